// Programs of the Hopper set: TMA, mbarriers, wgmma, clusters; and the same with a mistake planted (`bug`).
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

struct __align__(64) Map {
    u64 opaque[16];
};

__device__ u32 smem(const void *p) { return (u32)__cvta_generic_to_shared(p); }

__device__ void bar_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count));
}

__device__ void bar_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

__device__ void bar_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

// Arrival at the barrier of block `rank` of the cluster.
__device__ void bar_arrive_at(u32 bar, u32 rank) {
    asm volatile("{ .reg .b32 r; mapa.shared::cluster.u32 r, %0, %1;\n"
                 "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [r]; }" ::"r"(bar), "r"(rank) : "memory");
}

__device__ void bar_wait(u32 bar, u32 parity) {
    asm volatile("{ .reg .pred p;\n"
                 "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1;\n"
                 "@p bra DONE;\n"
                 "bra AGAIN;\n"
                 "DONE: }" ::"r"(bar), "r"(parity) : "memory");
}

__device__ void tma_load(u32 to, const Map *map, u32 bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
                 " [%0], [%1, {%3, %4}], [%2];"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y) : "memory");
}

__device__ void tma_load_both(u32 to, const Map *map, u32 bar, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster"
                 " [%0], [%1, {%3, %4}], [%2], %5;"
                 ::"r"(to), "l"(map), "r"(bar), "r"(x), "r"(y), "h"((u16)3) : "memory");
}

__device__ void tma_store(const Map *map, u32 from, int x, int y) {
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
                 ::"l"(map), "r"(from), "r"(x), "r"(y) : "memory");
}

__device__ bool elect() {
    u32 p;
    asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.b32 %0, 1, 0, p; }" : "=r"(p));
    return p;
}

__device__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory"); }
__device__ void proxy_fence() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// K-major with a swizzle of 128 bytes: 1024 bytes from eight rows to the next eight.
__device__ u64 descriptor(u32 at) { return (u64)((at & 0x3ffff) >> 4) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62; }

__device__ u32 bf16x2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ void mma128(float (&d)[64], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %66, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, "
        "%42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, "
        "%62, %63 "
        "}, %64, %65, p, 1, 1, 0, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31]),
          "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39]),
          "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47]),
          "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55]),
          "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
        : "l"(a), "l"(b), "r"(add));
}

__device__ void rs64(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

__device__ void scores64(float (&d)[32], u64 a, u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %34, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, %32, %33, p, 1, 1, 0, 0; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "l"(a), "l"(b), "r"(add));
}

__device__ void values64(float (&d)[32], const u32 (&a)[4], u64 b, int add) {
    asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, "
        "%22, %23, %24, %25, %26, %27, %28, %29, %30, %31 "
        "}, {%32, %33, %34, %35}, %36, p, 1, 1, 1; }"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]),
          "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]),
          "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]),
          "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(add));
}

enum { NONE, NO_EXPECT, WRONG_PARITY, NO_PROXY_FENCE, NO_WGMMA_FENCE, TOO_MANY_REGISTERS, EARLY_RELEASE, NO_WAIT };
enum { STAGES = 3, TILE_A = 128 * 64 * 2, TILE_B = 128 * 64 * 2, HALF_OUT = 64 * 64 * 2 };

