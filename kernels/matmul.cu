// Product of matrices on tensor cores: C = or += alpha op(A, B), operands multiplied as bf16.
//
// op: NT (C = A B^T), NN (C = A B) or TN (C = A^T B), named by which operands are k-major; see common/tile.cuh.
// Shapes: C (m, n), k steps; rows lie one after the other (stride_a, stride_b elements apart; C n).
// Defines: A_T, B_T in {float, bf16}, not both float; A_K_MAJOR, B_K_MAJOR in {0, 1}; BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES;
// ALIGNED = 1 where strides are multiples of 8 (and k where an operand is k-major), else 0.
// Numerics: f32 operands are rounded to bf16 when they are read; products are summed in f32 along k in one chain per element,
// whatever the shape and the tile; the product with alpha and the sum with C are f32 operations of their own (never one fused, which
// compilers choose as they like), one rounding of what is stored.
// Method: common/product.cuh; bf16 arrives by cp.async in 16-byte pieces, anything else through registers. C is read and written in
// 16-byte pieces.
// Needs: m, n, k > 0; strides times the tile below 2^32.
// Launch: one block of 32 WARPS_M WARPS_N threads per tile of C, in one dimension; dynamic shared memory of
// 2 STAGES (BLOCK_M + BLOCK_N) BLOCK_K bytes.
// Cost: 2 m n k flops; at least 2 (m k + k n) bytes read and m n elements of C written (and read, where added to).
// Test: tests/common/products.rs, on every device.
#include "common/product.cuh"
#include "common/elements.cuh"

using LoaderA = Loader<A_T, BLOCK_M, A_K_MAJOR, ALIGNED, THREADS>;
using LoaderB = Loader<B_T, BLOCK_N, B_K_MAJOR, ALIGNED, THREADS>;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    matmul(void *__restrict__ c, const A_T *__restrict__ a, const B_T *__restrict__ b, u32 m, u32 n, u32 k, u32 stride_a,
           u32 stride_b, float alpha, u32 c_is_bf16, u32 add) {
    extern __shared__ __align__(128) unsigned char shared[];
    const TilePlace place(blockIdx.x, (m + BLOCK_M - 1) / BLOCK_M, (n + BLOCK_N - 1) / BLOCK_N);
    const u32 tiles = (k + BLOCK_K - 1) / BLOCK_K, first_row = place.m * BLOCK_M, first_column = place.n * BLOCK_N;
    Operands<LoaderA, LoaderB> from{LoaderA(a, stride_a, first_row, m), LoaderB(b, stride_b, first_column, n), k - (tiles - 1) * BLOCK_K};
    const WarpPart part;
    Sums sums = {};
    start(shared, tiles, from);
    run(sums, shared, tiles, from, part);
    stage(shared, sums, part);

#pragma unroll 1
    for (u32 i = threadIdx.x; i < BLOCK_M * BLOCK_N / 8; i += THREADS) {
        const u32 r = i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8;
        const u32 row = first_row + r, j = first_column + column;
        if (row >= m || j >= n) continue;
        float sum[8];
        load8(sum, staged(shared, r, column));
        if (c_is_bf16) {
            write8(static_cast<bf16 *>(c) + u64(row) * n, sum, alpha, add, j, n);
        } else {
            write8(static_cast<float *>(c) + u64(row) * n, sum, alpha, add, j, n);
        }
    }
}
