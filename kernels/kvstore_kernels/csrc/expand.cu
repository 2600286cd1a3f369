// y = E q: every row of the expansion matrices against every query row, in float64, rounded to float32 once.
//
// Grid (ceil(length / 16), H, ceil(R / 8)), 2 warps: a warp multiplies 8 rows of one head's matrix and 8 query rows on
// tensor cores; which rows stand beside them does not change a product.
//
// q [T, Hq, D] of QUERY (0 float32, 1 float16, 2 bfloat16); row r of KV head h is token r / group, query head
// h * group + r % group. matrix float32 [H, length, D]. y float32 [H, R, length].
// Macros: HEAD_DIM, QUERY.
#include "ptx.cuh"

// Four neighbouring numbers of a query.
__device__ __forceinline__ float4 query_at(const void* q, i64 i) {
    if (QUERY == 0) return *(const float4*)((const float*)q + i);
    const uint2 pairs = *(const uint2*)((const u16*)q + i);
    if (QUERY == 1) return make_float4(low_half(pairs.x), high_half(pairs.x), low_half(pairs.y), high_half(pairs.y));
    return make_float4(from_bfloat((u16)pairs.x), from_bfloat((u16)(pairs.x >> 16)), from_bfloat((u16)pairs.y),
                       from_bfloat((u16)(pairs.y >> 16)));
}

extern "C" __global__ void __launch_bounds__(64)
    expand(const void* __restrict__ q, const float* __restrict__ matrix, float* __restrict__ y, i64 length, i64 rows,
           i64 query_heads, i64 group) {
    let_next_kernel_start();
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3, h = blockIdx.y;
    const i64 row = blockIdx.x * 16 + (threadIdx.x >> 5) * 8, query = (i64)blockIdx.z * 8;
    if (row >= length) return;
    const i64 from = min(query + g, rows - 1);
    const float* e = matrix + (h * length + min(row + g, length - 1)) * HEAD_DIM + 4 * t;
    const i64 base = (from / group * query_heads + h * group + from % group) * HEAD_DIM + 4 * t;
    float4 a[HEAD_DIM / 16], b[HEAD_DIM / 16];
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; d++) {
        a[d] = *(const float4*)(e + d * 16);
        b[d] = query_at(q, base + d * 16);
    }
    double sum[4][2] = {};
#pragma unroll
    for (int d = 0; d < HEAD_DIM / 16; d++) {
        mma_double(sum[0], a[d].x, b[d].x);
        mma_double(sum[1], a[d].y, b[d].y);
        mma_double(sum[2], a[d].z, b[d].z);
        mma_double(sum[3], a[d].w, b[d].w);
    }
#pragma unroll
    for (int i = 0; i < 2; i++)
        if (row + g < length && query + 2 * t + i < rows)
            y[(h * rows + query + 2 * t + i) * length + row + g] = (float)(sum[0][i] + sum[1][i] + (sum[2][i] + sum[3][i]));
}
