// Low-rank updates of a group of projections that read one x (Hu et al. 2021, arXiv:2106.09685, eq. 3), each with its own dropout:
//
//   lora_t      t_i = factor drop_i(x) A_i^T, from one read of x
//   lora_u_db   u_i = factor dy_i B_i and dB_i += dy_i^T t_i, from one read of dy_i
//   lora_da     dA_i += u_i^T drop_i(x), from one read of x
//
// Shapes: x (m, k), A_i (rank, k), dy_i (m, n_i), B_i (n_i, rank), t_i, u_i (m, rank) bf16; dA_i (rank, k), dB_i (n_i, rank) f32, dB_i may
// be null; m tokens. `factor` is scale of the update times that of dropout, so drop_i is 0 or 1 here: element e is dropped as
// dropout.cu would, by stream (key0_i .. hi1_i) and threshold; threshold 0: nothing is.
// Defines: RANK in {16, 32, 64}, columns of an update that a block takes: rank itself, filled up with zeros, or RANK of it at a time;
// STAGES.
// Numerics: sums in f32; t and u are rounded once. t: one chain along k. u: chains over CHUNK columns of dy, added in order. dA, dB:
// chains over STRIP rows, added in order, the whole added to the gradient once. Neither the number of rows nor that of blocks changes the
// bits of a row of t or u.
// Method: mma.sync on tiles that pass through STAGES buffers by cp.async. A warp masks 16 x 16 elements of x at a time on their way to its
// fragments, a lane draws the Philox block of its 8. Sums of several blocks go through memory: the block that comes last adds them.
// Needs: m > 0; k, n_i, rank multiples of 8; counters zero before, and after.
// Launch: lora_t 128 threads, a block for each 64 rows; lora_u_db and lora_da 256 threads, a block for each STRIP rows and CHUNK columns of
// a dy_i, or 128 columns of x; all times ceil(rank / RANK). Dynamic shared memory: STAGES buffers and what each says.
// Cost: x or dy read once; 2 m rank (k or n_i) flops, twice that in lora_u_db; partial sums of 8 rank bytes for each STRIP x 1, or
// 1 x CHUNK, elements.
// Test: tests/common/projections.rs, on every device.
#include "common/types.cuh"
#include "common/heads.cuh"
#include "common/reduce.cuh"
#include "common/philox.cuh"

constexpr int STRIP = 512, CHUNK = 512;
constexpr int RT = RANK / 8, RF = RANK / 16;
// Steps of u at once in lora_u_db: with four the widest spills on sm_100.
constexpr int U_STEPS = RANK == 64 ? 2 : 4;

using Columns = HeadTile<64>;       // 64 columns of x, A or dy
using Ranks = HeadTile<RANK>;       // of t, u or B
using Wide = HeadTile<128>;         // 128 columns of x

extern __shared__ __align__(128) unsigned char shared[];

// Starts the copy of Rows rows by Dim columns from (row, column) of a matrix on. What lies outside of it becomes zero and is not read.
template <int Dim, int Rows, int Threads>
__device__ __forceinline__ void load(u32 tile, const bf16 *matrix, u32 stride, u32 row, u32 rows, u32 column, u32 columns) {
    constexpr int CHUNKS = Dim / 8;
    static_assert(Rows * CHUNKS % Threads == 0 || Rows * CHUNKS < Threads, "the threads cover the tile");
#pragma unroll
    for (int pass = 0; pass < (Rows * CHUNKS + Threads - 1) / Threads; pass++) {
        const u32 i = threadIdx.x + pass * Threads, r = i / CHUNKS, c = i % CHUNKS;
        if (Rows * CHUNKS < Threads && i >= Rows * CHUNKS) return;
        const bool valid = row + r < rows && column + c * 8 < columns;
        cp_async16_zfill(tile + HeadTile<Dim>::offset(r, c), valid ? matrix + u64(row + r) * stride + column + c * 8 : matrix,
                         valid ? 16 : 0);
    }
}

