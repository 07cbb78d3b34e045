// Causal attention inside documents on tensor cores, backward; algorithm 2 of Dao 2023, arXiv:2307.08691, in two passes, so that every
// sum runs in one order and nothing is added in memory.
//
//   delta   delta = sum dout out, row by row, and lse in powers of two
//   dq      P = exp(S - lse), dS = P (dout v^T - delta);  dq = scale dS k: a tile of queries over its blocks of keys
//   dkdv    dv = P^T dout, dk = scale dS^T q: a tile of keys over the query heads that share it and their blocks of queries
//
// Tokens, heads, windows and tiles as in attention.cu; tiles of queries and of keys are TILE rows here. Shapes: q, out, dout, dq
// (N, heads D); k, v, dk, dv (N, kv_heads D) bf16; lse (N, heads) f32; stats (2, N, heads) f32: lse log2 e, then delta; table and
// positions as for rope.cu, or null: where they are given dq and dk are turned back before they are rounded.
// Defines: HEAD_DIM in {32, 64, 80, 96, 128}.
// Numerics: S, dP, delta and gradients in f32; P and dS are rounded to bf16 for the products with dout, k and q; one rounding of what
// is stored. Heads of a group one after the other, blocks counted from the document's first token: a document has
// the same bits wherever it stands.
// Method: four warps of 16 rows. Tiles and blocks pass through shared memory as in attention.cu. dkdv forms S^T and dP^T, so that its
// warps own keys and P^T and dS^T stay in registers.
// Launch: 128 threads. delta: 32 rows a block. dq, dkdv: blocks: tiles times heads, or key heads, heaviest tiles first; dynamic
// shared memory of 6 TILE rows, dkdv also 4 TILE floats, and 32 bytes.
// Cost: 6 D flops a pair of query and key for dq, 8 D for dkdv.
// Test: tests/common/attention.rs, on every device.
#include "common/elements.cuh"
#include "common/mask.cuh"

constexpr int TILE = 64, THREADS = 128, NT = TILE / 8, DT = HEAD_DIM / 8;
// Steps of k for which a warp's own rows stay in registers: as many as there is room for.
constexpr int HELD_DQ = HEAD_DIM <= 96 ? HEAD_DIM / 16 : 4, HELD_DKDV = HEAD_DIM <= 64 ? HEAD_DIM / 16 : 0;

using Tile = HeadTile<HEAD_DIM>;
using Fragments = HeadFragments<HEAD_DIM>;
using Copies = TileCopies<HEAD_DIM, TILE, THREADS>;
using Accumulator = float[DT][4];

constexpr float LOG2_E = 1.4426950408889634f;
constexpr u32 BLOCK = TILE * Tile::ROW; // bytes of a tile

extern __shared__ __align__(256) unsigned char shared[];

// Turns 16 rows back by the angles of their positions; rows from `end` on are left alone. Both halves of a pair are in one thread.
__device__ __forceinline__ void turn_back(Accumulator &x, const float *table, const int *positions, u32 first, u32 end) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = first + lane / 4 + h * 8;
        if (row < end) {
            const float *angle = table + u64(u32(positions[row])) * HEAD_DIM + lane % 4 * 2;
#pragma unroll
            for (int j = 0; j < DT / 2; j++) {
                const float2 cosine = *reinterpret_cast<const float2 *>(angle + j * 8);
                const float2 sine = *reinterpret_cast<const float2 *>(angle + HEAD_DIM / 2 + j * 8);
#pragma unroll
                for (int e = 0; e < 2; e++) {
                    const float c = e ? cosine.y : cosine.x, s = e ? sine.y : sine.x;
                    rotate(x[j][2 * h + e], x[j + DT / 2][2 * h + e], c, -s);
                }
            }
        }
    }
}

