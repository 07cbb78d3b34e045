// Causal attention inside documents, a warp per query (per key) and head; algorithms 1 and 2 of Dao 2023, arXiv:2307.08691.
//
//   forward   S = scale q k^T over the keys that the query sees;  out = softmax(S) v;  lse = log sum exp S
//   dq        delta = sum dout out;  dS = P (dout v^T - delta) scale with P = exp(S - lse);  dq = dS k
//   dkdv      dv = P^T dout,  dk = dS^T q over the queries that see the key, query head by query head
//   decode    forward of one query per sequence against a cache
//
// Token i sees keys max(doc_start[i], i + 1 - window) .. i; window 0: no window. Query head h reads key head h / (heads / kv_heads).
// Shapes: q, out, dout, dq (N, heads D); k, v, dk, dv (N, kv_heads D); lse, delta (N, heads) f32; table and positions as for
// rope.cu, or null: where they are given dq and dk are turned back before they are rounded. Caches (sequences capacity, kv_heads D).
// Defines: X_T in {float, bf16}; DIMS: 32 DIMS is at least D; VEC = 8 where D is a multiple of 8, else 1.
// Numerics: f32 throughout, probabilities too; one rounding of each stored value. Scores: a lane per key, blocks of 32 keys from the
// first one on; sums of values key by key. So a document has the same bits wherever it stands and whatever stands beside it.
// Launch: WARPS warps a block, a warp per (token, head): forward and dq N heads tasks, dkdv N kv_heads; dynamic shared memory of
// WARPS D floats (forward), 2 WARPS D (dq, dkdv). decode: a block per (sequence, head), its warps take every WARPSth block of keys
// and are merged in order; (WARPS + 1) D + 2 WARPS floats.
// Cost: no tensor cores; keys are read once per query. The path of f32, and the second opinion for whatever is faster.
// Test: tests/common/attention.rs, on every device.
#include "common/elements.cuh"
#include "common/reduce.cuh"

// With one block asked for a multiprocessor, ptxas does not spill a register or two to fit more of them.
constexpr int WARPS = 4, THREADS = 32 * WARPS;
constexpr u32 ALL = 0xffffffffu;
static_assert(VEC == 1 || VEC == 8, "VEC is 1 or 8");

extern __shared__ __align__(16) float shared[];

// Copies a row of D elements to shared memory, for this warp.
__device__ __forceinline__ void stage(float *to, const X_T *from, u32 dim) {
    for (u32 d = threadIdx.x % 32; d < dim; d += 32) to[d] = to_f32(from[d]);
}

// A staged row times a row in memory.
__device__ __forceinline__ float dot(const float *staged, const X_T *row, u32 dim) {
    float sum = 0.0f;
    for (u32 d = 0; d < dim; d += VEC) {
        float x[VEC];
        load_vec<VEC>(x, row + d);
#pragma unroll
        for (int e = 0; e < VEC; e++) sum = fmaf(staged[d + e], x[e], sum);
    }
    return sum;
}

// acc += by row; the lanes share the row.
__device__ __forceinline__ void accumulate(float (&acc)[DIMS], float by, const X_T *row, u32 dim) {
#pragma unroll
    for (int r = 0; r < DIMS; r++) {
        const u32 d = threadIdx.x % 32 + 32 * r;
        if (d < dim) acc[r] = fmaf(by, to_f32(row[d]), acc[r]);
    }
}

// The first key that token i sees.
__device__ __forceinline__ u32 first_key(const int *doc_start, u32 i, u32 window) {
    const u32 start = u32(doc_start[i]);
    return window > 0 && i + 1 > window ? max(start, i + 1 - window) : start;
}

// Writes a row of D sums, turned back by the angle of its position where there is a table. `row` is memory of this warp.
__device__ __forceinline__ void write_row(X_T *to, const float (&acc)[DIMS], float *row, u32 dim, const float *angle) {
    const u32 lane = threadIdx.x % 32, half = dim / 2;
    __syncwarp();
#pragma unroll
    for (int r = 0; r < DIMS; r++) {
        const u32 d = lane + 32 * r;
        if (d < dim) row[d] = acc[r];
    }
    __syncwarp();
    for (u32 d = lane; d < dim; d += 32) {
        float x = row[d];
        if (angle) {
            const u32 j = d < half ? d : d - half;
            float lo = row[j], hi = row[j + half];
            rotate(lo, hi, angle[j], -angle[j + half]);
            x = d < half ? lo : hi;
        }
        put(to[d], x);
    }
    __syncwarp();
}

