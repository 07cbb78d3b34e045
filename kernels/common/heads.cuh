// Tiles of rows of one attention head, HEAD_DIM bf16 to a row, in shared memory, and their fragments for mma.
//
// Where the row is 4, 8 or 16 chunks of 16 bytes they are permuted by the row; other rows are one chunk longer than they need, an odd
// number. Either way the 8 rows that ldmatrix reads at once meet no bank twice.
// Template parameters are in mixed case: words in capitals may be taken by a define of the kernel.
#pragma once

template <int Dim> struct HeadTile {
    static_assert(Dim % 16 == 0 && Dim <= 128, "steps of 16 of k");
    static constexpr int CHUNKS = Dim / 8;
    static constexpr bool PERMUTED = (CHUNKS & (CHUNKS - 1)) == 0;
    static constexpr int ROW = (PERMUTED ? CHUNKS : CHUNKS + 1) * 16; // bytes

    static __device__ __forceinline__ u32 permutation(u32 row) {
        return !PERMUTED ? 0 : CHUNKS == 2 ? row / 4 % 2 : CHUNKS == 4 ? row / 2 % 4 : row % 8;
    }

    // Where chunk `chunk` of a row lies.
    static __device__ __forceinline__ u32 offset(u32 row, u32 chunk) { return row * ROW + (chunk ^ permutation(row)) * 16; }

    // Rounds 16 rows of accumulators and writes them to memory in whole chunks, by way of 16 rows of a tile that no other warp reads or
    // writes any more. They are rows from `first` on of `head`; those from `end` on are not written.
    static __device__ __forceinline__ void store16(bf16 *head, u32 stride, u32 first, u32 end, unsigned char *rows,
                                                   const float (&x)[CHUNKS][4]) {
        const u32 lane = threadIdx.x % 32;
        __syncwarp();
#pragma unroll
        for (int h = 0; h < 2; h++) {
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) {
                u32 *at = reinterpret_cast<u32 *>(rows + offset(lane / 4 + h * 8, j) + lane % 4 * 4);
                *at = cvt_bf16x2(x[j][2 * h], x[j][2 * h + 1]);
            }
        }
        __syncwarp();
#pragma unroll
        for (int pass = 0; pass < 16 * CHUNKS / 32; pass++) {
            const u32 i = lane + pass * 32, row = i / CHUNKS, chunk = i % CHUNKS;
            if (first + row < end) {
                bf16 *to = head + u64(first + row) * stride + chunk * 8;
                *reinterpret_cast<uint4 *>(to) = *reinterpret_cast<const uint4 *>(rows + offset(row, chunk));
            }
        }
    }
};

// This thread's part in copies of tiles of Rows rows of a head, which lie `stride` elements apart in memory.
template <int Dim, int Rows, int Threads> struct TileCopies {
    using Tile = HeadTile<Dim>;
    static constexpr int LANES = Tile::CHUNKS < 8 ? Tile::CHUNKS : 8; // that share a row
    static constexpr int TIMES = (Tile::CHUNKS + LANES - 1) / LANES;  // chunks of a lane
    static constexpr int STEP = Threads / LANES;                      // rows at once
    static_assert(Rows % STEP == 0 && STEP % 8 == 0, "chunks of a thread are permuted alike");

    u32 to;    // its first chunk in a tile, in bytes
    u32 first; // and in memory, in elements
    u32 stride;

    __device__ __forceinline__ TileCopies(u32 stride) : to(Tile::offset(row(), lane())), first(row() * stride + lane() * 8), stride(stride) {
        keep(to);
        keep(first);
    }
    static __device__ __forceinline__ u32 row() { return threadIdx.x / LANES; }
    static __device__ __forceinline__ u32 lane() { return threadIdx.x % LANES; }

    // chunk(bytes in a tile, elements in memory, row) of each of its chunks.
    template <class Chunk> __device__ __forceinline__ void each(Chunk chunk) const {
        u32 to = this->to, first = this->first;
        // What is worked out from these takes an instruction each and no register over a loop.
        keep(to), keep(first);
#pragma unroll
        for (int pass = 0; pass < Rows / STEP; pass++) {
#pragma unroll
            for (int i = 0; i < TIMES; i++) {
                if (Tile::CHUNKS % LANES == 0 || lane() + i * LANES < Tile::CHUNKS) {
                    chunk(to + pass * (STEP * Tile::ROW) + i * (LANES * 16), first + pass * STEP * stride, i * (LANES * 8), row() + pass * STEP);
                }
            }
        }
    }

    // Starts the copy of the rows from `from` on.
    __device__ __forceinline__ void load(u32 tile, const bf16 *from) const {
        each([&](u32 to, u32 at, int more, u32) { cp_async16(tile + to, from + at + more); });
    }
    // Of the first `rows` of them; the others become zero and are not read.
    __device__ __forceinline__ void load(u32 tile, const bf16 *from, u32 rows) const {
        each([&](u32 to, u32 at, int more, u32 row) { cp_async16_zfill(tile + to, from + at + more, row < rows ? 16 : 0); });
    }
    // Sets NaN and infinity to zero in what this thread copied and waited for; whether there was any.
    __device__ __forceinline__ bool clean(unsigned char *tile) const {
        bool found = false;
        keep(tile);
        each([&](u32 to, u32, int, u32) {
            uint4 *at = reinterpret_cast<uint4 *>(tile + to);
            const uint4 v = *at;
            u32 words[4] = {v.x, v.y, v.z, v.w}, carries = 0;
            // Where all bits of an exponent are set one more carries out of it.
#pragma unroll
            for (int i = 0; i < 4; i++) carries |= (words[i] & 0x7f807f80u) + 0x00800080u;
            if (carries & 0x80008000u) {
                found = true;
#pragma unroll
                for (int i = 0; i < 4; i++) words[i] &= ~(((words[i] & 0x7f807f80u) + 0x00800080u >> 15 & 0x10001u) * 0xffffu);
                *at = make_uint4(words[0], words[1], words[2], words[3]);
            }
        });
        return found;
    }
};

