// Projections of a group that reads one x, forward, in one launch: y_i = x W_i^T + t_i B_i^T + bias_i, and what follows each at once.
//
//   PAIR 0   up to three of them, of widths n0, n1, n2 (0: none). y0 also takes a residual; the first `turned` of them are rotated.
//   PAIR 1   gate (0) and up (1), both n0 wide, and act = silu(gate) up
//
// Shapes: x (m, k), w (n, k), y, residual, act (m, n) bf16; bias (1, n) bf16 or null; t (m, rank), b (n, rank) bf16 or null: t holds the
// factor of the low-rank update already (lora.cu). table, positions as for rope.cu, `dim` the width of a head, both halves of which lie
// in a tile: `width` columns of C to a tile are the most whole heads (BLOCK_N of them without rotation).
// Defines: PAIR in {0, 1}; BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES.
// Numerics: products are summed in f32 in one chain per element, t B^T first, then along k, whatever the shape and the tile; bias,
// rotation, silu and residual follow in f32, in this order, each an operation of its own or a fused one that is spelled out; one
// rounding of what is stored. act is of unrounded gate and up.
// Method: common/product.cuh. A block finds its projection by its tile. The update passes through the one buffer that the loop fills last,
// in rank / 16 steps. In a pair half of a tile's columns are gate's and half up's.
// Needs: m, k > 0; k, n, rank multiples of 8; k times the tile below 2^32; with rotation dim a multiple of 16, at most BLOCK_N.
// Launch: a block of 32 WARPS_M WARPS_N threads per tile, in one dimension; dynamic shared memory of 2 STAGES (BLOCK_M + BLOCK_N) 64 bytes.
// Cost: 2 m (k + rank) n flops; 2 (m k + k n) bytes read and 2 m n written at least, residual read.
// Test: tests/common/projections.rs, on every device.
#define A_K_MAJOR 1
#define B_K_MAJOR 1
#include "common/product.cuh"
#include "common/elements.cuh"

constexpr int HALF = BLOCK_N / 2;
using LoaderA = Loader<bf16, BLOCK_M, true, true, THREADS>;
using LoaderHalf = Loader<bf16, HALF, true, true, THREADS>;

// The weights' part of a tile: rows of one of them, or half of it of each of a pair.
#if PAIR
struct LoaderB {
    LoaderHalf gate, up;

    template <bool First> __device__ __forceinline__ void load(unsigned char *tile, u32 k_valid) {
        gate.load<First>(tile, k_valid);
        up.load<First>(tile + HALF * BLOCK_K * 2, k_valid);
    }
};
#else
using LoaderB = Loader<bf16, BLOCK_N, true, true, THREADS>;
#endif

// x += eight neighbours, where there are some.
__device__ __forceinline__ void add8(float (&x)[8], const bf16 *p, u64 at) {
    if (!p) return;
    float y[8];
    load8(y, p + at);
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] = __fadd_rn(x[e], y[e]);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    project(bf16 *__restrict__ y0, bf16 *__restrict__ y1, bf16 *__restrict__ y2, bf16 *__restrict__ act, const bf16 *__restrict__ x,
            const bf16 *__restrict__ w0, const bf16 *__restrict__ w1, const bf16 *__restrict__ w2, const bf16 *__restrict__ bias0,
            const bf16 *__restrict__ bias1, const bf16 *__restrict__ bias2, const bf16 *__restrict__ t0,
            const bf16 *__restrict__ t1, const bf16 *__restrict__ t2, const bf16 *__restrict__ b0, const bf16 *__restrict__ b1,
            const bf16 *__restrict__ b2, const bf16 *__restrict__ residual, const float *__restrict__ table,
            const int *__restrict__ positions, u32 m, u32 n0, u32 n1, u32 n2, u32 k, u32 rank, u32 width, u32 dim, u32 turned) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 step = PAIR ? HALF : width;
    const u32 tiles0 = (n0 + step - 1) / step, tiles1 = PAIR ? 0 : (n1 + step - 1) / step, tiles2 = PAIR ? 0 : (n2 + step - 1) / step;
    const TilePlace place(blockIdx.x, (m + BLOCK_M - 1) / BLOCK_M, tiles0 + tiles1 + tiles2);
    const u32 group = PAIR || place.n < tiles0 ? 0 : place.n < tiles0 + tiles1 ? 1 : 2;
    const u32 first_row = place.m * BLOCK_M, first_column = (place.n - pick(group, 0u, tiles0, tiles0 + tiles1)) * step;
    const u32 n = pick(group, n0, n1, n2), tiles = (k + BLOCK_K - 1) / BLOCK_K;
    const WarpPart part;
    Sums sums = {};

    // The update, up to 64 steps of its k at a time; a pair's one after the other.
    const u32 parts = (rank + BLOCK_K - 1) / BLOCK_K;
    unsigned char *last = shared + (STAGES - 1) * TILE;
    auto update = [&](u32 i) { return PAIR ? i / parts : group; };
    auto load_update = [&](u32 i) {
        const u32 which = update(i), at = i % parts * BLOCK_K, valid = min(rank - at, u32(BLOCK_K));
        const bf16 *t = pick(which, t0, t1, t2), *b = pick(which, b0, b1, b2);
        if (!t) return;
        LoaderA(t + at, rank, first_row, m).template load<true>(last, valid);
#if PAIR
        LoaderHalf(b + at, rank, first_column, n).template load<true>(last + TILE_A + which * (HALF * BLOCK_K * 2), valid);
#else
        LoaderB(b + at, rank, first_column, n).template load<true>(last + TILE_A, valid);
#endif
    };
    const u32 updates = PAIR ? 2 * parts : parts;
    if (updates > 0) load_update(0);
    cp_async_commit();