// Keeps of 8 elements those whose draws are not below the threshold.
__device__ __forceinline__ uint4 kept(uint4 x, u64 block, const Stream &stream, u32 threshold) {
    if (threshold == 0) return x;
    u32 words[4];
    philox(words, block, stream);
    auto mask = [&](u32 w) { return ((w & 0xffffu) < threshold ? 0u : 0xffffu) | ((w >> 16) < threshold ? 0u : 0xffff0000u); };
    x.x &= mask(words[0]), x.y &= mask(words[1]), x.z &= mask(words[2]), x.w &= mask(words[3]);
    return x;
}

// The same here: the block's tiles are done with, so their memory tells all threads.
__device__ __forceinline__ bool comes_last(u32 *counter, u32 blocks) {
    return comes_last(counter, blocks, reinterpret_cast<u32 *>(shared));
}

// Dynamic shared memory: STAGES tiles of x (64 x 64) with `count` of A (RANK x 64); 6 KiB.
extern "C" __global__ void __launch_bounds__(128, 1)
    lora_t(bf16 *__restrict__ t0, bf16 *__restrict__ t1, bf16 *__restrict__ t2, const bf16 *__restrict__ x,
           const bf16 *__restrict__ a0, const bf16 *__restrict__ a1, const bf16 *__restrict__ a2, u32 m, u32 k, u32 rank, u32 count,
           float factor, u32 threshold, u32 s00, u32 s01, u32 s02, u32 s03, u32 s10, u32 s11, u32 s12, u32 s13, u32 s20, u32 s21,
           u32 s22, u32 s23) {
    constexpr u32 TILE_X = 64 * Columns::ROW, TILE_A = RANK * Columns::ROW;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 parts = (rank + RANK - 1) / RANK, first_rank = blockIdx.x % parts * RANK, first_row = blockIdx.x / parts * 64;
    const u32 stage = TILE_X + count * TILE_A, tiles = (k + 63) / 64, base = shared_address(shared);
    auto load_tile = [&](u32 tile) {
        const u32 to = base + tile % STAGES * stage;
        load<64, 64, 128>(to, x, k, first_row, m, tile * 64, k);
#pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < count) load<64, RANK, 128>(to + TILE_X + i * TILE_A, pick(i, a0, a1, a2), k, first_rank, rank, tile * 64, k);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) load_tile(s);
        cp_async_commit();
    }
    const Stream streams[3] = {{s00, s01, s02, s03}, {s10, s11, s12, s13}, {s20, s21, s22, s23}};
    const HeadFragments<64> of_a = HeadFragments<64>::b(lane);
    const u32 row = warp * 16 + lane % 16, half = lane / 16;
    // Masked elements of this warp, one tile an update: lane i writes what lane i of ldmatrix asks for.
    unsigned char *mine = shared + STAGES * stage + warp * (3 * 512) + lane * 16;
    float sums[3][RT][4] = {};
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; tile++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < tiles) load_tile(tile + STAGES - 1);
        cp_async_commit();
        const u32 at = tile % STAGES * stage;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint4 raw = *reinterpret_cast<const uint4 *>(shared + at + Columns::offset(row, 2 * step + half));
            const u64 block = (u64(first_row + row) * k + tile * 64 + (2 * step + half) * 8) / 8;
#pragma unroll
            for (int i = 0; i < 3; i++) {
                if (i < count) *reinterpret_cast<uint4 *>(mine + i * 512) = kept(raw, block, streams[i], threshold);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 3; i++) {
                if (i >= count) continue;
                u32 fx[4];
                ldmatrix_x4(fx, shared_address(mine + i * 512));
#pragma unroll
                for (int j = 0; j < RF; j++) {
                    u32 fa[4];
                    ldmatrix_x4(fa, of_a.at(base + at + TILE_X + i * TILE_A, j, step));
                    mma_16816(sums[i][2 * j], fx, fa[0], fa[1]);
                    mma_16816(sums[i][2 * j + 1], fx, fa[2], fa[3]);
                }
            }
            __syncwarp();
        }
    }
