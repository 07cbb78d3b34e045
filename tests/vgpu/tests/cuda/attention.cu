// Flash attention over sequences of different lengths in one row of tokens, causal, with fewer key heads than query heads.
// q, dout (T, H, 64), k, v (T, K, 64) bf16; out, dq (T, H, 64), dk, dv (T, K, 64), lse, delta (T, H) f32; starts (sequences + 1).
// Tiles of 64 rows; four warps own 16 rows each of every 64x64 product.
typedef unsigned short u16;
typedef unsigned int u32;
#define D 64
#define P 72
#define TILE (64 * P)

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// 64 rows of one head into a tile; rows past the end of the sequence are zero.
__device__ __forceinline__ void load(u16* tile, const u16* x, int first, int end, int heads, int head) {
    for (int i = threadIdx.x; i < 64 * 8; i += 128) {
        int r = i >> 3, c = (i & 7) * 8;
        bool inside = first + r < end;
        const u16* from = inside ? x + ((long long)(first + r) * heads + head) * D + c : x;
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(tile + r * P + c)), "l"(from),
                     "r"(inside ? 16 : 0));
    }
}

__device__ __forceinline__ void arrive_all() {
    asm volatile("cp.async.commit_group;");
    asm volatile("cp.async.wait_group 0;");
    __syncthreads();
}

__device__ __forceinline__ u32 pack(float low, float high) {
    u32 x;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(high), "f"(low));
    return x;
}

__device__ __forceinline__ void mma(float* d, const u32* a, u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8x8 pieces, each read along its rows or (trans) along its columns.
__device__ __forceinline__ void matrix(u32* x, const u16* at, bool trans) {
    if (trans)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared(at)));
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                     : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(shared(at)));
}

// Piece of 16 rows and 16 columns of the left operand, stored (row, k), or (k, row) if turned.
__device__ __forceinline__ void left(u32* a, const u16* tile, int row, int k, bool turned) {
    int lane = threadIdx.x & 31;
    if (turned)
        matrix(a, tile + (k + (lane & 7) + (lane >> 4) * 8) * P + row + ((lane >> 3) & 1) * 8, true);
    else
        matrix(a, tile + (row + (lane & 15)) * P + k + (lane >> 4) * 8, false);
}

// acc (16, 64) += left (16, 16) right (16, 64), right stored (column, k), or (k, column) if turned.
__device__ __forceinline__ void times(float (*acc)[4], const u32* a, const u16* tile, int k, bool turned) {
    int lane = threadIdx.x & 31;
    for (int j = 0; j < 4; j++) {
        u32 b[4];
        if (turned)
            matrix(b, tile + (k + (lane & 15)) * P + j * 16 + (lane >> 4) * 8, true);
        else
            matrix(b, tile + (j * 16 + (lane & 7) + (lane >> 4) * 8) * P + k + ((lane >> 3) & 1) * 8, false);
        mma(acc[2 * j], a, b[0], b[1]);
        mma(acc[2 * j + 1], a, b[2], b[3]);
    }
}

// acc (16 rows of this warp, 64) += left tile, right tile.
__device__ __forceinline__ void product(float (*acc)[4], const u16* l, bool l_turned, const u16* r, bool r_turned) {
    int row = (threadIdx.x >> 5) * 16;
    for (int k = 0; k < 64; k += 16) {
        u32 a[4];
        left(a, l, row, k, l_turned);
        times(acc, a, r, k, r_turned);
    }
}

// As product, with the left operand in the accumulators of an earlier one.
__device__ __forceinline__ void product_of(float (*acc)[4], float (*l)[4], const u16* r) {
    for (int k = 0; k < 4; k++) {
        u32 a[4] = {pack(l[2 * k][0], l[2 * k][1]), pack(l[2 * k][2], l[2 * k][3]), pack(l[2 * k + 1][0], l[2 * k + 1][1]),
                    pack(l[2 * k + 1][2], l[2 * k + 1][3])};
        times(acc, a, r, k * 16, true);
    }
}

__device__ __forceinline__ void clear(float (*acc)[4]) {
    for (int i = 0; i < 8; i++)
        for (int e = 0; e < 4; e++) acc[i][e] = 0.f;
}

