// AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2) of every trained tensor in one launch; nothing where the step's
// figures are not finite.
//
//   g = clip g;  m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g^2
//   w = (1 - lr decay) w - (lr / bias1) m / (sqrt(v) / sqrt(bias2) + eps);  p = round(w) where w is the master of a bf16 p
//
// Table, 64-bit words: for each slot 8 of them: p (its first trained row), master (0: p is f32 and its own), m, v, g, number of elements,
// multiple of the learning rate (bits of an f64), 1 where weight decay applies; then for each block of the grid: slot in the upper
// half, which CHUNK of its elements in the lower one.
// Numerics: f32 in the order of src/cpu/optim.rs, each operation rounded as spelled; p is rounded once from w.
// Launch: a block of THREADS threads per chunk.
// Cost: 28 bytes an element read and written with an f32 p, 30 with a bf16 one.
// Test: tests/common/optimiser.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256, CHUNK = 16384;

extern "C" __global__ void __launch_bounds__(THREADS)
    adamw(const double *__restrict__ stats, const u64 *__restrict__ table, u32 slots, u64 lr_bits, float beta1, float beta2,
          float one_minus_beta1, float one_minus_beta2, float eps, float weight_decay, float bias1, float bias2) {
    if (stats[3] == 0.0) return;
    const float clip = float(stats[2]);
    const u64 which = table[8 * slots + blockIdx.x];
    const u64 *slot = table + 8 * (which >> 32);
    float *m = reinterpret_cast<float *>(slot[2]), *v = reinterpret_cast<float *>(slot[3]);
    const float *g = reinterpret_cast<const float *>(slot[4]);
    float *w = reinterpret_cast<float *>(slot[1] ? slot[1] : slot[0]);
    bf16 *p = slot[1] ? reinterpret_cast<bf16 *>(slot[0]) : nullptr;
    const float lr = float(__longlong_as_double(lr_bits) * __longlong_as_double(slot[6]));
    const float rate = __fdiv_rn(lr, bias1), root = __fdiv_rn(1.0f, __fsqrt_rn(bias2));
    const float keep = __fsub_rn(1.0f, __fmul_rn(lr, slot[7] ? weight_decay : 0.0f));
    const u64 first = u64(u32(which)) * CHUNK, end = min(slot[5], first + CHUNK);
    for (u64 i = first + threadIdx.x; i < end; i += THREADS) {
        const float d = __fmul_rn(g[i], clip);
        const float mean = fmaf(beta1, m[i], __fmul_rn(one_minus_beta1, d));
        const float square = fmaf(beta2, v[i], __fmul_rn(__fmul_rn(one_minus_beta2, d), d));
        const float denominator = fmaf(__fsqrt_rn(square), root, eps);
        const float updated = fmaf(w[i], keep, -__fdiv_rn(__fmul_rn(rate, mean), denominator));
        m[i] = mean, v[i] = square, w[i] = updated;
        if (p) put(p[i], updated);
    }
}