__device__ __forceinline__ void multiply_by(Accumulator &x, float by) {
#pragma unroll
    for (int j = 0; j < DT; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) x[j][e] *= by;
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_delta(float *__restrict__ stats, const bf16 *__restrict__ dout, const bf16 *__restrict__ out,
                          const float *__restrict__ lse, u32 tasks) {
    // Four lanes a row.
    const u32 wanted = blockIdx.x * (THREADS / 4) + threadIdx.x / 4, task = min(wanted, tasks - 1);
    float sum = 0.0f;
#pragma unroll
    for (int pass = 0; pass < (Tile::CHUNKS + 3) / 4; pass++) {
        const u32 chunk = threadIdx.x % 4 + pass * 4;
        if (chunk < Tile::CHUNKS) {
            float x[8], y[8];
            load8(x, dout + u64(task) * HEAD_DIM + chunk * 8);
            load8(y, out + u64(task) * HEAD_DIM + chunk * 8);
#pragma unroll
            for (int e = 0; e < 8; e++) sum = fmaf(x[e], y[e], sum);
        }
    }
    sum = quad_sum(sum);
    if (threadIdx.x % 4 == 0 && wanted < tasks) stats[task] = lse[task] * LOG2_E, stats[u64(tasks) + task] = sum;
}

// The first key that a query sees.
__device__ __forceinline__ u32 oldest_key(u32 query, u32 document, u32 window) {
    return window > 0 ? max(document + window, query + 1) - window : document;
}

// Whether this lane finds NaN or infinity in its part of a row of a head.
__device__ __forceinline__ bool odd_row(const bf16 *row) {
    bool odd = false;
    for (u32 column = threadIdx.x % 32; column < HEAD_DIM; column += 32) odd |= !finite(row[column]);
    return odd;
}

// The warp makes a row NaN.
__device__ __forceinline__ void spoil(bf16 *row) {
    for (u32 column = threadIdx.x % 32; column < HEAD_DIM; column += 32) row[column].bits = 0x7fff;
}

// What is asked for at the edges alone stands behind the tiles: loops over whole blocks have no registers to spare.
struct Job {
    u32 document, end, first; // the document's first token, the one after its last, the tile's first row
    u32 head, blocks;         // dq: the oldest block; dkdv: how many there are
    u32 odd;                  // whether there was NaN or infinity at an edge
};
__device__ __forceinline__ Job &job() { return *reinterpret_cast<Job *>(shared + 6 * BLOCK + 4 * TILE * sizeof(float)); }
// This warp's 16 rows of the tile begin here.
__device__ __forceinline__ u32 warp_row() { return threadIdx.x / 32 * 16; }

// Waits for all copies of all threads. What a thread copied to these tiles is cleaned where some row at this edge does not see all of it.
__device__ __forceinline__ void arrive(bool masked, const Copies &copies, u32 tile, u32 tiles) {
    cp_async_wait<0>();
    if (!masked) return __syncthreads();
    // Zero times NaN would be NaN.
    bool found = false;
    for (u32 i = 0; i < tiles; i++) found |= copies.clean(shared + tile + i * BLOCK);
    const bool odd = __syncthreads_or(found);
    if (odd && threadIdx.x == 0) job().odd = 1;
}

// A warp's queries on their way through the blocks of keys, from the newest to the oldest; as in attention.cu.
struct Queries {
    Accumulator acc;
    const bf16 *k, *v; // the block that was asked for last
    Copies copies;
    HeadRows<HEAD_DIM, 1, HELD_DQ> q, dout;
    Fragments of_k, of_v, turned; // in the first buffer
    u32 tiles, buffer, left, window;
    float exponent, log_sum[2], delta[2];
    bool any;

    template <bool Edge> __device__ __forceinline__ void round();
};

template <bool Edge> __device__ __forceinline__ void Queries::round() {
    const u32 tile = buffer;
    left--;
    const u32 place = Edge ? job().first - job().document : 0, first = place + warp_row(), key = Edge ? (job().blocks + left) * TILE : 0;
    arrive(Edge && (key + TILE > place + 1 || (window > 0 && key + window < place + TILE)), copies, 2 * BLOCK + tile, 1);
    buffer ^= 2 * BLOCK;
    if (!Edge || left > 0) {
        // Older blocks are full.
        u32 back = -TILE * copies.stride;
        keep(back);
        k += int(back), v += int(back);
        keep(k), keep(v);
        copies.load(tiles + buffer, k);
        copies.load(tiles + buffer + BLOCK, v);
        cp_async_commit();
    }
    if (any && (!Edge || (key <= first + 15 && (window == 0 || key + TILE - 1 + window > first)))) {
        float p[1][NT][4] = {}, ds[1][NT][4] = {};
        multiply(p, q, of_k, tile);
        multiply(ds, dout, of_v, tile);
#pragma unroll
        for (int j = 0; j < NT; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                ds[0][j][e] = exp2_approx(fmaf(p[0][j][e], exponent, -log_sum[e / 2])) * (ds[0][j][e] - delta[e / 2]);
            }
        }
        if (Edge && (key + TILE - 1 > first || (window > 0 && key + window <= first + 15))) hide<true>(ds, 0.0f, first, key, window);
        accumulate(one_row(acc), ds, turned, tile);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_dq(bf16 *__restrict__ dq, const bf16 *__restrict__ dout, const bf16 *__restrict__ q, const bf16 *__restrict__ k,
                       const bf16 *__restrict__ v, const float *__restrict__ stats, const int *__restrict__ tiles,
                       const float *__restrict__ table, const int *__restrict__ positions, u32 n, u32 heads, u32 kv_heads, u32 window,
                       float scale) {
    const u32 lane = threadIdx.x % 32, head = blockIdx.x % heads, kv = head / (heads / kv_heads);
    const int *tile = tiles + blockIdx.x / heads * 3;
    const u32 document = uniform(tile[0]), end = uniform(tile[1]), first = uniform(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;
    k += kv * HEAD_DIM, v += kv * HEAD_DIM;

    const u32 place = first - document, newest = place / TILE;
    const u32 oldest = window > 0 && place >= window ? (place + 1 - window) / TILE : 0;
    const u32 whole_from = window > 0 && place + TILE > window ? (place + TILE - window + TILE - 1) / TILE : 0;
    const u32 q_tile = shared_address(shared), kv_tiles = q_tile + 2 * BLOCK, q_rows = q_tile + uniform(threadIdx.x / 32) * (16 * Tile::ROW);
    {
        const Copies of_q(q_stride), of_kv(kv_stride);
        const u64 at = u64(first) * q_stride + head * HEAD_DIM, at_kv = u64(first) * kv_stride;
        of_q.load(q_tile, q + at, end - first);
        of_q.load(q_tile + BLOCK, dout + at, end - first);
        of_kv.load(kv_tiles, k + at_kv, end - first);
        of_kv.load(kv_tiles + BLOCK, v + at_kv, end - first);
        cp_async_commit();
    }
    const Fragments of_k = Fragments::b(lane, kv_tiles);
    Queries of{{}, k + u64(first) * kv_stride, v + u64(first) * kv_stride, Copies(kv_stride), q_rows, q_rows + BLOCK, of_k,
               Fragments::b(lane, kv_tiles + BLOCK), Fragments::b_turned(lane, kv_tiles), kv_tiles, 0, newest + 1 - oldest, window,
               scale * LOG2_E, {}, {}, first + warp_row() < end};
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = first + warp_row() + lane / 4 + h * 8;
        const u64 at = u64(row) * heads + head;
        of.log_sum[h] = row < end ? stats[at] : 0.0f;
        of.delta[h] = row < end ? stats[u64(n) * heads + at] : 0.0f;
    }
    if (threadIdx.x == 0) job() = Job{document, end, first, head, oldest, 0};
    cp_async_wait<0>();
    __syncthreads();
    of.q.hold();
    of.dout.hold();
    // The newest block is at an edge, and the oldest one has none to follow.
    const u32 behind = max(whole_from, oldest + 1) - oldest, before = newest - oldest;
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
    const Job last = job();
    const u32 warp_first = last.first + warp_row();
    if (warp_first >= last.end) return;
    bf16 *to = dq + last.head * HEAD_DIM;
    multiply_by(of.acc, scale);
    if (table) turn_back(of.acc, table, positions, warp_first, last.end);
    Tile::store16(to, q_stride, warp_first, last.end, shared + threadIdx.x / 32 * (16 * Tile::ROW), of.acc);
    if (!last.odd) return;
    // What was left out reaches those that see it: a key that is not finite makes a score of it.
    __syncwarp();
    for (u32 row = warp_first; row < min(warp_first + 16, last.end); row++) {
        bool seen = false;
        for (u32 key = oldest_key(row, last.document, window); key <= row; key++) seen |= odd_row(k + u64(key) * kv_stride);
        if (__any_sync(~0u, seen)) spoil(to + u64(row) * q_stride);
    }
}

// A warp's keys on their way through the query heads that share them, and through the blocks of queries of each.
struct Keys {
    Accumulator acc_k, acc_v;
    const bf16 *q, *dout; // the block that was asked for last
    const float *stats;
    u32 figure;           // this thread's of that block: lse of a row, or delta
    Copies copies;
    HeadRows<HEAD_DIM, 1, HELD_DKDV> k, v;
    Fragments of_q, of_dout, turned; // in the first buffer
    u32 parts, buffer;               // its address, and which is read next, 0 or 1
    u32 block, heads_left;           // blocks of queries count from the tile's first row
    u32 heads, window;
    float exponent;

    // Goes on by a block. At an edge not every query may see every key, and what follows is another head, part of a block or nothing.
    template <bool Edge> __device__ __forceinline__ void round();
};

template <bool Edge> __device__ __forceinline__ void Keys::round() {
    const u32 tile = buffer * (2 * BLOCK), first = warp_row(), query = block * TILE;
    arrive(Edge && (block == 0 || (window > 0 && query + TILE > window)), copies, 2 * BLOCK + tile, 2);
    const u32 figures = buffer * (2 * TILE * sizeof(float));
    buffer ^= 1;
    block++;
    if (!Edge) {
        u32 on = TILE * copies.stride;
        keep(on);
        q += on, dout += on, figure += TILE * heads;
        keep(q), keep(dout), keep(figure);
    } else if (block < job().blocks) {
        q += TILE * copies.stride, dout += TILE * copies.stride, figure += TILE * heads;
    } else {
        // The next head begins anew.
        block = 0, heads_left--;
        q -= u64(query) * copies.stride - HEAD_DIM, dout -= u64(query) * copies.stride - HEAD_DIM, figure -= query * heads - 1;
    }
    if (!Edge || heads_left > 0) {
        const u32 to = parts + buffer * (2 * BLOCK), to_figure = parts + 4 * BLOCK + buffer * (2 * TILE * sizeof(float)) + threadIdx.x * 4;
        if (Edge) {
            // A row beyond the document is zero in q and dout: with zeros it adds nothing.
            const u32 rows = job().end - job().first - block * TILE;
            copies.load(to, q, rows);
            copies.load(to + BLOCK, dout, rows);
            cp_async4_zfill(to_figure, stats + figure, threadIdx.x % TILE < rows ? 4 : 0);
        } else {
            copies.load(to, q);
            copies.load(to + BLOCK, dout);
            cp_async4(to_figure, stats + figure);
        }
        cp_async_commit();
    }
    const float *of = reinterpret_cast<const float *>(shared + 6 * BLOCK + figures) + threadIdx.x % 4 * 2;
    // Keys of the document. A tile that has others has no whole blocks.
    const u32 keys = Edge ? job().end - job().first : TILE;
    if (!Edge || (first < keys && first <= query + TILE - 1 && (window == 0 || first + 15 + window > query))) {
        const bool masked = Edge && (first + 15 > query || (window > 0 && first + window <= query + TILE - 1));
        float p[1][NT][4] = {}, ds[1][NT][4] = {};
        multiply(p, k, of_q, tile);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const float2 log_sum = *reinterpret_cast<const float2 *>(of + j * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) p[0][j][e] = exp2_approx(fmaf(p[0][j][e], exponent, -(e % 2 ? log_sum.y : log_sum.x)));
        }
        if (masked) hide<false>(p, 0.0f, first, query, window);
        accumulate(one_row(acc_v), p, turned, tile + BLOCK);
        multiply(ds, v, of_dout, tile);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            const float2 delta = *reinterpret_cast<const float2 *>(of + TILE + j * 8);
#pragma unroll
            for (int e = 0; e < 4; e++) ds[0][j][e] = p[0][j][e] * (ds[0][j][e] - (e % 2 ? delta.y : delta.x));
        }
        if (masked) hide<false>(ds, 0.0f, first, query, window);
        accumulate(one_row(acc_k), ds, turned, tile);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_dkdv(bf16 *__restrict__ dk, bf16 *__restrict__ dv, const bf16 *__restrict__ dout, const bf16 *__restrict__ q,
                         const bf16 *__restrict__ k, const bf16 *__restrict__ v, const float *__restrict__ stats,
                         const int *__restrict__ tiles, const float *__restrict__ table, const int *__restrict__ positions, u32 n,
                         u32 heads, u32 kv_heads, u32 window, float scale) {
    const u32 lane = threadIdx.x % 32, kv = blockIdx.x % kv_heads, group = heads / kv_heads;
    const int *tile = tiles + blockIdx.x / kv_heads * 3;
    const u32 document = uniform(tile[0]), end = uniform(tile[1]), first = uniform(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;

    // Blocks of queries that see a key of the tile; behind the first one, until `whole`, they see all keys and a full one follows.
    const u32 rows = end - first, last_key = min(u32(TILE), rows) - 1;
    const u32 blocks = ((window > 0 ? min(rows, last_key + window) : rows) + TILE - 1) / TILE;
    const u32 full = min(blocks, rows / TILE), whole = window > 0 ? min(full, window / TILE + 1) : full;
    const u32 k_tile = shared_address(shared), parts = k_tile + 2 * BLOCK, own_rows = uniform(threadIdx.x / 32) * (16 * Tile::ROW);
    const u32 row = threadIdx.x % TILE;
    const u64 at = u64(first) * q_stride + kv * group * HEAD_DIM;
    const u32 figure = threadIdx.x / TILE * n * heads + (first + row) * heads + kv * group;
    const Copies of_q(q_stride);
    {
        const Copies of_kv(kv_stride);
        const u64 at_kv = u64(first) * kv_stride + kv * HEAD_DIM;
        of_kv.load(k_tile, k + at_kv, rows);
        of_kv.load(k_tile + BLOCK, v + at_kv, rows);
        of_q.load(parts, q + at, rows);
        of_q.load(parts + BLOCK, dout + at, rows);
        cp_async4_zfill(parts + 4 * BLOCK + threadIdx.x * 4, stats + figure, row < rows ? 4 : 0);
        cp_async_commit();
    }
    Keys of{{}, {}, q + at, dout + at, stats, figure, of_q, k_tile + own_rows, k_tile + BLOCK + own_rows, Fragments::b(lane, parts),
            Fragments::b(lane, parts + BLOCK), Fragments::b_turned(lane, parts), parts, 0, 0, group, heads, window,
            scale * LOG2_E};
    if (threadIdx.x == 0) job() = Job{document, end, first, kv, blocks, 0};
    cp_async_wait<0>();
    __syncthreads();
    of.k.hold();
    of.v.hold();
#pragma unroll 1
    while (of.heads_left > 0) {
        if (of.block == 0 || of.block + 1 >= whole) {
            of.round<true>();
        } else {
#pragma unroll 1
            do of.round<false>();
            while (of.block + 1 < whole);
        }
    }
    __syncthreads();
    const Job last = job();
    const u32 warp_first = last.first + warp_row();
    if (warp_first >= last.end) return;
    bf16 *to_k = dk + last.head * HEAD_DIM, *to_v = dv + last.head * HEAD_DIM;
    multiply_by(of.acc_k, scale);
    if (table) turn_back(of.acc_k, table, positions, warp_first, last.end);
    // Only this warp reads its rows of both tiles.
    unsigned char *rows_of_warp = shared + threadIdx.x / 32 * (16 * Tile::ROW);
    Tile::store16(to_k, kv_stride, warp_first, last.end, rows_of_warp, of.acc_k);
    Tile::store16(to_v, kv_stride, warp_first, last.end, rows_of_warp + BLOCK, of.acc_v);
    if (!last.odd) return;
    // What was left out reaches the keys that are seen: by scores all of dk and dv, by dout its columns of dv and all of dk.
    __syncwarp();
    for (u32 key = warp_first; key < min(warp_first + 16, last.end); key++) {
        const u32 until = window > 0 ? min(last.end, key + window) : last.end;
        bool odd_q = false, odd_dout = false;
        for (u32 head = last.head * group; head < (last.head + 1) * group; head++) {
            for (u32 query = key; query < until; query++) {
                const u64 from = u64(query) * q_stride + head * HEAD_DIM;
                odd_q |= odd_row(q + from);
                for (u32 column = threadIdx.x % 32; column < HEAD_DIM; column += 32) {
                    if (finite(dout[from + column])) continue;
                    odd_dout = true;
                    to_v[u64(key) * kv_stride + column].bits = 0x7fff;
                }
            }
        }
        if (__any_sync(~0u, odd_q)) spoil(to_v + u64(key) * kv_stride);
        if (__any_sync(~0u, odd_q || odd_dout)) spoil(to_k + u64(key) * kv_stride);
    }
}
