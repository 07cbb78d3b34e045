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
// counted from the document's first token, so a document has the same bits wherever it stands and whatever stands beside it. NaN and
// infinity in k or v reach the queries that see them and no others.
// Method: a block per tile and query head goes through the blocks of keys from the newest to the oldest; the next pair of K and V
// arrives by cp.async in the other buffer, one barrier a block. Blocks that all queries of the tile see in full have a loop of their own,
// without a mask; at the edges a warp leaves out blocks that none of its queries sees, and the block looks for what is not finite.
// Scores stay in registers: accumulators of the first product are the operand of the second. The output is turned into whole
// rows in the warp's part of the queries' tile.
// Launch: 32 WARPS threads; blocks: tiles times heads, heaviest tiles first; dynamic shared memory of (QUERIES + 4 KEYS) rows and 32 bytes.
// Cost: 4 D flops a pair of query and key; k and v are read once per tile of queries and query head.
// Test: tests/common/attention.rs, on every device.
#include "common/types.cuh"
#include "common/mask.cuh"

constexpr int THREADS = 32 * WARPS, QUERIES = WARPS * WARP_ROWS;
constexpr int MT = WARP_ROWS / 16, NT = KEYS / 8, DT = HEAD_DIM / 8;
// Steps of k for which the queries stay in registers: all, where there is room for them.
constexpr int HELD = HEAD_DIM <= 64 ? HEAD_DIM / 16 : 0;
constexpr u32 ALL = 0xffffffffu;
constexpr float LOG2_E = 1.4426950408889634f, LN_2 = 0.6931471805599453f;
static_assert(WARP_ROWS % 16 == 0 && KEYS % 16 == 0, "fragments");
static_assert(QUERIES % KEYS == 0 && KEYS % WARP_ROWS == 0, "a warp's own keys lie in one block");

using Tile = HeadTile<HEAD_DIM>;
using Fragments = HeadFragments<HEAD_DIM>;
constexpr u32 BLOCK = KEYS * Tile::ROW; // bytes of K or V

extern __shared__ __align__(256) unsigned char shared[];
constexpr u32 TILES = (QUERIES + 4 * KEYS) * Tile::ROW;

// What is asked for at the edges alone stands behind the tiles: the loop over whole blocks has no registers to spare.
struct Job {
    u32 document, end, first; // the document's first token, the one after its last, the tile's first query
    u32 head, oldest;         // the oldest block
    u32 odd;                  // whether there was NaN or infinity in v
};

// A warp's queries on their way through the blocks of keys, from the newest to the oldest. Places are counted from the document's first
// token.
struct Queries {
    float acc[MT][DT][4], most[MT][2], sum[MT][2]; // `most`: the largest score so far, in powers of two
    const bf16 *k, *v;                             // the block that was asked for last
    TileCopies<HEAD_DIM, KEYS, THREADS> copies;
    HeadRows<HEAD_DIM, MT, HELD> q;
    Fragments of_k, of_v; // in the first buffer
    u32 tiles, buffer;    // its address, and the offset of the one that is read next
    u32 left;             // blocks that are left
    u32 window;
    float exponent; // of scores, in powers of two
    bool any;       // whether the warp has a query

    // Goes on by a block. At an edge not every query may see every key, and the block may be the last one.
    template <bool Edge> __device__ __forceinline__ void round();
    __device__ __forceinline__ void soften(float (&s)[MT][NT][4]);
};

