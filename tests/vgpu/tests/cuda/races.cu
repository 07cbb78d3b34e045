// Races to be found (names with "racy"), and correct kernels that must raise no alarm.
typedef unsigned char u8;
typedef unsigned int u32;

// Each warp reads what the next one wrote: the barrier between is missing.
extern "C" __global__ void racy_shared(int* out) {
    __shared__ int s[256];
    int t = threadIdx.x;
    s[t] = t;
    out[t] = s[t ^ 32];
}
// The second round overwrites what slower warps still read.
extern "C" __global__ void racy_rounds(int* out) {
    __shared__ int s[256];
    int t = threadIdx.x, sum = 0;
    for (int i = 0; i < 3; i++) {
        s[t] = t * i;
        __syncthreads();
        sum += s[255 - t];
    }
    out[t] = sum;
}
// Neighbouring blocks write one word too many.
extern "C" __global__ void racy_blocks(int* out) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    out[i] = i;
    if (threadIdx.x == blockDim.x - 1) out[i + 1] = -1;
}
// A sum over blocks without atomics.
extern "C" __global__ void racy_sum(int* out) {
    if (threadIdx.x == 0) out[0] += 1;
}
// A flag without a fence: the data may come later than the flag.
extern "C" __global__ void racy_flag(int* data, volatile int* flag) {
    if (blockIdx.x == 0) {
        data[0] = 7;
        flag[0] = 1;
    } else {
        while (flag[0] == 0) {}
        data[1] = data[0];
    }
}

extern "C" __global__ void clean_rounds(int* out) {
    __shared__ int s[256];
    int t = threadIdx.x, sum = 0;
    for (int i = 0; i < 3; i++) {
        s[t] = t * i;
        __syncthreads();
        sum += s[255 - t];
        __syncthreads();
    }
    out[t] = sum;
}
// Warps write neighbouring bytes of the same words, and blocks too.
extern "C" __global__ void clean_bytes(u8* out) {
    __shared__ u8 s[256];
    int t = threadIdx.x, turned = (t & 7) * 32 + (t >> 3);
    s[turned] = t;
    __syncthreads();
    int at = (t * gridDim.x) + blockIdx.x;
    out[at] = s[t];
}
// Counts in shared and global memory with atomics; the last block sums what the others wrote.
extern "C" __global__ void clean_last_block(int* part, u32* done, int* out) {
    __shared__ int s[4];
    __shared__ bool last;
    int t = threadIdx.x;
    if (t < 4) s[t] = 0;
    __syncthreads();
    atomicAdd(&s[t & 3], t);
    __syncthreads();
    if (t == 0) {
        part[blockIdx.x] = s[0] + s[1] + s[2] + s[3];
        __threadfence();
        last = atomicAdd(done, 1u) == gridDim.x - 1;
    }
    __syncthreads();
    if (last && t == 0) {
        __threadfence();
        int sum = 0;
        for (int i = 0; i < gridDim.x; i++) sum += part[i];
        out[0] = sum;
    }
}
extern "C" __global__ void clean_flag(int* data, volatile int* flag) {
    if (blockIdx.x == 0) {
        data[0] = 7;
        __threadfence();
        flag[0] = 1;
    } else {
        while (flag[0] == 0) {}
        __threadfence();
        data[1] = data[0];
    }
}
// Producer and consumer warps with two named barriers.
extern "C" __global__ void clean_pipe(int* out) {
    __shared__ int s[32];
    int lane = threadIdx.x & 31, sum = 0;
    if (threadIdx.x < 32) {
        for (int i = 0; i < 8; i++) {
            asm volatile("bar.sync 2, 64;" ::: "memory");
            s[lane] = i * 100 + lane;
            asm volatile("bar.arrive 1, 64;" ::: "memory");
        }
    } else {
        for (int i = 0; i < 8; i++) {
            asm volatile("bar.arrive 2, 64;" ::: "memory");
            asm volatile("bar.sync 1, 64;" ::: "memory");
            sum += s[lane];
        }
        out[lane] = sum;
    }
}
// The same, but the consumer says "empty" before it has read.
extern "C" __global__ void racy_pipe(int* out) {
    __shared__ int s[32];
    int lane = threadIdx.x & 31, sum = 0;
    if (threadIdx.x < 32) {
        for (int i = 0; i < 8; i++) {
            s[lane] = i * 100 + lane;
            asm volatile("bar.arrive 1, 64;" ::: "memory");
            asm volatile("bar.sync 2, 64;" ::: "memory");
        }
    } else {
        for (int i = 0; i < 8; i++) {
            asm volatile("bar.sync 1, 64;" ::: "memory");
            asm volatile("bar.arrive 2, 64;" ::: "memory");
            sum += s[lane];
        }
        out[lane] = sum;
    }
}
// Copies that other warps read: after the wait, but before the barrier.
extern "C" __global__ void racy_copy(const int* x, int* out) {
    __shared__ __align__(16) int s[64];
    int t = threadIdx.x;
    u32 to = (u32)__cvta_generic_to_shared(&s[t]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + t));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;");
    out[t] = s[t ^ 32];
}
extern "C" __global__ void clean_copy(const int* x, int* out) {
    __shared__ __align__(16) int s[64];
    int t = threadIdx.x;
    u32 to = (u32)__cvta_generic_to_shared(&s[t]);
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(x + t));
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
    out[t] = s[t ^ 32];
}
// Which banks and sectors the words of a warp lie in: stride words apart in shared and in global memory.
extern "C" __global__ void strided(const float* x, float* y, int stride) {
    // Volatile: the compiler would hand the value on without reading it back.
    __shared__ volatile float s[1024];
    s[threadIdx.x * stride] = x[threadIdx.x * stride];
    y[threadIdx.x] = s[threadIdx.x * stride];
}
