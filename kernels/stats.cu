// What a step leaves behind, on the device: see src/cuda/stats.rs. All in f64 and in fixed orders; one block but for the squares.
//
// stats: f64, [0] right arg maxes, [1] squared norm of the gradient, [2] clip factor, [3] 1 while all is finite, else 0, then the summed
// loss of each micro-batch.
// Table of squares: for each chunk of at most CHUNK elements two 64-bit words: its address; its length, in the upper half 1 for bf16.
// Numerics: f64; a thread's elements, then the threads of a block, then blocks or chunks, each in order.
// Launch: blocks of THREADS threads; stats_squares one a chunk, the others one.
// Cost: the bytes of the gradients, once.
// Test: tests/common/optimiser.rs, on every device.
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;

__device__ __forceinline__ bool finite(double x) { return fabs(x) <= 1.7976931348623157e308; }

extern "C" __global__ void __launch_bounds__(THREADS) stats_begin(double *__restrict__ stats) {
    if (threadIdx.x < 4) stats[threadIdx.x] = threadIdx.x < 2 ? 0.0 : 1.0;
}

// place: which micro-batch of the step. correct may be null.
extern "C" __global__ void __launch_bounds__(THREADS)
    stats_add_loss(double *__restrict__ stats, const float *__restrict__ loss, const float *__restrict__ correct, u32 n, u32 place) {
    __shared__ double scratch[THREADS];
    double sum = 0.0, right = 0.0;
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        sum += double(loss[i]);
        if (correct) right += double(correct[i]);
    }
    sum = block_sum<THREADS>(sum, scratch);
    right = block_sum<THREADS>(right, scratch);
    if (threadIdx.x > 0) return;
    stats[4 + place] = sum;
    stats[0] += right;
    if (!finite(sum)) stats[3] = 0.0;
}

template <typename T> __device__ double squares(const T *x, u32 n) {
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += THREADS) {
        const double v = double(to_f32(x[i]));
        sum = fma(v, v, sum);
    }
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) stats_squares(double *__restrict__ parts, const u64 *__restrict__ table) {
    __shared__ double scratch[THREADS];
    const u64 address = table[2 * blockIdx.x], what = table[2 * blockIdx.x + 1];
    const u32 n = u32(what);
    double sum = what >> 32 ? squares(reinterpret_cast<const bf16 *>(address), n) : squares(reinterpret_cast<const float *>(address), n);
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) parts[blockIdx.x] = sum;
}

__device__ __forceinline__ void add_norm2(double *stats, double sum) {
    stats[1] += sum;
    if (!finite(stats[1])) stats[3] = 0.0;
}

extern "C" __global__ void __launch_bounds__(THREADS) stats_norm2(double *__restrict__ stats, const double *__restrict__ parts, u32 n) {
    __shared__ double scratch[THREADS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += THREADS) sum += parts[i];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x > 0) return;
    add_norm2(stats, sum);
}

// The same of parts that lie elsewhere: the i-th is parts[order[i]], so that it has the bits of stats_norm2 whoever made them.
extern "C" __global__ void __launch_bounds__(THREADS)
    stats_norm2_in_order(double *__restrict__ stats, const double *__restrict__ parts, const u64 *__restrict__ order, u32 n) {
    __shared__ double scratch[THREADS];
    double sum = 0.0;
    for (u32 i = threadIdx.x; i < n; i += THREADS) sum += parts[order[i]];
    sum = block_sum<THREADS>(sum, scratch);
    if (threadIdx.x == 0) add_norm2(stats, sum);
}

// limit: the bits of the largest norm, an f64; clips: whether there is one.
extern "C" __global__ void __launch_bounds__(THREADS) stats_clip(double *__restrict__ stats, u64 limit, u32 clips) {
    if (threadIdx.x > 0) return;
    // fmin takes the other one where the norm is NaN.
    stats[2] = clips ? fmin(__longlong_as_double(limit) / (sqrt(stats[1]) + 1e-6), 1.0) : 1.0;
}
