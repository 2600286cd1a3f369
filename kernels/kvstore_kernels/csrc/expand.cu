// y = E q: every row of the expansion matrices against every query row, in float64, rounded to float32 once.
//
// Grid (ceil(length / 16), H, ceil(R / 8)), 2 warps: a warp multiplies 8 rows of one head's matrix and 8 query rows on
// tensor cores; which rows stand beside them does not change a product.
//
// q [T, Hq, D] of QUERY (0 float32, 1 float16, 2 bfloat16); row r of KV head h is token r / group, query head
// h * group + r % group. matrix float32 [H, length, D]. y float32 [H, R, length].
// Macros: HEAD_DIM, QUERY.
#include "ptx.cuh"

#define STEPS (HEAD_DIM / 16)  // products of a lane's four numbers

// Four neighbouring numbers of a query, and one number.
#if QUERY == 0
typedef float4 Four;
typedef float One;
__device__ __forceinline__ void copy_four(u32 shared, const One* from) { copy_async(shared, from); }
__device__ __forceinline__ float4 floats(float4 v) { return v; }
#else
typedef uint2 Four;
typedef u16 One;
__device__ __forceinline__ void copy_four(u32 shared, const One* from) { copy_async_8(shared, from); }
__device__ __forceinline__ float of(u32 half) { return QUERY == 1 ? from_half((u16)half) : from_bfloat((u16)half); }
__device__ __forceinline__ float4 floats(uint2 v) { return make_float4(of(v.x), of(v.x >> 16), of(v.y), of(v.y >> 16)); }
#endif

extern "C" __global__ void __launch_bounds__(64)
    expand(const One* __restrict__ q, const float* __restrict__ matrix, float* __restrict__ y, i64 length, i64 rows,
           i64 query_heads, i64 group) {
    let_next_kernel_start();
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, h = blockIdx.y;
    const i64 row = blockIdx.x * 16 + (threadIdx.x >> 5) * 8, query = (i64)blockIdx.z * 8;
    const i64 from = min(query + g, rows - 1);
    const float* e = matrix + (h * length + min(row + g, length - 1)) * HEAD_DIM + 4 * t;
    const i64 base = (from / group * query_heads + h * group + from % group) * HEAD_DIM + 4 * t;
    // Every lane's own numbers come by shared memory, because loads the compiler would move down to where they are needed.
    __shared__ float4 rows_of_matrix[STEPS][64];
    __shared__ Four rows_of_queries[STEPS][64];
    const float4* a = rows_of_matrix[0] + threadIdx.x;
    const Four* b = rows_of_queries[0] + threadIdx.x;
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
        copy_async(shared_address(a + d * 64), e + d * 16);
        copy_four(shared_address(b + d * 64), q + base + d * 16);
    }
    close_copies();
    await_copies<0>();
    double sum[4][2] = {};
#pragma unroll
    for (int d = 0; d < STEPS; d++) {
        const float4 row_part = a[d * 64], query_part = floats(b[d * 64]);
        mma_double(sum[0], row_part.x, query_part.x);
        mma_double(sum[1], row_part.y, query_part.y);
        mma_double(sum[2], row_part.z, query_part.z);
        mma_double(sum[3], row_part.w, query_part.w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + g < length && query + 2 * t + i < rows)
            y[(h * rows + query + 2 * t + i) * length + row + g] = (float)(sum[0][i] + sum[1][i] + (sum[2][i] + sum[3][i]));
}
