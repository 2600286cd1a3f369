// Rows kept as numbers: one warp, 32 tokens of one KV head, ROWS query rows.
//
// A warp reads a row of keys with four lanes, 32 channels at once, and four rows a lane: lane (g, t) has channels 8t .. 8t + 7 of
// every 32 of tokens 8j + g, j < 4, and ends with the logits of token 8t + g. All sums are float32, and which other rows
// and tokens stand beside one does not change the order of its sum.
// Macros: HEAD_DIM, QUERY, KEYS, ROWS, SOFT_CAP, WARPS, PIECES (of 32 channels, to ask for at once), SHORT_SUMS (more exact, by one
// more sum for eight channels).
#pragma once
#include "ptx.cuh"

#define TILE 32  // tokens
#define LOWEST -1e30f

// Eight neighbouring numbers of TYPE: 0 float32, 1 float16, 2 bfloat16.
template <int TYPE>
__device__ __forceinline__ void load_8(float (&v)[8], const void* from, i64 at) {
    if (TYPE == 0) {
        const float4 low = ((const float4*)((const float*)from + at))[0], high = ((const float4*)((const float*)from + at))[1];
        v[0] = low.x, v[1] = low.y, v[2] = low.z, v[3] = low.w;
        v[4] = high.x, v[5] = high.y, v[6] = high.z, v[7] = high.w;
        return;
    }
    const uint4 pairs = *(const uint4*)((const u16*)from + at);
    const u32 words[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
#pragma unroll
    for (int i = 0; i < 8; i++)
        v[i] = TYPE == 1 ? from_half((u16)(words[i / 2] >> i % 2 * 16)) : from_bfloat((u16)(words[i / 2] >> i % 2 * 16));
}

// Blocks that read the same keys stand side by side, so that the L2 reads them once: which rows, and which split, is this one's.
struct Share {
    i64 row_first, split, splits;

    __device__ __forceinline__ explicit Share(i64 rows) {
        const i64 tiles = (rows + ROWS - 1) / ROWS;
        row_first = blockIdx.x % tiles * ROWS;
        split = blockIdx.x / tiles;
        splits = gridDim.x / tiles;
    }
};

// Which place query row `row` of KV head `h` has in [T, Hq].
__device__ __forceinline__ i64 place_of(i64 row, int h, i64 query_heads, i64 group) {
    return row / group * query_heads + h * group + row % group;
}

// Query rows [first, first + ROWS) of a head as float32 [ROWS][HEAD_DIM]; past the last, the last again. The caller synchronises.
__device__ __forceinline__ void load_queries(float* queries, const void* q, int h, i64 first, i64 rows, i64 query_heads, i64 group) {
    for (int i = threadIdx.x; i < ROWS * HEAD_DIM / 8; i += WARPS * 32) {
        const int row = i / (HEAD_DIM / 8), channel = i % (HEAD_DIM / 8) * 8;
        float v[8];
        load_8<QUERY>(v, q, place_of(min(first + row, rows - 1), h, query_heads, group) * HEAD_DIM + channel);
#pragma unroll
        for (int c = 0; c < 8; c++) queries[row * HEAD_DIM + channel + c] = v[c];
    }
}

// <q, k> of this lane's token, which is `first` + 8t + g, for every row. Tokens past `end` are read as the last.
__device__ __forceinline__ void dots(float (&dot)[ROWS], const float* queries, const void* keys, i64 first, i64 end, int h, i64 heads) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    i64 at[4];
    float sum[ROWS][4] = {};
#pragma unroll
    for (int j = 0; j < 4; j++) at[j] = (min(first + 8 * j + g, end - 1) * heads + h) * HEAD_DIM + 8 * t;
#pragma unroll (PIECES)
    for (int channel = 0; channel < HEAD_DIM; channel += 32) {
        float k[4][8];
#pragma unroll
        for (int j = 0; j < 4; j++) load_8<KEYS>(k[j], keys, at[j] + channel);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            float q[8];
            load_8<0>(q, queries, r * HEAD_DIM + channel + 8 * t);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                float part = SHORT_SUMS ? 0 : sum[r][j];
#pragma unroll
                for (int c = 0; c < 8; c++) part = fmaf(q[c], k[j][c], part);
                sum[r][j] = SHORT_SUMS ? sum[r][j] + part : part;
            }
        }
    }
    // Each exchange halves what a lane holds; a + b is b + a, so that a sum is the same in whichever lane it ends.
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        float half[2];
#pragma unroll
        for (int i = 0; i < 2; i++)
            half[i] = (t & 2 ? sum[r][2 + i] : sum[r][i]) + __shfl_xor_sync(ALL_LANES, t & 2 ? sum[r][i] : sum[r][2 + i], 2);
        dot[r] = (t & 1 ? half[1] : half[0]) + __shfl_xor_sync(ALL_LANES, t & 1 ? half[0] : half[1], 1);
    }
}

// The logit of a dot product; with a cap `unit` makes it a multiple of the cap. Its product is never fused with a sum that
// follows: whether the compiler does so depends on ROWS.
__device__ __forceinline__ float logit_of(float dot, float unit, float cap) {
    const float logit = __fmul_rn(dot, unit);
    return SOFT_CAP ? __fmul_rn(cap, tanhf(logit)) : logit;
}
