// Who sees whom in attention.
#pragma once
#include "heads.cuh"

// How far back a query sees: keys less than so many tokens before it, its own being none. A window of 0 is none.
__device__ __forceinline__ u32 reach(u32 window) { return window > 0 ? window : 1u << 31; }

// How far before a query a key lies, where rows are queries and columns keys, or the other way round; a later key has a huge number.
template <bool RowsAreQueries> __device__ __forceinline__ u32 distance(u32 row, u32 column) {
    return RowsAreQueries ? row - column : column - row;
}

// Sets accumulators from this row and column on to `hidden` where the query does not see the key.
template <bool RowsAreQueries, int Rows, int Columns>
__device__ __forceinline__ void hide(float (&x)[Rows][Columns][4], float hidden, u32 row, u32 column, u32 window) {
    u32 lane = threadIdx.x % 32;
    keep(lane); // nothing of this is worked out before the loop that it stands in
    const u32 far = reach(window), here = distance<RowsAreQueries>(row + lane / 4, column + lane % 4 * 2);
#pragma unroll
    for (int i = 0; i < Rows; i++) {
#pragma unroll
        for (int j = 0; j < Columns; j++) {
#pragma unroll
            for (int e = 0; e < 4; e++) {
                if (here + distance<RowsAreQueries>(i * 16 + e / 2 * 8, j * 8 + e % 2) >= far) x[i][j][e] = hidden;
            }
        }
    }
}
