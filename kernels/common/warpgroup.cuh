// The loop of a product on Hopper: tiles of both operands pass through buffers in shared memory. The first warpgroup of a block copies: one
// thread of it starts the copies of a tile as soon as nobody reads its buffer. The two others multiply 64 rows of A each and give a
// buffer back when the products of the next are under way. A block goes from tile to tile of the result; while the sums of one are
// written, 64 columns at a time through shared memory of their own, the buffers fill for the next. What lies beyond a matrix is zero.
//
// Blocks may work in clusters of two: on tiles below each other, so that both need the same columns of B. Each copies half of them to both,
// and every buffer is given back to both, since both copy into it.
//
// A tile holds BLOCK_M rows of A and BLOCK_N of B for BLOCK_K steps of k, swizzled by 128 bytes: rows of 64 elements where k runs along
// the rows in memory, else panels of 64 columns.
// Defines: BLOCK_N in {64, 128, 256}; STAGES; A_K_MAJOR, B_K_MAJOR in {0, 1}; CLUSTER in {1, 2}. Boxes of a map of B are a CLUSTERth of the
// rows of B in a buffer where k runs along the rows, else 64 rows, 32 where BLOCK_N is 64 in a cluster.
#pragma once
#include "types.cuh"
#include "tile.cuh"
#include "hopper.cuh"

constexpr int BLOCK_M = 128, WARPGROUP = 128, THREADS = 3 * WARPGROUP;
constexpr int TILE_A = BLOCK_M * BLOCK_K * 2, TILE = TILE_A + BLOCK_N * BLOCK_K * 2;
constexpr int PANEL = BLOCK_K * 128; // bytes of 64 columns; 64 rows take as many
// A warp stages 16 rows by 64 columns; the eight columns c of row r at c ^ (r & 7).
constexpr int STAGED_COLUMNS = 64, STAGED = 16 * STAGED_COLUMNS * 4;
static_assert(BLOCK_N == 64 || BLOCK_N == 128 || BLOCK_N == 256, "widths of wgmma");
static_assert(CLUSTER == 1 || CLUSTER == 2, "blocks that share B");
static_assert(STAGES >= 2, "a buffer is given back while the next one is multiplied");

// Steps of k in whole tiles.
__device__ __forceinline__ u32 tiles_of(u32 k) { return (k + BLOCK_K - 1) / BLOCK_K; }

#if CLUSTER > 1
#define IN_CLUSTERS __cluster_dims__(CLUSTER, 1, 1)
#else
#define IN_CLUSTERS
#endif

// Which block of its cluster this is, and which cluster of how many.
__device__ __forceinline__ u32 rank_of_block() { return blockIdx.x % CLUSTER; }
__device__ __forceinline__ u32 first_tile() { return blockIdx.x / CLUSTER; }
__device__ __forceinline__ u32 tiles_further() { return gridDim.x / CLUSTER; }

// Places that clusters go through, and the tile of this block at one of them; the last row of tiles may be one too many.
__device__ __forceinline__ u32 places_of(u32 tiles_m, u32 tiles_n) { return (tiles_m + CLUSTER - 1) / CLUSTER * tiles_n; }
struct BlockPlace {
    u32 m, n;
    __device__ __forceinline__ BlockPlace(u32 place, u32 tiles_m, u32 tiles_n) {
        const TilePlace first(place, (tiles_m + CLUSTER - 1) / CLUSTER, tiles_n);
        m = first.m * CLUSTER + rank_of_block(), n = first.n;
    }
};

// The end of a block: others of the cluster may still give it buffers back.
__device__ __forceinline__ void leave() {
    if (CLUSTER > 1) cluster_barrier();
}

// Whether this warpgroup copies; the same in a whole warp, which the compiler sees.
__device__ __forceinline__ bool copies() { return __shfl_sync(~0u, threadIdx.x / WARPGROUP, 0) == 0; }

// Whether this is the one thread of it that does.
__device__ __forceinline__ bool copies_alone() { return threadIdx.x < 32 && elected(); }

// The buffers and whose turn they are. Both sides go through them in the same order.
struct Buffers {
    u32 first, results, full, empty; // addresses in shared memory: tiles, staged results, barriers
    u32 buffer, parity;

