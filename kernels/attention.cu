// Causal attention inside documents on tensor cores, forward; algorithm 1 of Dao 2023, arXiv:2307.08691.
//
//   S = scale q k^T over the keys that the query sees;  out = softmax(S) v;  lse = log sum exp S
//
// Token i sees keys max(document, i + 1 - window) .. i; window 0: no window. Query head h reads key head h / (heads / kv_heads).
// Shapes: q, out (N, heads D); k, v (N, kv_heads D) bf16; lse (N, heads) f32; tiles (blocks / heads, 3): of each tile of queries its
// document's first token, the one after its last, and the tile's first query, a multiple of QUERIES behind the document's first.
// Defines: HEAD_DIM in {32, 64, 80, 96, 128}; WARPS of WARP_ROWS (16 or 32) queries, together QUERIES; KEYS of a block.
// Numerics: scores, largest score, sums and output in f32; exp in base 2; probabilities, not yet divided by their sum, are rounded to
// bf16 for the product with v, their sum is of unrounded ones; lse is a natural logarithm. Tiles of queries and blocks of keys are
// counted from the document's first token, so a document has the same bits wherever it stands and whatever stands beside it. NaN or
// infinity in v also reaches queries before it that share its block.
// Method: a block per tile and query head goes through the blocks of keys from the newest to the oldest; the next pair of K and V
// arrives by cp.async in the other buffer, one barrier a block. A warp leaves out blocks that none of its queries sees, and masks
// those that not all see in full. Scores stay in registers: accumulators of the first product are the operand of the second. The output
// is turned into whole rows in the warp's part of the queries' tile.
// Launch: 32 WARPS threads; blocks: tiles times heads, heaviest tiles first; dynamic shared memory of (QUERIES + 4 KEYS) rows.
// Cost: 4 D flops a pair of query and key; k and v are read once per tile of queries and query head.
// Test: tests/common/attention.rs, on every device.
#include "common/types.cuh"
#include "common/heads.cuh"

constexpr int THREADS = 32 * WARPS, QUERIES = WARPS * WARP_ROWS;
constexpr int MT = WARP_ROWS / 16, NT = KEYS / 8, DT = HEAD_DIM / 8;
constexpr u32 ALL = 0xffffffffu;
static_assert(WARP_ROWS % 16 == 0 && KEYS % 16 == 0, "fragments");

using Tile = HeadTile<HEAD_DIM>;
using Fragments = HeadFragments<HEAD_DIM>;

