// The largest key of every group of neighbouring scores: with them topk.cu reads only the groups that matter.
//
// Grid (rows * blocks of a row), 256 threads, each of which reads four chunks of eight scores; `lanes` chunks, a power of two
// up to 32, are a group.
//
// scores float32 or (HALF) float16 [T, heads, tokens], strided but for the last dimension; maxima u32 [rows, groups]: keys of
// topk.cuh, 0 for a group that holds no score.
// Macros: HALF.
#include "topk.cuh"

#define CHUNKS 4  // of a thread

extern "C" __global__ void __launch_bounds__(256)
    topk_maxima(const void* __restrict__ scores, u32* __restrict__ maxima, i64 heads, i64 token_stride, i64 head_stride, i64 tokens,
                i64 groups, i64 lanes, i64 blocks) {
    let_next_kernel_start();
    await_previous_kernel();
    const i64 row = blockIdx.x / blocks;
    const Row all(scores, row, heads, token_stride, head_stride, tokens, 0);
    const u32 block_first = (u32)(blockIdx.x % blocks) * (256 * CHUNKS), first = block_first + threadIdx.x;
    u32 most[CHUNKS];
    if (block_first * CHUNK >= all.shift && (block_first + 256 * CHUNKS) * CHUNK <= all.end) {
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) {
            u32 keys[CHUNK];
            all.read_whole(keys, first + i * 256);
            most[i] = largest(keys);
        }
    } else {
#pragma unroll 1
        for (int i = 0; i < CHUNKS; i++) {
            u32 keys[CHUNK];
            all.read(keys, first + i * 256);
            const u32 own = largest(keys);
#pragma unroll
            for (int j = 0; j < CHUNKS; j++) most[j] = i == j ? own : most[j];
        }
    }
    for (int d = 1; d < lanes; d *= 2)
#pragma unroll
        for (int i = 0; i < CHUNKS; i++) most[i] = max(most[i], __shfl_xor_sync(ALL_LANES, most[i], d));
    if (threadIdx.x % (u32)lanes) return;
#pragma unroll
    for (int i = 0; i < CHUNKS; i++) {
        const i64 group = (first + i * 256) / (u32)lanes;
        if (group < groups) maxima[row * groups + group] = most[i];
    }
}
