// Causal attention inside documents on tensor cores, backward; algorithm 2 of Dao 2023, arXiv:2307.08691, in two passes, so that every
// sum runs in one order and nothing is added in memory.
//
//   delta   delta = sum dout out, row by row
//   dq      P = exp(S - lse), dS = P (dout v^T - delta);  dq = scale dS k: a tile of queries over its blocks of keys
//   dkdv    dv = P^T dout, dk = scale dS^T q: a tile of keys over the query heads that share it and their blocks of queries
//
// Tokens, heads, windows and tiles as in attention.cu; tiles of queries and of keys are TILE rows here. Shapes: q, out, dout, dq
// (N, heads D); k, v, dk, dv (N, kv_heads D) bf16; lse, delta (N, heads) f32; table and positions as for rope.cu, or null: where they
// are given dq and dk are turned back before they are rounded.
// Defines: HEAD_DIM in {32, 64, 80, 96, 128}.
// Numerics: S, dP, delta and gradients in f32; P and dS are rounded to bf16 for the products with dout, k and q; one rounding of what
// is stored. Heads of a group one after the other, blocks counted from the document's first token: a document has
// the same bits wherever it stands.
// Method: four warps of 16 rows. Tiles and blocks pass through shared memory as in attention.cu. dkdv forms S^T and dP^T, so that its
// warps own keys and P^T and dS^T stay in registers.
// Launch: 128 threads. delta: 32 rows a block. dq, dkdv: blocks: tiles times heads, or key heads, heaviest tiles first; dynamic
// shared memory of 6 TILE rows, dkdv also 4 TILE floats.
// Cost: 6 D flops a pair of query and key for dq, 8 D for dkdv.
// Test: tests/common/attention.rs, on every device.
#include "common/elements.cuh"
#include "common/heads.cuh"

constexpr int TILE = 64, THREADS = 128, NT = TILE / 8, DT = HEAD_DIM / 8;

using Tile = HeadTile<HEAD_DIM>;
using Fragments = HeadFragments<HEAD_DIM>;
using Accumulator = float[DT][4];

constexpr float LOG2_E = 1.4426950408889634f;

extern __shared__ __align__(128) unsigned char shared[];

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

