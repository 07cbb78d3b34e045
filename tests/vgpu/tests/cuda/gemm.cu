// C (m, n) = A (m, k) B (k, n), bf16 in, f32 out: 64x64x32 tiles, four warps, three stages of cp.async, ldmatrix, mma.sync.
// m is any number; n and k are multiples of 8, so that rows start at 16 bytes. Edges are filled with zeros by cp.async.
typedef unsigned short u16;
typedef unsigned int u32;
#define BM 64
#define BN 64
#define BK 32
#define STAGES 3
#define PA BK
#define PB (BN + 8)

__device__ __forceinline__ u32 shared(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Where eight numbers of a row of the left tile lie: turned with the row, so that neither cp.async nor ldmatrix meets a bank twice.
__device__ __forceinline__ int turned(int r, int c) { return r * PA + ((c >> 3) ^ ((r >> 1) & 3)) * 8; }

__device__ __forceinline__ void copy16(void* to, const void* from, bool inside) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared(to)), "l"(from), "r"(inside ? 16 : 0));
}

__device__ __forceinline__ void load_tile(u16* sa, u16* sb, const u16* a, const u16* b, int m, int n, int k, int row0,
                                          int col0, int k0) {
    for (int i = threadIdx.x; i < BM * BK / 8; i += 128) {
        int r = i >> 2, c = (i & 3) * 8;
        bool inside = row0 + r < m && k0 + c < k;
        copy16(sa + turned(r, c), inside ? a + (long long)(row0 + r) * k + k0 + c : a, inside);
    }
    for (int i = threadIdx.x; i < BK * BN / 8; i += 128) {
        int r = i >> 3, c = (i & 7) * 8;
        bool inside = k0 + r < k && col0 + c < n;
        copy16(sb + r * PB + c, inside ? b + (long long)(k0 + r) * n + col0 + c : b, inside);
    }
}

extern "C" __global__ void __launch_bounds__(128) gemm(const u16* a, const u16* b, float* c, int m, int n, int k) {
    extern __shared__ __align__(16) u16 smem[];
    u16 *sa = smem, *sb = smem + STAGES * BM * PA;
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, wm = (warp >> 1) * 32, wn = (warp & 1) * 32;
    int row0 = blockIdx.y * BM, col0 = blockIdx.x * BN, tiles = (k + BK - 1) / BK;
    float acc[2][4][4] = {};
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) load_tile(sa + s * BM * PA, sb + s * BK * PB, a, b, m, n, k, row0, col0, s * BK);
        asm volatile("cp.async.commit_group;");
    }
    for (int t = 0; t < tiles; t++) {
        asm volatile("cp.async.wait_group %0;" ::"n"(STAGES - 2));
        __syncthreads();
        int next = t + STAGES - 1;
        if (next < tiles)
            load_tile(sa + next % STAGES * BM * PA, sb + next % STAGES * BK * PB, a, b, m, n, k, row0, col0, next * BK);
        asm volatile("cp.async.commit_group;");
        const u16 *ta = sa + t % STAGES * BM * PA, *tb = sb + t % STAGES * BK * PB;
        for (int ks = 0; ks < BK; ks += 16) {
            u32 x[2][4], y[2][4];
            for (int i = 0; i < 2; i++)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(x[i][0]), "=r"(x[i][1]), "=r"(x[i][2]), "=r"(x[i][3])
                             : "r"(shared(ta + turned(wm + i * 16 + (lane & 15), ks + (lane >> 4) * 8))));
            for (int j = 0; j < 2; j++)
                asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                             : "=r"(y[j][0]), "=r"(y[j][1]), "=r"(y[j][2]), "=r"(y[j][3])
                             : "r"(shared(tb + (ks + (lane & 15)) * PB + wn + j * 16 + (lane >> 4) * 8)));
            for (int i = 0; i < 2; i++)
                for (int j = 0; j < 4; j++)
                    asm volatile(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
                        "{%0,%1,%2,%3};"
                        : "+f"(acc[i][j][0]), "+f"(acc[i][j][1]), "+f"(acc[i][j][2]), "+f"(acc[i][j][3])
                        : "r"(x[i][0]), "r"(x[i][1]), "r"(x[i][2]), "r"(x[i][3]), "r"(y[j >> 1][(j & 1) * 2]),
                          "r"(y[j >> 1][(j & 1) * 2 + 1]));
        }
    }
    asm volatile("cp.async.wait_group 0;");
    for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++)
            for (int e = 0; e < 4; e++) {
                int r = row0 + wm + i * 16 + (lane >> 2) + (e >> 1) * 8, q = col0 + wn + j * 8 + (lane & 3) * 2 + (e & 1);
                if (r < m && q < n) c[(long long)r * n + q] = acc[i][j][e];
            }
}
