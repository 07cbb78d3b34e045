// Sums over groups of threads in a fixed order: the butterfly gives every lane the same bits, run after run.
#pragma once

// Sum over `width` neighbouring lanes, a power of two up to 32. All lanes of the warp take part.
__device__ __forceinline__ float lanes_sum(float x, int width) {
    for (int offset = width / 2; offset > 0; offset /= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
    return x;
}

// Sum over `threads` neighbouring threads: a power of two up to 32, or the whole block of Threads. `scratch` holds Threads / 32
// values; all threads of the block take part. Ends with a barrier where it used `scratch`, so that it may be used again.
template <int Threads> __device__ __forceinline__ float group_sum(float x, int threads, float *scratch) {
    if (threads <= 32) return lanes_sum(x, threads);
    x = lanes_sum(x, 32);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    if (lane == 0) scratch[warp] = x;
    __syncthreads();
    x = lane < Threads / 32 ? scratch[lane] : 0.0f;
    x = lanes_sum(x, 32);
    __syncthreads();
    return x;
}

// Sum over the block of Threads threads in f64, as a fixed tree; every thread gets it. `scratch` holds Threads values. Ends with a
// barrier, so that it may be used again.
template <int Threads> __device__ __forceinline__ double block_sum(double x, double *scratch) {
    scratch[threadIdx.x] = x;
    __syncthreads();
    for (int half = Threads / 2; half > 0; half /= 2) {
        if (threadIdx.x < half) scratch[threadIdx.x] += scratch[threadIdx.x + half];
        __syncthreads();
    }
    const double sum = scratch[0];
    __syncthreads();
    return sum;
}

// Whether this block is the last of `blocks` that come to a counter, which is zero again then. What the others wrote before is visible.
// `before` is a word of shared memory that tells all threads.
__device__ __forceinline__ bool comes_last(u32 *counter, u32 blocks, u32 *before) {
    __threadfence();
    __syncthreads();
    if (threadIdx.x == 0) *before = atomicAdd(counter, 1u);
    __syncthreads();
    const bool last = *before == blocks - 1;
    __syncthreads();
    if (!last) return false;
    __threadfence();
    if (threadIdx.x == 0) *counter = 0;
    return true;
}