#pragma unroll
    for (int i = 0; i < 3; i++) {
        if (i >= count) continue;
        bf16 *t = pick(i, t0, t1, t2);
#pragma unroll
        for (int j = 0; j < RT; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 r = first_row + warp * 16 + lane / 4 + h * 8, c = first_rank + j * 8 + lane % 4 * 2;
                if (r < m && c < rank) {
                    *reinterpret_cast<u32 *>(t + u64(r) * rank + c) =
                        cvt_bf16x2(__fmul_rn(factor, sums[i][j][2 * h]), __fmul_rn(factor, sums[i][j][2 * h + 1]));
                }
            }
        }
    }
}

// Dynamic shared memory: STAGES tiles of dy (128 x 64), t (128 x RANK) and B (64 x RANK); 64 RANK floats.
// counters: one for each strip of each update and part, for u; then one for each chunk. partial_u: (chunks of all, m, rank);
// partial_db: (strips, n0 + n1 + n2, rank). Either is left alone where a row, or a column, has one block.
extern "C" __global__ void __launch_bounds__(256, 1)
    lora_u_db(bf16 *__restrict__ u0, bf16 *__restrict__ u1, bf16 *__restrict__ u2, float *__restrict__ db0, float *__restrict__ db1,
              float *__restrict__ db2, float *__restrict__ partial_u, float *__restrict__ partial_db, u32 *__restrict__ counters,
              const bf16 *__restrict__ dy0, const bf16 *__restrict__ dy1, const bf16 *__restrict__ dy2, const bf16 *__restrict__ b0,
              const bf16 *__restrict__ b1, const bf16 *__restrict__ b2, const bf16 *__restrict__ t0, const bf16 *__restrict__ t1,
              const bf16 *__restrict__ t2, u32 m, u32 n0, u32 n1, u32 n2, u32 rank, float factor) {
    constexpr u32 TILE_DY = 128 * Columns::ROW, TILE_T = 128 * Ranks::ROW, TILE_B = 64 * Ranks::ROW, STAGE = TILE_DY + TILE_T + TILE_B;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, base = shared_address(shared);
    const u32 strips = (m + STRIP - 1) / STRIP, parts = (rank + RANK - 1) / RANK;
    const u32 chunks0 = (n0 + CHUNK - 1) / CHUNK, chunks1 = (n1 + CHUNK - 1) / CHUNK, chunks2 = (n2 + CHUNK - 1) / CHUNK;
    // Blocks: strip by strip the chunks of all updates, of each its parts.
    const u32 part = blockIdx.x % parts, chunks = chunks0 + chunks1 + chunks2, place = blockIdx.x / parts % chunks;
    const u32 strip = blockIdx.x / parts / chunks;
    const u32 which = place < chunks0 ? 0 : place < chunks0 + chunks1 ? 1 : 2;
    const u32 chunk = place - pick(which, 0u, chunks0, chunks0 + chunks1), n = pick(which, n0, n1, n2);
    const u32 first_row = strip * STRIP, first_column = chunk * CHUNK, first_rank = part * RANK;
    const u32 end_row = min(m, first_row + STRIP), columns = (min(n - first_column, u32(CHUNK)) + 63) / 64;
    const bf16 *dy = pick(which, dy0, dy1, dy2), *b = pick(which, b0, b1, b2), *t = pick(which, t0, t1, t2);

    // Tiles: of each 64 columns the four times 128 rows of the strip.
    const u32 tiles = columns * 4;
    auto load_tile = [&](u32 tile) {
        const u32 to = base + tile % STAGES * STAGE, row = first_row + tile % 4 * 128, column = first_column + tile / 4 * 64;
        load<64, 128, 256>(to, dy, n, row, end_row, column, n);
        load<RANK, 128, 256>(to + TILE_DY, t, rank, row, end_row, first_rank, rank);
        load<RANK, 64, 256>(to + TILE_DY + TILE_T, b, rank, column, n, first_rank, rank);
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) load_tile(s);
        cp_async_commit();
    }
    const HeadFragments<64> rows = HeadFragments<64>::a(lane), turned = HeadFragments<64>::b(lane);
    const HeadFragments<RANK> by = HeadFragments<RANK>::b_turned(lane);
    float *halves = reinterpret_cast<float *>(shared + STAGES * STAGE);
    const u32 columns_of_all = n0 + n1 + n2, column_of_all = pick(which, 0u, n0, n0 + n1) + first_column;
    float *db = pick(which, db0, db1, db2);

    float u[4][RT][4] = {};