template <bool Edge> __device__ __forceinline__ void Queries::round() {
    // This block has arrived for all; nobody reads the one before it any more, so its buffer is filled next.
    cp_async_wait<0>();
    const u32 tile = buffer;
    left--;
    Job &job = *reinterpret_cast<Job *>(shared + TILES);
    const u32 place = Edge ? job.first - job.document : 0, first = place + threadIdx.x / 32 * WARP_ROWS, last = first + WARP_ROWS - 1;
    const u32 key = Edge ? (job.oldest + left) * KEYS : 0;
    if (Edge && (key + KEYS > place + 1 || (window > 0 && key + window < place + QUERIES))) {
        // Zero times NaN would be NaN, also for queries that do not see its key.
        const bool odd = __syncthreads_or(copies.clean(shared + (tiles - shared_address(shared)) + tile + BLOCK));
        if (odd && threadIdx.x == 0) job.odd = 1;
    } else {
        __syncthreads();
    }
    buffer ^= 2 * BLOCK;
    if (!Edge || left > 0) {
        // Older blocks are full.
        u32 back = -KEYS * copies.stride;
        keep(back);
        k += int(back), v += int(back);
        keep(k);
        keep(v);
        copies.load(tiles + buffer, k);
        copies.load(tiles + buffer + BLOCK, v);
        cp_async_commit();
    }
    if (any && (!Edge || (key <= last && (window == 0 || key + KEYS - 1 + window > first)))) {
        float s[MT][NT][4] = {};
        multiply(s, q, of_k, tile);
        if (Edge && (key + KEYS - 1 > first || (window > 0 && key + window <= last))) hide<true>(s, -infinity(), first, key, window);
        soften(s);
        accumulate(acc, s, of_v, tile);
    }
}

// Scores of a block become probabilities, not yet divided by their sum; what was summed before is brought to the larger largest score.
__device__ __forceinline__ void Queries::soften(float (&s)[MT][NT][4]) {
    float shrink[MT][2];
    bool grew = false;
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
            float largest = fmaxf(s[i][0][2 * h], s[i][0][2 * h + 1]);
#pragma unroll
            for (int j = 1; j < NT; j++) largest = fmaxf(largest, fmaxf(s[i][j][2 * h], s[i][j][2 * h + 1]));
            const float larger = fmaxf(most[i][h], quad_max(largest) * exponent);
            shrink[i][h] = exp2_approx(most[i][h] - larger);
            grew |= larger > most[i][h];
            most[i][h] = larger;
        }
    }
    // Where no largest score grew every factor is 1.
    if (__any_sync(ALL, grew)) {
#pragma unroll
        for (int i = 0; i < MT; i++) {
#pragma unroll
            for (int j = 0; j < DT; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) acc[i][j][e] *= shrink[i][e / 2];
            }
        }
    }
#pragma unroll
    for (int i = 0; i < MT; i++) {
        float added[2];
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const float p = exp2_approx(fmaf(s[i][j][e], exponent, -most[i][e / 2]));
                added[e / 2] = j == 0 && e % 2 == 0 ? p : added[e / 2] + p;
                s[i][j][e] = p;
            }
        }
