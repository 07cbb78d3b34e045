// Row-wise programs: rmsnorm forward and backward, cross-entropy with its gradient.
typedef unsigned short u16;
typedef unsigned int u32;

__device__ __forceinline__ float value(u16 x) { return __uint_as_float((u32)x << 16); }
__device__ __forceinline__ u16 nearest(float x) {
    u16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y) : "f"(x));
    return y;
}

// Sum or maximum over the block; scratch holds one float for each warp. All threads get the result.
__device__ float over_block(float x, float* scratch, bool maximum) {
    for (int d = 16; d; d >>= 1) {
        float y = __shfl_xor_sync(0xffffffffu, x, d);
        x = maximum ? fmaxf(x, y) : x + y;
    }
    int warps = blockDim.x >> 5, warp = threadIdx.x >> 5;
    __syncthreads();
    if ((threadIdx.x & 31) == 0) scratch[warp] = x;
    __syncthreads();
    x = scratch[0];
    for (int i = 1; i < warps; i++) x = maximum ? fmaxf(x, scratch[i]) : x + scratch[i];
    return x;
}

// y = x rstd w, rstd = 1 / sqrt(mean(x^2) + eps); one block for each row of c bf16 numbers, two at a time.
extern "C" __global__ void rmsnorm_forward(const u16* x, const float* w, u16* y, float* rstd, int c, float eps) {
    __shared__ float scratch[32];
    const u32* row = (const u32*)(x + (long long)blockIdx.x * c);
    float s = 0.f;
    for (int i = threadIdx.x; i < c / 2; i += blockDim.x) {
        float a = value((u16)row[i]), b = value((u16)(row[i] >> 16));
        s += a * a + b * b;
    }
    float r = rsqrtf(over_block(s, scratch, false) / c + eps);
    if (threadIdx.x == 0) rstd[blockIdx.x] = r;
    u32* out = (u32*)(y + (long long)blockIdx.x * c);
    for (int i = threadIdx.x; i < c / 2; i += blockDim.x) {
        u32 low = nearest(value((u16)row[i]) * r * w[2 * i]), high = nearest(value((u16)(row[i] >> 16)) * r * w[2 * i + 1]);
        out[i] = low | high << 16;
    }
}

// dx = rstd (dy w - x rstd^2 mean(dy w x)); each block adds dy x rstd of its rows into its own row of parts (blocks, c).
extern "C" __global__ void rmsnorm_backward(const u16* x, const float* w, const u16* dy, const float* rstd, float* dx,
                                            float* parts, int rows, int c) {
    extern __shared__ float sums[];
    __shared__ float scratch[32];
    for (int i = threadIdx.x; i < c; i += blockDim.x) sums[i] = 0.f;
    for (int row = blockIdx.x; row < rows; row += gridDim.x) {
        long long at = (long long)row * c;
        float s = 0.f, r = rstd[row];
        for (int i = threadIdx.x; i < c; i += blockDim.x) s += value(dy[at + i]) * w[i] * value(x[at + i]);
        float mean = over_block(s, scratch, false) / c * r * r;
        for (int i = threadIdx.x; i < c; i += blockDim.x) {
            dx[at + i] = r * (value(dy[at + i]) * w[i] - value(x[at + i]) * mean);
            sums[i] += value(dy[at + i]) * value(x[at + i]) * r;
        }
    }
    for (int i = threadIdx.x; i < c; i += blockDim.x) parts[(long long)blockIdx.x * c + i] = sums[i];
}

// dw = sum of the rows of parts, in their order.
extern "C" __global__ void rmsnorm_backward_weight(const float* parts, float* dw, int blocks, int c) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= c) return;
    float s = 0.f;
    for (int b = 0; b < blocks; b++) s += parts[(long long)b * c + i];
    dw[i] = s;
}

// loss = log(sum(exp(x))) - x[target], and x becomes (softmax(x) - one at target) scale; a negative target gives zeros.
extern "C" __global__ void cross_entropy(float* x, const int* targets, float* loss, int v, float scale) {
    __shared__ float scratch[32];
    float* row = x + (long long)blockIdx.x * v;
    int target = targets[blockIdx.x];
    if (target < 0) {
        if (threadIdx.x == 0) loss[blockIdx.x] = 0.f;
        for (int i = threadIdx.x; i < v; i += blockDim.x) row[i] = 0.f;
        return;
    }
    float top = -1e30f;
    for (int i = threadIdx.x; i < v; i += blockDim.x) top = fmaxf(top, row[i]);
    top = over_block(top, scratch, true);
    float s = 0.f;
    for (int i = threadIdx.x; i < v; i += blockDim.x) s += __expf(row[i] - top);
    s = over_block(s, scratch, false);
    if (threadIdx.x == 0) loss[blockIdx.x] = logf(s) + top - row[target];
    __syncthreads();
    for (int i = threadIdx.x; i < v; i += blockDim.x) row[i] = (__expf(row[i] - top) / s - (i == target ? 1.f : 0.f)) * scale;
}
