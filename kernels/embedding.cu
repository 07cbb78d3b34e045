// Gradient of the token embedding: dw[tokens[i] - first_row] += dout[i], in order of i; tokens outside dw are skipped.
//
// Shapes: dout (n, cols), tokens and by_token n integers, dw (rows, cols) f32. by_token holds 0..n ordered by (token, row), so that
// equal tokens are neighbours: a run. Defines: DOUT_T in {float, bf16}.
// Numerics: f32, each run added to its row of dw term by term in order of i; no atomics, so the bits are the same run after run.
// Launch: ceil(cols / THREADS) blocks for each place in by_token; those that are not the first of a run return at once.
// Cost: n cols (size of DOUT_T) bytes read, 8 cols for each token that occurs.
// Test: tests/common/rows.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    embedding_backward(float *__restrict__ dw, const DOUT_T *__restrict__ dout, const int *__restrict__ tokens,
                       const int *__restrict__ by_token, u32 n, u32 cols, u32 first_row, u32 rows) {
    const u32 blocks = (cols + THREADS - 1) / THREADS;
    const u32 place = blockIdx.x / blocks, j = blockIdx.x % blocks * THREADS + threadIdx.x;
    const int token = tokens[by_token[place]];
    if (place > 0 && tokens[by_token[place - 1]] == token) return;
    // A token below first_row becomes a large number.
    const u32 row = u32(token) - first_row;
    if (row >= rows || j >= cols) return;
    float *to = dw + u64(row) * cols + j;
    float sum = *to;
    for (u32 p = place; p < n; p++) {
        const u32 i = by_token[p];
        if (tokens[i] != token) break;
        sum += to_f32(dout[u64(i) * cols + j]);
    }
    *to = sum;
}
