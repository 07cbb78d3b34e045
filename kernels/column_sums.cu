// Sums of columns, for the gradient of a bias: db[j] += sum over rows i of dy[i][j]. The last pass also ends the gradient of a norm.
//
// Shapes: dy (rows, cols), db (1, cols) f32, partial (strips, cols) f32. Defines: SRC_T in {float, bf16}.
// Numerics: f32; strips of STRIP rows from the first row to the last, the strips in order, the whole added to db once.
// Launch: column_sums ceil(cols / THREADS) blocks a strip, a thread per column; then column_sums_add ceil(cols / THREADS) blocks.
// Cost: rows cols (size of SRC_T) bytes.
// Test: tests/common/elementwise.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256, STRIP = 512;

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(float *__restrict__ partial, const SRC_T *__restrict__ dy, u32 rows, u32 cols) {
    const u32 blocks = (cols + THREADS - 1) / THREADS;
    const u32 strip = blockIdx.x / blocks, j = blockIdx.x % blocks * THREADS + threadIdx.x;
    if (j >= cols) return;
    const u32 end = min(rows, (strip + 1) * STRIP);
    float sum = 0.0f;
    for (u32 i = strip * STRIP; i < end; i++) sum += to_f32(dy[u64(i) * cols + j]);
    partial[u64(strip) * cols + j] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums_add(float *__restrict__ db, const float *__restrict__ partial, u32 strips, u32 cols) {
    const u32 j = blockIdx.x * THREADS + threadIdx.x;
    if (j >= cols) return;
    float sum = 0.0f;
    for (u32 s = 0; s < strips; s++) sum += partial[u64(s) * cols + j];
    db[j] += sum;
}