    // Dynamic shared memory: STAGES (TILE + 16) + 8 STAGED bytes, and 1024 so that tiles start at multiples of it.
    __device__ __forceinline__ Buffers(unsigned char *space) : buffer(0), parity(0) {
        first = (shared_address(space) + 1023) / 1024 * 1024;
        results = first + STAGES * TILE;
        full = results + 8 * STAGED;
        empty = full + STAGES * 8;
        if (threadIdx.x == 0) {
            for (int i = 0; i < STAGES; i++) {
                barrier_init(full + i * 8, 1);
                barrier_init(empty + i * 8, CLUSTER * 2 * WARPGROUP / 32); // a lane of each warp that multiplies, in each block
            }
            barriers_ready();
        }
        if (CLUSTER > 1) {
            cluster_barrier();
        } else {
            __syncthreads();
        }
    }

    __device__ __forceinline__ void next() {
        buffer++;
        if (buffer == STAGES) buffer = 0, parity ^= 1;
    }

    // The one that copies: waits until nobody reads the buffer, and announces what comes.
    __device__ __forceinline__ void fill(u32 bytes) const {
        barrier_wait(empty + buffer * 8, parity ^ 1);
        barrier_arrive_expect(full + buffer * 8, bytes);
    }
    // Copies rows of A from `row` on, 64 steps of k from `k` on.
    __device__ __forceinline__ void copy_a(const TensorMap &a, u32 row, u32 k) const {
        const u32 to = first + buffer * TILE;
        if constexpr (A_K_MAJOR) {
            copy_box(to, a, full + buffer * 8, k, row);
        } else {
            copy_panels<BLOCK_M / 64, false>(to, a, row, k);
        }
    }
    // Copies N rows of B, behind those of A and `at` bytes; of a cluster each block copies its share to all.
    template <int N> __device__ __forceinline__ void copy_b(const TensorMap &b, u32 row, u32 k, u32 at = 0) const {
        constexpr u32 SHARE = N / CLUSTER;
        const u32 to = first + buffer * TILE + TILE_A + at, rank = rank_of_block();
        if constexpr (B_K_MAJOR) {
            copy_to_all(to + rank * SHARE * 128, b, k, row + rank * SHARE);
        } else if constexpr (SHARE >= 64) {
            copy_panels<SHARE / 64, true>(to + rank * (SHARE / 64) * PANEL, b, row + rank * SHARE, k);
        } else {
            copy_to_all(to + rank * (PANEL / CLUSTER), b, row, k + rank * (BLOCK_K / CLUSTER));
        }
    }
    // Copies `steps` tiles of one product, rows of A and of B from these on.
    __device__ __forceinline__ void copy_term(const TensorMap &a, u32 row, const TensorMap &b, u32 column, u32 steps) {
        copy_term(a, row, steps, [&](u32 k) { copy_b<BLOCK_N>(b, column, k); });
    }
    // The same, B's part of a tile copied by `rows_of_b(k)`.
    template <class RowsOfB> __device__ __forceinline__ void copy_term(const TensorMap &a, u32 row, u32 steps, RowsOfB rows_of_b) {
#pragma unroll 1
        for (u32 s = 0; s < steps; s++, next()) {
            fill(TILE);
            copy_a(a, row, s * BLOCK_K);
            rows_of_b(s * BLOCK_K);
        }
    }
    __device__ __forceinline__ void copy_to_all(u32 to, const TensorMap &map, u32 column, u32 row) const {
        if (CLUSTER > 1) {
            copy_box_to_all(to, map, full + buffer * 8, column, row, u16((1 << CLUSTER) - 1));
        } else {
            copy_box(to, map, full + buffer * 8, column, row);
        }
    }
    template <int Panels, bool ToAll> __device__ __forceinline__ void copy_panels(u32 to, const TensorMap &map, u32 column, u32 row) const {
#pragma unroll
        for (int p = 0; p < Panels; p++) {
            if (ToAll) {
                copy_to_all(to + p * PANEL, map, column + p * 64, row);
            } else {
                copy_box(to + p * PANEL, map, full + buffer * 8, column + p * 64, row);
            }
        }
    }
};

// What a warp that multiplies knows of itself.
struct Multiplier {
    u32 warp, lane; // warp of eight
    u32 first_a, first_b; // operands in the first buffer
    u32 to_empty;         // from a full barrier to the empty one of the block whose rank is this lane
    float *staged;

    __device__ __forceinline__ Multiplier(const Buffers &of, unsigned char *space)
        : warp(threadIdx.x / 32 - 4), lane(threadIdx.x % 32),
          first_a(operand_at<A_K_MAJOR>(of.first + __shfl_sync(~0u, warp / 4, 0) * PANEL)),
          first_b(operand_at<B_K_MAJOR>(of.first + TILE_A)),
          to_empty(CLUSTER > 1 ? in_block(lane % CLUSTER, of.empty) - of.full : STAGES * 8),
          staged(reinterpret_cast<float *>(space + (of.results - shared_address(space))) + warp * (STAGED / 4)) {}

