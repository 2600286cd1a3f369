// One split of what the splits of an attention left, where there are many rows: merge.cu then need not merge them for each of
// its blocks of channels.
//
// Grid (R, H), 8 warps. partials [H, splits, R, width], sums: as attend.cu leaves them. merged [H, R, width] and merged_sums
// [H, R, SUMS]: as it would leave them with one split.
// Macros: VALUE_GROUPS, VALUE_OFFSETS.
#include "splits.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    merge_splits(const float* __restrict__ partials, const float* __restrict__ sums, const Head* __restrict__ heads,
                 float* __restrict__ merged, float* __restrict__ merged_sums, i64 splits, i64 width) {
    let_next_kernel_start();
    const i64 row = blockIdx.x, rows = gridDim.x, h = blockIdx.y, first = h * splits * rows + row, to = h * rows + row;
    const int own = heads[h].words * 32;
    await_previous_kernel();
    const Merged all(partials + first * width, sums + first * SUMS, splits, rows, width, own,
                     [&](int r, float sum) { merged[to * width + r] = sum; });
    if (threadIdx.x) return;
    merged_sums[to * SUMS] = all.top;
#pragma unroll
    for (int i = 1; i < SUMS; i++) merged_sums[to * SUMS + i] = all.totals[i];
}
