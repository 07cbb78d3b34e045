// Projections of a group that reads one x on Hopper, forward, in one launch: project.cu by wgmma. Compiled for sm_90a alone.
//
//   PAIR 0   up to three of them, of widths n0, n1, n2 (0: none). y0 also takes a residual; the first `turned` of them are rotated.
//   PAIR 1   gate (0) and up (1), both n0 wide, and act = silu(gate) up
//
// Shapes: x (m, k), w (n, k), y, residual, act (m, n) bf16; bias (1, n) bf16 or null; t (m, rank), b (n, rank) bf16: t holds the factor
// of the low-rank update already (lora.cu); bit i of `updated` says whether projection i has one. table, positions as for rope.cu. Maps of
// x and t in boxes of BLOCK_M rows, of w and b of BLOCK_N, of a pair's half as many.
// Defines: PAIR in {0, 1}; DIM, the width of a head where some are rotated, else 0; BLOCK_N in {64, 128, 256}, not 64 of a pair; STAGES.
// Numerics: products are summed in f32 in one chain per element, t B^T first, then along k, whatever the shape and the tile; bias,
// rotation, silu and residual follow in f32, in this order, each an operation of its own or a fused one that is spelled out; one
// rounding of what is stored. act is of unrounded gate and up.
// Method: common/warpgroup.cuh. Whole heads lie in a tile, and both halves of one, or gate and up, in the same thread.
// Needs: m, k > 0; k, n, rank multiples of 8; DIM a multiple of 16, at most BLOCK_N.
// Launch: at most a block of 384 threads per tile, in one dimension; dynamic shared memory as common/warpgroup.cuh says.
// Cost: 2 m (k + rank) n flops; 2 (m k + k n) bytes read and 2 m n written at least, residual read.
// Test: tests/common/projections.rs, by tests/cuda/hopper.rs.
#define A_K_MAJOR 1
#define B_K_MAJOR 1
#include "common/warpgroup.cuh"
#include "common/elements.cuh"

constexpr int HALF = BLOCK_N / 2;
constexpr u32 STEP = PAIR ? HALF : DIM ? BLOCK_N / (DIM ? DIM : 1) * DIM : BLOCK_N; // columns of C in a tile
constexpr u32 BOTH = PAIR ? 2 : 1;                                                                // updates of a tile at most
constexpr u32 BEYOND = 1u << 30;                                                                  // a row that no matrix has
static_assert(!PAIR || (HALF >= STAGED_COLUMNS && !DIM), "a pair's halves are staged apart");
static_assert(DIM % 16 == 0 && STEP > 0, "a tile holds whole heads");

// A tile of the group: of which projection, its width, and its first row and column.
struct Part {
    u32 group, n, row, column;

    __device__ __forceinline__ Part(u32 tile, u32 tiles_m, u32 n0, u32 n1, u32 n2) {
        const u32 tiles0 = (n0 + STEP - 1) / STEP, tiles1 = PAIR ? 0 : (n1 + STEP - 1) / STEP, tiles2 = PAIR ? 0 : (n2 + STEP - 1) / STEP;
        const BlockPlace place(tile, tiles_m, tiles0 + tiles1 + tiles2);
        group = PAIR || place.n < tiles0 ? 0 : place.n < tiles0 + tiles1 ? 1 : 2;
        n = pick(group, n0, n1, n2);
        row = place.m * BLOCK_M, column = (place.n - pick(group, 0u, tiles0, tiles0 + tiles1)) * STEP;
    }
};

// Two neighbours.
__device__ __forceinline__ float2 load2(const bf16 *p) {
    const u32 v = *reinterpret_cast<const u32 *>(p);
    return make_float2(__uint_as_float(v << 16), __uint_as_float(v & 0xffff0000u));
}

