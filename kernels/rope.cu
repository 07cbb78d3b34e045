// Rotary embedding in place (Su et al. 2021, arXiv:2104.09864, eq. 34, half-split): the pair (x[j], x[j + D/2]) of each head turns.
//
//   lo' = lo cos - hi sin,  hi' = hi cos + lo sin;  back with sin negated
//
// Shapes: x (rows, heads D); table (P, D) f32, D/2 cosines then D/2 sines a row; positions one integer a row, in 0..P.
// Defines: X_T in {float, bf16}.
// Numerics: f32, one product rounded, then a fused multiply-add, one rounding of each stored value.
// Launch: blocks of THREADS threads, a thread per pair, ceil(cols / 2 / THREADS) blocks a row.
// Cost: 2 rows cols (size of X_T) bytes.
// Test: tests/common/elementwise.rs, on every device.
#include "common/elements.cuh"

constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS)
    rope(X_T *__restrict__ x, const float *__restrict__ table, const int *__restrict__ positions, u32 cols, u32 dim, u32 back) {
    const u32 pairs = cols / 2, blocks = (pairs + THREADS - 1) / THREADS, half = dim / 2;
    const u32 row = blockIdx.x / blocks, pair = blockIdx.x % blocks * THREADS + threadIdx.x;
    if (pair >= pairs) return;
    const u32 j = pair % half;
    const float *angle = table + u64(u32(positions[row])) * dim + j;
    const float cosine = angle[0], sine = back ? -angle[half] : angle[half];
    X_T *lo = x + u64(row) * cols + pair / half * dim + j, *hi = lo + half;
    float a = to_f32(*lo), b = to_f32(*hi);
    rotate(a, b, cosine, sine);
    put(*lo, a);
    put(*hi, b);
}