// A softmax over keys that come block by block, and the values it weighs.
struct Online {
    float most = -infinity(), sum = 0.0f, acc[DIMS] = {};

    // Keys `first`, `first + step`, ..., 32 at a time, below `end`; rows lie `stride` elements apart.
    __device__ __forceinline__ void see(const float *q, const X_T *k, const X_T *v, u32 stride, u32 dim, u32 first, u32 end, u32 step,
                                        float scale) {
        const u32 lane = threadIdx.x % 32;
        for (u32 block = first; block < end; block += step) {
            const u32 j = block + lane, count = min(end - block, 32u);
            const float score = lane < count ? dot(q, k + u64(j) * stride, dim) * scale : -infinity();
            float larger = fmaxf(most, score);
            for (int offset = 16; offset > 0; offset /= 2) larger = fmaxf(larger, __shfl_xor_sync(ALL, larger, offset));
            // The first block has nothing to shrink: exp(-inf) is 0.
            const float shrink = expf(most - larger), p = lane < count ? expf(score - larger) : 0.0f;
            most = larger;
            sum = fmaf(sum, shrink, lanes_sum(p, 32));
#pragma unroll
            for (int r = 0; r < DIMS; r++) acc[r] *= shrink;
            for (u32 t = 0; t < count; t++) accumulate(acc, __shfl_sync(ALL, p, t), v + u64(block + t) * stride, dim);
        }
    }
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_forward(X_T *__restrict__ out, float *__restrict__ lse, const X_T *__restrict__ q, const X_T *__restrict__ k,
                      const X_T *__restrict__ v, const int *__restrict__ doc_start, u32 tasks, u32 heads, u32 kv_heads, u32 dim,
                      u32 window, float scale) {
    const u32 warp = threadIdx.x / 32, task = blockIdx.x * WARPS + warp;
    if (task >= tasks) return;
    const u32 i = task / heads, kv = task % heads / (heads / kv_heads);
    float *row = shared + warp * dim;
    stage(row, q + u64(task) * dim, dim);
    __syncwarp();
    Online s;
    s.see(row, k + kv * dim, v + kv * dim, kv_heads * dim, dim, first_key(doc_start, i, window), i + 1, 32, scale);
#pragma unroll
    for (int r = 0; r < DIMS; r++) s.acc[r] /= s.sum;
    write_row(out + u64(task) * dim, s.acc, row, dim, nullptr);
    if (threadIdx.x % 32 == 0) lse[task] = s.most + logf(s.sum);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_dq(X_T *__restrict__ dq, float *__restrict__ delta, const X_T *__restrict__ dout, const X_T *__restrict__ out,
                 const X_T *__restrict__ q, const X_T *__restrict__ k, const X_T *__restrict__ v, const float *__restrict__ lse,
                 const int *__restrict__ doc_start, const float *__restrict__ table, const int *__restrict__ positions, u32 tasks,
                 u32 heads, u32 kv_heads, u32 dim, u32 window, float scale) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, task = blockIdx.x * WARPS + warp;
    if (task >= tasks) return;
    const u32 i = task / heads, kv = task % heads / (heads / kv_heads), stride = kv_heads * dim;
    const u64 at = u64(task) * dim;
    float *row = shared + 2 * warp * dim, *drow = row + dim;
    stage(row, q + at, dim);
    stage(drow, dout + at, dim);
    float sum = 0.0f;
    for (u32 d = lane; d < dim; d += 32) sum = fmaf(to_f32(dout[at + d]), to_f32(out[at + d]), sum);
    const float del = lanes_sum(sum, 32), log_sum = lse[task];
    if (lane == 0) delta[task] = del;
    __syncwarp();
    k += kv * dim, v += kv * dim;
    float acc[DIMS] = {};
    for (u32 block = first_key(doc_start, i, window); block <= i; block += 32) {
        const u32 j = block + lane, count = min(i + 1 - block, 32u);
        float ds = 0.0f;
        if (lane < count) {
            const float p = expf(dot(row, k + u64(j) * stride, dim) * scale - log_sum);
            ds = p * (dot(drow, v + u64(j) * stride, dim) - del) * scale;
        }
        for (u32 t = 0; t < count; t++) accumulate(acc, __shfl_sync(ALL, ds, t), k + u64(block + t) * stride, dim);
    }
    write_row(dq + at, acc, row, dim, table ? table + u64(u32(positions[i])) * dim : nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_dkdv(X_T *__restrict__ dk, X_T *__restrict__ dv, const X_T *__restrict__ dout, const X_T *__restrict__ q,
                   const X_T *__restrict__ k, const X_T *__restrict__ v, const float *__restrict__ lse,
                   const float *__restrict__ delta, const int *__restrict__ doc_start, const float *__restrict__ table,
                   const int *__restrict__ positions, u32 tasks, u32 n, u32 heads, u32 kv_heads, u32 dim, u32 window, float scale) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, task = blockIdx.x * WARPS + warp;
    if (task >= tasks) return;
    const u32 j = task / kv_heads, group = heads / kv_heads, first_head = task % kv_heads * group;
    const u64 at = u64(task) * dim;
    float *k_row = shared + 2 * warp * dim, *v_row = k_row + dim;
    stage(k_row, k + at, dim);
    stage(v_row, v + at, dim);
    __syncwarp();
    const int document = doc_start[j];
    const u32 end = window > 0 ? min(n, j + window) : n;
    float sum_k[DIMS] = {}, sum_v[DIMS] = {};
    for (u32 head = first_head; head < first_head + group; head++) {
        // Each head apart: shorter chains of sums.
        float acc_k[DIMS] = {}, acc_v[DIMS] = {};
        for (u32 block = j; block < end; block += 32) {
            const u32 i = block + lane;
            const bool sees = i < end && doc_start[i] == document;
            // Documents lie one after the other: those that see the key come first.
            const u32 count = __popc(__ballot_sync(ALL, sees));
            float p = 0.0f, ds = 0.0f;
            if (sees) {
                const u64 of = u64(i) * heads + head;
                p = expf(dot(k_row, q + of * dim, dim) * scale - lse[of]);
                ds = p * (dot(v_row, dout + of * dim, dim) - delta[of]) * scale;
            }
            for (u32 t = 0; t < count; t++) {
                const u64 of = (u64(block + t) * heads + head) * dim;
                accumulate(acc_v, __shfl_sync(ALL, p, t), dout + of, dim);
                accumulate(acc_k, __shfl_sync(ALL, ds, t), q + of, dim);
            }
            if (count < 32) break;
        }
#pragma unroll
        for (int r = 0; r < DIMS; r++) sum_k[r] += acc_k[r], sum_v[r] += acc_v[r];
    }
    write_row(dv + at, sum_v, v_row, dim, nullptr);
    write_row(dk + at, sum_k, k_row, dim, table ? table + u64(u32(positions[j])) * dim : nullptr);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_decode(X_T *__restrict__ out, const X_T *__restrict__ q, const X_T *__restrict__ k, const X_T *__restrict__ v,
                     const int *__restrict__ lens, u32 heads, u32 kv_heads, u32 dim, u32 window, u32 capacity, float scale) {
    const u32 warp = threadIdx.x / 32, lane = threadIdx.x % 32, task = blockIdx.x;
    const u32 sequence = task / heads, kv = task % heads / (heads / kv_heads), stride = kv_heads * dim;
    const u32 len = u32(lens[sequence]);
    if (len == 0 || len > capacity) __trap();
    float *row = shared, *mine = row + dim + warp * (dim + 2); // largest score, sum, values
    for (u32 d = threadIdx.x; d < dim; d += THREADS) row[d] = to_f32(q[u64(task) * dim + d]);
    __syncthreads();
    const u64 cache = u64(sequence) * capacity * stride + kv * dim;
    const u32 first = window > 0 && len > window ? len - window : 0;
    Online s;
    s.see(row, k + cache, v + cache, stride, dim, first + 32 * warp, len, THREADS, scale);
    if (lane == 0) mine[0] = s.most, mine[1] = s.sum;
#pragma unroll
    for (int r = 0; r < DIMS; r++) {
        if (lane + 32 * r < dim) mine[2 + lane + 32 * r] = s.acc[r];
    }
    __syncthreads();
    const float *all = row + dim;
    float most = -infinity(), sum = 0.0f, weight[WARPS];
    for (int w = 0; w < WARPS; w++) most = fmaxf(most, all[w * (dim + 2)]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
        const float *of = all + w * (dim + 2);
        // 0 for a warp without keys: its largest score is -inf.
        weight[w] = expf(of[0] - most);
        sum = fmaf(weight[w], of[1], sum);
    }
    for (u32 d = threadIdx.x; d < dim; d += THREADS) {
        float x = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) x = fmaf(weight[w], all[w * (dim + 2) + 2 + d], x);
        put(out[u64(task) * dim + d], x / sum);
    }
}
