// Root-mean-square norm, forward and backward (Zhang & Sennrich 2019, arXiv:1910.07467, eq. 4).
//
//   forward    rstd = 1 / sqrt(mean(x^2) + eps),  out = x rstd w
//   backward   dx (+)= rstd (w dout - xhat mean(w dout xhat)) with xhat = x rstd,  dw += sum over groups of dout xhat
//
// Shapes: x, out, dx, dout (N, C), seen as `groups` = N C / D groups of D neighbours; w, dw (1, D); rstd one per group. D = C for a
// norm of rows, D dividing C for a norm per head.
// Defines: X_T, W_T, OUT_T (forward), X_T, W_T, DOUT_T, DX_T (backward), each float or bf16; VEC = 8 where D is a multiple of 8,
// else 1; DIRECTION_FORWARD or DIRECTION_BACKWARD.
// Numerics: everything in f32, one rounding of each stored value. Sums in a fixed order that does not depend on the number of rows:
// a group belongs to `team` threads (8, 32 or all THREADS; the launch chooses by D), each sums its elements, then a butterfly.
// dw: each team sums its groups in shared memory, the teams of a block are added in order, then column_sums_add adds the blocks in order.
// Launch: blocks of THREADS threads. Forward: THREADS / team groups a block. Backward: ROUNDS times as many; dynamic shared memory
// of THREADS / team * D floats where dw is asked for, else none; `partial` holds one row of D floats per block.
// Cost in bytes a row of C bf16: forward 4 C, backward 6 C (dx set) or 8 C (dx added to); 4 C and 11 C flops. Memory-bound.
// Test: tests/common/norms.rs, on every device.
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256;
constexpr int ROUNDS = 16;
static_assert(VEC == 1 || VEC == 8, "VEC is 1 or 8");

#ifdef DIRECTION_FORWARD
extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_forward(OUT_T *__restrict__ out, float *__restrict__ rstd, const X_T *__restrict__ x, const W_T *__restrict__ w,
                    float eps, u32 groups, u32 width, u32 team) {
    __shared__ float scratch[THREADS / 32];
    const u32 member = threadIdx.x % team;
    const u32 group = blockIdx.x * (THREADS / team) + threadIdx.x / team;
    // Threads beyond the last group read nothing but take part in the sums.
    const bool inside = group < groups;
    const u64 at = u64(group) * width;
    float sum = 0.0f;
    if (inside) {
        for (u32 j = member * VEC; j < width; j += team * VEC) {
            float v[VEC];
            load_vec<VEC>(v, x + at + j);
#pragma unroll
            for (int i = 0; i < VEC; i++) sum = fmaf(v[i], v[i], sum);
        }
    }
    sum = group_sum<THREADS>(sum, team, scratch);
    if (!inside) return;
    const float r = 1.0f / sqrtf(sum / float(width) + eps);
    if (member == 0) rstd[group] = r;
    for (u32 j = member * VEC; j < width; j += team * VEC) {
        float v[VEC], s[VEC];
        load_vec<VEC>(v, x + at + j);
        load_vec<VEC>(s, w + j);
#pragma unroll
        for (int i = 0; i < VEC; i++) v[i] = v[i] * r * s[i];
        store_vec<VEC>(out + at + j, v);
    }
}
#endif

#ifdef DIRECTION_BACKWARD
// add: dx is added to. with_dw: `partial` row blockIdx.x becomes this block's sum for dw.
extern "C" __global__ void __launch_bounds__(THREADS)
    rmsnorm_backward(DX_T *__restrict__ dx, float *__restrict__ partial, const DOUT_T *__restrict__ dout, const X_T *__restrict__ x,
                     const W_T *__restrict__ w, const float *__restrict__ rstd, u32 groups, u32 width, u32 team, u32 add,
                     u32 with_dw) {
    extern __shared__ __align__(16) float sums[]; // (THREADS / team, width)
    __shared__ float scratch[THREADS / 32];
    const u32 member = threadIdx.x % team, teams = THREADS / team, which = threadIdx.x / team;
    float *mine = sums + which * width;
    if (with_dw) {
        // The same thread adds to the same columns in every round: no barrier is needed until the end.
        for (u32 j = member * VEC; j < width; j += team * VEC) {
            const float zero[VEC] = {};
            store_vec<VEC>(mine + j, zero);
        }
    }
    for (u32 round = 0; round < ROUNDS; round++) {
        const u32 group = (blockIdx.x * ROUNDS + round) * teams + which;
        const bool inside = group < groups;
        const u64 at = u64(group) * width;
        const float r = inside ? rstd[group] : 0.0f;
        float dot = 0.0f;
        if (inside) {
            for (u32 j = member * VEC; j < width; j += team * VEC) {
                float v[VEC], d[VEC], s[VEC];
                load_vec<VEC>(v, x + at + j);
                load_vec<VEC>(d, dout + at + j);
                load_vec<VEC>(s, w + j);
#pragma unroll
                for (int i = 0; i < VEC; i++) dot = fmaf(d[i] * s[i], v[i], dot);
            }
        }
        dot = group_sum<THREADS>(dot, team, scratch);
        if (!inside) continue;
        // mean(w dout xhat) rstd: what x is multiplied by.
        const float back = dot * r / float(width) * r;
        for (u32 j = member * VEC; j < width; j += team * VEC) {
            float v[VEC], d[VEC], s[VEC], o[VEC];
            load_vec<VEC>(v, x + at + j);
            load_vec<VEC>(d, dout + at + j);
            load_vec<VEC>(s, w + j);
#pragma unroll
            for (int i = 0; i < VEC; i++) o[i] = r * fmaf(-v[i], back, d[i] * s[i]);
            if (add) {
                float old[VEC];
                load_vec<VEC>(old, dx + at + j);
#pragma unroll
                for (int i = 0; i < VEC; i++) o[i] += old[i];
            }
            store_vec<VEC>(dx + at + j, o);
            if (with_dw) {
                float acc[VEC];
                load_vec<VEC>(acc, mine + j);
#pragma unroll
                for (int i = 0; i < VEC; i++) acc[i] = fmaf(d[i], v[i] * r, acc[i]);
                store_vec<VEC>(mine + j, acc);
            }
        }
    }
    if (!with_dw) return;
    __syncthreads();
    for (u32 j = threadIdx.x; j < width; j += THREADS) {
        float sum = 0.0f;
        for (u32 t = 0; t < teams; t++) sum += sums[t * width + j];
        partial[u64(blockIdx.x) * width + j] = sum;
    }
}
#endif
