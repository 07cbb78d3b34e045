// Gradient of the input of a group of projections on Hopper, in one launch and one sum: project_dx.cu by wgmma. Compiled for sm_90a alone.
//
// dx = sum over i of drop_i(u_i A_i), then of dy_i W_i.
// Shapes: dx (m, n); dy_i (m, k_i), W_i (k_i, n), k_i = 0 where there is none; u_i (m, rank), A_i (rank, n); all bf16; `updates` of u and A,
// without gaps. u_i holds all factors already (lora.cu), so a mask is 0 or 1: element e of dx is dropped as dropout.cu
// would, by stream (si0 .. si3) and threshold; threshold 0: nothing is. Maps of dy and u in boxes of BLOCK_M rows, of W and A of 64.
// Defines: MASKS in {0, 1, 2, 3}, all of the updates with dropout, or 0 without; BLOCK_N in {64, 128, 256}, not 256 with dropout: the
// registers of a masked sum come on top; STAGES.
// Numerics: with dropout each u_i A_i is summed in f32, masked, and the masked sums are added in order, else they begin the chain; it
// goes on with the products, dy_0 W_0 first, along k; one rounding. Neither shape nor tile changes the order.
// Method: common/warpgroup.cuh. A masked update is formed 64 columns at a time, all its steps of rank being there; the lanes of a row draw
// each Philox block once.
// Needs: m > 0, k_0 > 0; n, k_i, rank multiples of 8; rank at most 64 (STAGES - 1) with dropout.
// Launch: at most a block of 384 threads per tile, in one dimension; dynamic shared memory as common/warpgroup.cuh says.
// Cost: 2 m n (sum of k_i + rank) flops; some 13 integer operations an element and update with dropout.
// Test: tests/common/projections.rs, by tests/cuda/hopper.rs.
#define A_K_MAJOR 1
#define B_K_MAJOR 0
#include "common/warpgroup.cuh"
#include "common/philox.cuh"