    // sums = or += the products of `tiles` buffers; set by the first where `add` is 0.
    __device__ __forceinline__ void run(WarpgroupSums<BLOCK_N> &sums, Buffers &of, u32 tiles, u32 add) const {
        u32 before = 0; // the barrier by which the buffer of the tile before is given back
#pragma unroll 1
        for (u32 t = 0; t < tiles; t++) {
            const u32 barrier = of.full + of.buffer * 8, at = of.buffer * (TILE / 16);
            barrier_wait(barrier, of.parity);
            wgmma_fence();
#pragma unroll
            for (int i = 0; i < BLOCK_K / 16; i++) {
                const u32 a = first_a + at + i * STEP_OF_16<A_K_MAJOR>, b = first_b + at + i * STEP_OF_16<B_K_MAJOR>;
                wgmma<A_K_MAJOR, B_K_MAJOR>(sums, operand(a), operand(b), i > 0 || (t | add) > 0);
            }
            wgmma_commit();
            wgmma_wait<1>();
            if (t > 0) give_back(before);
            before = barrier + to_empty;
            of.next();
        }
        wgmma_wait<0>();
        give_back(before);
    }
    // A buffer is not read here any more, says a lane to each block that copies into it.
    __device__ __forceinline__ void give_back(u32 barrier) const {
        if (lane >= CLUSTER) return;
        if (CLUSTER > 1) {
            barrier_arrive_there(barrier);
        } else {
            barrier_arrive(barrier);
        }
    }

    // part = or += the product of the first `steps` of k, at most 64, in the buffer whose turn it is, with the N rows of B that lie `at`
    // bytes behind its first. Steps beyond are zeros, so more may be taken.
    template <bool Add, int N>
    __device__ __forceinline__ void some(float (&part)[N], const Buffers &of, u32 steps, u32 at = 0) const {
        const u32 a = first_a + of.buffer * (TILE / 16), b = first_b + of.buffer * (TILE / 16) + at / 16;
        if (steps <= 16) {
            first<Add, 1>(part, a, b);
        } else if (steps <= 32) {
            first<Add, 2>(part, a, b);
        } else {
            first<Add, 4>(part, a, b);
        }
    }
    template <bool Add, int Times, int N> static __device__ __forceinline__ void first(float (&part)[N], u32 a, u32 b) {
        keep_sums(part);
        wgmma_fence();
#pragma unroll
        for (int i = 0; i < Times; i++) {
            wgmma<A_K_MAJOR, B_K_MAJOR>(part, operand(a + i * STEP_OF_16<A_K_MAJOR>), operand(b + i * STEP_OF_16<B_K_MAJOR>),
                                        Add || i > 0);
        }
        wgmma_commit();
        wgmma_wait<0>();
        keep_sums(part);
    }
    __device__ __forceinline__ void wait(const Buffers &of) const { barrier_wait(of.full + of.buffer * 8, of.parity); }
    __device__ __forceinline__ void give_back(Buffers &of) const {
        give_back(of.full + of.buffer * 8 + to_empty);
        of.next();
    }

    // 64 columns of the warp's 16 rows through shared memory: value(i) is sum i of this thread among them, store(row, column, eight) takes
    // eight neighbours.
    template <class Value, class Store> __device__ __forceinline__ void write(Value value, Store store) const {
#pragma unroll
        for (int j = 0; j < STAGED_COLUMNS / 8; j++) {
            float *to = staged + lane / 4 * STAGED_COLUMNS + (j ^ lane / 4) * 8 + lane % 4 * 2;
            *reinterpret_cast<float2 *>(to) = make_float2(value(4 * j), value(4 * j + 1));
            *reinterpret_cast<float2 *>(to + 8 * STAGED_COLUMNS) = make_float2(value(4 * j + 2), value(4 * j + 3));
        }
        __syncwarp();
#pragma unroll 1
        for (u32 pass = 0; pass < 4; pass++) {
            const u32 r = pass * 4 + lane / 8;
            float eight[8];
            load8(eight, staged + r * STAGED_COLUMNS + (lane % 8 ^ r % 8) * 8);
            store(r, lane % 8 * 8, eight);
        }
        __syncwarp();
    }
};
