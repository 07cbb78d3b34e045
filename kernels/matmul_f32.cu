// Product of matrices in f32: C = or += alpha op(A, B) where both operands are f32.
//
// Shapes: C (m, n), k steps. Element (i, l) of A lies at i * a_major + l * a_k, element (l, j) of B at j * b_major + l * b_k: the
// strides say which operand is transposed.
// Numerics: f32 throughout, one fused multiply-add per step in order of k; no TF32. C f32 or bf16, rounded once.
// Method: tiles of 64 x 64 by 16 steps through shared memory, 4 x 4 elements a thread; the next tile is fetched while this one multiplies.
// Threads load along the operand's contiguous direction.
// Needs: m, n, k > 0; no alignment. Meant for f32 training and tests: tensor cores are never used.
// Launch: one block of 256 threads per tile of C, in one dimension.
// Cost: 2 m n k flops; every operand read once per 64 rows or columns of the other.
// Test: tests/common/products.rs, on every device.
#include "common/types.cuh"

constexpr int THREADS = 256, TILE = 64, STEPS = 16, EACH = TILE * STEPS / THREADS;

// A tile of an operand in shared memory, by steps. Four floats more to a row: the transposing stores then spread over the banks.
struct Operand {
    const float *from;
    u64 major_stride, k_stride;
    u32 first, extent, k;
    bool along_k; // neighbouring threads take neighbouring steps

    __device__ __forceinline__ void place(int i, u32 &major, u32 &step) const {
        const u32 at = threadIdx.x + i * THREADS;
        major = along_k ? at / STEPS : at % TILE;
        step = along_k ? at % STEPS : at / TILE;
    }
    __device__ __forceinline__ void fetch(float (&x)[EACH], u32 k0) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            u32 major, step;
            place(i, major, step);
            const bool inside = first + major < extent && k0 + step < k;
            x[i] = inside ? from[(first + major) * major_stride + (k0 + step) * k_stride] : 0.0f;
        }
    }
    __device__ __forceinline__ void store(float (&tile)[STEPS][TILE + 4], const float (&x)[EACH]) const {
#pragma unroll
        for (int i = 0; i < EACH; i++) {
            u32 major, step;
            place(i, major, step);
            tile[step][major] = x[i];
        }
    }
};

template <typename T> __device__ __forceinline__ void write(T &c, float sum, float alpha, u32 add) {
    put(c, fmaf(alpha, sum, add ? to_f32(c) : 0.0f));
}

extern "C" __global__ void __launch_bounds__(THREADS)
    matmul_f32(void *__restrict__ c, const float *__restrict__ a, const float *__restrict__ b, u32 m, u32 n, u32 k, u64 a_major,
               u64 a_k, u64 b_major, u64 b_k, float alpha, u32 c_is_bf16, u32 add) {
    __shared__ __align__(16) float tile_a[STEPS][TILE + 4], tile_b[STEPS][TILE + 4];
    const u32 tiles_n = (n + TILE - 1) / TILE;
    const u32 row0 = blockIdx.x / tiles_n * TILE, column0 = blockIdx.x % tiles_n * TILE;
    const Operand rows = {a, a_major, a_k, row0, m, k, a_k == 1}, columns = {b, b_major, b_k, column0, n, k, b_k == 1};
    const u32 i0 = threadIdx.x / 16 * 4, j0 = threadIdx.x % 16 * 4;
    float sum[4][4] = {}, next_a[EACH], next_b[EACH];
    rows.fetch(next_a, 0);
    columns.fetch(next_b, 0);
    for (u32 k0 = 0; k0 < k; k0 += STEPS) {
        rows.store(tile_a, next_a);
        columns.store(tile_b, next_b);
        __syncthreads();
        if (k0 + STEPS < k) {
            rows.fetch(next_a, k0 + STEPS);
            columns.fetch(next_b, k0 + STEPS);
        }
#pragma unroll
        for (int l = 0; l < STEPS; l++) {
            const float4 x = *reinterpret_cast<const float4 *>(&tile_a[l][i0]), y = *reinterpret_cast<const float4 *>(&tile_b[l][j0]);
            const float xs[4] = {x.x, x.y, x.z, x.w}, ys[4] = {y.x, y.y, y.z, y.w};
#pragma unroll
            for (int i = 0; i < 4; i++) {
#pragma unroll
                for (int j = 0; j < 4; j++) sum[i][j] = fmaf(xs[i], ys[j], sum[i][j]);
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < 4; i++) {
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const u32 row = row0 + i0 + i, column = column0 + j0 + j;
            if (row >= m || column >= n) continue;
            const u64 at = u64(row) * n + column;
            if (c_is_bf16) {
                write(static_cast<bf16 *>(c)[at], sum[i][j], alpha, add);
            } else {
                write(static_cast<float *>(c)[at], sum[i][j], alpha, add);
            }
        }
    }
}
