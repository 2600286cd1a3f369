// Sums and maxima over the lanes of a warp; each lane gets the result.
#pragma once
#include "ptx.cuh"

__device__ __forceinline__ float warp_sum(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v += __shfl_xor_sync(ALL_LANES, v, d);
    return v;
}

__device__ __forceinline__ float warp_max(float v) {
#pragma unroll
    for (int d = 16; d; d >>= 1) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, d));
    return v;
}
