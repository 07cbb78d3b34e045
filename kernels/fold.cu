// The ordered fold of a gradient over ranks: sum[i] = ((sum[i] + x_0[i]) + x_1[i]) + …, the terms in the order of ranks, which is that of
// the micro-batches of a step; the first ones of a step are added to zero.
//
// Shapes: n elements, seen as ceil(n / 4) quads: what lies behind the last element up to the quad's end is summed with it and of no
// meaning. x_r is own for r = rank, else received + r stride.
// Numerics: f32, one rounding for each term, so that the bits do not depend on how the terms were dealt to ranks.
// Needs: pointers aligned to 16 bytes; stride a multiple of 4.
// Launch: blocks of THREADS threads, a quad a thread; the grid covers the quads.
// Cost: 4 (ranks + 1) bytes an element, 4 more but for the first terms.
// Test: tests/cuda/fold.rs against the host; tests/cuda/ranks.rs, whole trainings on one to four ranks.
#include "common/types.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    fold(float4 *__restrict__ sum, const float4 *__restrict__ own, const float4 *__restrict__ received, u32 ranks, u32 rank, u64 stride,
         u64 quads, u32 begins) {
    const u64 i = u64(blockIdx.x) * THREADS + threadIdx.x;
    if (i >= quads) return;
    float4 s = begins ? make_float4(0.0f, 0.0f, 0.0f, 0.0f) : sum[i];
    for (u32 r = 0; r < ranks; r++) {
        const float4 x = r == rank ? own[i] : received[r * (stride / 4) + i];
        s.x = __fadd_rn(s.x, x.x), s.y = __fadd_rn(s.y, x.y), s.z = __fadd_rn(s.z, x.z), s.w = __fadd_rn(s.w, x.w);
    }
    sum[i] = s;
}
