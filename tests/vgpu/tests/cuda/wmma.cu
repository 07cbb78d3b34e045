// Programs that use the warp matrix functions of <mma.h>: a tiled product with scaled sums, and products of other types.
#include <mma.h>

using namespace nvcuda;

// D = alpha A B + C for row-major A [m, k] and column-major B [k, n]; every block makes a tile of 32 by 32 with four warps. The
// tiles of A and B pass through shared memory with padded rows; the sums are scaled element by element in their fragments.
extern "C" __global__ void __launch_bounds__(128) wmma_product(const __nv_bfloat16 *a, const __nv_bfloat16 *b,
                                                               const float *c, float *d, int n, int k, float alpha)
{
    constexpr int PAD = 32;
    __shared__ __align__(32) __nv_bfloat16 left[32][PAD], right[32][PAD];
    const int row = blockIdx.y * 32, col = blockIdx.x * 32, warp = threadIdx.x / 32;
    const int i = 16 * (warp / 2), j = 16 * (warp % 2);
    wmma::fragment<wmma::accumulator, 16, 16, 16, float> sum, add;
    wmma::fill_fragment(sum, 0.0f);
    for (int at = 0; at < k; at += 16) {
        for (int e = threadIdx.x; e < 32 * 16; e += blockDim.x) {
            left[e / 16][e % 16] = a[(row + e / 16) * k + at + e % 16];
            right[e / 16][e % 16] = b[(col + e / 16) * k + at + e % 16];
        }
        __syncthreads();
        wmma::fragment<wmma::matrix_a, 16, 16, 16, __nv_bfloat16, wmma::row_major> x;
        wmma::fragment<wmma::matrix_b, 16, 16, 16, __nv_bfloat16, wmma::col_major> y;
        wmma::load_matrix_sync(x, &left[i][0], PAD);
        wmma::load_matrix_sync(y, &right[j][0], PAD);
        wmma::mma_sync(sum, x, y, sum);
        __syncthreads();
    }
    wmma::load_matrix_sync(add, c + (row + i) * n + col + j, n, wmma::mem_row_major);
    for (int e = 0; e < sum.num_elements; e++) {
        sum.x[e] = alpha * sum.x[e] + add.x[e];
    }
    wmma::store_matrix_sync(d + (row + i) * n + col + j, sum, n, wmma::mem_row_major);
}

// One tile of 32 by 8 in halves, with half sums: column-major A, row-major B, column-major D.
extern "C" __global__ void wmma_half(const __half *a, const __half *b, __half *d, int k)
{
    wmma::fragment<wmma::matrix_a, 32, 8, 16, __half, wmma::col_major> x;
    wmma::fragment<wmma::matrix_b, 32, 8, 16, __half, wmma::row_major> y;
    wmma::fragment<wmma::accumulator, 32, 8, 16, __half> sum;
    wmma::fill_fragment(sum, __half(0.0f));
    for (int at = 0; at < k; at += 16) {
        wmma::load_matrix_sync(x, a + at * 32, 32);
        wmma::load_matrix_sync(y, b + at * 8, 8);
        wmma::mma_sync(sum, x, y, sum);
    }
    wmma::store_matrix_sync(d, sum, 32, wmma::mem_col_major);
}

// One tile of 8 by 32 in bytes.
extern "C" __global__ void wmma_bytes(const signed char *a, const signed char *b, int *d, int k)
{
    wmma::fragment<wmma::matrix_a, 8, 32, 16, signed char, wmma::row_major> x;
    wmma::fragment<wmma::matrix_b, 8, 32, 16, signed char, wmma::col_major> y;
    wmma::fragment<wmma::accumulator, 8, 32, 16, int> sum;
    wmma::fill_fragment(sum, 0);
    for (int at = 0; at < k; at += 16) {
        wmma::load_matrix_sync(x, a + at, k);
        wmma::load_matrix_sync(y, b + at, k);
        wmma::mma_sync(sum, x, y, sum, true);
    }
    wmma::store_matrix_sync(d, sum, 32, wmma::mem_row_major);
}

// One tile of 16 by 16 in tf32, rounded in its fragments as the programming guide asks.
extern "C" __global__ void wmma_tf32(const float *a, const float *b, float *d, int k)
{
    wmma::fragment<wmma::matrix_a, 16, 16, 8, wmma::precision::tf32, wmma::row_major> x;
    wmma::fragment<wmma::matrix_b, 16, 16, 8, wmma::precision::tf32, wmma::row_major> y;
    wmma::fragment<wmma::accumulator, 16, 16, 8, float> sum;
    wmma::fill_fragment(sum, 0.0f);
    for (int at = 0; at < k; at += 8) {
        wmma::load_matrix_sync(x, a + at, k);
        wmma::load_matrix_sync(y, b + at * 16, 16);
        for (int e = 0; e < x.num_elements; e++)
            x.x[e] = wmma::__float_to_tf32(x.x[e]);
        for (int e = 0; e < y.num_elements; e++)
            y.x[e] = wmma::__float_to_tf32(y.x[e]);
        wmma::mma_sync(sum, x, y, sum);
    }
    wmma::store_matrix_sync(d, sum, 16, wmma::mem_row_major);
}