extern "C" __global__ void IN_CLUSTERS __launch_bounds__(THREADS, 1)
    project_dx_sm90(bf16 *__restrict__ dx, const __grid_constant__ TensorMap dy0, const __grid_constant__ TensorMap dy1,
                    const __grid_constant__ TensorMap dy2, const __grid_constant__ TensorMap w0, const __grid_constant__ TensorMap w1,
                    const __grid_constant__ TensorMap w2, const __grid_constant__ TensorMap u0, const __grid_constant__ TensorMap u1,
                    const __grid_constant__ TensorMap u2, const __grid_constant__ TensorMap a0, const __grid_constant__ TensorMap a1,
                    const __grid_constant__ TensorMap a2, u32 m, u32 n, u32 k0, u32 k1, u32 k2, u32 rank, u32 updates, u32 threshold,
                    u32 s00, u32 s01, u32 s02, u32 s03, u32 s10, u32 s11, u32 s12, u32 s13, u32 s20, u32 s21, u32 s22, u32 s23) {
    extern __shared__ unsigned char space[];
    const u32 tiles_m = (m + BLOCK_M - 1) / BLOCK_M, tiles_n = (n + BLOCK_N - 1) / BLOCK_N, parts = tiles_of(rank);
    Buffers buffers(space);
    if (copies()) {
        give_registers<40>();
        if (copies_alone()) {
            for (u32 tile = first_tile(); tile < places_of(tiles_m, tiles_n); tile += tiles_further()) {
                const BlockPlace place(tile, tiles_m, tiles_n);
                const u32 row = place.m * BLOCK_M, column = place.n * BLOCK_N;
#pragma unroll 1
                for (u32 i = 0; i < updates; i++) {
                    buffers.copy_term(i == 0 ? u0 : i == 1 ? u1 : u2, row, i == 0 ? a0 : i == 1 ? a1 : a2, column, parts);
                }
#pragma unroll 1
                for (u32 i = 0; i < 3; i++) {
                    buffers.copy_term(i == 0 ? dy0 : i == 1 ? dy1 : dy2, row, i == 0 ? w0 : i == 1 ? w1 : w2, column,
                                      tiles_of(pick(i, k0, k1, k2)));
                }
            }
        }
        leave();
        return;
    }
    take_registers<232>();
    const Multiplier mine(buffers, space);
    const u32 steps = tiles_of(k0) + tiles_of(k1) + tiles_of(k2);
    for (u32 tile = first_tile(); tile < places_of(tiles_m, tiles_n); tile += tiles_further()) {
        const BlockPlace place(tile, tiles_m, tiles_n);
        const u32 first_row = place.m * BLOCK_M + mine.warp * 16, first_column = place.n * BLOCK_N;
        WarpgroupSums<BLOCK_N> sums;
        if (MASKS || updates) {
#pragma unroll
            for (int i = 0; i < BLOCK_N / 2; i++) sums[i] = 0.0f;
        }
#if MASKS
        const u32 lane = mine.lane;
        WarpgroupSums<64> sum = {};
        // As many as the define says, not as an argument would: where paths with and without an update meet, ptxas holds the sums in other
        // registers, and then the products wait for each other (C7515).
#pragma unroll
        for (u32 i = 0; i < MASKS; i++) {
            const Stream stream{pick(i, s00, s10, s20), pick(i, s01, s11, s21), pick(i, s02, s12, s22), pick(i, s03, s13, s23)};
            mine.wait(buffers);
#pragma unroll
            for (int c = 0; c < BLOCK_N / 64; c++) {
                keep_sums(sums);
                mine.some<false>(sum, buffers, rank, c * PANEL);
                // Its other parts stand in the buffers behind, until all columns have had them.
                Buffers behind = buffers;
#pragma unroll 1
                for (u32 at = BLOCK_K; at < rank; at += BLOCK_K) {
                    behind.next();
                    mine.wait(behind);
                    mine.some<true>(sum, behind, rank - at, c * PANEL);
                }
#pragma unroll
                for (int part = 0; part < 4; part++) {
                    // Rows 8 h below this thread's, 32 columns. A lane draws for eight of them; then each has the words of its own.
                    const int h = part / 2, four = part % 2;
                    const u32 row = first_row + lane / 4 + h * 8, column = first_column + c * 64 + (four * 4 + lane % 4) * 8;
                    u32 words[4];
                    philox(words, (u64(row) * n + column) / 8, stream);
                    turn_words(words);
#pragma unroll
                    for (int j = 0; j < 4; j++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const int at = (four * 4 + j) * 4 + 2 * h + e;
                            const bool kept = (words[j] >> (16 * e) & 0xffffu) >= threshold;
                            sums[c * 32 + at] = __fadd_rn(sums[c * 32 + at], kept ? sum[at] : 0.0f);
                        }
                    }
                }
            }
#pragma unroll 1
            for (u32 at = 0; at < rank; at += BLOCK_K) mine.give_back(buffers);
        }
#else
#pragma unroll 1
        for (u32 i = 0; i < updates * parts; i++) {
            mine.wait(buffers);
            mine.some<true>(sums, buffers, rank - i % parts * BLOCK_K);
            mine.give_back(buffers);
        }
#endif
        keep_sums(sums);
        mine.run(sums, buffers, steps, MASKS ? 1 : updates);
#pragma unroll
        for (int p = 0; p < BLOCK_N / STAGED_COLUMNS; p++) {
            mine.write([&](int i) { return sums[p * (STAGED_COLUMNS / 2) + i]; },
                       [&](u32 r, u32 column, const float(&eight)[8]) {
                           const u32 row = first_row + r, j = first_column + p * STAGED_COLUMNS + column;
                           if (row < m && j < n) store8(dx + u64(row) * n + j, eight);
                       });
        }
    }
    leave();
}
