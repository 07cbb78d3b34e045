// Kernels of a training step for the bench and its tests: product, attention, norm, cross-entropy, AdamW, rope, two loops.
typedef unsigned short u16;
typedef unsigned int u32;
#define INFINITY __int_as_float(0x7f800000)
#define DEVICE static __device__ __forceinline__
DEVICE float widen(u16 x) { return __uint_as_float((u32)x << 16); }
DEVICE u32 narrow2(float low, float high) {
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}
DEVICE u32 shared_at(const void* p) { return (u32)__cvta_generic_to_shared(p); }
DEVICE void copy16(u32 to, const void* from, int size) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size));
}
DEVICE void commit() { asm volatile("cp.async.commit_group;"); }
template <int N> DEVICE void wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N)); }
DEVICE void matrix4(u32* r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEVICE void matrix4_trans(u32* r, u32 at) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(at));
}
DEVICE void mma(float* d, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C (M, N) f32 = A (M, K) B (N, K)^T, bf16; tiles of 128x128x32, 8 warps of 64x32, two stages. K is a multiple of 8, N even.
// Rows of a tile are 64 bytes; the 16-byte pieces of two rows share the banks, so pieces are moved by the row pair.
DEVICE int piece(int row, int c) { return row * 64 + ((c ^ (row >> 1 & 3)) << 4); }

extern "C" __global__ void __launch_bounds__(256) gemm(const u16* a, const u16* b, float* c, int M, int N, int K) {
    __shared__ __align__(128) char tiles[2][2][128 * 64];
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5;
    int wm = (warp & 1) * 64, wn = (warp >> 1) * 32, m0 = blockIdx.y * 128, n0 = blockIdx.x * 128;
    float acc[4][4][4] = {};
    auto load = [&](int stage, int k0) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            int row = (tid + i * 256) >> 2, col = tid & 3, k = k0 + col * 8;
            bool in = m0 + row < M && k < K;
            copy16(shared_at(tiles[stage][0] + piece(row, col)), in ? a + (long long)(m0 + row) * K + k : a, in ? 16 : 0);
            in = n0 + row < N && k < K;
            copy16(shared_at(tiles[stage][1] + piece(row, col)), in ? b + (long long)(n0 + row) * K + k : b, in ? 16 : 0);
        }
        commit();
    };
    load(0, 0);
    int steps = (K + 31) / 32;
    for (int t = 0; t < steps; t++) {
        if (t + 1 < steps) load(t + 1 & 1, (t + 1) * 32); else commit();
        wait<1>();
        __syncthreads();
        u32 sa = shared_at(tiles[t & 1][0]), sb = shared_at(tiles[t & 1][1]);
#pragma unroll
        for (int k = 0; k < 4; k += 2) {
            u32 fa[4][4], fb[2][4];
#pragma unroll
            for (int i = 0; i < 4; i++) matrix4(fa[i], sa + piece(wm + i * 16 + (lane & 15), k + (lane >> 4)));
#pragma unroll
            for (int j = 0; j < 2; j++)
                matrix4(fb[j], sb + piece(wn + j * 16 + (lane & 7) + (lane >> 4) * 8, k + (lane >> 3 & 1)));
#pragma unroll
            for (int i = 0; i < 4; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) mma(acc[i][j], fa[i], fb[j >> 1][(j & 1) * 2], fb[j >> 1][(j & 1) * 2 + 1]);
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int h = 0; h < 2; h++) {
                int row = m0 + wm + i * 16 + (lane >> 2) + h * 8, col = n0 + wn + j * 8 + (lane & 3) * 2;
                if (row < M && col < N)
                    *(float2*)(c + (long long)row * N + col) = make_float2(acc[i][j][h * 2], acc[i][j][h * 2 + 1]);
            }
}

// Causal attention of T tokens in documents (start[t] is the first token of t's document), H query heads on H / G heads
// of K and V, 64 wide; q (T, H, 64), k and v (T, H / G, 64) bf16, out (T, H, 64) f32. 4 warps of 16 rows, 64 keys a step.
DEVICE int piece64(int row, int c) { return row * 128 + ((c ^ (row & 7)) << 4); }

