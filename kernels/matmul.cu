// Product of matrices on tensor cores: C = or += alpha op(A, B), operands multiplied as bf16.
//
// op: NT (C = A B^T), NN (C = A B) or TN (C = A^T B), named by which operands are k-major; see common/tile.cuh.
// Shapes: C (m, n), k steps; rows lie one after the other (stride_a, stride_b elements apart; C n).
// Defines: A_T, B_T in {float, bf16}, not both float; A_K_MAJOR, B_K_MAJOR in {0, 1}; BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES;
// ALIGNED = 1 where strides are multiples of 8 (and k where an operand is k-major), else 0.
// Numerics: f32 operands are rounded to bf16 when they are read; products are summed in f32 along k in one chain per element,
// whatever the shape and the tile; alpha and the sum with C in f32, one rounding of what is stored.
// Method: tiles through STAGES buffers in shared memory, one barrier a tile; bf16 arrives by cp.async in 16-byte pieces, anything
// else through registers. Fragments of the next 16 steps are read while those of these multiply. The result goes through shared
// memory, so that C is read and written in 16-byte pieces.
// Needs: m, n, k > 0; strides times the tile below 2^32.
// Launch: one block of 32 WARPS_M WARPS_N threads per tile of C, in one dimension; dynamic shared memory of
// 2 STAGES (BLOCK_M + BLOCK_N) BLOCK_K bytes.
// Cost: 2 m n k flops; at least 2 (m k + k n) bytes read and m n elements of C written (and read, where added to).
// Test: tests/common/products.rs, on every device.
#include "common/types.cuh"
#include "common/tile.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
constexpr int MT = WARP_M / 16, NT = WARP_N / 8, K_STEPS = BLOCK_K / 16;
constexpr int TILE_A = BLOCK_M * BLOCK_K * 2, TILE = TILE_A + BLOCK_N * BLOCK_K * 2;
// Rows of the staged result are 8 floats longer than they are: the lanes of a fragment then write to different banks.
constexpr int STAGED = WARP_N + 8;
static_assert(WARP_M == 32 || WARP_M == 64, "fragments of A");
static_assert(WARP_N == 32 || WARP_N == 64, "fragments of B");
static_assert(STAGES >= 2, "one buffer is read while the next is filled");
static_assert(WARPS_M * WARPS_N * 16 * STAGED * 4 <= STAGES * TILE, "the staged result fits the buffers");

using LoaderA = Loader<A_T, BLOCK_M, A_K_MAJOR, ALIGNED, THREADS>;
using LoaderB = Loader<B_T, BLOCK_N, B_K_MAJOR, ALIGNED, THREADS>;

