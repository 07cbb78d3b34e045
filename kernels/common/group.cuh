// A tile of the gradients of a group's weights, which lie below each other as in one matrix: of which projection it is, the height of that
// one, and its own first row and column. Widths and heights as the including loop defines them: BLOCK_M, BLOCK_N.
#pragma once
#include "tile.cuh"

// Rows of tiles of the whole group.
__device__ __forceinline__ u32 tiles_below(u32 m0, u32 m1, u32 m2) {
    return (m0 + BLOCK_M - 1) / BLOCK_M + (m1 + BLOCK_M - 1) / BLOCK_M + (m2 + BLOCK_M - 1) / BLOCK_M;
}

// Place is what finds a block's tile: one of its own, or one of its cluster's. A row of tiles too many is the last one again, of no height.
template <class Place> struct WeightPart {
    u32 group, m, row, column;

    __device__ __forceinline__ WeightPart(u32 tile, u32 m0, u32 m1, u32 m2, u32 n) {
        const u32 tiles0 = (m0 + BLOCK_M - 1) / BLOCK_M, tiles1 = (m1 + BLOCK_M - 1) / BLOCK_M;
        const u32 below = tiles_below(m0, m1, m2);
        const Place place(tile, below, (n + BLOCK_N - 1) / BLOCK_N);
        const u32 tile_row = min(place.m, below - 1);
        group = tile_row < tiles0 ? 0 : tile_row < tiles0 + tiles1 ? 1 : 2;
        m = place.m < below ? pick(group, m0, m1, m2) : 0;
        row = (tile_row - pick(group, 0u, tiles0, tiles0 + tiles1)) * BLOCK_M, column = place.n * BLOCK_N;
    }
};
