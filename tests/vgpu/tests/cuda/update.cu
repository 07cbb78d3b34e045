// AdamW with f32 master weights and bf16 copies; embedding forward and backward.
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

__device__ __forceinline__ u16 nearest(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, p -= lr (m / c1 / (sqrt(v / c2) + eps) + decay p), g = grad * clip[0].
extern "C" __global__ void adamw(float* p, u16* copy, float* m, float* v, const float* grad, const float* clip, int n, float lr,
                                 float b1, float b2, float c1, float c2, float eps, float decay) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
        float g = grad[i] * clip[0];
        float a = m[i] = b1 * m[i] + (1.f - b1) * g;
        float b = v[i] = b2 * v[i] + (1.f - b2) * g * g;
        float x = p[i] - lr * (a / c1 / (sqrtf(b / c2) + eps) + decay * p[i]);
        p[i] = x;
        copy[i] = nearest(x);
    }
}

// out (t, c) = table[ids[t]]; sixteen bytes at a time, the rest two by two. Rows of tables start at 16 bytes when c is a multiple of 8.
extern "C" __global__ void embedding_forward(const u16* table, const int* ids, u16* out, int c) {
    const u16* from = table + (long long)ids[blockIdx.x] * c;
    u16* to = out + (long long)blockIdx.x * c;
    if (c % 8 == 0) {
        for (int i = threadIdx.x; i < c / 8; i += blockDim.x) ((uint4*)to)[i] = ((const uint4*)from)[i];
    } else {
        for (int i = threadIdx.x; i < c; i += blockDim.x) to[i] = from[i];
    }
}

// dtable[ids[t]] += dout[t], in no fixed order.
extern "C" __global__ void embedding_backward(float* dtable, const int* ids, const u16* dout, int c) {
    float* to = dtable + (long long)ids[blockIdx.x] * c;
    const u16* from = dout + (long long)blockIdx.x * c;
    for (int i = threadIdx.x; i < c; i += blockDim.x) atomicAdd(&to[i], __uint_as_float((u32)from[i] << 16));
}

// The same in the order of tokens: one block for each row of the table looks through all ids, 32 in a vote.
extern "C" __global__ void embedding_backward_ordered(float* dtable, const int* ids, const u16* dout, int tokens, int c) {
    float* to = dtable + (long long)blockIdx.x * c;
    for (int base = 0; base < tokens; base += 32) {
        int t = base + (threadIdx.x & 31);
        u32 hits = __ballot_sync(0xffffffffu, t < tokens && ids[t] == blockIdx.x);
        for (; hits; hits &= hits - 1) {
            const u16* from = dout + (long long)(base + __ffs(hits) - 1) * c;
            for (int i = threadIdx.x; i < c; i += blockDim.x) to[i] += __uint_as_float((u32)from[i] << 16);
        }
    }
}