#pragma unroll 1
    for (u32 column = 0; column < columns; column++) {
        float sums[RT][4] = {};
#pragma unroll
        for (int q = 0; q < 4; q++) {
            const u32 tile = column * 4 + q;
            cp_async_wait<STAGES - 2>();
            __syncthreads();
            if (tile + STAGES - 1 < tiles) load_tile(tile + STAGES - 1);
            cp_async_commit();
            const u32 at = base + tile % STAGES * STAGE;
            // u of this warp's 16 rows of 128.
#pragma unroll U_STEPS
            for (int step = 0; step < 4; step++) {
                u32 fa[4];
                ldmatrix_x4(fa, rows.at(at + warp * (16 * Columns::ROW), 0, step));
#pragma unroll
                for (int j = 0; j < RF; j++) {
                    u32 fb[4];
                    ldmatrix_x4_trans(fb, by.at(at + TILE_DY + TILE_T, step, j));
                    mma_16816(u[q][2 * j], fa, fb[0], fb[1]);
                    mma_16816(u[q][2 * j + 1], fa, fb[2], fb[3]);
                }
            }
            // dB of 16 columns and half of the rows.
#pragma unroll
            for (int step = 0; step < 4; step++) {
                const u32 half = warp / 4 * 64;
                u32 fa[4];
                ldmatrix_x4_trans(fa, turned.at(at + half * Columns::ROW, step, warp % 4));
#pragma unroll
                for (int j = 0; j < RF; j++) {
                    u32 fb[4];
                    ldmatrix_x4_trans(fb, by.at(at + TILE_DY + half * Ranks::ROW, step, j));
                    mma_16816(sums[2 * j], fa, fb[0], fb[1]);
                    mma_16816(sums[2 * j + 1], fa, fb[2], fb[3]);
                }
            }
        }
        if (!db) continue;
        // The other half of the rows, by way of shared memory.
        if (warp >= 4) {
#pragma unroll
            for (int j = 0; j < RT; j++) {
#pragma unroll
                for (int e = 0; e < 4; e++) halves[((warp - 4) * RT * 4 + j * 4 + e) * 32 + lane] = sums[j][e];
            }
        }
        __syncthreads();
        if (warp < 4) {
#pragma unroll
            for (int j = 0; j < RT; j++) {
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    const u32 c = column * 64 + warp * 16 + lane / 4 + h * 8, r = first_rank + j * 8 + lane % 4 * 2;
                    const float *other = halves + (warp * RT * 4 + j * 4 + 2 * h) * 32 + lane;
                    if (first_column + c < n && r < rank) {
                        float2 sum = make_float2(sums[j][2 * h] + other[0], sums[j][2 * h + 1] + other[32]);
                        float *to = strips == 1 ? db + u64(first_column + c) * rank + r
                                                : partial_db + (u64(strip) * columns_of_all + column_of_all + c) * rank + r;
                        float2 *at = reinterpret_cast<float2 *>(to);
                        if (strips == 1) sum.x += at->x, sum.y += at->y;
                        *at = sum;
                    }
                }
            }
        }
    }

    bf16 *out = pick(which, u0, u1, u2);
    const u32 own = pick(which, chunks0, chunks1, chunks2);
    partial_u += u64(place - chunk) * m * rank;
