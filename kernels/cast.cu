// Copy with conversion: dst[i] = src[i], rounded once to nearest even where dst is bf16.
//
// Shapes: any, seen as n elements. Defines: SRC_T, DST_T in {float, bf16}.
// Numerics: f32 to bf16 rounds to nearest even; the other way is exact.
// Needs: both pointers aligned to 16 bytes, as every tensor is.
// Launch: blocks of THREADS threads, 8 elements a thread; the grid covers n.
// Cost: n (size of SRC_T + size of DST_T) bytes, no arithmetic.
// Test: tests/cuda/device.rs. `ringtune doctor` runs it to prove a device.
#include "common/types.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS) cast(DST_T *__restrict__ dst, const SRC_T *__restrict__ src, u64 n) {
    const u64 at = (u64(blockIdx.x) * THREADS + threadIdx.x) * 8;
    if (at + 8 <= n) {
        float x[8];
        load8(x, src + at);
        store8(dst + at, x);
    } else {
        for (u64 i = at; i < n; i++) put(dst[i], to_f32(src[i]));
    }
}
