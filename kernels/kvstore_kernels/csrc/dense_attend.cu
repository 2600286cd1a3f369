// Attention over rows kept as numbers, in float32: what each split of the tokens leaves; dense_merge.cu makes the answer of it.
//
// Grid (splits * ceil(R / ROWS), H), 8 warps. A warp takes every eighth tile of 32 tokens of its block's split: logits (dense.cuh), one
// token a lane, then the weighted sum of the values, eight channels a lane and SIDE tokens side by side. Exponents are
// relative to whole powers of two, so that no rescaling rounds.
//
// q, keys as dense_score.cu says, values [N, H, HEAD_DIM] of VALUES. partials float32 [H, splits, R, HEAD_DIM]: sum p v; sums
// float32 [H, splits, R, 2]: the power of two they are relative to, sum p. `unit` gives logits in powers of two.
// Macros: HEAD_DIM, QUERY, KEYS, VALUES, ROWS, SOFT_CAP.
//
// One H100, 131,072 float16 tokens x 8 heads x 128, of a copy's 2.9 TB/s: 4 query rows a head 250 us (73 %) with two blocks of 8 warps;
// with three of 4 warps and more registers 308 us.
#define WARPS 8
#define PIECES (ROWS == 4 ? 1 : 2)
#define SHORT_SUMS 0
#include "dense.cuh"
#include "warp.cuh"

// ptxas finds 128 registers by itself for four rows, and none in memory; told to, it keeps some there.
#if ROWS == 4
#define BOUNDS __launch_bounds__(WARPS * 32)
#else
#define BOUNDS __launch_bounds__(WARPS * 32, 2)
#endif

#define LANES (HEAD_DIM / 8)  // that read one token
#define SIDE (32 / LANES)

// A warp's own sums; `total` of the lane's own tokens.
struct Sums {
    float top[ROWS], total[ROWS], values[ROWS][8];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            top[r] = LOWEST;
            total[r] = 0;
#pragma unroll
            for (int c = 0; c < 8; c++) values[r][c] = 0;
        }
    }

    // From the logits of the lane's token to its weights, which are left in `weights` [TILE][ROWS].
    __device__ __forceinline__ void weigh(float (&x)[ROWS], bool present, float* weights) {
        const int lane = threadIdx.x & 31, token = (lane & 3) * 8 + (lane >> 2);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float highest = fmaxf(top[r], ceilf(fmaxf(warp_max(present ? x[r] : LOWEST), LOWEST / 2)));
            const float factor = exp2_fast(top[r] - highest), p = present ? exp2_fast(x[r] - highest) : 0;
            total[r] = fmaf(total[r], factor, p);
            weights[token * ROWS + r] = p;
            top[r] = highest;
            if (factor != 1)
#pragma unroll
                for (int c = 0; c < 8; c++) values[r][c] *= factor;
        }
    }

    // Adds the values of the tile that begins at `first`.
    __device__ __forceinline__ void add(const void* data, const float* weights, i64 first, i64 end, int h, i64 heads) {
        const int lane = threadIdx.x & 31, side = lane / LANES, channel = lane % LANES * 8;
#pragma unroll 4
        for (int i = 0; i < TILE; i += SIDE) {
            const i64 token = first + i + side;
            float v[8] = {};
            if (side < SIDE && token < end) load_8<VALUES>(v, data, (token * heads + h) * HEAD_DIM + channel);
#pragma unroll
            for (int r = 0; r < ROWS; r++) {
                const float p = weights[min(i + side, TILE - 1) * ROWS + r];
#pragma unroll
                for (int c = 0; c < 8; c++) values[r][c] = fmaf(p, v[c], values[r][c]);
            }
        }
    }

    // Leaves the sums in `into` [ROWS][HEAD_DIM] and [ROWS][2], relative to `tops`.
    __device__ __forceinline__ void store(float* into, float* totals, const float* tops) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float factor = exp2_fast(top[r] - tops[r]), all = warp_sum(total[r]) * factor;
            if (lane == 0) totals[r] = all;
#pragma unroll
            for (int c = 0; c < 8; c++) {
                float sum = values[r][c];
#pragma unroll
                for (int s = 1; s < SIDE; s++) sum += __shfl_down_sync(ALL_LANES, values[r][c], s * LANES);
                if (lane < LANES) into[r * HEAD_DIM + lane * 8 + c] = sum * factor;
            }
        }
    }
};

extern "C" __global__ void BOUNDS
    dense_attend(const void* __restrict__ q, const void* __restrict__ keys, const void* __restrict__ values,
                 float* __restrict__ partials, float* __restrict__ sums, i64 tokens, i64 split_tokens, i64 rows, i64 query_heads,
                 i64 group, float unit, float cap) {
    let_next_kernel_start();
    extern __shared__ __align__(16) float shared[];  // [WARPS][ROWS][HEAD_DIM]; at first the queries and the weights
    __shared__ float tops[WARPS + 1][ROWS], totals[WARPS][ROWS];
    float *queries = shared, *weights = queries + ROWS * HEAD_DIM;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y;
    const Share share(rows);
    const i64 row_first = share.row_first, heads = query_heads / group, last = min(tokens, (share.split + 1) * split_tokens);
    weights += warp * TILE * ROWS;
    load_queries(queries, q, h, row_first, rows, query_heads, group);
    __syncthreads();

    Sums own;
    own.clear();
    for (i64 first = share.split * split_tokens + warp * TILE; first < last; first += WARPS * TILE) {
        float x[ROWS];
        dots(x, queries, keys, first, last, h, heads);
#pragma unroll
        for (int r = 0; r < ROWS; r++) x[r] = logit_of(x[r], unit, cap);
        own.weigh(x, first + (lane & 3) * 8 + (lane >> 2) < last, weights);
        __syncwarp();
        own.add(values, weights, first, last, h, heads);
        __syncwarp();
    }
    if (lane == 0)
#pragma unroll
        for (int r = 0; r < ROWS; r++) tops[warp][r] = own.top[r];
    __syncthreads();
    if (threadIdx.x < ROWS) {
        float top = tops[0][threadIdx.x];
        for (int w = 1; w < WARPS; w++) top = fmaxf(top, tops[w][threadIdx.x]);
        tops[WARPS][threadIdx.x] = top;
    }
    __syncthreads();
    own.store(shared + warp * ROWS * HEAD_DIM, totals[warp], tops[WARPS]);
    __syncthreads();
    const i64 record = (h * share.splits + share.split) * rows + row_first;
    const int present = (int)min(rows - row_first, (i64)ROWS);
    for (int i = threadIdx.x; i < present * HEAD_DIM; i += WARPS * 32) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < WARPS; w++) sum += shared[w * ROWS * HEAD_DIM + i];
        partials[record * HEAD_DIM + i] = sum;
    }
    if (threadIdx.x >= present) return;
    float total = 0;
    for (int w = 0; w < WARPS; w++) total += totals[w][threadIdx.x];
    sums[(record + threadIdx.x) * 2] = tops[WARPS][threadIdx.x];
    sums[(record + threadIdx.x) * 2 + 1] = total;
}
