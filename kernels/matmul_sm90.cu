// Product of matrices on Hopper's tensor cores: C = or += alpha op(A, B), bf16 operands. Compiled for sm_90a alone.
//
// op: NT (C = A B^T), NN (C = A B) or TN (C = A^T B), named by which operands are k-major; see common/tile.cuh.
// Shapes: C (m, n), k steps. The maps describe A and B as they lie in memory, in boxes of 64 elements by BLOCK_M or BLOCK_N rows where k
// runs along the rows, else by 64 rows.
// Defines: A_K_MAJOR, B_K_MAJOR in {0, 1}; BLOCK_N in {64, 128, 256}; STAGES.
// Numerics: products are summed in f32 along k, 16 steps at a time in order, in one chain per element whatever the shape and the tile;
// the product with alpha and the sum with C are f32 operations of their own, one rounding of what is stored.
// Method: common/warpgroup.cuh.
// Needs: m, n, k > 0; addresses and strides of A and B multiples of 16 bytes.
// Launch: at most a block of 384 threads per tile, in one dimension; dynamic shared memory as common/warpgroup.cuh says.
// Cost: 2 m n k flops; at least 2 (m k + k n) bytes read and m n elements of C written (and read, where added to).
// Test: tests/cuda/hopper.rs.
#include "common/warpgroup.cuh"
#include "common/elements.cuh"

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    matmul_sm90(void *__restrict__ c, const __grid_constant__ TensorMap a, const __grid_constant__ TensorMap b, u32 m, u32 n, u32 k,
                float alpha, u32 c_is_bf16, u32 add) {
    extern __shared__ unsigned char space[];
    const u32 tiles_m = (m + BLOCK_M - 1) / BLOCK_M, tiles_n = (n + BLOCK_N - 1) / BLOCK_N, steps = tiles_of(k);
    Buffers buffers(space);
    if (copies()) {
        give_registers<40>();
        if (copies_alone()) {
            for (u32 tile = first_tile(); tile < places_of(tiles_m, tiles_n); tile += tiles_further()) {
                const BlockPlace place(tile, tiles_m, tiles_n);
                buffers.copy_term(a, place.m * BLOCK_M, b, place.n * BLOCK_N, steps);
            }
        }
        leave();
        return;
    }
    take_registers<232>();
    const Multiplier mine(buffers, space);
    for (u32 tile = first_tile(); tile < places_of(tiles_m, tiles_n); tile += tiles_further()) {
        WarpgroupSums<BLOCK_N> sums;
        mine.run(sums, buffers, steps, 0);
        const BlockPlace place(tile, tiles_m, tiles_n);
        const u32 first_row = place.m * BLOCK_M + mine.warp * 16, first_column = place.n * BLOCK_N;
#pragma unroll
        for (int p = 0; p < BLOCK_N / STAGED_COLUMNS; p++) {
            mine.write([&](int i) { return sums[p * (STAGED_COLUMNS / 2) + i]; },
                       [&](u32 r, u32 column, const float(&sum)[8]) {
                           const u32 row = first_row + r, j = first_column + p * STAGED_COLUMNS + column;
                           if (row >= m || j >= n) return;
                           if (c_is_bf16) {
                               write8(static_cast<bf16 *>(c) + u64(row) * n, sum, alpha, add, j, n);
                           } else {
                               write8(static_cast<float *>(c) + u64(row) * n, sum, alpha, add, j, n);
                           }
                       });
        }
    }
    leave();
}