extern __shared__ __align__(128) unsigned char shared[];

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_forward(bf16 *__restrict__ out, float *__restrict__ lse, const bf16 *__restrict__ q, const bf16 *__restrict__ k,
                            const bf16 *__restrict__ v, const int *__restrict__ tiles, u32 heads, u32 kv_heads, u32 window,
                            float scale) {
    constexpr u32 BLOCK = KEYS * Tile::ROW; // bytes of K or V
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 head = blockIdx.x % heads, kv = head / (heads / kv_heads);
    const int *tile = tiles + blockIdx.x / heads * 3;
    const u32 document = u32(tile[0]), end = u32(tile[1]), first = u32(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;
    k += kv * HEAD_DIM, v += kv * HEAD_DIM;

    // Blocks of keys, counted from the document's first token.
    const u32 place = first - document;
    const u32 newest = (min(first + QUERIES, end) - 1 - document) / KEYS;
    const u32 oldest = window > 0 && place >= window ? (place + 1 - window) / KEYS : 0;

    const u32 q_tile = shared_address(shared), kv_tiles = q_tile + QUERIES * Tile::ROW;
    auto load = [&](u32 block, u32 to) {
        Tile::load<KEYS, THREADS>(to, k, kv_stride, document + block * KEYS, end);
        Tile::load<KEYS, THREADS>(to + BLOCK, v, kv_stride, document + block * KEYS, end);
    };
    Tile::load<QUERIES, THREADS>(q_tile, q + head * HEAD_DIM, q_stride, first, end);
    load(newest, kv_tiles);
    cp_async_commit();

    const Fragments of_q = Fragments::a(lane), of_k = Fragments::b(lane), of_v = Fragments::b_turned(lane);
    const u32 q_rows = q_tile + warp * (WARP_ROWS * Tile::ROW);
    const u32 warp_first = first + warp * WARP_ROWS, warp_last = warp_first + WARP_ROWS - 1;
    const float exponent = scale * 1.4426950408889634f; // scores in powers of two

    float acc[MT][DT][4] = {}, most[MT][2], sum[MT][2] = {};
#pragma unroll
    for (int i = 0; i < MT; i++) most[i][0] = most[i][1] = -infinity();

    u32 buffer = 0;
#pragma unroll 1
    for (u32 block = newest;; block--) {
        // This block has arrived for all; nobody reads the one before it any more, so its buffer is filled next.
        cp_async_wait<0>();
        __syncthreads();
        if (block > oldest) {
            load(block - 1, kv_tiles + (buffer ^ (2 * BLOCK)));
            cp_async_commit();
        }
        const u32 k_tile = kv_tiles + buffer, v_tile = k_tile + BLOCK;
        buffer ^= 2 * BLOCK;
        const u32 key = document + block * KEYS;
        const bool some = warp_first < end && key <= warp_last && (window == 0 || key + KEYS - 1 + window > warp_first);
        if (some) {
            float s[MT][NT][4] = {};
            multiply(s, of_q, q_rows, of_k, k_tile);
            if (key + KEYS - 1 > warp_first || (window > 0 && key + window <= warp_last)) {
#pragma unroll
                for (int i = 0; i < MT; i++) {
#pragma unroll
                    for (int j = 0; j < NT; j++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) {
                            const u32 row = warp_first + i * 16 + lane / 4 + e / 2 * 8, column = key + j * 8 + lane % 4 * 2 + e % 2;
                            if (column > row || (window > 0 && column + window <= row)) s[i][j][e] = -infinity();
                        }
                    }
                }
            }
#pragma unroll
            for (int i = 0; i < MT; i++) {
                float shrink[2];
                bool grew = false;
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    float larger = most[i][h];
#pragma unroll
                    for (int j = 0; j < NT; j++) larger = fmaxf(larger, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
                    larger = quad_max(larger);
                    // Of a query without a score so far; infinity less infinity would be NaN.
                    const float base = larger == -infinity() ? 0.0f : larger * exponent;
                    shrink[h] = exp2_approx(fmaf(most[i][h], exponent, -base));
                    grew |= larger > most[i][h];
                    most[i][h] = larger;
                    float added = 0.0f;
#pragma unroll
                    for (int j = 0; j < NT; j++) {
#pragma unroll
                        for (int e = 2 * h; e < 2 * h + 2; e++) {
                            s[i][j][e] = exp2_approx(fmaf(s[i][j][e], exponent, -base));
                            added += s[i][j][e];
                        }
                    }
                    sum[i][h] = fmaf(sum[i][h], shrink[h], added);
                }
                // Where no largest score grew every factor is 1.
                if (__any_sync(ALL, grew)) {
#pragma unroll
                    for (int j = 0; j < DT; j++) {
#pragma unroll
                        for (int e = 0; e < 4; e++) acc[i][j][e] *= shrink[e / 2];
                    }
                }
            }
            accumulate(acc, s, of_v, v_tile);
        }
        if (block == oldest) break;
    }
    if (warp_first >= end) return;

    // Only this warp reads its rows of the queries' tile: they now take its output.
    unsigned char *rows = shared + warp * (WARP_ROWS * Tile::ROW);
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const u32 rows_first = warp_first + i * 16;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float total = quad_sum(sum[i][h]), inverse = 1.0f / total;
            const u32 row = rows_first + lane / 4 + h * 8;
#pragma unroll
            for (int j = 0; j < DT; j++) acc[i][j][2 * h] *= inverse, acc[i][j][2 * h + 1] *= inverse;
            if (lane % 4 == 0 && row < end) lse[u64(row) * heads + head] = fmaf(most[i][h], scale, logf(total));
        }
        Tile::store16(out + head * HEAD_DIM, q_stride, rows_first, end, rows + i * (16 * Tile::ROW), acc[i]);
    }
}
