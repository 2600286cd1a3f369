// Sign sketches of vectors: z = P (x - mean) on tensor cores, its signs or quantiser cells as packed rows, and the scales.
//
// Grid (blocks, codes), WARPS warps. A code is a projection with the heads that share it; its vectors are counted token-major
// over these heads, and a warp takes every (WARPS * blocks)-th tile of 16 TILES of them, the next one being fetched
// meanwhile. Lane (g = lane / 4, t = lane % 4) has channels 32 p + 8 t .. + 7 of vectors g, g + 8, .. of the tile: with the
// columns of A permuted these are its part of it, and the matrix is stored in the order in which lanes need it as B, 16
// bytes a lane for 8 columns x 32 channels. The columns of z are permuted too: of the 128 of a unit a lane ends up with 32 t
// .. 32 t + 31, all of one word.
//
// x of INPUT (0 float32, 1 float16, 2 bfloat16) [N, H, D], `stride` numbers between tokens. mean float32 [H, D]. codes: Code.
// places: Place, the heads of the codes one after the other. matrix: halves, for each unit, tile j of 16 and piece p of
// channels [8 columns n][32 channels]; column n is 32 (n / 2) + 31 - 2 j - n % 2 of the unit. word_groups int
// [units * 4] (GROUPS > 1). columns, rows: planes.cuh (PLANES). support float32 [G, D] (SUPPORT). norm_factor float32 [G]
// (NORM). words int [N, width], scales halves [N, scale_width], record: Record, which the caller sets to the greatest numbers.
// `.._most`: the greatest number of heads, units and words that a code has.
//
// Numbers: x - mean in float32, times a power of two that brings a bound of it (the greatest |x| and |mean| together) to
// 2^14 .. 2^15, then rounded to half: neither tiny nor huge vectors lose bits. The matrix is P times a power of two a
// column (-P without PLANES: then the sign bit of z is the row). Sums are over columns in one order whatever the tile, so a
// sketch depends on its vector alone. Of an x that is not finite something is stored. N * H is at most 2^30.
//
// Macros: HEAD_DIM, INPUT, TILES (1, 2), WARPS, RESIDENT (the matrix is in shared memory), GROUPS, SUPPORT (0: one group of
// all channels), NORM, CODED_ENERGY (with PLANES only), ALIKE (a lane's vectors have the same head), PLANES (0: every
// coordinate is a row; else the planes of the deepest coordinate), GRAIN (planes.cuh).
//
// Keys and values of 131,072 tokens x 8 heads of 128 channels from fp16, 256 rows each (H100, which copies 3.0 TB/s):
//   v1 vectors straight to registers, two tensor-core tiles of columns at a time: 417 us; 8 warps 478, 16 warps 433
//   v2 vectors fetched to shared memory a tile ahead, four tiles of columns at a time: 390 us; 8 warps 436
//   v3 each block's Code in shared memory, to free registers: 404 us; started one after the other, warps gain nothing
// Rotated planes, keys alone: rows gathered bit by bit 471 / 621 / 743 us (2 / 4 / 6 planes), byte by byte 334 / 460 / 564.
#include "tile.cuh"

#define SIGN_TILES 4  // at a time
#if PLANES
#include "planes.cuh"
#endif

struct Code {
    int unit, units;
    int place, heads;
    int words, word;  // of each head; where its rows begin in `rows`
    float factor;     // without PLANES of alpha, for the power of two of the matrix; else 1 / coded coordinates
};

#if !PLANES
// The signs of z as words, and sum |z| of each group for the vector that the lane answers for.
__device__ __forceinline__ void take_signs(const Tile& tile, const Code& code, const uint4* matrix, const int* word_groups, int out,
                                           u32* words, float (&along)[GROUPS]) {
    const int t = threadIdx.x & 3;
    float sums[GROUPS][ROWS] = {};
#pragma unroll 1
    for (int unit = 0; unit < code.units; unit++) {
        u32 word[ROWS] = {};
        float sum[ROWS] = {};
        project<SIGN_TILES>(tile, matrix + unit * UNIT_PIECES, 16 / SIGN_TILES, [&](int, const float (&z)[ROWS][2 * SIGN_TILES]) {
#pragma unroll
            for (int i = 0; i < 2 * SIGN_TILES; i++)
#pragma unroll
                for (int r = 0; r < ROWS; r++) {
                    word[r] = __funnelshift_l(__float_as_uint(z[r][i]), word[r], 1);
                    sum[r] += fabsf(z[r][i]);
                }
        });
        const int own = 4 * unit + t, group = GROUPS > 1 ? word_groups[own] : 0;
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
#pragma unroll
            for (int i = 0; i < GROUPS; i++) sums[i][r] += i == group ? sum[r] : 0;
            const int to = of_row(out, r);
            if (own < code.words && to >= 0) words[to + own] = word[r];
        }
    }
