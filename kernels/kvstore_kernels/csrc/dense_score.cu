// Logits of rows kept as numbers, <q, k> sm_scale with the soft cap, in float32.
//
// Grid (splits * ceil(R / ROWS), H), 4 warps, of which each takes every fourth tile of 32 tokens of its block's split: dense.cuh. Row
// r of KV head h is query token r / group, query head h * group + r % group.
//
// q [T, Hq, HEAD_DIM] of QUERY, keys [N, H, HEAD_DIM] of KEYS (0 float32, 1 float16, 2 bfloat16); out float32 [T, Hq, N].
// Macros: HEAD_DIM, QUERY, KEYS, ROWS, SOFT_CAP.
//
// One H100, 131,072 float16 tokens x 8 heads x 128, of a copy's 2.9 TB/s: 4 query rows a head 146 us with a block for every 256 tokens;
// 109 us (89 %) with splits, 94 % at 1,048,576 tokens.
#define WARPS 4
#define PIECES (KEYS ? 2 : 1)
#define SHORT_SUMS 1
#include "dense.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, 3)
    dense_score(const void* __restrict__ q, const void* __restrict__ keys, float* __restrict__ out, i64 tokens,
                i64 split_tokens, i64 rows, i64 query_heads, i64 group, float unit, float cap) {
    __shared__ __align__(16) float queries[ROWS * HEAD_DIM];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y;
    const Share own(rows);
    const i64 row_first = own.row_first, last = min(tokens, (own.split + 1) * split_tokens);
    load_queries(queries, q, h, row_first, rows, query_heads, group);
    __syncthreads();
    i64 to[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; r++) to[r] = place_of(row_first + r, h, query_heads, group) * tokens;
    for (i64 first = own.split * split_tokens + warp * TILE; first < last; first += WARPS * TILE) {
        float dot[ROWS];
        dots(dot, queries, keys, first, last, h, query_heads / group);
        const i64 token = first + (lane & 3) * 8 + (lane >> 2);
#pragma unroll
        for (int r = 0; r < ROWS; r++)
            if (row_first + r < rows && token < last) out[to[r] + token] = logit_of(dot[r], unit, cap);
    }
}
