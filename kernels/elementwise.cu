// Sums: add dst[i] += src[i];  add_bias dst[i][j] += b[j] for every row.
//
// Shapes: add any, seen as n elements; add_bias (rows, cols). Defines: DST_T, SRC_T in {float, bf16}; VEC = 8 where cols is a multiple
// of 8, else 1 (add_bias alone asks).
// Numerics: the sum in f32, one rounding.
// Needs: pointers aligned to 16 bytes, as every tensor is.
// Launch: blocks of THREADS threads. add: 8 elements a thread, the grid covers n. add_bias: a row has ceil(cols / (THREADS VEC)) blocks.
// Cost: n (2 size of DST_T + size of SRC_T) bytes; add_bias 2 n size of DST_T.
// Test: tests/common/elementwise.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) add(DST_T *__restrict__ dst, const SRC_T *__restrict__ src, u64 n) {
    const u64 at = (u64(blockIdx.x) * THREADS + threadIdx.x) * 8;
    if (at + 8 <= n) {
        float x[8], y[8];
        load8(x, src + at);
        load8(y, dst + at);
#pragma unroll
        for (int i = 0; i < 8; i++) y[i] += x[i];
        store8(dst + at, y);
    } else {
        for (u64 i = at; i < n; i++) put(dst[i], to_f32(dst[i]) + to_f32(src[i]));
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) add_bias(DST_T *__restrict__ dst, const SRC_T *__restrict__ b, u32 cols) {
    const u32 blocks = (cols + THREADS * VEC - 1) / (THREADS * VEC);
    const u32 row = blockIdx.x / blocks, j = (blockIdx.x % blocks * THREADS + threadIdx.x) * VEC;
    if (j >= cols) return;
    DST_T *to = dst + u64(row) * cols + j;
    float x[VEC], y[VEC];
    load_vec<VEC>(x, b + j);
    load_vec<VEC>(y, to);
#pragma unroll
    for (int i = 0; i < VEC; i++) y[i] += x[i];
    store_vec<VEC>(to, y);
}
