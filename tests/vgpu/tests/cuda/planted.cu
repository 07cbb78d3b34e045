// One mistake per kernel; each has to be found.
typedef unsigned int u32;
extern "C" __global__ void past_the_end(float* x, int n) {
    int i = threadIdx.x;
    if (i <= n) x[i] = 1.f;
}
extern "C" __global__ void misaligned(const float* x, float4* y) { y[0] = *(const float4*)(x + 1); }
extern "C" __global__ void unwritten(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x]; }
extern "C" __global__ void unwritten_shared(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.f;
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x + 1];
}
extern "C" __global__ void divergent(float* y) {
    if (threadIdx.x < 8) __syncthreads();
    y[threadIdx.x] = 1.f;
}
extern "C" __global__ void forever(volatile int* x) { while (*x == 0) {} }
extern "C" __global__ void no_wait(const float* x, float* y) {
    __shared__ __align__(16) float s[32];
    u32 to = (u32)__cvta_generic_to_shared(&s[threadIdx.x]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + threadIdx.x));
    asm volatile("cp.async.commit_group;");
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
