// The answer of an attention over rows kept as numbers from what dense_attend.cu leaves of its splits, merged in order.
//
// Grid (R, H), 8 warps: a warp sums every eighth split, lane i channels i, i + 32, ..
//
// partials, sums: dense_attend.cu. out float32 [T, Hq, HEAD_DIM]; lse float32 [T, Hq], natural log.
// Macros: HEAD_DIM.
#include "warp.cuh"

#define WARPS 8
#define SHARE (HEAD_DIM / 32)

extern "C" __global__ void __launch_bounds__(WARPS * 32, 2)
    dense_merge(const float* __restrict__ partials, const float* __restrict__ sums, float* __restrict__ out,
                float* __restrict__ lse, i64 splits, i64 query_heads, i64 group) {
    __shared__ float parts[WARPS][HEAD_DIM];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y;
    const i64 row = blockIdx.x, rows = gridDim.x, first = (i64)h * splits * rows + row;
    await_previous_kernel();
    float top = sums[first * 2], total = 0, own[SHARE] = {};
    for (i64 s = lane; s < splits; s += 32) top = fmaxf(top, sums[(first + s * rows) * 2]);
    top = warp_max(top);
    for (i64 s = lane; s < splits; s += 32) {
        const float* left = sums + (first + s * rows) * 2;
        total = fmaf(exp2_fast(left[0] - top), left[1], total);
    }
    total = warp_sum(total);
#pragma unroll 4
    for (i64 s = warp; s < splits; s += WARPS) {
        const i64 at = first + s * rows;
        const float factor = exp2_fast(sums[at * 2] - top);
#pragma unroll
        for (int i = 0; i < SHARE; i++) own[i] = fmaf(factor, partials[at * HEAD_DIM + i * 32 + lane], own[i]);
    }
#pragma unroll
    for (int i = 0; i < SHARE; i++) parts[warp][i * 32 + lane] = own[i];
    __syncthreads();
    const i64 to = row / group * query_heads + h * group + row % group;
    for (int channel = threadIdx.x; channel < HEAD_DIM; channel += WARPS * 32) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += parts[w][channel];
        out[to * HEAD_DIM + channel] = sum / total;
    }
    if (threadIdx.x == 0) lse[to] = (top + log2f(total)) * 0.6931471805599453f;
}
