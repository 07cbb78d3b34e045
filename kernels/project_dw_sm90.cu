// Gradients of the weights of a group of projections that read one x on Hopper, in one launch: project_dw.cu by wgmma. Compiled for sm_90a
// alone.
//
// Shapes: dy_i (k, m_i), x (k, n) bf16, dW_i (m_i, n) f32; m_i = 0 where there is none; k tokens. Maps in boxes of 64 rows.
// Defines: BLOCK_N in {64, 128, 256}; STAGES.
// Numerics: products are summed in f32 in one chain per element along k, whatever the shape and the tile; the finished sum is added to
// dW once.
// Method: common/warpgroup.cuh. A tile finds its projection by its row.
// Needs: k > 0; n, m_i multiples of 8.
// Launch: at most a block of 384 threads per tile, in one dimension; dynamic shared memory as common/warpgroup.cuh says.
// Cost: 2 k n (sum of m_i) flops; dW read and written.
// Test: tests/common/projections.rs, by tests/cuda/hopper.rs.
#define A_K_MAJOR 0
#define B_K_MAJOR 0
#include "common/warpgroup.cuh"
#include "common/elements.cuh"
#include "common/group.cuh"

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    project_dw_sm90(float *__restrict__ dw0, float *__restrict__ dw1, float *__restrict__ dw2, const __grid_constant__ TensorMap dy0,
                    const __grid_constant__ TensorMap dy1, const __grid_constant__ TensorMap dy2, const __grid_constant__ TensorMap x,
                    u32 m0, u32 m1, u32 m2, u32 n, u32 k) {
    extern __shared__ unsigned char space[];
    const u32 tiles = places_of(tiles_below(m0, m1, m2), (n + BLOCK_N - 1) / BLOCK_N), steps = tiles_of(k);
    Buffers buffers(space);
    if (copies()) {
        give_registers<40>();
        if (copies_alone()) {
            for (u32 tile = first_tile(); tile < tiles; tile += tiles_further()) {
                const WeightPart<BlockPlace> part(tile, m0, m1, m2, n);
                const TensorMap &dy = part.group == 0 ? dy0 : part.group == 1 ? dy1 : dy2;
                buffers.copy_term(dy, part.row, x, part.column, steps);
            }
        }
        leave();
        return;
    }
    take_registers<232>();
    const Multiplier mine(buffers, space);
    for (u32 tile = first_tile(); tile < tiles; tile += tiles_further()) {
        WarpgroupSums<BLOCK_N> sums;
        mine.run(sums, buffers, steps, 0);
        const WeightPart<BlockPlace> part(tile, m0, m1, m2, n);
        float *dw = pick(part.group, dw0, dw1, dw2);
#pragma unroll
        for (int p = 0; p < BLOCK_N / STAGED_COLUMNS; p++) {
            mine.write([&](int i) { return sums[p * (STAGED_COLUMNS / 2) + i]; },
                       [&](u32 r, u32 column, const float(&eight)[8]) {
                           const u32 row = part.row + mine.warp * 16 + r, j = part.column + p * STAGED_COLUMNS + column;
                           if (row < part.m && j < n) accumulate8(dw + u64(row) * n + j, eight);
                       });
        }
    }
    leave();
}
