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
