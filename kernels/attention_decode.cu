// Attention of one new token of each sequence against a cache of keys and values, on tensor cores.
//
//   out = softmax(scale q k^T) v over the keys max(0, len - window) .. len - 1 of a sequence of len; window 0: no window
//
// Query head h reads key head h / (heads / kv_heads).
// Shapes: q, out (sequences, heads D); k, v (sequences capacity, kv_heads D) bf16; lens (sequences, 1); parts (blocks, rows of a tile, D + 2) f32, or null
// where the capacity is one part;
// counters: one for each sequence and tile of heads, zero before and behind the launch.
// Defines: HEAD_DIM in {32, 64, 80, 96, 128}.
// Numerics: scores, largest scores, sums and output in f32; exp in base 2. Probabilities enter the product with v as a bf16 and the bf16 of
// what it leaves, 16 bits together: the tensor cores have nothing else to do here. Parts of KEYS keys are counted from the sequence's first
// token, and added in order, as are the warps within one. So a sequence has the same bits whatever stands beside it and however long the
// cache is. Keys and values that are not seen are not read.
// Method: the query heads that read one key head are the rows of a tile, so the cache is read once for all of them, up to 16. A block
// takes a part of the keys, a warp a quarter of it; the block of a sequence that comes last adds the parts.
// Launch: THREADS threads; blocks: sequences, key heads, tiles of 16 of its query heads, parts of the capacity, the last fastest; dynamic
// shared memory of 16 + 2 KEYS rows.
// Cost: the cache's bytes.
// Test: tests/common/attention.rs, on every device.
#include "common/types.cuh"
#include "common/mask.cuh"
#include "common/reduce.cuh"

constexpr int WARPS = 4, THREADS = 32 * WARPS, KEYS = 128, OF_WARP = KEYS / WARPS;
constexpr int HEADS = 16, NT = OF_WARP / 8, DT = HEAD_DIM / 8, CHUNKS = HEAD_DIM / 8;
constexpr int WIDE = HEAD_DIM + 2; // floats of a row of a part: its largest score in powers of two, the sum, the values
constexpr float LOG2_E = 1.4426950408889634f;

using Tile = HeadTile<HEAD_DIM>;
using Fragments = HeadFragments<HEAD_DIM>;
constexpr u32 BLOCK = KEYS * Tile::ROW;
static_assert(WARPS * HEADS * WIDE * 4 <= 2 * BLOCK, "what warps merge lies where keys and values were");

extern __shared__ __align__(256) unsigned char shared[];

