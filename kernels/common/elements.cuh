// What is done to elements once their sums are complete. Kernels that share a formula share it here, so that they give the same bits.
#pragma once
#include "types.cuh"

// A pair of a rotary embedding turns by an angle; back, where the sine is negated. One product rounded, then a fused multiply-add.
__device__ __forceinline__ void rotate(float &lo, float &hi, float cosine, float sine) {
    const float turned = fmaf(lo, cosine, -__fmul_rn(hi, sine));
    hi = fmaf(hi, cosine, __fmul_rn(lo, sine));
    lo = turned;
}

__device__ __forceinline__ float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// silu(gate) up.
__device__ __forceinline__ float swiglu(float gate, float up) { return gate * sigmoid(gate) * up; }

// c = alpha sum, or += where `add`, for eight neighbours from column j of a row of n on; the product and the sum are rounded apart.
template <typename T> __device__ __forceinline__ void write8(T *c, const float (&sum)[8], float alpha, u32 add, u32 j, u32 n) {
    if (n % 8 == 0) {
        float x[8] = {};
        if (add) load8(x, c + j);
#pragma unroll
        for (int e = 0; e < 8; e++) x[e] = __fadd_rn(__fmul_rn(alpha, sum[e]), x[e]);
        store8(c + j, x);
    } else {
#pragma unroll
        for (int e = 0; e < 8; e++) {
            if (j + e < n) put(c[j + e], __fadd_rn(__fmul_rn(alpha, sum[e]), add ? to_f32(c[j + e]) : 0.0f));
        }
    }
}

// c += sum, eight neighbours.
__device__ __forceinline__ void accumulate8(float *c, const float (&sum)[8]) {
    float x[8];
    load8(x, c);
#pragma unroll
    for (int e = 0; e < 8; e++) x[e] += sum[e];
    store8(c, x);
}
