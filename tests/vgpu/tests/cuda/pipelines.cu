// Pipelines that load ahead without asking whether anything is there: the last loads read what nobody wrote, and drop it.
typedef unsigned short u16;
typedef unsigned int u32;
#define DEPTH 3

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ float load(const float* p) {
    float v;
    asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
    return v;
}
__device__ __forceinline__ float load_shared(const float* p) {
    float v;
    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(shared(p)));
    return v;
}
__device__ __forceinline__ void copy16(void* to, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared(to)), "l"(from));
}

// y = the sum of `tiles` rows of 32: two rows are loaded ahead into registers.
extern "C" __global__ void ahead_in_registers(const float* x, float* y, int tiles) {
    float next[DEPTH - 1], sum = 0.f;
    for (int s = 0; s < DEPTH - 1; s++) next[s] = load(x + s * 32 + threadIdx.x);
    for (int t = 0; t < tiles; t++) {
        float v = next[0];
        next[0] = next[1];
        next[1] = load(x + (t + DEPTH - 1) * 32 + threadIdx.x);
        sum += v;
    }
    y[threadIdx.x] = sum;
}

// The same through shared memory: rows come by cp.async, and the value of the next row is read a round ahead.
extern "C" __global__ void ahead_by_copies(const float* x, float* y, int tiles) {
    __shared__ __align__(16) float rows[DEPTH][128];
    float sum = 0.f;
    for (int s = 0; s < DEPTH - 1; s++) {
        copy16(&rows[s][threadIdx.x * 4], x + s * 128 + threadIdx.x * 4);
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2));
    __syncthreads();
    float value = load_shared(&rows[0][threadIdx.x]);
    for (int t = 0; t < tiles; t++) {
        copy16(&rows[(t + DEPTH - 1) % DEPTH][threadIdx.x * 4], x + (t + DEPTH - 1) * 128 + threadIdx.x * 4);
        asm volatile("cp.async.commit_group;");
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2));
        __syncthreads();
        float next = load_shared(&rows[(t + 1) % DEPTH][threadIdx.x]);
        sum += value;
        value = next;
    }
    y[threadIdx.x] = sum;
}

// D (16, 8) = A (16, 16 tiles) B (16 tiles, 8) for one warp: only tiles that exist are copied, fragments of the next are loaded always.
extern "C" __global__ void ahead_of_products(const u16* a, const u16* b, float* d, int tiles) {
    __shared__ __align__(16) u16 sa[DEPTH][256], sb[DEPTH][128];
    int lane = threadIdx.x;
    float acc[4] = {};
    u32 x[2][4], y[2][2];
    for (int s = 0; s < DEPTH - 1; s++) {
        if (s < tiles) {
            copy16(&sa[s][lane * 8], a + s * 256 + lane * 8);
            if (lane < 16) copy16(&sb[s][lane * 8], b + s * 128 + lane * 8);
        }
        asm volatile("cp.async.commit_group;");
    }
    for (int t = -1; t < tiles; t++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(DEPTH - 2));
        __syncwarp();
        int at = (t + 1) % DEPTH, mine = (t + 1) & 1;
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[mine][0]), "=r"(x[mine][1]), "=r"(x[mine][2]), "=r"(x[mine][3])
                     : "r"(shared(&sa[at][(lane & 15) * 16 + (lane >> 4) * 8])));
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0,%1}, [%2];"
                     : "=r"(y[mine][0]), "=r"(y[mine][1])
                     : "r"(shared(&sb[at][(lane & 15) * 8])));
        if (t >= 0)
            asm volatile(
                "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                : "+f"(acc[0]), "+f"(acc[1]), "+f"(acc[2]), "+f"(acc[3])
                : "r"(x[1 - mine][0]), "r"(x[1 - mine][1]), "r"(x[1 - mine][2]), "r"(x[1 - mine][3]), "r"(y[1 - mine][0]),
                  "r"(y[1 - mine][1]));
        if (t + DEPTH < tiles) {
            int s = (t + DEPTH) % DEPTH;
            copy16(&sa[s][lane * 8], a + (t + DEPTH) * 256 + lane * 8);
            if (lane < 16) copy16(&sb[s][lane * 8], b + (t + DEPTH) * 128 + lane * 8);
        }
        asm volatile("cp.async.commit_group;");
    }
    asm volatile("cp.async.wait_group 0;");
    for (int e = 0; e < 4; e++) d[((lane >> 2) + (e >> 1) * 8) * 8 + (lane & 3) * 2 + (e & 1)] = acc[e];
}
