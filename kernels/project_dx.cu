// Gradient of the input of a group of projections, in one launch and one sum: dx = sum over i of drop_i(u_i A_i), then of dy_i W_i.
//
// Shapes: dx (m, n); dy_i (m, k_i), W_i (k_i, n), k_i = 0 where there is none; u_i (m, rank), A_i (rank, n) or null; all bf16. u_i holds
// all factors already (lora.cu), so a mask is 0 or 1: element e of dx is dropped as dropout.cu would, by stream (key0_i .. hi1_i) and
// threshold; threshold 0: nothing is.
// Defines: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES.
// Numerics: each u_i A_i is summed in f32, masked, and the masked sums are added in order of i; the chain of products goes on from there,
// dy_0 W_0 first, along k; one rounding. Neither shape nor tile changes the order.
// Method: common/product.cuh, its source going from one pair of operands to the next. An update passes through the buffer that the
// loop fills last; its 16 x 8 fragments are formed four at a time, so that the lanes of a row draw each Philox block once.
// Needs: m > 0, k_0 > 0; n, k_i, rank multiples of 8; n and k_i times the tile below 2^32.
// Launch: a block of 32 WARPS_M WARPS_N threads per tile, in one dimension; dynamic shared memory of 2 STAGES (BLOCK_M + BLOCK_N) 64 bytes.
// Cost: 2 m n (sum of k_i + rank) flops; some 13 integer operations an element and update with dropout.
// Test: tests/common/projections.rs, on every device.
#define A_K_MAJOR 1
#define B_K_MAJOR 0
#include "common/product.cuh"
#include "common/philox.cuh"

using LoaderA = Loader<bf16, BLOCK_M, true, true, THREADS>;
using LoaderB = Loader<bf16, BLOCK_N, false, true, THREADS>;

// Pairs of operands one after the other.
struct Terms {
    const bf16 *dy0, *dy1, *dy2, *w0, *w1, *w2;
    u32 k0, k1, k2, m, n, first_row, first_column;
    LoaderA a;
    LoaderB b;
    u32 term, left; // tiles of the term that follow

    __device__ __forceinline__ u32 steps() const { return pick(term, k0, k1, k2); }
    __device__ __forceinline__ u32 remainder() const { return (steps() - 1) % BLOCK_K + 1; }
    __device__ __forceinline__ bool another() const { return left == 0 && term < 2 && (term == 0 ? k1 : k2) > 0; }

    // The first tile of a term.
    __device__ __forceinline__ void first_a(unsigned char *tile) {
        const u32 k = steps();
        a = LoaderA(pick(term, dy0, dy1, dy2), k, first_row, m);
        b = LoaderB(pick(term, w0, w1, w2), n, first_column, n);
        left = (k + BLOCK_K - 1) / BLOCK_K - 1;
        a.template load<true>(tile, remainder());
    }
    __device__ __forceinline__ void first_b(unsigned char *tile) { b.template load<true>(tile, remainder()); }

    // One after it.
    __device__ __forceinline__ void next_a(unsigned char *tile) { a.template load<false>(tile, BLOCK_K); }
    __device__ __forceinline__ void next_b(unsigned char *tile) {
        b.template load<false>(tile, BLOCK_K);
        left--;
    }
};

// Starts the loads of the first STAGES - 1 tiles, whatever terms they belong to.
__device__ __forceinline__ void start(unsigned char *shared, Terms &from) {
#pragma unroll 1
    for (int s = 0; s < STAGES - 1; s++) {
        unsigned char *tile = shared + s * TILE;
        if (s == 0 || from.another()) {
            if (s > 0) from.term++;
            from.first_a(tile);
            from.first_b(tile + TILE_A);
        } else if (from.left > 0) {
            from.next_a(tile);
            from.next_b(tile + TILE_A);
        }
        cp_async_commit();
    }
}