// out (M, N) bf16 = a (M, K) * b (N, K)^T, persistent over tiles of 128x128x64: a producer and two consumer warpgroups,
// TMA in and out. `tiles_m * tiles_n` tiles, `steps` of K.
extern "C" __global__ void __launch_bounds__(384, 1)
gemm(const __grid_constant__ Map a, const __grid_constant__ Map b, const __grid_constant__ Map out,
     int tiles_m, int tiles_n, int steps, int bug) {
    extern __shared__ __align__(1024) unsigned char space[];
    __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
    u32 base = smem(space), base_out = base + STAGES * (TILE_A + TILE_B);
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            bar_init(smem(&full[i]), 1);
            bar_init(smem(&empty[i]), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
        asm volatile("prefetch.tensormap [%0];" ::"l"(&a));
    }
    __syncthreads();
    int n = 0;
    if (group == 0) {
        asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
        if (warp == 0 && elect()) {
            for (int t = blockIdx.x; t < tiles_m * tiles_n; t += gridDim.x) {
                for (int k = 0; k < steps; k++, n++) {
                    int s = n % STAGES;
                    bar_wait(smem(&empty[s]), (n / STAGES & 1) ^ 1);
                    if (bug == NO_EXPECT) bar_arrive(smem(&full[s]));
                    else bar_expect(smem(&full[s]), TILE_A + TILE_B);
                    tma_load(base + s * TILE_A, &a, smem(&full[s]), k * 64, t / tiles_n * 128);
                    tma_load(base + STAGES * TILE_A + s * TILE_B, &b, smem(&full[s]), k * 64, t % tiles_n * 128);
                }
            }
        }
        return;
    }
    if (bug == TOO_MANY_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 240;");
    else asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    u32 mine = base_out + (group - 1) * 2 * HALF_OUT;
    for (int t = blockIdx.x; t < tiles_m * tiles_n; t += gridDim.x) {
        float d[64];
        for (int k = 0; k < steps; k++, n++) {
            int s = n % STAGES;
            if (bug != NO_WAIT) bar_wait(smem(&full[s]), (n / STAGES & 1) ^ (bug == WRONG_PARITY));
            u32 at = base + s * TILE_A + (group - 1) * 64 * 128, bt = base + STAGES * TILE_A + s * TILE_B;
            if (bug != NO_WGMMA_FENCE) wgmma_fence();
#pragma unroll
            for (int q = 0; q < 4; q++) mma128(d, descriptor(at + 32 * q), descriptor(bt + 32 * q), k + q > 0);
            wgmma_commit();
            if (bug != EARLY_RELEASE) wgmma_wait<0>();
            if (lane == 0) bar_arrive(smem(&empty[s]));
            if (bug == EARLY_RELEASE) wgmma_wait<0>();
        }
        // The copy of the tile before must have read the buffer.
        if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
        asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
        int row = warp % 4 * 16 + lane / 4;
#pragma unroll
        for (int i = 0; i < 64; i += 2) {
            // Column 8 (i / 4) + 2 (lane % 4) of row `row` or eight below; 64 columns to a swizzled half.
            int r = row + (i / 2 & 1) * 8, chunk = i / 4 % 8;
            u32 at = mine + i / 32 * HALF_OUT + r * 128 + ((chunk ^ r & 7) << 4) + lane % 4 * 4;
            asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(bf16x2(d[i], d[i + 1])) : "memory");
        }
        if (bug != NO_PROXY_FENCE) proxy_fence();
        asm volatile("bar.sync %0, 128;" ::"r"(group) : "memory");
        if (threadIdx.x % 128 == 0) {
            int x = t % tiles_n * 128, y = t / tiles_n * 128 + (group - 1) * 64;
            tma_store(&out, mine, x, y);
            tma_store(&out, mine + HALF_OUT, x + 64, y);
            asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        }
    }
    if (threadIdx.x % 128 == 0) asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// out (128, 128) f32 = a (128, K) * b (128, K)^T: one product group stays in flight while the next is issued.
extern "C" __global__ void __launch_bounds__(288)
pipelined(const __grid_constant__ Map a, const __grid_constant__ Map b, float *out, int steps, int bug) {
    extern __shared__ __align__(1024) unsigned char space[];
    __shared__ __align__(8) u64 full[STAGES], empty[STAGES];
    u32 base = smem(space);
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0), warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x == 0) {
        for (int i = 0; i < STAGES; i++) {
            bar_init(smem(&full[i]), 1);
            bar_init(smem(&empty[i]), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncthreads();
    if (group == 2) {
        if (elect()) {
            for (int k = 0; k < steps; k++) {
                int s = k % STAGES;
                bar_wait(smem(&empty[s]), (k / STAGES & 1) ^ 1);
                bar_expect(smem(&full[s]), TILE_A + TILE_B);
                tma_load(base + s * TILE_A, &a, smem(&full[s]), k * 64, 0);
                tma_load(base + STAGES * TILE_A + s * TILE_B, &b, smem(&full[s]), k * 64, 0);
            }
        }
        return;
    }
    float d[64];
    for (int k = 0; k < steps; k++) {
        int s = k % STAGES;
        bar_wait(smem(&full[s]), k / STAGES & 1);
        u32 at = base + s * TILE_A + group * 64 * 128, bt = base + STAGES * TILE_A + s * TILE_B;
        wgmma_fence();
#pragma unroll
        for (int q = 0; q < 4; q++) mma128(d, descriptor(at + 32 * q), descriptor(bt + 32 * q), k + q > 0);
        wgmma_commit();
        if (bug == EARLY_RELEASE) {
            // The buffer of the group that is still in flight.
            if (lane == 0) bar_arrive(smem(&empty[s]));
            wgmma_wait<1>();
        } else {
            wgmma_wait<1>();
            if (k > 0 && lane == 0) bar_arrive(smem(&empty[(k - 1) % STAGES]));
        }
    }
    if (bug != NO_WAIT) wgmma_wait<0>();
    int row = group * 64 + warp % 4 * 16 + lane / 4, col = lane % 4 * 2;
#pragma unroll
    for (int i = 0; i < 64; i++) out[(row + (i / 2 & 1) * 8) * 128 + col + i / 4 * 8 + i % 2] = d[i];
}

// out (64, 64) f32 = a (64, K) f16 in registers * b (K, 64) f16, stored N-major in shared memory without swizzle.
extern "C" __global__ void __launch_bounds__(128) registers_a(const u16 *a, const u16 *b, float *out, int k, int bug) {
    __shared__ __align__(128) u16 tile[16 * 64];
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
    float d[32];
    for (int first = 0; first < k; first += 16) {
        // Core matrices of 8 k by 8 n: n in steps of 256 bytes, k in steps of 128.
        for (int i = threadIdx.x; i < 16 * 64; i += 128) {
            int kk = i / 64, n = i % 64;
            tile[n / 8 * 128 + kk / 8 * 64 + kk % 8 * 8 + n % 8] = b[(first + kk) * 64 + n];
        }
        u32 f[4];
        for (int i = 0; i < 4; i++) f[i] = *(const u32 *)&a[(row + i % 2 * 8) * k + first + col + i / 2 * 8];
        if (bug != NO_PROXY_FENCE) proxy_fence();
        __syncthreads();
        u64 desc = (u64)((smem(tile) & 0x3ffff) >> 4) | (u64)(128 >> 4) << 16 | (u64)(256 >> 4) << 32;
        wgmma_fence();
        rs64(d, f, desc, first > 0);
        wgmma_commit();
        if (bug == EARLY_RELEASE) tile[threadIdx.x] = 0;
        wgmma_wait<0>();
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 32; i++) out[(row + (i / 2 & 1) * 8) * 64 + i / 4 * 8 + col + i % 2] = d[i];
}

// out (M, N) f32 = a (M, K) * b (N, K)^T by clusters of two blocks along M: each block loads half of b's tile for both.
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(160)
cluster_gemm(const __grid_constant__ Map a, const __grid_constant__ Map b, float *out, int n, int steps) {
    extern __shared__ __align__(1024) unsigned char space[];
    __shared__ __align__(8) u64 full[2], empty[2];
    enum { A = 64 * 128, B = 128 * 128 };
    u32 base = smem(space), rank, warp = threadIdx.x / 32;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    if (threadIdx.x == 0) {
        for (int i = 0; i < 2; i++) {
            bar_init(smem(&full[i]), 1);
            bar_init(smem(&empty[i]), 8);
        }
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
    if (warp == 4) {
        if (elect()) {
            for (int k = 0; k < steps; k++) {
                int s = k & 1;
                bar_wait(smem(&empty[s]), (k >> 1 & 1) ^ 1);
                bar_expect(smem(&full[s]), A + B);
                tma_load(base + s * A, &a, smem(&full[s]), k * 64, blockIdx.x * 64);
                int y = blockIdx.y * 128 + rank * 64;
                tma_load_both(base + 2 * A + s * B + rank * (B / 2), &b, smem(&full[s]), k * 64, y);
            }
        }
        __syncwarp();
    } else {
        float d[64];
        for (int k = 0; k < steps; k++) {
            int s = k & 1;
            bar_wait(smem(&full[s]), k >> 1 & 1);
            u32 at = base + s * A, bt = base + 2 * A + s * B;
            wgmma_fence();
#pragma unroll
            for (int q = 0; q < 4; q++) mma128(d, descriptor(at + 32 * q), descriptor(bt + 32 * q), k + q > 0);
            wgmma_commit();
            wgmma_wait<0>();
            // Both blocks fill this buffer: both must know that it is free.
            if (threadIdx.x % 32 < 2) bar_arrive_at(smem(&empty[s]), threadIdx.x % 32);
        }
        int row = blockIdx.x * 64 + warp * 16 + threadIdx.x % 32 / 4, col = blockIdx.y * 128 + threadIdx.x % 4 * 2;
#pragma unroll
        for (int i = 0; i < 64; i++) out[(row + (i / 2 & 1) * 8) * n + col + i / 4 * 8 + i % 2] = d[i];
    }
    // No block may leave while another still arrives at its barriers.
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Causal attention of one head: out (N, 64) f32 = softmax(q k^T scale) v, q, k, v (N, 64) bf16. A block has 64 queries;
// scores and probabilities stay in registers, which are A of the second product.
extern "C" __global__ void __launch_bounds__(128)
attention(const __grid_constant__ Map q, const __grid_constant__ Map k, const __grid_constant__ Map v, float *out,
          float scale) {
    enum { TILE = 64 * 128 };
    extern __shared__ __align__(1024) unsigned char space[];
    __shared__ __align__(8) u64 full;
    u32 sq = smem(space), sk = sq + TILE, sv = sk + TILE;
    int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
    if (threadIdx.x == 0) {
        bar_init(smem(&full), 1);
        asm volatile("fence.mbarrier_init.release.cluster;");
    }
    __syncthreads();
    const float far = -__int_as_float(0x7f800000);
    float o[32], top[2] = {far, far}, sum[2] = {0, 0};
    for (int j = 0; j <= blockIdx.x; j++) {
        if (threadIdx.x == 0) {
            bar_expect(smem(&full), (j == 0 ? 3 : 2) * TILE);
            if (j == 0) tma_load(sq, &q, smem(&full), 0, blockIdx.x * 64);
            tma_load(sk, &k, smem(&full), 0, j * 64);
            tma_load(sv, &v, smem(&full), 0, j * 64);
        }
        bar_wait(smem(&full), j & 1);
        float s[32];
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) scores64(s, descriptor(sq + 32 * i), descriptor(sk + 32 * i), i > 0);
        wgmma_commit();
        wgmma_wait<0>();
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float m = top[h];
#pragma unroll
            for (int i = 0; i < 32; i++) {
                if ((i / 2 & 1) != h) continue;
                bool seen = j < blockIdx.x || i / 4 * 8 + col + i % 2 <= row + h * 8;
                s[i] = seen ? s[i] * scale : far;
                m = fmaxf(m, s[i]);
            }
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 1));
            m = fmaxf(m, __shfl_xor_sync(~0u, m, 2));
            float keep = __expf(top[h] - m);
            top[h] = m;
            sum[h] *= keep;
#pragma unroll
            for (int i = 0; i < 32; i++) {
                if ((i / 2 & 1) != h) continue;
                s[i] = __expf(s[i] - m);
                sum[h] += s[i];
                if (j > 0) o[i] *= keep;
            }
        }
        // Sixteen keys are 2048 bytes of v; its channels are contiguous, so B is N-major.
        u32 p[4][4];
#pragma unroll
        for (int i = 0; i < 16; i++) p[i / 4][i % 4] = bf16x2(s[2 * i], s[2 * i + 1]);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < 4; i++) values64(o, p[i], descriptor(sv + 2048 * i), j + i > 0);
        wgmma_commit();
        wgmma_wait<0>();
        // Nobody reads k and v any more when the next ones are loaded.
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
        sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
#pragma unroll
    for (int i = 0; i < 32; i++) {
        int h = i / 2 & 1;
        out[(blockIdx.x * 64 + row + h * 8) * 64 + i / 4 * 8 + col + i % 2] = o[i] / sum[h];
    }
}
