// Element types of tensors and their conversion to f32 and back. No header of the toolkit is needed: bf16 is 16 bits of storage.
#pragma once

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

// bfloat16: the upper half of an f32.
struct __align__(2) bf16 {
    u16 bits;
};

#include "ptx.cuh"

// NVRTC knows no INFINITY.
__device__ __forceinline__ float infinity() { return __uint_as_float(0x7f800000u); }

__device__ __forceinline__ float to_f32(float x) { return x; }
__device__ __forceinline__ float to_f32(bf16 x) { return __uint_as_float(u32(x.bits) << 16); }

__device__ __forceinline__ bool finite(bf16 x) { return (x.bits & 0x7f80) != 0x7f80; }

// One rounding, to nearest even.
__device__ __forceinline__ void put(float &to, float x) { to = x; }
__device__ __forceinline__ void put(bf16 &to, float x) { to.bits = cvt_bf16(x); }

// One of a group of three.
template <typename T> __device__ __forceinline__ T pick(u32 which, T a, T b, T c) { return which == 0 ? a : which == 1 ? b : c; }

// Eight neighbouring elements in f32, by 16-byte accesses: `p` is aligned to 16 bytes.
__device__ __forceinline__ void load8(float (&to)[8], const float *p) {
    float4 a = reinterpret_cast<const float4 *>(p)[0], b = reinterpret_cast<const float4 *>(p)[1];
    to[0] = a.x, to[1] = a.y, to[2] = a.z, to[3] = a.w;
    to[4] = b.x, to[5] = b.y, to[6] = b.z, to[7] = b.w;
}
__device__ __forceinline__ void load8(float (&to)[8], const bf16 *p) {
    uint4 v = *reinterpret_cast<const uint4 *>(p);
    const u32 words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        to[2 * i] = __uint_as_float(words[i] << 16);
        to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
}
__device__ __forceinline__ void store8(float *p, const float (&x)[8]) {
    reinterpret_cast<float4 *>(p)[0] = make_float4(x[0], x[1], x[2], x[3]);
    reinterpret_cast<float4 *>(p)[1] = make_float4(x[4], x[5], x[6], x[7]);
}
__device__ __forceinline__ void store8(bf16 *p, const float (&x)[8]) {
    *reinterpret_cast<uint4 *>(p) = make_uint4(cvt_bf16x2(x[0], x[1]), cvt_bf16x2(x[2], x[3]), cvt_bf16x2(x[4], x[5]),
                                               cvt_bf16x2(x[6], x[7]));
}

// N (1 or 8) elements at `p`; for 8, aligned to 16 bytes.
template <int N, typename T> __device__ __forceinline__ void load_vec(float (&to)[N], const T *p) {
    if constexpr (N == 8) {
        load8(to, p);
    } else {
        to[0] = to_f32(p[0]);
    }
}
template <int N, typename T> __device__ __forceinline__ void store_vec(T *p, const float (&x)[N]) {
    if constexpr (N == 8) {
        store8(p, x);
    } else {
        put(p[0], x[0]);
    }
}
