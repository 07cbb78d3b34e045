// Tiles of an operand of a product: from global to shared memory in bf16, and from there to the fragments of mma.
//
// A tile covers Width rows or columns of the result and BLOCK_K steps of k, 64 whatever the tile: how a sum is cut along k then depends on
// k alone, and an element of C is the same bits in every tile. "k-major": k runs along the rows in memory (A of NT and NN, B of
// NT); otherwise M or N does. In shared memory 16-byte chunks are permuted by their row so that ldmatrix meets no bank twice:
//   k-major       Width rows of BLOCK_K elements: chunk c of row r at c ^ (r & 7)
//   otherwise     panels of BLOCK_K rows of 64 elements: chunk c of row r at c ^ (r & 7)
// Template parameters are in mixed case: words in capitals may be taken by a define of the kernel.
#pragma once

constexpr int BLOCK_K = 64;

template <typename T, int Width, bool KMajor, bool Aligned, int Threads> struct Loader {
    static_assert(KMajor || Width % 64 == 0, "panels of 64");
    static constexpr bool ASYNC = Aligned && sizeof(T) == 2;
    static constexpr int ROW_CHUNKS = 8; // 128 bytes
    static constexpr int ROWS = KMajor ? Width : BLOCK_K;             // of a panel
    static constexpr int PANELS = KMajor ? 1 : Width / 64;
    static constexpr int STEP = Threads / ROW_CHUNKS;          // rows loaded at once
    static_assert(ROWS % STEP == 0, "the threads cover a panel");

    const T *from;       // this thread's first chunk of the next tile; where not aligned, the first element of the tile
    u32 stride;          // elements from row to row
    u32 last;            // last row or column of the tile inside the matrix; what lies beyond repeats it and is never stored
    u32 limit;           // as an offset from `from`
    u32 row, column;     // of this thread's first chunk
    u32 to;              // offset in bytes of this thread's first chunk in the tile

    __device__ __forceinline__ Loader(const T *matrix, u32 stride, u32 first, u32 extent) : stride(stride) {
        from = matrix + (KMajor ? u64(first) * stride : u64(first));
        last = min(u32(Width), extent - first) - 1;
        row = threadIdx.x / ROW_CHUNKS;
        const u32 chunk = threadIdx.x % ROW_CHUNKS;
        column = chunk * 8;
        // STEP is a multiple of 8, so every chunk of this thread is permuted alike.
        to = row * 128 + (chunk ^ row % 8) * 16;
        if constexpr (Aligned) {
            const u32 end = KMajor ? last : last / 8 * 8, mine = min(KMajor ? row : column, end);
            limit = KMajor ? (end - mine) * stride : end - mine;
            from += KMajor ? mine * stride + column : row * stride + mine;
            keep(limit);
        }
    }

    // Starts the load of the next tile. The first may have fewer steps of k (FIRST): the rest of it becomes zero. Starting with the
    // remainder keeps the loop over the others free of conditions.
    template <bool FIRST> __device__ __forceinline__ void load(unsigned char *tile, u32 k_valid) {
#pragma unroll
        for (int panel = 0; panel < PANELS; panel++) {
#pragma unroll (Aligned ? ROWS / STEP : 1)
            for (int i = 0; i < ROWS / STEP; i++) {
                unsigned char *chunk = tile + to + panel * (BLOCK_K * 128) + i * (STEP * 128);
                if constexpr (Aligned) {
                    u32 at = KMajor ? min(i * STEP * stride, limit) : i * STEP * stride + min(panel * 64u, limit);
                    if (KMajor && !FIRST) keep(at); // one instruction then makes an address of it, not two
                    const bool valid = !FIRST || (KMajor ? column : row + i * STEP) < k_valid;
                    // Where nothing is read the address still has to lie inside the matrix: step 0 of k always does.
                    copy_chunk<FIRST>(chunk, valid ? from + at : from - (KMajor ? column : row * stride), valid);
                } else {
                    float x[8];
#pragma unroll
                    for (int e = 0; e < 8; e++) {
                        const u32 r = row + i * STEP, c = column + panel * 64 + e;
                        const bool valid = !FIRST || (KMajor ? c : r) < k_valid;
                        const u32 at = KMajor ? min(r, last) * stride + c : r * stride + min(c, last);
                        x[e] = valid ? to_f32(from[at]) : 0.0f;
                    }
                    store8(reinterpret_cast<bf16 *>(chunk), x);
                }
            }
        }
        const u32 steps = FIRST ? k_valid : BLOCK_K;
        from += KMajor ? u64(steps) : u64(steps) * stride;
        if (KMajor && !FIRST) keep(from);
    }

    template <bool FIRST> static __device__ __forceinline__ void copy_chunk(unsigned char *chunk, const T *p, bool valid) {
        if constexpr (ASYNC) {
            if constexpr (FIRST) {
                cp_async16_zfill(shared_address(chunk), p, valid ? 16 : 0);
            } else {
                cp_async16(shared_address(chunk), p);
            }
        } else {
            float x[8] = {};
            if (valid) load8(x, p);
            store8(reinterpret_cast<bf16 *>(chunk), x);
        }
    }
};