#pragma unroll
    for (int q = 0; q < 4; q++) {
#pragma unroll
        for (int j = 0; j < RT; j++) {
#pragma unroll
            for (int h = 0; h < 2; h++) {
                const u32 row = first_row + q * 128 + warp * 16 + lane / 4 + h * 8, r = first_rank + j * 8 + lane % 4 * 2;
                if (row < end_row && r < rank) {
                    const float x = u[q][j][2 * h], y = u[q][j][2 * h + 1];
                    if (own == 1) {
                        *reinterpret_cast<u32 *>(out + u64(row) * rank + r) = cvt_bf16x2(__fmul_rn(factor, x), __fmul_rn(factor, y));
                    } else {
                        *reinterpret_cast<float2 *>(partial_u + (u64(chunk) * m + row) * rank + r) = make_float2(x, y);
                    }
                }
            }
        }
    }
    const u32 width = min(rank - first_rank, u32(RANK));
    if (own > 1 && comes_last(counters + (which * strips + strip) * parts + part, own)) {
        for (u32 i = threadIdx.x; i < (end_row - first_row) * width; i += 256) {
            const u64 at = u64(first_row + i / width) * rank + first_rank + i % width;
            float sum = 0.0f;
            for (u32 c = 0; c < own; c++) sum += __ldcg(partial_u + u64(c) * m * rank + at);
            put(out[at], __fmul_rn(factor, sum));
        }
    }
    if (db && strips > 1 && comes_last(counters + 3 * strips * parts + place * parts + part, strips)) {
        for (u32 i = threadIdx.x; i < min(n - first_column, u32(CHUNK)) * width; i += 256) {
            const u64 at = u64(i / width) * rank + first_rank + i % width;
            float sum = 0.0f;
            for (u32 s = 0; s < strips; s++) sum += __ldcg(partial_db + (u64(s) * columns_of_all + column_of_all) * rank + at);
            db[u64(first_column) * rank + at] += sum;
        }
    }
}

