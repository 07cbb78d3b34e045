// Rows by index: gather dst[i] = src[rows[i]];  scatter dst[rows[i]] = src[i], the rows distinct.
//
// Shapes: the picked rows (n, units), the table (limit, units), rows n integers in 0..limit. Defines: UNIT_T in {uint4, u32, u16}, the
// widest whose size divides that of a row: bytes are copied, whatever the elements are.
// Numerics: none, bytes are copied. An index outside the table stops the kernel: the host has checked the tokens.
// Launch: blocks of THREADS threads, ceil(units / THREADS) of them a row.
// Cost: 2 n units bytes.
// Test: tests/common/rows.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256;

// The row of the table for picked row `i`.
__device__ __forceinline__ u64 place(const int *rows, u32 i, u32 limit) {
    const u32 row = u32(rows[i]);
    if (row >= limit) __trap();
    return row;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    gather(UNIT_T *__restrict__ dst, const UNIT_T *__restrict__ src, const int *__restrict__ rows, u32 units, u32 limit) {
    const u32 blocks = (units + THREADS - 1) / THREADS;
    const u32 i = blockIdx.x / blocks, j = blockIdx.x % blocks * THREADS + threadIdx.x;
    const u64 row = place(rows, i, limit);
    if (j < units) dst[u64(i) * units + j] = src[row * units + j];
}

extern "C" __global__ void __launch_bounds__(THREADS)
    scatter(UNIT_T *__restrict__ dst, const UNIT_T *__restrict__ src, const int *__restrict__ rows, u32 units, u32 limit) {
    const u32 blocks = (units + THREADS - 1) / THREADS;
    const u32 i = blockIdx.x / blocks, j = blockIdx.x % blocks * THREADS + threadIdx.x;
    const u64 row = place(rows, i, limit);
    if (j < units) dst[row * units + j] = src[u64(i) * units + j];
}