// The same in all lanes of a warp, which the compiler sees.
__device__ __forceinline__ u32 uniform(u32 x) { return __shfl_sync(0xffffffffu, x, 0); }

// The largest and the sum of the four lanes that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Reads fragments of 16 rows by 16 columns, or 16 columns by 16 rows. Tiles start at multiples of 128 bytes, of 256 where a row has as
// many, so that the bits of a chunk stand alone in an address.
template <int Dim> struct HeadFragments {
    using Tile = HeadTile<Dim>;
    u32 first;

    __device__ __forceinline__ HeadFragments(u32 lane_row, u32 half, u32 tile) : first(tile + Tile::offset(lane_row, half)) { keep(first); }

    // Rows of the tile are rows of A: step k of 16 columns.
    static __device__ __forceinline__ HeadFragments a(u32 lane, u32 tile = 0) { return HeadFragments(lane % 16, lane / 16, tile); }
    // Rows of the tile are columns of B, k runs along them.
    static __device__ __forceinline__ HeadFragments b(u32 lane, u32 tile = 0) { return HeadFragments(lane % 8 + lane / 16 * 8, lane / 8 % 2, tile); }
    // Rows of the tile are steps of k, columns those of B: read transposed.
    static __device__ __forceinline__ HeadFragments b_turned(u32 lane, u32 tile = 0) { return HeadFragments(lane % 16, lane / 16, tile); }

    // The address of the fragment at 16 i rows and 16 j columns.
    __device__ __forceinline__ u32 at(u32 tile, int i, int j) const {
        // An exclusive or where chunks are permuted; elsewhere a sum, which is part of the instruction.
        const u32 at = tile + first;
        return (Tile::PERMUTED ? at ^ (j * 32) : at + j * 32) + i * (16 * Tile::ROW);
    }
};

// Fragments of 16 rows alone, as what follows takes them.
template <int Columns> __device__ __forceinline__ auto one_row(float (&x)[Columns][4]) -> float (&)[1][Columns][4] {
    return reinterpret_cast<float(&)[1][Columns][4]>(x);
}

// A warp's 16 Rows rows of A: fragments of the first Held steps of k stay in registers, the others are read for each product.
template <int Dim, int Rows, int Held> struct HeadRows {
    HeadFragments<Dim> of;
    u32 held[Held > 0 ? Held : 1][Rows][4];

    // Rows from this address on.
    __device__ __forceinline__ HeadRows(u32 rows) : of(HeadFragments<Dim>::a(threadIdx.x % 32, rows)) {}
    // Once they are there.
    __device__ __forceinline__ void hold() {
#pragma unroll
        for (int step = 0; step < Held; step++) {
#pragma unroll
            for (int i = 0; i < Rows; i++) ldmatrix_x4(held[step][i], of.at(0, i, step));
        }
    }
    __device__ __forceinline__ void read(u32 (&a)[4], int i, int step) const {
        if (step < Held) {
#pragma unroll
            for (int e = 0; e < 4; e++) a[e] = held[step][i][e];
        } else {
            ldmatrix_x4(a, of.at(0, i, step));
        }
    }
};

// x += rows of A times 8 Columns rows of a tile, transposed.
template <int Rows, int Columns, int Dim, int Held>
__device__ __forceinline__ void multiply(float (&x)[Rows][Columns][4], const HeadRows<Dim, Rows, Held> &rows,
                                         const HeadFragments<Dim> &of_b, u32 tile) {
#pragma unroll
    for (int step = 0; step < Dim / 16; step++) {
        u32 a[Rows][4];
#pragma unroll
        for (int i = 0; i < Rows; i++) rows.read(a[i], i, step);
#pragma unroll
        for (int j = 0; j < Columns / 2; j++) {
            u32 b[4];
            ldmatrix_x4(b, of_b.at(tile, j, step));
#pragma unroll
            for (int i = 0; i < Rows; i++) {
                mma_16816(x[i][2 * j], a[i], b[0], b[1]);
                mma_16816(x[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}

// Fragments of A of accumulators, rounded to bf16.
template <int Rows, int Steps>
__device__ __forceinline__ void round_a(u32 (&a)[Rows][4], const float (&x)[Rows][Steps][4], int step) {
#pragma unroll
    for (int i = 0; i < Rows; i++) {
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const float(&p)[4] = x[i][2 * step + half];
            a[i][2 * half] = cvt_bf16x2(p[0], p[1]), a[i][2 * half + 1] = cvt_bf16x2(p[2], p[3]);
        }
    }
}

// acc += x, rounded to bf16, times the rows of a tile: accumulators of one product are the operand of the next.
template <int Rows, int Steps, int Columns, int Dim>
__device__ __forceinline__ void accumulate(float (&acc)[Rows][Columns][4], const float (&x)[Rows][Steps][4],
                                           const HeadFragments<Dim> &of_b, u32 tile) {
#pragma unroll
    for (int step = 0; step < Steps / 2; step++) {
        u32 a[Rows][4];
        round_a(a, x, step);
#pragma unroll
        for (int j = 0; j < Columns / 2; j++) {
            u32 b[4];
            ldmatrix_x4_trans(b, of_b.at(tile, step, j));
#pragma unroll
            for (int i = 0; i < Rows; i++) {
                mma_16816(acc[i][2 * j], a[i], b[0], b[1]);
                mma_16816(acc[i][2 * j + 1], a[i], b[2], b[3]);
            }
        }
    }
}
