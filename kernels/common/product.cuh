// The loop of a product on tensor cores, and its sums of a tile of C staged in shared memory.
//
// A block computes BLOCK_M x BLOCK_N elements of C, one chain of sums along k for each; a warp computes WARP_M x WARP_N of them. Tiles of
// 64 steps of k pass through STAGES buffers, one barrier a tile; fragments of the next 16 steps are read while those of these multiply.
// When the loop has ended, its buffers stage the sums in f32: an epilogue reads whole rows of them and has all registers to itself.
// Where operands come from is the business of a source:
//   first_a, first_b(tile)   start the load of the chain's first tile, of A and of B
//   next_a, next_b(tile)     of the one after it
// Defines: BLOCK_M, BLOCK_N, WARPS_M, WARPS_N, STAGES; A_K_MAJOR, B_K_MAJOR in {0, 1}, see tile.cuh.
#pragma once
#include "types.cuh"
#include "tile.cuh"

constexpr int THREADS = 32 * WARPS_M * WARPS_N;
constexpr int WARP_M = BLOCK_M / WARPS_M, WARP_N = BLOCK_N / WARPS_N;
constexpr int MT = WARP_M / 16, NT = WARP_N / 8, K_STEPS = BLOCK_K / 16;
constexpr int TILE_A = BLOCK_M * BLOCK_K * 2, TILE = TILE_A + BLOCK_N * BLOCK_K * 2;
// Rows of the staged sums are 8 floats longer than they are: the lanes of a fragment then write to different banks.
constexpr int STAGED = BLOCK_N + 8;
static_assert(WARP_M == 32 || WARP_M == 64, "fragments of A");
static_assert(WARP_N == 32 || WARP_N == 64, "fragments of B");
static_assert(STAGES >= 2, "one buffer is read while the next is filled");
static_assert(BLOCK_M * STAGED * 4 <= STAGES * TILE, "the staged sums fit the buffers");

// Two operands whole, as a source. `remainder`: steps of k of the first tile.
template <class LoaderA, class LoaderB> struct Operands {
    LoaderA a;
    LoaderB b;
    u32 remainder;

    __device__ __forceinline__ void first_a(unsigned char *tile) { a.template load<true>(tile, remainder); }
    __device__ __forceinline__ void first_b(unsigned char *tile) { b.template load<true>(tile, remainder); }
    __device__ __forceinline__ void next_a(unsigned char *tile) { a.template load<false>(tile, BLOCK_K); }
    __device__ __forceinline__ void next_b(unsigned char *tile) { b.template load<false>(tile, BLOCK_K); }
};

// The sums of a warp.
using Sums = float[MT][NT][4];

// A warp's part of a tile.
struct WarpPart {
    u32 m, n; // its first row and column
    Fragments<WARP_M, A_K_MAJOR, true> a;
    Fragments<WARP_N, B_K_MAJOR, false> b;

    __device__ __forceinline__ WarpPart()
        : m(threadIdx.x / 32 / WARPS_N * WARP_M), n(threadIdx.x / 32 % WARPS_N * WARP_N), a(m), b(n) {}

    // Its fragments of 16 steps of k.
    __device__ __forceinline__ void read(u32 (&fa)[MT][4], u32 (&fb)[NT / 2][4], u32 tile, int step) const {
#pragma unroll
        for (int i = 0; i < MT; i++) a.read(fa[i], tile, i, step);
#pragma unroll
        for (int j = 0; j < NT / 2; j++) b.read(fb[j], tile + TILE_A, j, step);
    }
};

// sums += the product of fragments.
__device__ __forceinline__ void multiply(Sums &sums, const u32 (&fa)[MT][4], const u32 (&fb)[NT / 2][4]) {
#pragma unroll
    for (int i = 0; i < MT; i++) {
#pragma unroll
        for (int jj = 0; jj < NT; jj++) {
            // Back and forth, so that neighbouring instructions share an operand.
            const int j = i % 2 == 0 ? jj : NT - 1 - jj;
            mma_16816(sums[i][j], fa[i], fb[j / 2][j % 2 * 2], fb[j / 2][j % 2 * 2 + 1]);
        }
    }
}

