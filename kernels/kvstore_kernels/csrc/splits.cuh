// What the splits of an attention left of one row, merged: sums over value rows in order of the splits, for each thread's own,
// and the other sums.
#pragma once
#include "page.cuh"

#define SUMS (2 + VALUE_GROUPS * VALUE_OFFSETS)
#define WARPS 8
#define LOWEST -1e30f

struct Merged {
    float top, totals[SUMS];  // totals[0] is unused

    // By every warp of a block for itself, lane i has splits i, i + 32, ..; take(r, sum) is called for value rows r < own, each
    // by one thread. partials [splits, rows, width] and sums [splits, rows, SUMS] from this row's.
    template <class Take>
    __device__ __forceinline__ Merged(const float* partials, const float* sums, i64 splits, i64 rows, i64 width, int own, Take take) {
        const int lane = threadIdx.x & 31;
        const i64 left_step = rows * SUMS, split_step = rows * width;
        float early[32];
        const float* next = partials + threadIdx.x;
#pragma unroll
        for (int s = 0; s < 32; s++, next += split_step) early[s] = s < splits && threadIdx.x < own ? *next : 0;
        top = LOWEST;
        for (int s = lane; s < splits; s += 32) top = fmaxf(top, sums[s * left_step]);
#pragma unroll
        for (int d = 16; d; d >>= 1) top = fmaxf(top, __shfl_xor_sync(ALL_LANES, top, d));
        float sum = 0;
#pragma unroll
        for (int i = 1; i < SUMS; i++) totals[i] = 0;
        for (int base = 0; base < splits; base += 32) {
            const bool there = base + lane < splits;
            const float* mine = sums + (there ? base + lane : 0) * left_step;
            const float factor = there ? exp2_fast(mine[0] - top) : 0;
#pragma unroll
            for (int i = 1; i < SUMS; i++) totals[i] = fmaf(factor, mine[i], totals[i]);
#pragma unroll
            for (int s = 0; s < 32; s++) {
                float value = early[s];
                if (base) value = base + s < splits && threadIdx.x < own ? partials[(base + s) * split_step + threadIdx.x] : 0;
                sum = fmaf(__shfl_sync(ALL_LANES, factor, s), value, sum);
            }
        }
#pragma unroll
        for (int i = 1; i < SUMS; i++)
#pragma unroll
            for (int d = 16; d; d >>= 1) totals[i] += __shfl_xor_sync(ALL_LANES, totals[i], d);
        if (threadIdx.x < own) take(threadIdx.x, sum);
        for (int r = threadIdx.x + WARPS * 32; r < own; r += WARPS * 32) {
            sum = 0;
            for (int s = 0; s < splits; s++) sum = fmaf(exp2_fast(sums[s * left_step] - top), partials[s * split_step + r], sum);
            take(r, sum);
        }
    }
};
