// One mistake per kernel; each has to be found at the line that is marked with the kernel's name.
typedef unsigned int u32;
extern "C" __global__ void past_the_end(float* x, int n) {
    int i = threadIdx.x;
    if (i <= n)
        x[i] = 1.f;  // <- past_the_end
}
extern "C" __global__ void read_past_the_end(const float* x, float* y, int n) {
    int i = threadIdx.x + blockIdx.x * blockDim.x;
    float s = 0.f;
    for (int j = -1; j < 1; j++)
        if (i + j >= 0 && i <= n)
            s += x[i + j + 1];  // <- read_past_the_end
    if (i < n) y[i] = s;
}
extern "C" __global__ void before_the_start(float* x) {
    x[(int)threadIdx.x - 1] = 1.f;  // <- before_the_start
}
extern "C" __global__ void past_shared(float* y) {
    extern __shared__ float s[];
    s[threadIdx.x + 1] = 2.f;  // <- past_shared
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x];
}
extern "C" __global__ void misaligned(const float* x, float4* y) {
    y[threadIdx.x] = *(const float4*)(x + threadIdx.x * 4 + 1);  // <- misaligned
}
extern "C" __global__ void unwritten(const float* x, float* y) {
    float v = x[threadIdx.x];
    y[threadIdx.x] = v;  // <- unwritten
}
extern "C" __global__ void unwritten_shared(float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = 1.f;
    __syncthreads();
    float v = s[threadIdx.x + 1];
    y[threadIdx.x] = v;  // <- unwritten_shared
}
extern "C" __global__ void unwritten_local(float* y, int n) {
    float a[16];
    for (int i = 0; i < n; i++) a[i & 15] = i;
    float v = a[(threadIdx.x + n) & 15];
    y[threadIdx.x] = v;  // <- unwritten_local
}
// Every thread sums what its neighbours of another warp left; the second barrier is missing.
extern "C" __global__ void missing_sync(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = 0.f;
    __syncthreads();
    s[threadIdx.x] = x[threadIdx.x];
    float v = s[threadIdx.x ^ 32];  // <- missing_sync
    y[threadIdx.x] = v;
}
extern "C" __global__ void with_sync(const float* x, float* y) {
    __shared__ float s[64];
    s[threadIdx.x] = 0.f;
    __syncthreads();
    s[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    y[threadIdx.x] = s[threadIdx.x ^ 32];
}
extern "C" __global__ void divergent(float* y) {
    if (threadIdx.x < 8)
        __syncthreads();  // <- divergent
    y[threadIdx.x] = 1.f;
}
extern "C" __global__ void forever(volatile int* x) {
    while (*x == 0) {}  // <- forever
}
// The second warp never comes to the barrier of 64 threads.
extern "C" __global__ void lonely_barrier(float* y) {
    if (threadIdx.x < 32)
        asm volatile("bar.sync 1, 64;");  // <- lonely_barrier
    else
        while (((volatile float*)y)[0] != 2.f) {}
    y[threadIdx.x] = 1.f;
}
extern "C" __global__ void no_wait(const float* x, float* y) {
    __shared__ __align__(16) float s[32];
    u32 to = (u32)__cvta_generic_to_shared(&s[threadIdx.x]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + threadIdx.x));
    asm volatile("cp.async.commit_group;");
    __syncthreads();
    float v = s[threadIdx.x];
    y[threadIdx.x] = v;  // <- no_wait
}
// Two stages; the wait leaves the newest group open, and the newest group is the one that is read.
extern "C" __global__ void wait_for_the_wrong_group(const float* x, float* y) {
    __shared__ __align__(16) float s[64];
    for (int i = 0; i < 2; i++) {
        u32 to = (u32)__cvta_generic_to_shared(&s[i * 32 + threadIdx.x]);
        asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + i * 32 + threadIdx.x));
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group 1;");
    __syncthreads();
    float v = s[32 + threadIdx.x];
    y[threadIdx.x] = v;  // <- wait_for_the_wrong_group
}
extern "C" __global__ void wrong_mask(float* y) {
    float v = threadIdx.x;
    if (threadIdx.x < 16)
        v = __shfl_xor_sync(0xffffffffu, v, 1);  // <- wrong_mask
    y[threadIdx.x] = v;
}
extern "C" __global__ void trapped(float* y, int n) {
    if (threadIdx.x == n)
        asm volatile("trap;");  // <- trapped
    y[threadIdx.x] = 1.f;
}

// No mistakes, but slow: what the counters say about them is tested.
extern "C" __global__ void columns(float* y) {
    __shared__ float s[32 * 32];
    s[threadIdx.x * 32] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = s[threadIdx.x * 32];
}
extern "C" __global__ void padded_columns(float* y) {
    __shared__ float s[32 * 33];
    s[threadIdx.x * 33] = threadIdx.x;
    __syncwarp();
    y[threadIdx.x] = s[threadIdx.x * 33];
}
extern "C" __global__ void strided(const float* x, float* y, int stride) { y[threadIdx.x] = x[threadIdx.x * stride]; }