// Eight elements of a row of C from column j on.
template <typename T>
__device__ __forceinline__ void write8(T *c, const float (&sum)[8], float alpha, u32 add, u32 j, u32 n) {
    if (n % 8 == 0) {
        float x[8] = {};
        if (add) load8(x, c + j);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = fmaf(alpha, sum[e], x[e]);
        store8(c + j, x);
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (j + e < n) put(c[j + e], fmaf(alpha, sum[e], add ? to_f32(c[j + e]) : 0.0f));
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    matmul(void *__restrict__ c, const A_T *__restrict__ a, const B_T *__restrict__ b, u32 m, u32 n, u32 k, u32 stride_a,
           u32 stride_b, float alpha, u32 c_is_bf16, u32 add) {
    extern __shared__ __align__(128) unsigned char shared[];
    const u32 warp = threadIdx.x / 32, warp_m = warp / WARPS_N * WARP_M, warp_n = warp % WARPS_N * WARP_N;
    const TilePlace place(blockIdx.x, (m + BLOCK_M - 1) / BLOCK_M, (n + BLOCK_N - 1) / BLOCK_N);
    const u32 tiles = (k + BLOCK_K - 1) / BLOCK_K;

    LoaderA load_a(a, stride_a, place.m * BLOCK_M, m);
    LoaderB load_b(b, stride_b, place.n * BLOCK_N, n);
    const Fragments<WARP_M, A_K_MAJOR, true> read_a(warp_m);
    const Fragments<WARP_N, B_K_MAJOR, false> read_b(warp_n);

    const u32 remainder = k - (tiles - 1) * BLOCK_K;
    load_a.load<true>(shared, remainder);
    load_b.load<true>(shared + TILE_A, remainder);
    cp_async_commit();
#pragma unroll
    for (int s = 1; s < STAGES - 1; s++) {
        if (s < tiles) {
            load_a.load<false>(shared + s * TILE, BLOCK_K);
            load_b.load<false>(shared + s * TILE + TILE_A, BLOCK_K);
        }
        cp_async_commit();
    }

    float acc[MT][NT][4] = {};
    u32 frag_a[2][MT][4], frag_b[2][NT / 2][4];
    const u32 first_tile = shared_address(shared);
    auto read = [&](int which, u32 tile, int step) {
#pragma unroll
        for (int i = 0; i < MT; i++) read_a.read(frag_a[which][i], tile, i, step);
#pragma unroll
        for (int j = 0; j < NT / 2; j++) read_b.read(frag_b[which][j], tile + TILE_A, j, step);
    };
    cp_async_wait<STAGES - 2>();
    __syncthreads();
    read(0, first_tile, 0);

    u32 reading = 0, filling = (STAGES - 1) * TILE; // offsets of tiles
#pragma unroll 1
    for (u32 t = 0; t < tiles; t++) {
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            const u32 tile = first_tile + reading;
            if (step < K_STEPS - 1) {
                read((step + 1) % 2, tile, step + 1);
            } else {
                // The next tile has arrived for all; nobody reads this one any more, so its buffer is filled next.
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                reading = reading == (STAGES - 1) * TILE ? 0 : reading + TILE;
                if (t + 1 < tiles) read((step + 1) % 2, first_tile + reading, 0);
            }
            // The next load is spread over two steps: fewer addresses are alive at once.
            if (step == 0 && t + STAGES - 1 < tiles) load_a.load<false>(shared + filling, BLOCK_K);
            if (step == 1) {
                if (t + STAGES - 1 < tiles) load_b.load<false>(shared + filling + TILE_A, BLOCK_K);
                cp_async_commit();
                filling = filling == (STAGES - 1) * TILE ? 0 : filling + TILE;
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
#pragma unroll
                for (int jj = 0; jj < NT; jj++) {
                    // Back and forth, so that neighbouring instructions share an operand.
                    const int j = i % 2 == 0 ? jj : NT - 1 - jj;
                    const u32(&f)[4] = frag_b[step % 2][j / 2];
                    mma_16816(acc[i][j], frag_a[step % 2][i], f[j % 2 * 2], f[j % 2 * 2 + 1]);
                }
            }
        }
    }

    // The last barrier of the loop lies behind every read of the buffers: they now stage the result, a part for each warp.
    float *staged = reinterpret_cast<float *>(shared) + warp * 16 * STAGED;
    const u32 lane = threadIdx.x % 32;
    constexpr int LANES = WARP_N / 8; // to a row
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int j = 0; j < NT; j++) {
            float *at = staged + lane / 4 * STAGED + j * 8 + lane % 4 * 2;
            *reinterpret_cast<float2 *>(at) = make_float2(acc[i][j][0], acc[i][j][1]);
            *reinterpret_cast<float2 *>(at + 8 * STAGED) = make_float2(acc[i][j][2], acc[i][j][3]);
        }
        __syncwarp();
#pragma unroll 1
        for (int pass = 0; pass < 16 * LANES / 32; pass++) {
            const u32 r = pass * (32 / LANES) + lane / LANES, column = lane % LANES * 8;
            const u32 row = place.m * BLOCK_M + warp_m + i * 16 + r, j = place.n * BLOCK_N + warp_n + column;
            if (row < m && j < n) {
                float sum[8];
                load8(sum, staged + r * STAGED + column);
                if (c_is_bf16) {
                    write8(static_cast<bf16 *>(c) + u64(row) * n, sum, alpha, add, j, n);
                } else {
                    write8(static_cast<float *>(c) + u64(row) * n, sum, alpha, add, j, n);
                }
            }
        }
        __syncwarp();
    }
}