// Starts the loads of the first STAGES - 1 of `tiles` tiles.
template <class Source> __device__ __forceinline__ void start(unsigned char *shared, u32 tiles, Source &from) {
    from.first_a(shared);
    from.first_b(shared + TILE_A);
    cp_async_commit();
#pragma unroll
    for (int s = 1; s < STAGES - 1; s++) {
        if (s < tiles) {
            from.next_a(shared + s * TILE);
            from.next_b(shared + s * TILE + TILE_A);
        }
        cp_async_commit();
    }
}

// The rounds of a product, one a tile, after `start`.
struct Rounds {
    u32 frag_a[2][MT][4], frag_b[2][NT / 2][4];
    unsigned char *shared;
    u32 first_tile, reading, filling; // the last two: offsets of tiles
    Reads<WARP_M, A_K_MAJOR, true> a;
    Reads<WARP_N, B_K_MAJOR, false> b;

    // The first tile has arrived for all.
    __device__ __forceinline__ Rounds(unsigned char *shared, const WarpPart &part)
        : shared(shared), first_tile(shared_address(shared)), reading(0), filling((STAGES - 1) * TILE), a(part.a), b(part.b) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();
        read(part, 0, first_tile, 0);
    }

    // Fragments of 16 steps of k.
    __device__ __forceinline__ void read(const WarpPart &part, int which, u32 tile, int step) {
#pragma unroll
        for (int i = 0; i < MT; i++) a.read(frag_a[which][i], tile, i, step);
#pragma unroll
        for (int j = 0; j < NT / 2; j++) b.read(frag_b[which][j], tile + TILE_A, j, step);
    }

    // sums += the product of a tile. `more`: another one follows. `load_a` and `load_b` start the load of one into the free buffer.
    template <class LoadA, class LoadB>
    __device__ __forceinline__ void round(Sums &sums, const WarpPart &part, bool more, LoadA load_a, LoadB load_b) {
#pragma unroll
        for (int step = 0; step < K_STEPS; step++) {
            const u32 tile = first_tile + reading;
            const int next = (step + 1) % 2;
            if (step < K_STEPS - 1) {
                read(part, next, tile, step + 1);
            } else {
                // The next tile has arrived for all; nobody reads this one any more, so its buffer is filled next.
                cp_async_wait<STAGES - 2>();
                __syncthreads();
                reading = reading == (STAGES - 1) * TILE ? 0 : reading + TILE;
                if (more) read(part, next, first_tile + reading, 0);
            }
            // The next load is spread over two steps: fewer addresses are alive at once.
            if (step == 0) load_a(shared + filling);
            if (step == 1) {
                load_b(shared + filling + TILE_A);
                cp_async_commit();
                filling = filling == (STAGES - 1) * TILE ? 0 : filling + TILE;
            }
            multiply(sums, frag_a[step % 2], frag_b[step % 2]);
        }
    }
};

// sums += the product of all tiles, after `start`. Behind it nobody reads the buffers any more.
template <class Source>
__device__ __forceinline__ void run(Sums &sums, unsigned char *shared, u32 tiles, Source &from, const WarpPart &part) {
    Rounds rounds(shared, part);
    u32 t = 0;
#pragma unroll 1
    for (; t + STAGES - 1 < tiles; t++) {
        rounds.round(sums, part, true, [&](unsigned char *tile) { from.next_a(tile); }, [&](unsigned char *tile) { from.next_b(tile); });
    }
#pragma unroll 1
    for (; t < tiles; t++) rounds.round(sums, part, t + 1 < tiles, [](unsigned char *) {}, [](unsigned char *) {});
}

// Where element (row, column) of the tile is staged.
__device__ __forceinline__ float *staged(unsigned char *shared, u32 row, u32 column) {
    return reinterpret_cast<float *>(shared) + row * STAGED + column;
}

// Stages the sums of all warps of a block, for all of its threads.
__device__ __forceinline__ void stage(unsigned char *shared, const Sums &sums, const WarpPart &part) {
    const u32 lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < MT; i++) {
        float *at = staged(shared, part.m + i * 16 + lane / 4, part.n + lane % 4 * 2);
#pragma unroll
        for (int j = 0; j < NT; j++) {
            *reinterpret_cast<float2 *>(at + j * 8) = make_float2(sums[i][j][0], sums[i][j][1]);
            *reinterpret_cast<float2 *>(at + 8 * STAGED + j * 8) = make_float2(sums[i][j][2], sums[i][j][3]);
        }
    }
    __syncthreads();
}