// Row and column in the tile of element e of accumulator i.
__device__ __forceinline__ int row_of(int e) { return (threadIdx.x >> 5) * 16 + ((threadIdx.x & 31) >> 2) + (e >> 1) * 8; }
__device__ __forceinline__ int col_of(int i, int e) { return i * 8 + (threadIdx.x & 3) * 2 + (e & 1); }

__device__ __forceinline__ void store(float* out, float (*acc)[4], int first, int end, int heads, int head) {
    for (int i = 0; i < 8; i++)
        for (int e = 0; e < 4; e++)
            if (first + row_of(e) < end) out[((long long)(first + row_of(e)) * heads + head) * D + col_of(i, e)] = acc[i][e];
}

extern "C" __global__ void __launch_bounds__(128)
attention_forward(const u16* q, const u16* k, const u16* v, float* out, float* lse, const int* starts, int heads, int kv_heads,
                  float scale) {
    extern __shared__ __align__(16) u16 smem[];
    u16 *tq = smem, *tk = smem + TILE, *tv = smem + 2 * TILE;
    int begin = starts[blockIdx.z], end = starts[blockIdx.z + 1], first = begin + blockIdx.x * 64;
    if (first >= end) return;
    int head = blockIdx.y, kv = head / (heads / kv_heads);
    float o[8][4], top[2] = {-1e30f, -1e30f}, sum[2] = {0.f, 0.f};
    clear(o);
    load(tq, q, first, end, heads, head);
    for (int from = begin; from <= first; from += 64) {
        load(tk, k, from, end, kv_heads, kv);
        load(tv, v, from, end, kv_heads, kv);
        arrive_all();
        float s[8][4];
        clear(s);
        product(s, tq, false, tk, false);
        float high[2] = {top[0], top[1]};
        for (int i = 0; i < 8; i++)
            for (int e = 0; e < 4; e++) {
                int key = from + col_of(i, e);
                s[i][e] = key <= first + row_of(e) && key < end ? s[i][e] * scale : -1e30f;
                high[e >> 1] = fmaxf(high[e >> 1], s[i][e]);
            }
        for (int h = 0; h < 2; h++) {
            high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 1));
            high[h] = fmaxf(high[h], __shfl_xor_sync(0xffffffffu, high[h], 2));
            float shrink = __expf(top[h] - high[h]);
            top[h] = high[h];
            sum[h] *= shrink;
            for (int i = 0; i < 8; i++) {
                o[i][2 * h] *= shrink;
                o[i][2 * h + 1] *= shrink;
            }
        }
        for (int i = 0; i < 8; i++)
            for (int e = 0; e < 4; e++) {
                s[i][e] = s[i][e] > -1e29f ? __expf(s[i][e] - top[e >> 1]) : 0.f;
                sum[e >> 1] += s[i][e];
            }
        product_of(o, s, tv);
        __syncthreads();
    }
    for (int h = 0; h < 2; h++) {
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 1);
        sum[h] += __shfl_xor_sync(0xffffffffu, sum[h], 2);
        for (int i = 0; i < 8; i++) {
            o[i][2 * h] /= sum[h];
            o[i][2 * h + 1] /= sum[h];
        }
        int row = first + row_of(2 * h);
        if (row < end && (threadIdx.x & 3) == 0) lse[(long long)row * heads + head] = top[h] + logf(sum[h]);
    }
    store(out, o, first, end, heads, head);
}

// delta = sum over the head of out * dout; one warp for each row and head.
extern "C" __global__ void attention_delta(const float* out, const u16* dout, float* delta, int rows) {
    int row = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
    if (row >= rows) return;
    float s = 0.f;
    for (int i = lane; i < D; i += 32)
        s += out[(long long)row * D + i] * __uint_as_float((u32)dout[(long long)row * D + i] << 16);
    for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(0xffffffffu, s, d);
    if (lane == 0) delta[row] = s;
}