extern "C" __global__ void __launch_bounds__(128)
    flash(const u16* q, const u16* k, const u16* v, const int* start, float* out, int T, int H, int G, float scale) {
    __shared__ __align__(128) char sk[64 * 128], sv[64 * 128];
    int tid = threadIdx.x, lane = tid & 31, warp = tid >> 5, head = blockIdx.y, t0 = blockIdx.x * 64;
    int kv = H / G, row = t0 + warp * 16 + (lane >> 2);
    const u16* heads[2] = {k + (head / G) * 64, v + (head / G) * 64};
    auto load = [&](char* tile, const u16* from, int first, int stride) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            int r = (tid + i * 128) >> 3, c = tid & 7;
            bool in = first + r < T;
            copy16(shared_at(tile + piece64(r, c)), in ? from + (long long)(first + r) * stride + c * 8 : from, in ? 16 : 0);
        }
    };
    u32 fq[4][4];
    load(sk, q + head * 64, t0, H * 64);
    commit();
    wait<0>();
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; i++) matrix4(fq[i], shared_at(sk) + piece64(warp * 16 + (lane & 15), i * 2 + (lane >> 4)));
    __syncthreads();
    int doc[2] = {row < T ? start[row] : T, row + 8 < T ? start[row + 8] : T};
    int first = start[t0] / 64 * 64, last = min(t0 + 64, T);
    float o[8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.f, 0.f};
    for (int s0 = first; s0 < last; s0 += 64) {
        load(sk, heads[0], s0, kv * 64);
        load(sv, heads[1], s0, kv * 64);
        commit();
        wait<0>();
        __syncthreads();
        float s[8][4] = {};
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int i = 0; i < 4; i++) {
                u32 fk[4];
                matrix4(fk, shared_at(sk) + piece64(j * 16 + (lane & 7) + (lane >> 4) * 8, i * 2 + (lane >> 3 & 1)));
                mma(s[j * 2], fq[i], fk[0], fk[1]);
                mma(s[j * 2 + 1], fq[i], fk[2], fk[3]);
            }
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float m = top[h];
#pragma unroll
            for (int j = 0; j < 8; j++)
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    int key = s0 + j * 8 + (lane & 3) * 2 + e;
                    float& x = s[j][h * 2 + e];
                    x = key <= row + h * 8 && key >= doc[h] ? x * scale : -INFINITY;
                    m = fmaxf(m, x);
                }
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
            m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
            // A row without keys so far would give infinity minus infinity.
            float base = m == -INFINITY ? 0.f : m, old = exp2f(top[h] - base);
            top[h] = m;
            sum[h] *= old;
#pragma unroll
            for (int j = 0; j < 8; j++) {
                o[j][h * 2] *= old;
                o[j][h * 2 + 1] *= old;
                s[j][h * 2] = exp2f(s[j][h * 2] - base);
                s[j][h * 2 + 1] = exp2f(s[j][h * 2 + 1] - base);
                sum[h] += s[j][h * 2] + s[j][h * 2 + 1];
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            u32 fp[4] = {narrow2(s[2 * i][0], s[2 * i][1]), narrow2(s[2 * i][2], s[2 * i][3]),
                         narrow2(s[2 * i + 1][0], s[2 * i + 1][1]), narrow2(s[2 * i + 1][2], s[2 * i + 1][3])};
#pragma unroll
            for (int j = 0; j < 4; j++) {
                u32 fv[4];
                matrix4_trans(fv, shared_at(sv) + piece64(i * 16 + (lane & 15), j * 2 + (lane >> 4)));
                mma(o[j * 2], fp, fv[0], fv[1]);
                mma(o[j * 2 + 1], fp, fv[2], fv[3]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float total = sum[h];
        total += __shfl_xor_sync(0xffffffffu, total, 1);
        total += __shfl_xor_sync(0xffffffffu, total, 2);
        if (row + h * 8 < T)
#pragma unroll
            for (int j = 0; j < 8; j++)
                *(float2*)(out + ((long long)(row + h * 8) * H + head) * 64 + j * 8 + (lane & 3) * 2) =
                    make_float2(o[j][h * 2] / total, o[j][h * 2 + 1] / total);
    }
}

// y = x / sqrt(mean(x^2) + eps) * w, bf16; one block per row of C columns, two a thread and turn.
template <bool MAX> DEVICE float block_all(float x, float* part) {
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        float y = __shfl_xor_sync(0xffffffffu, x, d);
        x = MAX ? fmaxf(x, y) : x + y;
    }
    if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = x;
    __syncthreads();
    x = part[0];
    for (int i = 1; i < blockDim.x >> 5; i++) x = MAX ? fmaxf(x, part[i]) : x + part[i];
    __syncthreads();
    return x;
}

