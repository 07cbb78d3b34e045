// Small programs for the interpreter's tests: vector add, RMS norm, and two products, one with mma.sync.
typedef unsigned short u16;
typedef unsigned int u32;
__device__ float bf(u16 x) { return __uint_as_float((u32)x << 16); }

extern "C" __global__ void vadd(const float* a, const float* b, float* c, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) c[i] = a[i] + b[i];
}

// One block per row; y = x / sqrt(mean(x^2) + eps) * w.
extern "C" __global__ void rmsnorm(const float* x, const float* w, float* y, int cols, float eps) {
    __shared__ float part[32];
    const float* row = x + (long long)blockIdx.x * cols;
    float s = 0.f;
    for (int i = threadIdx.x; i < cols; i += blockDim.x) s += row[i] * row[i];
    for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(0xffffffffu, s, d);
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = s;
    __syncthreads();
    if (threadIdx.x < 32) {
        s = threadIdx.x < (blockDim.x >> 5) ? part[threadIdx.x] : 0.f;
        for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(0xffffffffu, s, d);
        if (threadIdx.x == 0) part[0] = s;
    }
    __syncthreads();
    float r = rsqrtf(part[0] / cols + eps);
    for (int i = threadIdx.x; i < cols; i += blockDim.x) y[(long long)blockIdx.x * cols + i] = row[i] * r * w[i];
}

// C (m, n) = A (m, k) B (k, n), bf16 in, f32 out; one warp per 16x8 tile, cp.async into shared memory, ldmatrix.
extern "C" __global__ void gemm(const u16* a, const u16* b, float* c, int n, int k) {
    __shared__ __align__(16) u16 sa[16 * 16], sb[16 * 8];
    int lane = threadIdx.x, row = blockIdx.y * 16, col = blockIdx.x * 8;
    float d[4] = {0.f, 0.f, 0.f, 0.f};
    for (int k0 = 0; k0 < k; k0 += 16) {
        u32 to = (u32)__cvta_generic_to_shared(&sa[(lane >> 1) * 16 + (lane & 1) * 8]);
        const u16* from = a + (long long)(row + (lane >> 1)) * k + k0 + (lane & 1) * 8;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
        if (lane < 16) {
            to = (u32)__cvta_generic_to_shared(&sb[lane * 8]);
            from = b + (long long)(k0 + lane) * n + col;
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from));
        }
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group 0;");
        __syncthreads();
        u32 x[4], y[2];
        to = (u32)__cvta_generic_to_shared(&sa[(lane & 15) * 16 + (lane >> 4) * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(to));
        to = (u32)__cvta_generic_to_shared(&sb[(lane & 15) * 8]);
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];" : "=r"(y[0]), "=r"(y[1]) : "r"(to));
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                     : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                     : "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(y[0]), "r"(y[1]));
        __syncthreads();
    }
    for (int i = 0; i < 4; i++)
        c[(long long)(row + (lane >> 2) + 8 * (i >> 1)) * n + col + 2 * (lane & 3) + (i & 1)] = d[i];
}

// Rotary angles: sinf and cosf with their slow path for large arguments, which uses local memory.
extern "C" __global__ void angles(const float* x, float* s, float* c, float* e, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    s[i] = sinf(x[i]);
    c[i] = cosf(x[i]);
    e[i] = expf(-fabsf(x[i]) * 0.001f) / 3.0f;
}

__constant__ int table[4] = {3, 1, 4, 1};
// Divergence, atomics, votes and integer division.
extern "C" __global__ void mixed(int* count, u32* out, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= n) return;
    int v = 0;
    for (int j = 0; j < i % 7; j++) v += (i * 31 + j) / (j + 3) % 11 + table[j & 3];
    if (v & 1) atomicAdd(&count[v & 7], v); else atomicMax(&count[8], v);
    out[i] = v ^ __popc(i) ^ (__clz(i + 1) << 4);
}