// p and ds of one pair of tiles, in the accumulators: p = exp(q k scale - lse), ds = p (dout v - delta) scale.
__device__ __forceinline__ void scores(float (*p)[4], float (*ds)[4], const u16* tq, const u16* tk, const u16* tv,
                                       const u16* tdo, const float* lse, const float* delta, int first, int from, int end,
                                       int heads, int head, float scale) {
    clear(p);
    clear(ds);
    product(p, tq, false, tk, false);
    product(ds, tdo, false, tv, false);
    for (int e = 0; e < 4; e++) {
        int row = first + row_of(e);
        float l = row < end ? lse[(long long)row * heads + head] : 0.f;
        float d = row < end ? delta[(long long)row * heads + head] : 0.f;
        for (int i = 0; i < 8; i++) {
            int key = from + col_of(i, e);
            p[i][e] = key <= row && row < end ? __expf(p[i][e] * scale - l) : 0.f;
            ds[i][e] = p[i][e] * (ds[i][e] - d) * scale;
        }
    }
}

extern "C" __global__ void __launch_bounds__(128)
attention_backward_query(const u16* q, const u16* k, const u16* v, const u16* dout, const float* lse, const float* delta,
                         float* dq, const int* starts, int heads, int kv_heads, float scale) {
    extern __shared__ __align__(16) u16 smem[];
    u16 *tq = smem, *tk = smem + TILE, *tv = smem + 2 * TILE, *tdo = smem + 3 * TILE;
    int begin = starts[blockIdx.z], end = starts[blockIdx.z + 1], first = begin + blockIdx.x * 64;
    if (first >= end) return;
    int head = blockIdx.y, kv = head / (heads / kv_heads);
    float acc[8][4];
    clear(acc);
    load(tq, q, first, end, heads, head);
    load(tdo, dout, first, end, heads, head);
    for (int from = begin; from <= first; from += 64) {
        load(tk, k, from, end, kv_heads, kv);
        load(tv, v, from, end, kv_heads, kv);
        arrive_all();
        float p[8][4], ds[8][4];
        scores(p, ds, tq, tk, tv, tdo, lse, delta, first, from, end, heads, head, scale);
        product_of(acc, ds, tk);
        __syncthreads();
    }
    store(dq, acc, first, end, heads, head);
}

extern "C" __global__ void __launch_bounds__(128)
attention_backward_key(const u16* q, const u16* k, const u16* v, const u16* dout, const float* lse, const float* delta,
                       float* dk, float* dv, const int* starts, int heads, int kv_heads, float scale) {
    extern __shared__ __align__(16) u16 smem[];
    u16 *tq = smem, *tk = smem + TILE, *tv = smem + 2 * TILE, *tdo = smem + 3 * TILE, *tp = smem + 4 * TILE,
        *tds = smem + 5 * TILE;
    int begin = starts[blockIdx.z], end = starts[blockIdx.z + 1], from = begin + blockIdx.x * 64;
    if (from >= end) return;
    int kv = blockIdx.y, group = heads / kv_heads;
    float ak[8][4], av[8][4];
    clear(ak);
    clear(av);
    load(tk, k, from, end, kv_heads, kv);
    load(tv, v, from, end, kv_heads, kv);
    for (int head = kv * group; head < (kv + 1) * group; head++)
        for (int first = from; first < end; first += 64) {
            load(tq, q, first, end, heads, head);
            load(tdo, dout, first, end, heads, head);
            arrive_all();
            float p[8][4], ds[8][4];
            scores(p, ds, tq, tk, tv, tdo, lse, delta, first, from, end, heads, head, scale);
            for (int i = 0; i < 8; i++)
                for (int e = 0; e < 4; e += 2) {
                    *(u32*)(tp + row_of(e) * P + col_of(i, e)) = pack(p[i][e], p[i][e + 1]);
                    *(u32*)(tds + row_of(e) * P + col_of(i, e)) = pack(ds[i][e], ds[i][e + 1]);
                }
            __syncthreads();
            product(av, tp, true, tdo, true);
            product(ak, tds, true, tq, true);
            __syncthreads();
        }
    store(dk, ak, from, end, kv_heads, kv);
    store(dv, av, from, end, kv_heads, kv);
}