#if PAIR
    Operands<LoaderA, LoaderB> from{LoaderA(x, k, first_row, m), {LoaderHalf(w0, k, first_column, n), LoaderHalf(w1, k, first_column, n)},
                  k - (tiles - 1) * BLOCK_K};
#else
    Operands<LoaderA, LoaderB> from{LoaderA(x, k, first_row, m), LoaderB(pick(group, w0, w1, w2), k, first_column, n), k - (tiles - 1) * BLOCK_K};
#endif
    start(shared, tiles, from);

#pragma unroll 1
    for (u32 i = 0; i < updates; i++) {
        if (i == 0) {
            cp_async_wait<STAGES - 1>();
        } else {
            __syncthreads();
            load_update(i);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
        const u32 which = update(i), steps = (min(rank - i % parts * BLOCK_K, u32(BLOCK_K)) + 15) / 16;
        if (!pick(which, t0, t1, t2) || (PAIR && part.n / HALF != which)) continue;
#pragma unroll 1
        for (u32 s = 0; s < steps; s++) {
            u32 fa[MT][4], fb[NT / 2][4];
            part.read(fa, fb, shared_address(last), s);
            multiply(sums, fa, fb);
        }
    }

    run(sums, shared, tiles, from, part);
    stage(shared, sums, part);

    // Eight columns at a time; of a pair, or of a head that is rotated, also the eight that they meet.
    bf16 *y = pick(group, y0, y1, y2);
    const bf16 *bias = pick(group, bias0, bias1, bias2);
    const bool turn = !PAIR && group < turned;
    const u32 apart = turn ? dim / 2 : HALF, pieces = (PAIR || turn ? step / (PAIR ? 8 : 16) : step / 8);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < BLOCK_M * pieces; i += THREADS) {
        const u32 r = i / pieces, piece = i % pieces * 8, row = first_row + r;
        const u32 column = turn ? piece / apart * dim + piece % apart : piece, j = first_column + column;
        if (row >= m || j >= n) continue;
        float lo[8], hi[8];
        load8(lo, staged(shared, r, column));
        add8(lo, bias, j);
        const u64 at = u64(row) * n + j;
        if (PAIR || turn) {
            load8(hi, staged(shared, r, column + apart));
            add8(hi, PAIR ? bias1 : bias, PAIR ? j : j + apart);
        }
        if (PAIR) {
            store8(y0 + at, lo);
            store8(y1 + at, hi);
#pragma unroll
            for (int e = 0; e < 8; e++) lo[e] = swiglu(lo[e], hi[e]);
            store8(act + at, lo);
        } else if (turn) {
            const float *angle = table + u64(u32(positions[row])) * dim + piece % apart;
            float cosine[8], sine[8];
            load8(cosine, angle);
            load8(sine, angle + apart);
#pragma unroll
            for (int e = 0; e < 8; e++) rotate(lo[e], hi[e], cosine[e], sine[e]);
            store8(y + at, lo);
            store8(y + at + apart, hi);
        } else {
            add8(lo, group == 0 ? residual : nullptr, at);
            store8(y + at, lo);
        }
    }
}