#pragma unroll
    for (int i = 0; i < GROUPS; i++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) keep_own(along[i], quad_sum(sums[i][r]), r);
}
#endif

extern "C" __global__ void __launch_bounds__(WARPS * 32, 1)
    encode(const void* __restrict__ x, const float* __restrict__ mean, const Code* __restrict__ codes, const Place* __restrict__ places,
           const uint4* __restrict__ matrix, const int* __restrict__ word_groups, const float4* __restrict__ columns,
           const uint2* __restrict__ rows, const float* __restrict__ support, const float* __restrict__ norm_factor,
           u32* __restrict__ words, u16* __restrict__ scales, Record* __restrict__ record, i64 tokens, i64 stride, i64 heads,
           i64 width, i64 scale_width, i64 heads_most, i64 units_most, i64 words_most) {
    extern __shared__ __align__(16) u8 shared[];
    let_next_kernel_start();
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    const Code code = codes[blockIdx.y];
    const Means means{(Place*)shared, (float*)(shared + heads_most * sizeof(Place))};
    float* own_support = means.rows + heads_most * MEAN_ROW;
    uint4* at = (uint4*)(own_support + (SUPPORT ? GROUPS * HEAD_DIM : 0));
    uint4* raw = at + warp * RAW_PIECES;
    at += WARPS * RAW_PIECES;
    matrix += (i64)code.unit * UNIT_PIECES;
    if (RESIDENT) {
        for (int i = threadIdx.x; i < code.units * UNIT_PIECES; i += WARPS * 32) copy_async(shared_address(at + i), matrix + i);
        matrix = at;
        at += units_most * UNIT_PIECES;
    }
#if PLANES
    const Planes planes((u8*)at, warp, columns, rows, code, units_most, words_most);
#endif
    for (int i = threadIdx.x; i < (SUPPORT ? GROUPS * HEAD_DIM : 0); i += WARPS * 32) own_support[i] = support[i];
    for (int slot = warp; slot < code.heads; slot += WARPS) means.read(slot, places[code.place + slot], mean, lane);
    close_copies();
    __syncthreads();

    const Source source{x, (int)(tokens * code.heads), code.heads, (int)width, stride};
    const int step = WARPS * gridDim.x * TILE;
    int first = (warp * gridDim.x + blockIdx.x) * TILE;
    Owned owned(first, source);
    if (first < source.count) fetch(raw, source, owned, means);
    close_copies();
    await_copies<1>();
    __syncthreads();
    for (; first < source.count; first += step) {
        Tile tile;
        await_copies<0>();
        float scale[ROWS];
        find_scales(scale, tile, raw, owned, means, &record->not_finite, heads);
        fill(tile, scale, raw, owned, means, own_support);
        const Place place = means.places[owned.slot];
        const int token = owned.token, first_token = first / code.heads;
        const bool present = owned.present && (threadIdx.x & 3) < ROWS;
        owned = Owned(first + step, source);
        if (first + step < source.count) fetch(raw, source, owned, means);
        close_copies();
        if (!code.words) continue;
        const int out = present ? (token - first_token) * (int)width + place.word : -1;
        u32* tile_words = words + first_token * width;
        float along[GROUPS] = {};
#if PLANES
        planes.take(tile, code, matrix + lane, out, tile_words, along);
#else
        take_signs(tile, code, matrix + lane, word_groups + 4 * code.unit, out, tile_words, along);
#endif
#pragma unroll
        for (int group = 0; group < GROUPS; group++) {
            const float energy = tile.energy[group];
            float alpha = NORM ? norm_factor[group] * sqrtf(energy) : along[group] > 0 ? energy / along[group] * (PLANES ? 1 : code.factor) : 0;
            alpha *= tile.unscale;
            if (!present) continue;
            if (!(alpha <= FP16_MAX)) atomicMin(&record->beyond, token * heads + place.head);
            scales[token * scale_width + place.scale + group] = (u16)to_halves(alpha, alpha);
        }
    }
    await_previous_kernel();
}