extern "C" __global__ void rmsnorm(const u32* x, const u32* w, u32* y, int C, float eps) {
    __shared__ float part[32];
    long long row = (long long)blockIdx.x * (C / 2);
    float s = 0.f;
    for (int i = threadIdx.x; i < C / 2; i += blockDim.x) {
        float a = widen((u16)x[row + i]), b = __uint_as_float(x[row + i] & 0xffff0000u);
        s += a * a + b * b;
    }
    float r = rsqrtf(block_all<false>(s, part) / C + eps);
    for (int i = threadIdx.x; i < C / 2; i += blockDim.x) {
        u32 v = x[row + i], g = w[i];
        y[row + i] = narrow2(widen((u16)v) * r * widen((u16)g),
                             __uint_as_float(v & 0xffff0000u) * r * __uint_as_float(g & 0xffff0000u));
    }
}

// Cross-entropy of one row of V logits per block; logits become gradients times scale; target < 0 counts nothing.
extern "C" __global__ void cross_entropy(float* logits, const int* target, float* loss, int V, float scale) {
    __shared__ float part[32];
    float* row = logits + (long long)blockIdx.x * V;
    int want = target[blockIdx.x];
    float m = -INFINITY;
    for (int i = threadIdx.x; i < V; i += blockDim.x) m = fmaxf(m, row[i]);
    m = block_all<true>(m, part);
    float s = 0.f;
    for (int i = threadIdx.x; i < V; i += blockDim.x) s += expf(row[i] - m);
    s = block_all<false>(s, part);
    if (threadIdx.x == 0) loss[blockIdx.x] = want < 0 ? 0.f : logf(s) + m - row[want];
    __syncthreads();
    float f = want < 0 ? 0.f : scale;
    for (int i = threadIdx.x; i < V; i += blockDim.x)
        row[i] = f * (expf(row[i] - m) / s - (i == want ? 1.f : 0.f));
}

// AdamW with decoupled decay on n parameters in f32, four a thread.
extern "C" __global__ void adamw(float4* p, const float4* g, float4* m, float4* v, int n, float lr, float b1, float b2,
                                 float eps, float decay, float c1, float c2) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i * 4 >= n) return;
    float4 x = p[i], d = g[i], a = m[i], b = v[i];
    auto one = [&](float& x, float d, float& a, float& b) {
        a = b1 * a + (1.f - b1) * d;
        b = b2 * b + (1.f - b2) * d * d;
        x -= lr * ((a / c1) / (sqrtf(b / c2) + eps) + decay * x);
    };
    one(x.x, d.x, a.x, b.x);
    one(x.y, d.y, a.y, b.y);
    one(x.z, d.z, a.z, b.z);
    one(x.w, d.w, a.w, b.w);
    p[i] = x;
    m[i] = a;
    v[i] = b;
}

// Rotary embedding in place on x (T, H, D) f32 with positions, angles by exp2f and sincosf; pairs (i, i + D / 2).
extern "C" __global__ void rope(float* x, const int* position, int H, int D, float log2_theta) {
    int i = threadIdx.x, half = D / 2;
    if (i >= half) return;
    float* at = x + ((long long)blockIdx.x * H + blockIdx.y) * D + i, s, c;
    sincosf(position[blockIdx.x] * exp2f(-log2_theta * i / half), &s, &c);
    float a = at[0], b = at[half];
    at[0] = a * c - b * s;
    at[half] = b * c + a * s;
}

// Rows of a table, 16 bytes a thread: out (T, C) = table (V, C)[token], bf16.
extern "C" __global__ void embedding(const uint4* table, const int* token, uint4* out, int C8) {
    long long row = blockIdx.x;
    for (int i = threadIdx.x; i < C8; i += blockDim.x) out[row * C8 + i] = table[token[row] * (long long)C8 + i];
}

// Plain arithmetic: n turns of fma, add and a load from shared memory.
extern "C" __global__ void fma_loop(float* out, int n) {
    __shared__ float s[256];
    int t = threadIdx.x;
    s[t] = t * 0.001f;
    __syncthreads();
    float a = t, b = 0.5f, c = 0.25f;
    for (int i = 0; i < n; i++) {
        a = fmaf(a, b, c);
        b = b + s[(t + i) & 255];
        c = fmaf(c, 0.5f, a);
        b = fmaf(b, 0.25f, a * 0.5f);
    }
    out[blockIdx.x * blockDim.x + t] = a + b + c;
}

// Matrix instructions alone: n turns of eight.
extern "C" __global__ void mma_loop(float* out, int n) {
    float d[8][4] = {};
    u32 a[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u}, b = 0x3c003c00u;
    for (int i = 0; i < n; i++)
#pragma unroll
        for (int j = 0; j < 8; j++) mma(d[j], a, b, b);
    float s = 0.f;
    for (int j = 0; j < 8; j++) s += d[j][0] + d[j][1] + d[j][2] + d[j][3];
    out[threadIdx.x] = s;
}
