// Dropout: dst[i] = src[i] times 0 or `scale`. The masks are those of the CPU: src/backend/dropout.rs says how they are drawn.
//
// Shapes: any, seen as n elements. Defines: SRC_T, DST_T in {float, bf16}.
// Numerics: one product in f32, one rounding; a product, so that a dropped NaN stays visible.
// Needs: pointers aligned to 16 bytes, as every tensor is.
// Launch: blocks of THREADS threads; a thread draws one Philox block for 8 elements; the grid covers n.
// Cost: n (size of SRC_T + size of DST_T) bytes, some 13 integer operations an element.
// Test: tests/common/elementwise.rs, on every device.
#include "common/types.cuh"
#include "common/philox.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    dropout(DST_T *__restrict__ dst, const SRC_T *__restrict__ src, u64 n, u32 key0, u32 key1, u32 hi0, u32 hi1, u32 threshold,
            float scale) {
    const u64 block = u64(blockIdx.x) * THREADS + threadIdx.x, at = block * 8;
    if (at >= n) return;
    u32 words[4];
    philox(words, block, Stream{key0, key1, hi0, hi1});
    // Element e draws half e % 2 of word e / 2, the low one first.
    auto factor = [&](int e) { return (words[e / 2] >> (16 * (e % 2)) & 0xffffu) < threshold ? 0.0f : scale; };
    if (at + 8 <= n) {
        float x[8];
        load8(x, src + at);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] *= factor(e);
        store8(dst + at, x);
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (at + e < n) put(dst[at + e], to_f32(src[at + e]) * factor(e));
        }
    }
}
