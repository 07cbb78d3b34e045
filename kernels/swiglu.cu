// SwiGLU (Shazeer 2020, arXiv:2002.05202, eq. 6) and its gradient, which is formed in place.
//
//   forward    out = silu(gate) up,  silu(x) = x sigma(x)
//   backward   dact becomes out again;  up becomes dact silu(gate);  gate becomes dact up sigma (1 + gate (1 - sigma))
//
// Shapes: all alike, seen as n elements. Defines: X_T in {float, bf16}.
// Numerics: f32, one rounding of each stored value; backward gives out's very bits.
// Needs: pointers aligned to 16 bytes, as every tensor is.
// Launch: blocks of THREADS threads, 8 elements a thread; the grid covers n.
// Cost: forward 3 n, backward 6 n (size of X_T) bytes.
// Test: tests/common/elementwise.rs, on every device.
#include "common/elements.cuh"

// With one block asked for a multiprocessor, ptxas does not spill a register or two to fit more of them.
constexpr int THREADS = 256;

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    swiglu_forward(X_T *__restrict__ out, const X_T *__restrict__ gate, const X_T *__restrict__ up, u64 n) {
    const u64 at = (u64(blockIdx.x) * THREADS + threadIdx.x) * 8;
    if (at + 8 <= n) {
        float g[8], u[8];
        load8(g, gate + at);
        load8(u, up + at);
#pragma unroll
        for (int i = 0; i < 8; i++) g[i] = swiglu(g[i], u[i]);
        store8(out + at, g);
    } else {
        for (u64 i = at; i < n; i++) put(out[i], swiglu(to_f32(gate[i]), to_f32(up[i])));
    }
}

// One element: its gate, up and gradient become their results.
__device__ __forceinline__ void back(float &gate, float &up, float &dact) {
    const float d = dact, g = gate, u = up, s = sigmoid(g);
    dact = g * s * u;
    up = d * g * s;
    gate = d * u * s * fmaf(g, 1.0f - s, 1.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    swiglu_backward(X_T *__restrict__ gate, X_T *__restrict__ up, X_T *__restrict__ dact, u64 n) {
    const u64 at = (u64(blockIdx.x) * THREADS + threadIdx.x) * 8;
    if (at + 8 <= n) {
        float g[8], u[8], d[8];
        load8(g, gate + at);
        load8(u, up + at);
        load8(d, dact + at);
#pragma unroll
        for (int i = 0; i < 8; i++) back(g[i], u[i], d[i]);
        store8(gate + at, g);
        store8(up + at, u);
        store8(dact + at, d);
    } else {
        for (u64 i = at; i < n; i++) {
            float g = to_f32(gate[i]), u = to_f32(up[i]), d = to_f32(dact[i]);
            back(g, u, d);
            put(gate[i], g);
            put(up[i], u);
            put(dact[i], d);
        }
    }
}
