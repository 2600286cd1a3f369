// The answer of an attention from what its splits left: merged in order, normalised, taken out of the values' basis.
//
// Grid (R, H, HEAD_DIM / 32), 8 warps: a block makes 32 channels of one row of one head; the warps share the value rows.
//
// partials [H, splits, R, width], sums: as attend.cu leaves them. matrix float32 [H, length, D]: each head's value expansion,
// whose mean is row `width`, followed by the offset basis. heads: Head [H], of the values. out [T, Hq, HEAD_DIM] float32 or
// (OUT_HALF) float16; lse float32 [T, Hq], natural log. A row of no tokens gives (0, -inf). beside_out float32, beside_lse:
// such a result over other tokens, merged in; null if there is none.
// Macros: HEAD_DIM, VALUE_GROUPS, VALUE_OFFSETS, OUT_HALF.
#include "page.cuh"

#define SUMS (2 + VALUE_GROUPS * VALUE_OFFSETS)
#define WARPS 8
#define LOWEST -1e30f
#define KEPT 32  // value rows of a warp whose share of the basis is read before the splits have ended

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    merge(const float* __restrict__ partials, const float* __restrict__ sums, const float* __restrict__ matrix,
          const Head* __restrict__ heads, const float* __restrict__ beside_out, const float* __restrict__ beside_lse,
          void* __restrict__ out, float* __restrict__ lse, i64 length, i64 splits, i64 width, i64 query_heads, i64 group) {
    let_next_kernel_start();
    extern __shared__ __align__(16) float merged[];  // [width]
    __shared__ float parts[WARPS][32];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y, own = heads[h].words * 32;
    const i64 row = blockIdx.x, rows = gridDim.x;
    const float* basis = matrix + h * length * HEAD_DIM + blockIdx.z * 32 + lane;
    float kept[KEPT];
#pragma unroll
    for (int i = 0; i < KEPT; i++) kept[i] = i * WARPS + warp < own ? basis[(i64)(i * WARPS + warp) * HEAD_DIM] : 0;
    const float mean = basis[width * HEAD_DIM];

    await_previous_kernel();
    // Every warp merges the totals for itself: lane i has splits i, i + 32, ..
    const float* left = sums + ((i64)h * splits * rows + row) * SUMS;
    const i64 left_step = rows * SUMS, split_step = rows * width;
    const float* from = partials + ((i64)h * splits * rows + row) * width;
    float early[32];
    const float* next = from + threadIdx.x;
#pragma unroll
    for (int s = 0; s < 32; s++, next += split_step) early[s] = s < splits && threadIdx.x < own ? *next : 0;
    float top = LOWEST;
    for (int s = lane; s < splits; s += 32) top = fmaxf(top, left[s * left_step]);
#pragma unroll
    for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, d));
    float totals[SUMS], sum = 0;
#pragma unroll
    for (int i = 1; i < SUMS; i++) totals[i] = 0;
    for (int base = 0; base < splits; base += 32) {
        const bool there = base + lane < splits;
        const float* mine = left + (there ? base + lane : 0) * left_step;
        const float factor = there ? exp2_fast(mine[0] - top) : 0;
#pragma unroll
        for (int i = 1; i < SUMS; i++) totals[i] = fmaf(factor, mine[i], totals[i]);
#pragma unroll
        for (int s = 0; s < 32; s++) {
            float value = early[s];
            if (base) value = base + s < splits && threadIdx.x < own ? from[(base + s) * split_step + threadIdx.x] : 0;
            sum = fmaf(__shfl_sync(ALL_LANES, factor, s), value, sum);
        }
    }
#pragma unroll
    for (int i = 1; i < SUMS; i++)
#pragma unroll
        for (int d = 16; d; d >>= 1) totals[i] += __shfl_xor_sync(ALL_LANES, totals[i], d);
    if (threadIdx.x < own) merged[threadIdx.x] = sum;
    for (int r = threadIdx.x + WARPS * 32; r < own; r += WARPS * 32) {
        sum = 0;
        for (int s = 0; s < splits; s++) sum = fmaf(exp2_fast(left[s * left_step] - top), from[s * split_step + r], sum);
        merged[r] = sum;
    }
    __syncthreads();
    float part = 0;
#pragma unroll
    for (int i = 0; i < KEPT; i++)
        if (i * WARPS + warp < own) part = fmaf(kept[i], merged[i * WARPS + warp], part);
    for (int r = KEPT * WARPS + warp; r < own; r += WARPS) part = fmaf(basis[(i64)r * HEAD_DIM], merged[r], part);
    parts[warp][lane] = part;
    __syncthreads();
    if (warp) return;
    sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) sum += parts[w][lane];
#pragma unroll
    for (int g = 0; g < VALUE_GROUPS * VALUE_OFFSETS; g++)
        sum = fmaf(totals[2 + g], basis[(width + 1 + g) * HEAD_DIM], sum);
    const i64 to = row / group * query_heads + h * group + row % group;
    const bool empty = !(totals[1] > 0);
    float result = empty ? 0 : sum / totals[1] + mean;
    float log = empty ? __int_as_float(0xff800000) : (top + log2f(totals[1])) * 0.6931471805599453f;
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
