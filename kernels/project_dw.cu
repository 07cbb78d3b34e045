// Gradients of the weights of a group of projections that read one x, in one launch: dW_i += dy_i^T x.
//
// Shapes: dy_i (k, m_i), x (k, n) bf16, dW_i (m_i, n) f32; m_i = 0 where there is none; k tokens.
// Defines: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES.
// Numerics: products are summed in f32 in one chain per element along k, whatever the shape and the tile; the finished sum is added to
// dW once.
// Method: common/product.cuh. A block finds its projection by its row of tiles.
// Needs: k > 0; n, m_i multiples of 8; n and m_i times the tile below 2^32.
// Launch: a block of 32 WARPS_M WARPS_N threads per tile, in one dimension; dynamic shared memory of 2 STAGES (BLOCK_M + BLOCK_N) 64 bytes.
// Cost: 2 k n (sum of m_i) flops; dW read and written.
// Test: tests/common/projections.rs, on every device.
#define A_K_MAJOR 0
#define B_K_MAJOR 0
#include "common/product.cuh"
#include "common/elements.cuh"
#include "common/group.cuh"

using LoaderA = Loader<bf16, BLOCK_M, false, true, THREADS>;
using LoaderB = Loader<bf16, BLOCK_N, false, true, THREADS>;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    project_dw(float *__restrict__ dw0, float *__restrict__ dw1, float *__restrict__ dw2, const bf16 *__restrict__ dy0,
               const bf16 *__restrict__ dy1, const bf16 *__restrict__ dy2, const bf16 *__restrict__ x, u32 m0, u32 m1, u32 m2, u32 n,
               u32 k) {
    extern __shared__ __align__(128) unsigned char shared[];
    // Worked out once more behind the loop: kept over it, it would cost registers that the loop wants.
    auto part_of_group = [&] {
        u32 block = blockIdx.x;
        keep(block);
        return WeightPart<TilePlace>(block, m0, m1, m2, n);
    };
    {
        const u32 tiles = (k + BLOCK_K - 1) / BLOCK_K;
        const WeightPart<TilePlace> of = part_of_group();
        Operands<LoaderA, LoaderB> from{LoaderA(pick(of.group, dy0, dy1, dy2), of.m, of.row, of.m), LoaderB(x, n, of.column, n),
                                        k - (tiles - 1) * BLOCK_K};
        const WarpPart part;
        Sums sums = {};
        start(shared, tiles, from);
        run(sums, shared, tiles, from, part);
        stage(shared, sums, part);
    }
    const WeightPart<TilePlace> of = part_of_group();
    float *dw = pick(of.group, dw0, dw1, dw2);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < BLOCK_M * BLOCK_N / 8; i += THREADS) {
        const u32 r = i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8, row = of.row + r, j = of.column + column;
        if (row >= of.m || j >= n) continue;
        float sum[8];
        load8(sum, staged(shared, r, column));
        accumulate8(dw + u64(row) * n + j, sum);
    }
}
