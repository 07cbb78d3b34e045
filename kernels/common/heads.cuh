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

    // Starts the copy of Rows rows from `first` on; `stride` elements lie between rows. Rows from `end` on become zero and are not read.
    template <int Rows, int Threads>
    static __device__ __forceinline__ void load(u32 tile, const bf16 *head, u32 stride, u32 first, u32 end) {
        const bf16 *from = head + u64(first) * stride;
        const u32 rows = end - first;
#pragma unroll
        for (int pass = 0; pass < (Rows * CHUNKS + Threads - 1) / Threads; pass++) {
            const u32 i = threadIdx.x + pass * Threads, row = i / CHUNKS, chunk = i % CHUNKS;
            if (Rows * CHUNKS % Threads == 0 || i < Rows * CHUNKS) {
                const bool valid = row < rows;
                cp_async16_zfill(tile + offset(row, chunk), from + (valid ? row * stride : 0) + chunk * 8, valid ? 16 : 0);
            }
        }
    }

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

// The largest and the sum of the four lanes that share a row of accumulators.
__device__ __forceinline__ float quad_max(float x) {
    x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
    return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
    x += __shfl_xor_sync(0xffffffffu, x, 1);
    return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Reads fragments of 16 rows by 16 columns, or 16 columns by 16 rows. Both are kept as an offset of the row and one of the chunk.
template <int Dim> struct HeadFragments {
    using Tile = HeadTile<Dim>;
    u32 row, chunk;

    __device__ __forceinline__ HeadFragments(u32 lane_row, u32 half)
        : row(lane_row * Tile::ROW), chunk((half ^ Tile::permutation(lane_row)) * 16) {}

    // Rows of the tile are rows of A: step k of 16 columns.
    static __device__ __forceinline__ HeadFragments a(u32 lane) { return HeadFragments(lane % 16, lane / 16); }
    // Rows of the tile are columns of B, k runs along them.
    static __device__ __forceinline__ HeadFragments b(u32 lane) { return HeadFragments(lane % 8 + lane / 16 * 8, lane / 8 % 2); }
    // Rows of the tile are steps of k, columns those of B: read transposed.
    static __device__ __forceinline__ HeadFragments b_turned(u32 lane) { return HeadFragments(lane % 16, lane / 16); }

    // The address of the fragment at 16 i rows and 16 j columns.
    __device__ __forceinline__ u32 at(u32 tile, int i, int j) const {
        // An exclusive or where chunks are permuted; elsewhere a sum, which is part of the instruction.
        return tile + row + i * (16 * Tile::ROW) + (Tile::PERMUTED ? chunk ^ (j * 32) : chunk + j * 32);
    }
};

// Fragments of 16 rows alone, as what follows takes them.
template <int Columns> __device__ __forceinline__ auto one_row(float (&x)[Columns][4]) -> float (&)[1][Columns][4] {
    return reinterpret_cast<float(&)[1][Columns][4]>(x);
}

// x += rows of A times rows of B, transposed: a warp's 16 Rows rows from `rows` on, and 8 Columns rows of a tile.
template <int Rows, int Columns, int Dim>
__device__ __forceinline__ void multiply(float (&x)[Rows][Columns][4], const HeadFragments<Dim> &of_a, u32 rows,
                                         const HeadFragments<Dim> &of_b, u32 tile) {
#pragma unroll
    for (int step = 0; step < Dim / 16; step++) {
        u32 a[Rows][4];
#pragma unroll
        for (int i = 0; i < Rows; i++) ldmatrix_x4(a[i], of_a.at(rows, i, step));
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

// acc += x, rounded to bf16, times the rows of a tile: accumulators of one product are the operand of the next.
template <int Rows, int Steps, int Columns, int Dim>
__device__ __forceinline__ void accumulate(float (&acc)[Rows][Columns][4], const float (&x)[Rows][Steps][4],
                                           const HeadFragments<Dim> &of_b, u32 tile) {
#pragma unroll
    for (int step = 0; step < Steps / 2; step++) {
        u32 a[Rows][4];
#pragma unroll
        for (int i = 0; i < Rows; i++) {
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const float(&p)[4] = x[i][2 * step + half];
                a[i][2 * half] = cvt_bf16x2(p[0], p[1]), a[i][2 * half + 1] = cvt_bf16x2(p[2], p[3]);
            }
        }
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