// Takes scores out where the query does not see the key. Rows are queries and columns keys, or the other way round.
template <bool RowsAreQueries>
__device__ __forceinline__ void mask(float (&s)[NT][4], u32 first_row, u32 first_column, u32 window) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int j = 0; j < NT; j++) {
#pragma unroll
        for (int e = 0; e < 4; e++) {
            const u32 row = first_row + lane / 4 + e / 2 * 8, column = first_column + j * 8 + lane % 4 * 2 + e % 2;
            const u32 query = RowsAreQueries ? row : column, key = RowsAreQueries ? column : row;
            if (key > query || (window > 0 && key + window <= query)) s[j][e] = -infinity();
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
    attention_tiles_delta(float *__restrict__ delta, const bf16 *__restrict__ dout, const bf16 *__restrict__ out, u32 tasks) {
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
    if (threadIdx.x % 4 == 0 && wanted < tasks) delta[task] = sum;
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_dq(bf16 *__restrict__ dq, const bf16 *__restrict__ dout, const bf16 *__restrict__ q, const bf16 *__restrict__ k,
                       const bf16 *__restrict__ v, const float *__restrict__ lse, const float *__restrict__ delta,
                       const int *__restrict__ tiles, const float *__restrict__ table, const int *__restrict__ positions, u32 heads,
                       u32 kv_heads, u32 window, float scale) {
    constexpr u32 BLOCK = TILE * Tile::ROW; // bytes of a tile
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 head = blockIdx.x % heads, kv = head / (heads / kv_heads);
    const int *tile = tiles + blockIdx.x / heads * 3;
    const u32 document = u32(tile[0]), end = u32(tile[1]), first = u32(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;
    k += kv * HEAD_DIM, v += kv * HEAD_DIM;

    const u32 place = first - document, newest = place / TILE;
    const u32 oldest = window > 0 && place >= window ? (place + 1 - window) / TILE : 0;
    const u32 q_tile = shared_address(shared), kv_tiles = q_tile + 2 * BLOCK;
    auto load = [&](u32 block, u32 to) {
        Tile::load<TILE, THREADS>(to, k, kv_stride, document + block * TILE, end);
        Tile::load<TILE, THREADS>(to + BLOCK, v, kv_stride, document + block * TILE, end);
    };
    Tile::load<TILE, THREADS>(q_tile, q + head * HEAD_DIM, q_stride, first, end);
    Tile::load<TILE, THREADS>(q_tile + BLOCK, dout + head * HEAD_DIM, q_stride, first, end);
    load(newest, kv_tiles);
    cp_async_commit();

    const Fragments of_rows = Fragments::a(lane), of_columns = Fragments::b(lane), turned = Fragments::b_turned(lane);
    const u32 q_rows = q_tile + warp * (16 * Tile::ROW), dout_rows = q_rows + BLOCK;
    const u32 warp_first = first + warp * 16, warp_last = warp_first + 15;
    const float exponent = scale * LOG2_E;
    float log_sum[2], del[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
        const u32 row = warp_first + lane / 4 + h * 8;
        log_sum[h] = row < end ? lse[u64(row) * heads + head] * LOG2_E : 0.0f;
        del[h] = row < end ? delta[u64(row) * heads + head] : 0.0f;
    }

    Accumulator acc = {};
    u32 buffer = 0;
#pragma unroll 1
    for (u32 block = newest;; block--) {
        cp_async_wait<0>();
        __syncthreads();
        if (block > oldest) {
            load(block - 1, kv_tiles + (buffer ^ (2 * BLOCK)));
            cp_async_commit();
        }
        const u32 k_tile = kv_tiles + buffer, v_tile = k_tile + BLOCK;
        buffer ^= 2 * BLOCK;
        const u32 key = document + block * TILE;
        if (warp_first < end && key <= warp_last && (window == 0 || key + TILE - 1 + window > warp_first)) {
            float p[NT][4] = {}, ds[NT][4] = {};
            multiply(one_row(p), of_rows, q_rows, of_columns, k_tile);
            multiply(one_row(ds), of_rows, dout_rows, of_columns, v_tile);
            if (key + TILE - 1 > warp_first || (window > 0 && key + window <= warp_last)) mask<true>(p, warp_first, key, window);
#pragma unroll
            for (int j = 0; j < NT; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    ds[j][e] = exp2_approx(fmaf(p[j][e], exponent, -log_sum[e / 2])) * (ds[j][e] - del[e / 2]);
                }
            }
            accumulate(one_row(acc), one_row(ds), turned, k_tile);
        }
        if (block == oldest) break;
    }
    if (warp_first >= end) return;
    multiply_by(acc, scale);
    if (table) turn_back(acc, table, positions, warp_first, end);
    Tile::store16(dq + head * HEAD_DIM, q_stride, warp_first, end, shared + warp * (16 * Tile::ROW), acc);
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    attention_tiles_dkdv(bf16 *__restrict__ dk, bf16 *__restrict__ dv, const bf16 *__restrict__ dout, const bf16 *__restrict__ q,
                         const bf16 *__restrict__ k, const bf16 *__restrict__ v, const float *__restrict__ lse,
                         const float *__restrict__ delta, const int *__restrict__ tiles, const float *__restrict__ table,
                         const int *__restrict__ positions, u32 heads, u32 kv_heads, u32 window, float scale) {
    constexpr u32 BLOCK = TILE * Tile::ROW; // bytes of a tile
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 kv = blockIdx.x % kv_heads, group = heads / kv_heads;
    const int *tile = tiles + blockIdx.x / kv_heads * 3;
    const u32 end = u32(tile[1]), first = u32(tile[2]);
    const u32 q_stride = heads * HEAD_DIM, kv_stride = kv_heads * HEAD_DIM;

    // Queries that see a key of the tile.
    const u32 last_key = min(first + TILE, end) - 1;
    const u32 seen_until = window > 0 ? min(end, last_key + window) : end;
    const u32 blocks = (seen_until - first + TILE - 1) / TILE;
    const u32 k_tile = shared_address(shared), parts = k_tile + 2 * BLOCK;
    float *stats = reinterpret_cast<float *>(shared + 6 * BLOCK);
    // Block `block` of a query head into buffer 0 or 1.
    auto load = [&](u32 head, u32 block, u32 buffer) {
        const u32 from = first + block * TILE, to = parts + buffer * (2 * BLOCK);
        Tile::load<TILE, THREADS>(to, q + head * HEAD_DIM, q_stride, from, end);
        Tile::load<TILE, THREADS>(to + BLOCK, dout + head * HEAD_DIM, q_stride, from, end);
        if (threadIdx.x < TILE) {
            const u32 row = from + threadIdx.x;
            const u64 at = u64(row) * heads + head;
            // A row beyond the document is zero in q and dout: with these it adds nothing.
            float *of = stats + buffer * (2 * TILE) + threadIdx.x;
            of[0] = row < end ? lse[at] * LOG2_E : 0.0f;
            of[TILE] = row < end ? delta[at] : 0.0f;
        }
    };
    Tile::load<TILE, THREADS>(k_tile, k + kv * HEAD_DIM, kv_stride, first, end);
    Tile::load<TILE, THREADS>(k_tile + BLOCK, v + kv * HEAD_DIM, kv_stride, first, end);
    load(kv * group, 0, 0);
    cp_async_commit();

    const Fragments of_rows = Fragments::a(lane), of_columns = Fragments::b(lane), turned = Fragments::b_turned(lane);
    const u32 k_rows = k_tile + warp * (16 * Tile::ROW), v_rows = k_rows + BLOCK;
    const u32 warp_first = first + warp * 16, warp_last = warp_first + 15;
    const float exponent = scale * LOG2_E;
    Accumulator acc_k = {}, acc_v = {};
    u32 head = kv * group, block = 0, buffer = 0;
#pragma unroll 1
    while (true) {
        cp_async_wait<0>();
        __syncthreads();
        const u32 query = first + block * TILE;
        const bool last_block = block + 1 == blocks;
        block = last_block ? 0 : block + 1, head += last_block;
        const bool more = head < (kv + 1) * group;
        if (more) {
            load(head, block, buffer ^ 1);
            cp_async_commit();
        }
        const u32 q_part = parts + buffer * (2 * BLOCK), dout_part = q_part + BLOCK;
        const float *of = stats + buffer * (2 * TILE) + lane % 4 * 2;
        buffer ^= 1;
        if (warp_first < end && warp_first <= query + TILE - 1 && (window == 0 || warp_last + window > query)) {
            float p[NT][4] = {}, ds[NT][4] = {};
            multiply(one_row(p), of_rows, k_rows, of_columns, q_part);
            if (warp_last > query || (window > 0 && warp_first + window <= query + TILE - 1)) {
                mask<false>(p, warp_first, query, window);
            }
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float2 log_sum = *reinterpret_cast<const float2 *>(of + j * 8);
#pragma unroll
                for (int e = 0; e < 4; e++) {
                    p[j][e] = exp2_approx(fmaf(p[j][e], exponent, -(e % 2 ? log_sum.y : log_sum.x)));
                }
            }
            accumulate(one_row(acc_v), one_row(p), turned, dout_part);
            multiply(one_row(ds), of_rows, v_rows, of_columns, dout_part);
#pragma unroll
            for (int j = 0; j < NT; j++) {
                const float2 del = *reinterpret_cast<const float2 *>(of + TILE + j * 8);
#pragma unroll
                for (int e = 0; e < 4; e++) ds[j][e] = p[j][e] * (ds[j][e] - (e % 2 ? del.y : del.x));
            }
            accumulate(one_row(acc_k), one_row(ds), turned, q_part);
        }
        if (!more) break;
    }
    if (warp_first >= end) return;
    multiply_by(acc_k, scale);
    if (table) turn_back(acc_k, table, positions, warp_first, end);
    // Only this warp reads its rows of both tiles.
    unsigned char *rows = shared + warp * (16 * Tile::ROW);
    Tile::store16(dk + kv * HEAD_DIM, kv_stride, warp_first, end, rows, acc_k);
    Tile::store16(dv + kv * HEAD_DIM, kv_stride, warp_first, end, rows + BLOCK, acc_v);
}
