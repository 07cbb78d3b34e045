// Sums of columns, for the gradients of the biases of a group: db_i[j] += sum over rows of dy_i[row][j]. `column_sums_add` ends the gradient
// of a norm.
//
// Shapes: dy_i (rows, n_i), db_i (1, n_i) f32, n_i = 0 where there is none; partial (strips, sum of n_i) f32, left alone where there is one
// strip; counters: one for each THREADS columns, zero before and behind the launch. column_sums_add: dst (1, cols), partial (rows, cols).
// Defines: SRC_T in {float, bf16}.
// Numerics: f32; strips of STRIP rows from the first row to the last, the strips in order, the whole added to db once.
// Method: a thread per column of a strip; the block of a few columns that comes last adds the sums of all strips.
// Launch: column_sums blocks of THREADS threads, strip by strip ceil(n_i / THREADS) of each; column_sums_add ceil(cols / THREADS) blocks.
// Cost: rows (sum of n_i) (size of SRC_T) bytes.
// Test: tests/common/elementwise.rs and projections.rs, on every device.
#include "common/types.cuh"
#include "common/reduce.cuh"

constexpr int THREADS = 256, STRIP = 512;

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums(float *__restrict__ db0, float *__restrict__ db1, float *__restrict__ db2, float *__restrict__ partial,
                u32 *__restrict__ counters, const SRC_T *__restrict__ dy0, const SRC_T *__restrict__ dy1,
                const SRC_T *__restrict__ dy2, u32 rows, u32 n0, u32 n1, u32 n2) {
    __shared__ u32 before;
    const u32 blocks0 = (n0 + THREADS - 1) / THREADS, blocks1 = (n1 + THREADS - 1) / THREADS, blocks2 = (n2 + THREADS - 1) / THREADS;
    const u32 blocks = blocks0 + blocks1 + blocks2, strip = blockIdx.x / blocks, place = blockIdx.x % blocks;
    const u32 strips = (rows + STRIP - 1) / STRIP, which = place < blocks0 ? 0 : place < blocks0 + blocks1 ? 1 : 2;
    const u32 cols = pick(which, n0, n1, n2), j = (place - pick(which, 0u, blocks0, blocks0 + blocks1)) * THREADS + threadIdx.x;
    const SRC_T *dy = pick(which, dy0, dy1, dy2);
    float *db = pick(which, db0, db1, db2);
    const u32 all = n0 + n1 + n2, at = pick(which, 0u, n0, n0 + n1) + j, end = min(rows, (strip + 1) * STRIP);
    float sum = 0.0f;
    if (j < cols) {
        for (u32 i = strip * STRIP; i < end; i++) sum += to_f32(dy[u64(i) * cols + j]);
        if (strips > 1) partial[u64(strip) * all + at] = sum;
    }
    if (strips > 1) {
        if (!comes_last(counters + place, strips, &before)) return;
        sum = 0.0f;
        if (j < cols) {
            for (u32 s = 0; s < strips; s++) sum += __ldcg(partial + u64(s) * all + at);
        }
    }
    if (j < cols) db[j] += sum;
}

extern "C" __global__ void __launch_bounds__(THREADS)
    column_sums_add(float *__restrict__ dst, const float *__restrict__ partial, u32 rows, u32 cols) {
    const u32 j = blockIdx.x * THREADS + threadIdx.x;
    if (j >= cols) return;
    float sum = 0.0f;
    for (u32 s = 0; s < rows; s++) sum += partial[u64(s) * cols + j];
    dst[j] += sum;
}