// sums += bias over COUNT columns from `first` of the sums on, which are those from `column` on of the n that there are.
template <int COUNT> __device__ __forceinline__ void add_bias(float *sums, const bf16 *bias, u32 column, u32 n, u32 lane) {
    if (!bias) return;
#pragma unroll
    for (int j = 0; j < COUNT / 8; j++) {
        if (column + j * 8 >= n) continue;
        const float2 b = load2(bias + column + j * 8 + lane % 4 * 2);
#pragma unroll
        for (int i = 0; i < 4; i++) sums[4 * j + i] = __fadd_rn(sums[4 * j + i], i % 2 ? b.y : b.x);
    }
}

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    project_sm90(bf16 *__restrict__ y0, bf16 *__restrict__ y1, bf16 *__restrict__ y2, bf16 *__restrict__ act,
                 const __grid_constant__ TensorMap x, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1,
                 const __grid_constant__ TensorMap w2, const __grid_constant__ TensorMap t0, const __grid_constant__ TensorMap t1,
                 const __grid_constant__ TensorMap t2, const __grid_constant__ TensorMap b0, const __grid_constant__ TensorMap b1,
                 const __grid_constant__ TensorMap b2, const bf16 *__restrict__ bias0, const bf16 *__restrict__ bias1,
                 const bf16 *__restrict__ bias2, const bf16 *__restrict__ residual, const float *__restrict__ table,
                 const int *__restrict__ positions, u32 m, u32 n0, u32 n1, u32 n2, u32 k, u32 rank, u32 updated, u32 turned) {
    extern __shared__ unsigned char space[];
    const u32 tiles_m = (m + BLOCK_M - 1) / BLOCK_M, steps = tiles_of(k), parts = tiles_of(rank);
    const u32 tiles = places_of(tiles_m, (n0 + STEP - 1) / STEP + (PAIR ? 0 : (n1 + STEP - 1) / STEP + (n2 + STEP - 1) / STEP));
    Buffers buffers(space);
    if (copies()) {
        give_registers<40>();
        if (copies_alone()) {
            for (u32 tile = first_tile(); tile < tiles; tile += tiles_further()) {
                const Part part(tile, tiles_m, n0, n1, n2);
#if !PAIR
                const TensorMap &w = part.group == 0 ? w0 : part.group == 1 ? w1 : w2;
#endif
                for (u32 which = part.group; which < part.group + BOTH; which++) {
                    if (!(updated >> which & 1)) continue;
                    const TensorMap &t = which == 0 ? t0 : which == 1 ? t1 : t2, &b = which == 0 ? b0 : which == 1 ? b1 : b2;
#if PAIR
                    buffers.copy_term(t, part.row, parts, [&](u32 k) {
                        // Rows beyond b, which are zeros, for the columns that are not this one's.
                        buffers.copy_b<HALF>(b, which == 0 ? part.column : BEYOND, k);
                        buffers.copy_b<HALF>(b, which == 1 ? part.column : BEYOND, k, HALF * BLOCK_K * 2);
                    });
#else
                    buffers.copy_term(t, part.row, b, part.column, parts);
#endif
                }
#if PAIR
                buffers.copy_term(x, part.row, steps, [&](u32 k) {
                    buffers.copy_b<HALF>(w0, part.column, k);
                    buffers.copy_b<HALF>(w1, part.column, k, HALF * BLOCK_K * 2);
                });
#else
                buffers.copy_term(x, part.row, w, part.column, steps);
#endif
            }
        }
        leave();
        return;
    }
    take_registers<232>();
    const Multiplier mine(buffers, space);
    const u32 lane = mine.lane;
    for (u32 tile = first_tile(); tile < tiles; tile += tiles_further()) {
        WarpgroupSums<BLOCK_N> sums;
        {
            const Part part(tile, tiles_m, n0, n1, n2);
            const u32 updates = __popc(updated >> part.group & ((1 << BOTH) - 1));
            if (updates) {
#pragma unroll
                for (int i = 0; i < BLOCK_N / 2; i++) sums[i] = 0.0f;
            }
#pragma unroll 1
            for (u32 i = 0; i < updates * parts; i++) {
                mine.wait(buffers);
                mine.some<true>(sums, buffers, rank - i % parts * BLOCK_K);
                mine.give_back(buffers);
            }
            mine.run(sums, buffers, steps, updates);
        }
        const Part part(tile, tiles_m, n0, n1, n2);
        const u32 first_row = part.row + mine.warp * 16, n = part.n;
#if PAIR
        add_bias<HALF>(sums, bias0, part.column, n, lane);
        add_bias<HALF>(sums + HALF / 2, bias1, part.column, n, lane);
        // Gate, up, act.
        auto store_to = [&](bf16 *y, int p) {
            return [=](u32 r, u32 column, const float(&eight)[8]) {
                const u32 row = first_row + r, j = part.column + p * STAGED_COLUMNS + column;
                if (row < m && j < n) store8(y + u64(row) * n + j, eight);
            };
        };
#pragma unroll
        for (int p = 0; p < HALF / STAGED_COLUMNS; p++) {
            const float *gate = sums + p * (STAGED_COLUMNS / 2), *up = gate + HALF / 2;
            mine.write([&](int i) { return gate[i]; }, store_to(y0, p));
            mine.write([&](int i) { return up[i]; }, store_to(y1, p));
            mine.write([&](int i) { return swiglu(gate[i], up[i]); }, store_to(act, p));
        }
#else
        add_bias<BLOCK_N>(sums, pick(part.group, bias0, bias1, bias2), part.column, n, lane);
#if DIM
        if (part.group < turned) {
            // This thread's rows: lane / 4 and eight below.
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 row = first_row + lane / 4 + h * 8;
                const float *angles = table + u64(u32(row < m ? positions[row] : 0)) * DIM + lane % 4 * 2;
#pragma unroll
                for (int p = 0; p < DIM / 16; p++) {
                    const float2 cosine = *reinterpret_cast<const float2 *>(angles + p * 8);
                    const float2 sine = *reinterpret_cast<const float2 *>(angles + p * 8 + DIM / 2);
#pragma unroll
                    for (int head = 0; head < STEP / DIM; head++) {
                        const int lo = (head * DIM / 8 + p) * 4 + h * 2, hi = lo + DIM / 16 * 4;
                        rotate(sums[lo], sums[hi], cosine.x, sine.x);
                        rotate(sums[lo + 1], sums[hi + 1], cosine.y, sine.y);
                    }
                }
            }
        }
#endif
        bf16 *y = pick(part.group, y0, y1, y2);
        const bf16 *onto = part.group == 0 ? residual : nullptr;
#pragma unroll
        for (int p = 0; p < BLOCK_N / STAGED_COLUMNS; p++) {
            mine.write([&](int i) { return sums[p * (STAGED_COLUMNS / 2) + i]; },
                       [&](u32 r, u32 column, float(&eight)[8]) {
                           const u32 row = first_row + r, at = p * STAGED_COLUMNS + column, j = part.column + at;
                           if (row >= m || j >= n || at >= STEP) return;
                           if (onto) {
                               float more[8];
                               load8(more, onto + u64(row) * n + j);
#pragma unroll
                               for (int e = 0; e < 8; e++) eight[e] = __fadd_rn(eight[e], more[e]);
                           }
                           store8(y + u64(row) * n + j, eight);
                       });
        }
#endif
    }
    leave();
}