// 2^(x - most), 0 where nothing was seen.
__device__ __forceinline__ float share(float x, float most) { return exp2_approx(x - most); }

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_decode(bf16 *__restrict__ out, float *__restrict__ parts, u32 *__restrict__ counters, const bf16 *__restrict__ q,
                           const bf16 *__restrict__ k, const bf16 *__restrict__ v, const int *__restrict__ lens, u32 heads, u32 kv_heads,
                           u32 window, u32 capacity, float scale) {
    __shared__ u32 before;
    const u32 lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const u32 all_parts = (capacity + KEYS - 1) / KEYS, group = heads / kv_heads, tiles = (group + HEADS - 1) / HEADS;
    const u32 part = blockIdx.x % all_parts, task = blockIdx.x / all_parts, kv = task / tiles % kv_heads;
    const u32 sequence = task / (tiles * kv_heads), len = u32(lens[sequence]);
    if (len == 0 || len > capacity) __trap();
    const u32 oldest = window > 0 && len > window ? len - window : 0, begin = part * KEYS;
    if (begin >= len || begin + KEYS <= oldest) return;
    const u32 first_part = oldest / KEYS, seen_parts = (len - 1) / KEYS + 1 - first_part;
    const u32 first_head = kv * group + task % tiles * HEADS, rows = min((kv + 1) * group - first_head, u32(HEADS));
    // Rows of the part that are seen.
    const u32 from = max(oldest, begin) - begin, to = min(len - begin, u32(KEYS));

    const u32 q_tile = shared_address(shared), k_tile = q_tile + HEADS * Tile::ROW, v_tile = k_tile + BLOCK;
    const u64 head = (u64(sequence) * heads + first_head) * HEAD_DIM;
    for (u32 i = threadIdx.x; i < HEADS * CHUNKS; i += THREADS) {
        const u32 row = i / CHUNKS, chunk = i % CHUNKS;
        cp_async16_zfill(q_tile + Tile::offset(row, chunk), q + head + row * HEAD_DIM + chunk * 8, row < rows ? 16 : 0);
    }
    const TileCopies<HEAD_DIM, KEYS, THREADS> copies(kv_heads * HEAD_DIM);
    const u64 cache = (u64(sequence) * capacity + begin) * (kv_heads * HEAD_DIM) + kv * HEAD_DIM;
    copies.each([&](u32 at, u32 of, int more, u32 row) {
        cp_async16_zfill(k_tile + at, k + cache + of + more, row >= from && row < to ? 16 : 0);
    });
    cp_async_commit();
    copies.each([&](u32 at, u32 of, int more, u32 row) {
        cp_async16_zfill(v_tile + at, v + cache + of + more, row >= from && row < to ? 16 : 0);
    });
    cp_async_commit();

    const HeadRows<HEAD_DIM, 1, 0> of_q(q_tile);
    const Fragments of_k = Fragments::b(lane, k_tile + warp * (OF_WARP * Tile::ROW));
    const Fragments of_v = Fragments::b_turned(lane, v_tile + warp * (OF_WARP * Tile::ROW));
    const float exponent = scale * LOG2_E;
    float s[1][NT][4] = {}, rest[1][NT][4], acc[1][DT][4] = {}, most[2], sum[2];
    cp_async_wait<1>();
    __syncthreads();
    multiply(s, of_q, of_k, 0);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float largest = -infinity();
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) {
                const u32 key = warp * OF_WARP + j * 8 + lane % 4 * 2 + e % 2;
                if (key < from || key >= to) s[0][j][e] = -infinity();
                largest = fmaxf(largest, s[0][j][e]);
            }
        }
        most[h] = quad_max(largest) * exponent;
        // A warp without keys has probabilities of 0.
        const float by = most[h] == -infinity() ? 0.0f : most[h];
        float added = 0.0f;
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) {
                const float p = exp2_approx(fmaf(s[0][j][e], exponent, -by)), cut = __uint_as_float(__float_as_uint(p) & 0xffff0000u);
                added += p;
                s[0][j][e] = cut;
                // Not 0 where p is not: it may meet infinity.
                rest[0][j][e] = p > 0.0f ? fmaxf(p - cut, 1.17549435e-38f) : p;
            }
        }
        sum[h] = quad_sum(added);
    }
    cp_async_wait<0>();
    __syncthreads();
    accumulate(acc, s, of_v, 0);
    accumulate(acc, rest, of_v, 0);
    __syncthreads();

    // Warps put their rows where keys and values were.
    float *of_warps = reinterpret_cast<float *>(shared + HEADS * Tile::ROW);
#pragma unroll
    for (int h = 0; h < 2; h++) {
        float *row = of_warps + (warp * HEADS + lane / 4 + h * 8) * WIDE;
        if (lane % 4 == 0) row[0] = most[h], row[1] = sum[h];
#pragma unroll
        for (int j = 0; j < DT; j++) {
            float *at = row + 2 + j * 8 + lane % 4 * 2;
            at[0] = acc[0][j][2 * h], at[1] = acc[0][j][2 * h + 1];
        }
    }
    __syncthreads();
    bf16 *result = out + head;
    const u32 pitch = min(group, u32(HEADS)) * WIDE;
    float *mine = parts + u64(blockIdx.x) * pitch;
    for (u32 i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS) {
        const u32 row = i / HEAD_DIM, d = i % HEAD_DIM;
        const float *of = of_warps + row * WIDE;
        float top = of[0];
#pragma unroll
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, of[w * HEADS * WIDE]);
        float x = 0.0f, total = 0.0f;
#pragma unroll
        for (int w = 0; w < WARPS; w++) {
            const float *there = of + w * HEADS * WIDE, by = share(there[0], top);
            x = fmaf(by, there[2 + d], x), total = fmaf(by, there[1], total);
        }
        if (seen_parts == 1) {
            put(result[i], x / total);
        } else {
            float *to = mine + row * WIDE;
            to[2 + d] = x;
            if (d == 0) to[0] = top, to[1] = total;
        }
    }
    if (seen_parts == 1 || !comes_last(counters + task, seen_parts, &before)) return;
    const float *first = parts + u64(blockIdx.x - part + first_part) * pitch;
    for (u32 i = threadIdx.x; i < rows * HEAD_DIM; i += THREADS) {
        const u32 row = i / HEAD_DIM, d = i % HEAD_DIM;
        const float *of = first + row * WIDE;
        float top = -infinity();
        for (u32 p = 0; p < seen_parts; p++) top = fmaxf(top, __ldcg(of + u64(p) * pitch));
        float x = 0.0f, total = 0.0f;
        for (u32 p = 0; p < seen_parts; p++) {
            const float *there = of + u64(p) * pitch;
            const float by = share(__ldcg(there), top);
            x = fmaf(by, __ldcg(there + 2 + d), x), total = fmaf(by, __ldcg(there + 1), total);
        }
        put(result[i], x / total);
    }
}