// sums += all terms, after `start`. Rounds that start a term, and the last ones, which load nothing, stand apart: the loop that runs
// most has no condition.
__device__ __forceinline__ void run(Sums &sums, unsigned char *shared, u32 tiles, Terms &from, const WarpPart &part) {
    Rounds rounds(shared, part);
    u32 t = 0;
    while (true) {
#pragma unroll 1
        for (; from.left > 0; t++) {
            rounds.round(sums, part, true, [&](unsigned char *tile) { from.next_a(tile); },
                         [&](unsigned char *tile) { from.next_b(tile); });
        }
        if (!from.another()) break;
        from.term++;
        rounds.round(sums, part, true, [&](unsigned char *tile) { from.first_a(tile); },
                     [&](unsigned char *tile) { from.first_b(tile); });
        t++;
    }
#pragma unroll 1
    for (; t < tiles; t++) rounds.round(sums, part, t + 1 < tiles, [](unsigned char *) {}, [](unsigned char *) {});
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    project_dx(bf16 *__restrict__ dx, const bf16 *__restrict__ dy0, const bf16 *__restrict__ dy1, const bf16 *__restrict__ dy2,
               const bf16 *__restrict__ w0, const bf16 *__restrict__ w1, const bf16 *__restrict__ w2, const bf16 *__restrict__ u0,
               const bf16 *__restrict__ u1, const bf16 *__restrict__ u2, const bf16 *__restrict__ a0, const bf16 *__restrict__ a1,
               const bf16 *__restrict__ a2, u32 m, u32 n, u32 k0, u32 k1, u32 k2, u32 rank, u32 threshold, u32 s00, u32 s01, u32 s02,
               u32 s03, u32 s10, u32 s11, u32 s12, u32 s13, u32 s20, u32 s21, u32 s22, u32 s23) {
    extern __shared__ __align__(128) unsigned char shared[];
    const TilePlace place(blockIdx.x, (m + BLOCK_M - 1) / BLOCK_M, (n + BLOCK_N - 1) / BLOCK_N);
    const u32 first_row = place.m * BLOCK_M, first_column = place.n * BLOCK_N;
    auto tiles_of = [](u32 k) { return (k + BLOCK_K - 1) / BLOCK_K; };
    const u32 tiles = tiles_of(k0) + tiles_of(k1) + tiles_of(k2);
    const WarpPart part;
    Sums sums = {};

    const u32 parts = tiles_of(rank), updates = 3 * parts;
    unsigned char *last = shared + (STAGES - 1) * TILE;
    auto load_update = [&](u32 i) {
        const u32 which = i / parts, at = i % parts * BLOCK_K, valid = min(rank - at, u32(BLOCK_K));
        const bf16 *u = pick(which, u0, u1, u2), *a = pick(which, a0, a1, a2);
        if (!u) return;
        LoaderA(u + at, rank, first_row, m).template load<true>(last, valid);
        LoaderB(a + u64(at) * n, n, first_column, n).template load<true>(last + TILE_A, valid);
    };
    if (updates > 0) load_update(0);
    cp_async_commit();

    Terms from{dy0, dy1, dy2, w0, w1, w2, k0, k1, k2, m, n, first_row, first_column, LoaderA(dy0, k0, first_row, m),
               LoaderB(w0, n, first_column, n), 0, 0};
    start(shared, from);

#pragma unroll 1
    for (u32 i = 0; i < updates; i++) {
        const u32 which = i / parts, steps = (min(rank - i % parts * BLOCK_K, u32(BLOCK_K)) + 15) / 16;
        if (!pick(which, u0, u1, u2)) continue;
        if (i == 0) {
            cp_async_wait<STAGES - 1>();
        } else {
            __syncthreads();
            load_update(i);
            cp_async_commit();
            cp_async_wait<0>();
        }
        __syncthreads();
        const Stream stream{pick(which, s00, s10, s20), pick(which, s01, s11, s21), pick(which, s02, s12, s22), pick(which, s03, s13, s23)};
        const u32 tile = shared_address(last), lane = threadIdx.x % 32;
#pragma unroll
        for (int r = 0; r < MT; r++) {
#pragma unroll
            for (int c = 0; c < NT; c += 4) {
                float sum[4][4] = {};
#pragma unroll 1
                for (u32 s = 0; s < steps; s++) {
                    u32 fa[4], fb[2][4];
                    part.a.read(fa, tile, r, s);
                    part.b.read(fb[0], tile + TILE_A, c / 2, s);
                    part.b.read(fb[1], tile + TILE_A, c / 2 + 1, s);
#pragma unroll
                    for (int j = 0; j < 4; j++) mma_16816(sum[j], fa, fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
                }
#pragma unroll
                for (int h = 0; h < 2; h++) {
                    // A lane draws for its row and the fragment of its number; then each has the words of its columns.
                    u32 words[4] = {~0u, ~0u, ~0u, ~0u};
                    if (threshold > 0) {
                        const u32 row = first_row + part.m + r * 16 + lane / 4 + h * 8;
                        const u32 column = first_column + part.n + (c + lane % 4) * 8;
                        philox(words, (u64(row) * n + column) / 8, stream);
                        turn_words(words);
                    }
#pragma unroll
                    for (int j = 0; j < 4; j++) {
#pragma unroll
                        for (int e = 0; e < 2; e++) {
                            const bool kept = (words[j] >> (16 * e) & 0xffffu) >= threshold;
                            float &to = sums[r][c + j][2 * h + e];
                            to = __fadd_rn(to, kept ? sum[j][2 * h + e] : 0.0f);
                        }
                    }
                }
            }
        }
    }

    run(sums, shared, tiles, from, part);
    stage(shared, sums, part);
#pragma unroll 1
    for (u32 i = threadIdx.x; i < BLOCK_M * BLOCK_N / 8; i += THREADS) {
        const u32 r = i / (BLOCK_N / 8), column = i % (BLOCK_N / 8) * 8, row = first_row + r, j = first_column + column;
        if (row >= m || j >= n) continue;
        float x[8];
        load8(x, staged(shared, r, column));
        store8(dx + u64(row) * n + j, x);
    }
}
