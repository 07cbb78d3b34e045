// Loss of rows of logits and its gradient: loss = logsumexp(x) - x[target],  d = scale (softmax(x) - onehot(target)).
//
// Shapes: logits (m, classes) f32; rows m integers, the tokens they belong to; targets, loss and correct one a token. correct may be
// null. The gradient goes to d (m, classes) in bf16, or takes the place of the logits where d is null. No defines.
// Numerics: f32; the arg max is the lowest class on ties; NaN stays visible. Sums in a fixed order: a thread's classes, then a
// butterfly. A target outside the classes stops the kernel: the host has checked them.
// Launch: a block of THREADS threads per row.
// Cost: a row is read three times, the last two from a cache where it fits, and its gradient written once.
// Test: tests/common/head.rs, on every device.
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ float larger(float m, float x) { return x > m || x != x ? x : m; }

extern "C" __global__ void __launch_bounds__(THREADS)
    cross_entropy(float *__restrict__ loss, float *__restrict__ correct, bf16 *__restrict__ d, float *logits,
                  const int *__restrict__ rows, const int *__restrict__ targets, u32 classes, float scale, u32 gradient) {
    __shared__ float scratch[THREADS / 32];
    const u32 token = u32(rows[blockIdx.x]), target = u32(targets[token]), lane = threadIdx.x % 32;
    if (target >= classes) __trap();
    float *x = logits + u64(blockIdx.x) * classes;
    const float wanted = x[target];

    float most = -infinity();
    for (u32 j = threadIdx.x; j < classes; j += THREADS) most = larger(most, x[j]);
    for (int offset = 16; offset > 0; offset /= 2) most = larger(most, __shfl_xor_sync(0xffffffffu, most, offset));
    if (lane == 0) scratch[threadIdx.x / 32] = most;
    __syncthreads();
    most = scratch[0];
    for (int i = 1; i < THREADS / 32; i++) most = larger(most, scratch[i]);
    __syncthreads();

    float sum = 0.0f;
    bool earlier = false; // a lower class that is as large
    for (u32 j = threadIdx.x; j < classes; j += THREADS) {
        sum += expf(x[j] - most);
        earlier |= j < target && x[j] == most;
    }
    sum = group_sum<THREADS>(sum, THREADS, scratch);
    const bool first = !__syncthreads_or(earlier);
    if (threadIdx.x == 0) {
        loss[token] = most + logf(sum) - wanted;
        if (correct) correct[token] = wanted == most && first ? 1.0f : 0.0f;
    }
    if (!gradient) return;

    const float by = __fmul_rn(scale, __fdiv_rn(1.0f, sum));
    for (u32 j = threadIdx.x; j < classes; j += THREADS) {
        float p = __fmul_rn(expf(x[j] - most), by);
        if (j == target) p = __fsub_rn(p, scale);
        if (d) {
            put(d[u64(blockIdx.x) * classes + j], p);
        } else {
            x[j] = p;
        }
    }
}