#pragma unroll
        for (int h = 0; h < 2; h++) sum[i][h] = fmaf(sum[i][h], shrink[i][h], added[h]);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_forward(bf16 *__restrict__ out, float *__restrict__ lse, const bf16 *__restrict__ q, const bf16 *__restrict__ k,
                            const bf16 *__restrict__ v, const int *__restrict__ tiles, u32 heads, u32 kv_heads, u32 window,
                            float scale) {
    const u32 lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32);
    const u32 head = blockIdx.x % heads, kv = head / (heads / kv_heads);
    const int *tile = tiles + blockIdx.x / heads * 3;
    const u32 document = uniform(tile[0]), end = uniform(tile[1]), first = uniform(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;
    // Blocks of keys, counted from the document's first token; every query of the tile sees all of those from `whole_from` to `whole_to`.
    const u32 place = first - document;
    const u32 newest = (min(first + QUERIES, end) - 1 - document) / KEYS;
    const u32 oldest = window > 0 && place >= window ? (place + 1 - window) / KEYS : 0;
    const u32 whole_to = place / KEYS;
    const u32 whole_from = window > 0 && place + QUERIES > window ? (place + QUERIES - window + KEYS - 1) / KEYS : 0;

    const u32 q_tile = shared_address(shared), kv_tiles = q_tile + QUERIES * Tile::ROW;
    const TileCopies<HEAD_DIM, KEYS, THREADS> of_block(kv_stride);
    const bf16 *v_head = v + kv * HEAD_DIM;
    const u64 row_of_newest = u64(document + newest * KEYS) * kv_stride;
    k += row_of_newest + kv * HEAD_DIM, v = v_head + row_of_newest;
    TileCopies<HEAD_DIM, QUERIES, THREADS>(q_stride).load(q_tile, q + u64(first) * q_stride + head * HEAD_DIM, end - first);
    of_block.load(kv_tiles, k, end - document - newest * KEYS);
    of_block.load(kv_tiles + BLOCK, v, end - document - newest * KEYS);
    cp_async_commit();

    Job &job = *reinterpret_cast<Job *>(shared + TILES);
    Queries of{{}, {}, {}, k, v, of_block, q_tile + warp * (WARP_ROWS * Tile::ROW), Fragments::b(lane, kv_tiles),
               Fragments::b_turned(lane, kv_tiles + BLOCK), kv_tiles, 0, newest + 1 - oldest, window, scale * LOG2_E,
               first + warp * WARP_ROWS < end};
#pragma unroll
    for (int i = 0; i < MT; i++) of.most[i][0] = of.most[i][1] = -infinity();
    if (threadIdx.x == 0) job = Job{document, end, first, head, oldest, 0};
    cp_async_wait<0>();
    __syncthreads();
    of.q.hold();
    // Blocks that are left where the whole ones begin, and behind them; the oldest is not one of them.
    const u32 before = max(whole_to, oldest) - oldest, behind = max(whole_from, oldest + 1) - oldest;
#pragma unroll 1
    while (of.left > 0) {
        if (of.left > before || of.left <= behind) {
            of.round<true>();
        } else {
#pragma unroll 1
            do of.round<false>();
            while (of.left > behind);
        }
    }
    __syncthreads();
    const u32 warp_first = job.first + threadIdx.x / 32 * WARP_ROWS, last = job.end, odd = job.odd;
    if (warp_first >= last) return;

    // Only this warp reads its rows of the queries' tile: they now take its output.
    unsigned char *rows = shared + threadIdx.x / 32 * (WARP_ROWS * Tile::ROW);
    bf16 *to = out + job.head * HEAD_DIM;
#pragma unroll
    for (int i = 0; i < MT; i++) {
        const u32 rows_first = warp_first + i * 16;
#pragma unroll
        for (int h = 0; h < 2; h++) {
            const float total = quad_sum(of.sum[i][h]), inverse = 1.0f / total;
            const u32 row = rows_first + threadIdx.x % 32 / 4 + h * 8;
#pragma unroll
            for (int j = 0; j < DT; j++) of.acc[i][j][2 * h] *= inverse, of.acc[i][j][2 * h + 1] *= inverse;
            if (threadIdx.x % 4 == 0 && row < last) lse[u64(row) * heads + job.head] = fmaf(of.most[i][h], LN_2, logf(total));
        }
        Tile::store16(to, q_stride, rows_first, last, rows + i * (16 * Tile::ROW), of.acc[i]);
    }
    if (!odd) return;
    // What was left out reaches those that see it.
    __syncwarp();
    for (u32 row = warp_first; row < min(warp_first + WARP_ROWS, last); row++) {
        const u32 oldest_key = window > 0 ? max(job.document + window, row + 1) - window : job.document;
        for (u32 column = threadIdx.x % 32; column < HEAD_DIM; column += 32) {
            // Both infinities are NaN together, and with what a whole block made of them.
            float added = 0.0f;
            for (u32 key = oldest_key; key <= row; key++) {
                const bf16 x = v_head[u64(key) * kv_stride + column];
                if (!finite(x)) added += to_f32(x);
            }
            if (added != 0.0f) put(to[u64(row) * q_stride + column], to_f32(to[u64(row) * q_stride + column]) + added);
        }
    }
}