// Fragments of a warp's part of a tile: Part rows (A) or columns (B) from `first` on, 16 by 16 elements at a time.
template <int Part, bool KMajor, bool IsA> struct Fragments {
    static_assert(Part == 32 || Part == 64, "a part lies in one panel");
    u32 base, permuted;

    __device__ __forceinline__ Fragments(u32 first) {
        const u32 lane = threadIdx.x % 32;
        // Which 8x8 matrix of the four a lane addresses: mma wants A by rows and B by columns.
        const bool straight = IsA == KMajor;
        const u32 row = straight ? lane % 16 : lane % 8 + lane / 16 * 8;
        const u32 half = straight ? lane / 16 : lane / 8 % 2;
        if (KMajor) {
            base = (first + row) * 128;
            permuted = (half ^ row % 8) * 16;
        } else {
            base = first / 64 * (BLOCK_K * 128) + row * 128;
            permuted = ((first % 64 / 8 + half) ^ row % 8) * 16;
        }
        keep(base);
        keep(permuted);
    }

    // The i-th 16 rows or columns at step k of 16. The permutation is an exclusive or, so each address is one operation away.
    __device__ __forceinline__ void read(u32 (&r)[4], u32 tile, int i, int k) const {
        if constexpr (KMajor) {
            ldmatrix_x4(r, tile + base + i * (16 * 128) + (permuted ^ (k * 32)));
        } else {
            ldmatrix_x4_trans(r, tile + base + k * (16 * 128) + (permuted ^ (i * 32)));
        }
    }
};

// The same reads over a loop of tiles: addresses within a tile stay in registers, and where the tile begins is the same for all threads,
// which the instruction adds.
template <int Part, bool KMajor, bool IsA> struct Reads {
    u32 at[KMajor ? BLOCK_K / 16 : Part / 16];

    __device__ __forceinline__ Reads(const Fragments<Part, KMajor, IsA> &of) {
#pragma unroll
        for (int i = 0; i < sizeof(at) / sizeof(u32); i++) {
            at[i] = of.base + (of.permuted ^ (i * 32));
            keep(at[i]);
        }
    }
    __device__ __forceinline__ void read(u32 (&r)[4], u32 tile, int i, int k) const {
        if constexpr (KMajor) {
            ldmatrix_x4(r, tile + at[k] + i * (16 * 128));
        } else {
            ldmatrix_x4_trans(r, tile + at[i] + k * (16 * 128));
        }
    }
};

// Which tile of C a block computes: groups of 8 rows of tiles, column by column, so that blocks that run together share operands in
// the L2 cache.
struct TilePlace {
    u32 m, n;
    __device__ __forceinline__ TilePlace(u32 block, u32 tiles_m, u32 tiles_n) {
        constexpr u32 GROUP = 8;
        const u32 in_group = GROUP * tiles_n, first = block / in_group * GROUP;
        const u32 rows = min(tiles_m - first, GROUP), at = block % in_group;
        m = first + at % rows;
        n = at / rows;
    }
};