// Dynamic shared memory: STAGES tiles of x (64 x 128) with `count` of u (64 x RANK); 12 KiB. counters: one for each 128 columns and
// part. partial: (strips, count, rank, k), left alone where there is one strip.
extern "C" __global__ void __launch_bounds__(256, 1)
    lora_da(float *__restrict__ da0, float *__restrict__ da1, float *__restrict__ da2, float *__restrict__ partial,
            u32 *__restrict__ counters, const bf16 *__restrict__ x, const bf16 *__restrict__ u0, const bf16 *__restrict__ u1,
            const bf16 *__restrict__ u2, u32 m, u32 k, u32 rank, u32 count, u32 threshold, u32 s00, u32 s01, u32 s02, u32 s03,
            u32 s10, u32 s11, u32 s12, u32 s13, u32 s20, u32 s21, u32 s22, u32 s23) {
    constexpr u32 TILE_X = 64 * Wide::ROW, TILE_U = 64 * Ranks::ROW;
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32, base = shared_address(shared);
    const u32 strips = (m + STRIP - 1) / STRIP, parts = (rank + RANK - 1) / RANK, blocks = (k + 127) / 128;
    const u32 part = blockIdx.x % parts, block = blockIdx.x / parts % blocks, strip = blockIdx.x / parts / blocks;
    const u32 first_row = strip * STRIP, end_row = min(m, first_row + STRIP), first_column = block * 128, first_rank = part * RANK;
    const u32 stage = TILE_X + count * TILE_U, tiles = (end_row - first_row + 63) / 64;
    auto load_tile = [&](u32 tile) {
        const u32 to = base + tile % STAGES * stage, row = first_row + tile * 64;
        load<128, 64, 256>(to, x, k, row, end_row, first_column, k);
#pragma unroll
        for (int i = 0; i < 3; i++) {
            if (i < count) load<RANK, 64, 256>(to + TILE_X + i * TILE_U, pick(i, u0, u1, u2), rank, row, end_row, first_rank, rank);
        }
    };
#pragma unroll
    for (int s = 0; s < STAGES - 1; s++) {
        if (s < tiles) load_tile(s);
        cp_async_commit();
    }
    const Stream streams[3] = {{s00, s01, s02, s03}, {s10, s11, s12, s13}, {s20, s21, s22, s23}};
    const HeadFragments<RANK> of_u = HeadFragments<RANK>::b(lane);
    const u32 row = lane % 16, piece = warp * 2 + lane / 16;
    unsigned char *mine = shared + STAGES * stage + warp * (3 * 512) + lane * 16;
    float sums[3][RF][2][4] = {};
#pragma unroll 1
    for (u32 tile = 0; tile < tiles; tile++) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        if (tile + STAGES - 1 < tiles) load_tile(tile + STAGES - 1);
        cp_async_commit();
        const u32 at = tile % STAGES * stage;
#pragma unroll
        for (int step = 0; step < 4; step++) {
            const uint4 raw = *reinterpret_cast<const uint4 *>(shared + at + Wide::offset(step * 16 + row, piece));
            const u64 draw = (u64(first_row + tile * 64 + step * 16 + row) * k + first_column + piece * 8) / 8;
#pragma unroll
            for (int i = 0; i < 3; i++) {
                if (i < count) *reinterpret_cast<uint4 *>(mine + i * 512) = kept(raw, draw, streams[i], threshold);
            }
            __syncwarp();
#pragma unroll
            for (int i = 0; i < 3; i++) {
                if (i >= count) continue;
                u32 fx[4];
                ldmatrix_x4_trans(fx, shared_address(mine + i * 512));
#pragma unroll
                for (int j = 0; j < RF; j++) {
                    u32 fu[4];
                    ldmatrix_x4_trans(fu, of_u.at(base + at + TILE_X + i * TILE_U, step, j));
                    mma_16816(sums[i][j][0], fu, fx[0], fx[1]);
                    mma_16816(sums[i][j][1], fu, fx[2], fx[3]);
                }
            }
            __syncwarp();
        }
    }
#pragma unroll
    for (int i = 0; i < 3; i++) {
        if (i >= count) continue;
        float *to = strips == 1 ? pick(i, da0, da1, da2) : partial + (u64(strip) * count + i) * rank * k;
#pragma unroll
        for (int j = 0; j < RF; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                const u32 r = first_rank + j * 16 + lane / 4 + e % 2 * 8, c = first_column + warp * 16 + e / 2 * 8 + lane % 4 * 2;
                if (r < rank && c < k) {
                    float2 *p = reinterpret_cast<float2 *>(to + u64(r) * k + c);
                    float2 sum = make_float2(sums[i][j][e / 2][e % 2 * 2], sums[i][j][e / 2][e % 2 * 2 + 1]);
                    if (strips == 1) sum.x += p->x, sum.y += p->y;
                    *p = sum;
                }
            }
        }
    }
    if (strips == 1 || !comes_last(counters + block * parts + part, strips)) return;
    const u32 width = min(k - first_column, 128u), height = min(rank - first_rank, u32(RANK));
    for (u32 i = threadIdx.x; i < count * height * width; i += 256) {
        const u32 which = i / (height * width);
        const u64 at = u64(first_rank + i / width % height) * k + first_column + i % width;
        float sum = 0.0f;
        for (u32 s = 0; s < strips; s++) sum += __ldcg(partial + (u64(s) * count + which) * rank * k + at);
        pick(which, da0, da1, da2)[at] += sum;
    }
}
