// The answer of an attention from what its splits left: merged in order, normalised, taken out of the values' basis.
//
// Grid (ceil(R / ROWS), H, HEAD_DIM / 32), 8 warps: a block makes 32 channels of ROWS rows of one head; the warps share the
// value rows.
//
// partials [H, splits, R, width], sums: as attend.cu leaves them. matrix float32 [H, length, D]: each head's value expansion,
// whose mean is row `width`, followed by the offset basis. heads: Head [H], of the values. out [T, Hq, HEAD_DIM] float32 or
// (OUT_HALF) float16; lse float32 [T, Hq], natural log. A row of no tokens gives (0, -inf). beside_out float32, beside_lse:
// such a result over other tokens, merged in; null if there is none.
// Macros: HEAD_DIM, VALUE_GROUPS, VALUE_OFFSETS, OUT_HALF, ROWS: 1, or 8 of what merge_splits.cu has made one split.
// One H100, 32 rows of 8 heads and 32 splits: a block a row that merges the splits itself 17 us; merged before 10.9 us with that.
#include "splits.cuh"

#define KEPT 32  // value rows of a warp whose share of the basis is read before the splits have ended

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    merge(const float* __restrict__ partials, const float* __restrict__ sums, const float* __restrict__ matrix,
          const Head* __restrict__ heads, const float* __restrict__ beside_out, const float* __restrict__ beside_lse,
          void* __restrict__ out, float* __restrict__ lse, i64 length, i64 splits, i64 rows, i64 width, i64 query_heads, i64 group) {
    extern __shared__ __align__(16) float merged[];  // [width][ROWS]
    __shared__ float parts[WARPS][ROWS][32], totals[ROWS][SUMS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y, own = heads[h].words * 32;
    const i64 first = (i64)blockIdx.x * ROWS, present = min((i64)ROWS, rows - first);
    const float* basis = matrix + h * length * HEAD_DIM + blockIdx.z * 32 + lane;
    float kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = i * WARPS + warp < own ? basis[(i64)(i * WARPS + warp) * HEAD_DIM] : 0;
    const float mean = basis[width * HEAD_DIM];

    await_previous_kernel();
    partials += ((i64)h * splits * rows + first) * width;
    sums += ((i64)h * splits * rows + first) * SUMS;
    if (ROWS == 1) {
        const Merged all(partials, sums, splits, rows, width, own, [&](int r, float sum) { merged[r] = sum; });
        totals[0][0] = all.top;
#pragma unroll
        for (int i = 1; i < SUMS; i++) totals[0][i] = all.totals[i];
    } else {
        for (int r = threadIdx.x; r < own; r += WARPS * 32)
#pragma unroll
            for (int i = 0; i < ROWS; i++) merged[r * ROWS + i] = i < present ? partials[i * width + r] : 0;
        if (threadIdx.x < present * SUMS) totals[0][threadIdx.x] = sums[threadIdx.x];
    }
    __syncthreads();
    float part[ROWS] = {};
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (i * WARPS + warp < own)
#pragma unroll
            for (int r = 0; r < ROWS; r++) part[r] = fmaf(kept[i], merged[(i * WARPS + warp) * ROWS + r], part[r]);
    for (int v = KEPT * WARPS + warp; v < own; v += WARPS)
#pragma unroll
        for (int r = 0; r < ROWS; r++) part[r] = fmaf(basis[(i64)v * HEAD_DIM], merged[v * ROWS + r], part[r]);
#pragma unroll
    for (int r = 0; r < ROWS; r++) parts[warp][r][lane] = part[r];
    __syncthreads();
    if (warp >= present) return;
    const float *of_row = totals[warp], total = of_row[1];
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][warp][lane];
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS * VALUE_OFFSETS; g++) sum = fmaf(of_row[2 + g], basis[(width + 1 + g) * HEAD_DIM], sum);
    const i64 row = first + warp, to = row / group * query_heads + h * group + row % group;
    const bool empty = !(total > 0);
    float result = empty ? 0 : sum / total + mean;
    float log = empty ? __int_as_float(0xff800000) : (of_row[0] + log2f(total)) * 0.6931471805599453f;
    const i64 at = to * HEAD_DIM + blockIdx.z * 32 + lane;
    if (beside_out) {
        const float other = beside_lse[to], most = fmaxf(log, other);
        if (other > __int_as_float(0xff800000)) {
            const float own = expf(log - most), share = expf(other - most);
            result = (own * result + share * beside_out[at]) / (own + share);
            log = most + logf(own + share);
        }
    }
    if (OUT_HALF)
        ((u16*)out)[at] = (u16)to_halves(result, result);
    else
        ((float*)out)[at] = result;
    if (blockIdx.z == 0 && lane == 0) lse[to] = log;
}
