// Attention over stored sign sketches, keys and values never expanded to numbers: logits, softmax and weighted sums in one
// pass over the pages. merge.cu makes the answer of what the splits leave.
//
// Grid (splits, H, ceil(R / ROWS)), WARPS warps. A round takes WARPS pages of 256 tokens. First each warp scores its own
// page against all rows (logits.cuh), and turns p_n alpha_n into integers of WEIGHT_PLANES bits relative to the page's
// largest, whose bit planes it leaves in shared memory. Then each warp takes VALUE_WORDS times 32 value rows and sums
// them over all pages of the round: the bits of the values are the A operand, the planes B. Exponents are kept relative to
// whole powers of two, so that no rescaling ever rounds, and a row's result does not depend on the rows or rounds around it.
//
// Pages: keys as logits.cuh says. A page of values holds the scales likewise, and each head's words as [words * 2] tiles of
// 512 bytes: lane (g, t) has 16 bytes, the words (t, s = 0) of value rows g and g + 8, then (t, s = 1) of both; bit
// 16 i + 8 j + c of word (t, s) is token 32 c + 4 (2 t + i) + 2 s + j, the order in which lanes hold the logits.
//
// key_slab, key_table, key_heads, unit_words, y: as score.cu; the values' likewise. value_groups u8
// [H][width / 32]: scale group of each word. noise float32 [H][y_extra]. partials float32 [H, splits, R, width]:
// sum over the split of p_n alpha_n t_n; sums float32 [H, splits, R, SUMS]: the power of
// two that they are relative to, sum p, and for each group sum p beta.
// Macros: UNITS, PLANES, WEIGHT_PLANES, VALUE_WORDS (of a warp, a page), KEY_GROUPS, VALUE_GROUPS, KEY_OFFSETS,
// VALUE_OFFSETS, SOFT_CAP, DEBIAS, ROW_TILES, BLOCKS (a multiprocessor), BUFFERS.
#include "weights.cuh"

#define SCALE_ROWS (KEY_SCALES + VALUE_SCALES)
#define ROUND_PIECES (KEY_PIECES + WARPS * VALUE_WORDS)
#define SCALE_BUFFERS (WARPS * VALUE_WORDS < RING ? 2 : 1)  // the next page's may come before this one's are done with

#if BLOCKS == 2
#define BOUNDS TWO_BLOCKS
#else
#define BOUNDS __launch_bounds__(WARPS * 32, 1)
#endif

extern "C" __global__ void BOUNDS
    attend(const u8* __restrict__ key_slab, const int* __restrict__ key_table, const u8* __restrict__ value_slab,
           const int* __restrict__ value_table,
           const Head* __restrict__ key_heads, const Head* __restrict__ value_heads, const int* __restrict__ unit_words,
           const u8* __restrict__ value_groups, const float* __restrict__ y, const float* __restrict__ noise,
           float* __restrict__ partials, float* __restrict__ sums, i64 page_first, i64 page_end, i64 split_pages, i64 first,
           i64 end, i64 rows, i64 y_stride, i64 y_extra, i64 width, float unit, float cap,
           float half_debias) {
    let_next_kernel_start();
    extern __shared__ __align__(128) u8 shared[];
    u8* pieces = shared;
    u8* scales = pieces + WARPS * RING * PIECE;
    u8* weights = scales + WARPS * SCALE_BUFFERS * SCALE_ROWS * 512;
    uint2* planes = (uint2*)(weights + BUFFERS * WARPS * WEIGHT_BYTES);
    float* constants = (float*)((u8*)planes + QUERY_PLANES_BYTES);
    float* stats = (float*)((u8*)constants + QUERY_CONSTANTS_BYTES);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y;
    const i64 row_first = (i64)blockIdx.z * ROWS;
    scales += warp * SCALE_BUFFERS * SCALE_ROWS * 512;
    const Ring ring(pieces + warp * RING * PIECE);
    const Head head = key_heads[h], value_head = value_heads[h];
    const int* units = unit_words + h * UNITS * 9;
    int buffer = 0;
    const int split_first = (int)(page_first + blockIdx.x * split_pages), last = (int)min(page_end, split_first + split_pages);

    // This warp's page of keys and the one of the next round; lane i has page i of the round's values. Past the end: any page.
    auto key_page = [&](int round) { return key_slab + (i64)key_table[min(round + warp, last - 1)] * 512; };
    auto value_entry = [&](int round) { return value_table[min(round + lane % WARPS, last - 1)]; };
    int round = split_first;
    const u8 *keys = key_page(round), *next_keys = key_page(round + WARPS);
    int values = value_entry(round), next_values = value_entry(round + WARPS);
    KeyWalk walk{keys, head, units};
    auto push_keys = [&](int number, int own, bool after) {
        if (own == 0) {
            const u8* page = (after ? next_keys : keys) + lane * 16;
            const u8* value_page = value_slab + (i64)__shfl_sync(ALL_LANES, after ? next_values : values, warp) * 512 + lane * 16;
            const u32 to = shared_address(scales + (SCALE_BUFFERS == 2 && buffer ^ after) * SCALE_ROWS * 512 + lane * 16);
            for (int s = 0; s < KEY_SCALES; s++)
                copy_async_or_zero(to + s * 512, page + (i64)(head.scale_start + s) * 512, head.stored);
            for (int s = 0; s < VALUE_SCALES; s++)
                copy_async_or_zero(to + (KEY_SCALES + s) * 512, value_page + (i64)(value_head.scale_start + s) * 512,
                                   value_head.stored);
        }
        walk.push(ring, number, after ? next_keys : keys, own % PASS_PIECES);
    };
    // Asks for piece `number` of the round or of the next one: the keys of this warp's page for every pass, then its words of
    // the values of all pages.
    auto push = [&](int number) {
        if (number < KEY_PIECES) {
            push_keys(number, number, false);
        } else if (number < ROUND_PIECES) {
            const int own = number - KEY_PIECES, word = warp * VALUE_WORDS + own % VALUE_WORDS;
            const u8* page = value_slab + (i64)__shfl_sync(ALL_LANES, values, own / VALUE_WORDS) * 512 + lane * 16;
            page += (i64)(value_head.word_start + word) * 1024;
            ring.push(number, lane * 16, page, page + 512, word < value_head.words);
        } else {
            push_keys(number, number - ROUND_PIECES, true);
        }
    };
    for (int i = 0; i < RING; i++) push(i);

    await_previous_kernel();
    prepare_queries(BitPlanes{planes}, constants, Queries{y + (i64)h * rows * y_stride, rows, row_first, y_stride, y_extra, unit, half_debias},
                    head, units, noise + h * y_extra);
    __syncthreads();

    Sums sum;
    sum.clear();
    for (; round < last; round += WARPS) {
        const i64 start = (i64)(round + warp) * PAGE;
        const int from = (int)max(0ll, min(first - start, (i64)PAGE));
        const int to = round + warp < last ? (int)min(end - start, (i64)PAGE) : 0;
        u8* round_weights = weights + (BUFFERS == 2 ? buffer : 0) * WARPS * WEIGHT_BYTES;
        float* round_stats = stats + (BUFFERS == 2 ? buffer : 0) * WARPS * ROWS * STATS;
        const u16* page_scales = (const u16*)(scales + (SCALE_BUFFERS == 2 ? buffer : 0) * SCALE_ROWS * 512);
#pragma unroll 1
        for (int tile = 0; tile < ROW_TILES; tile++) {
            PageLogits x;
            const int passed = REREAD ? 0 : tile * PASS_PIECES;
            page_logits(x, ring, planes + tile * UNITS * STEPS * 32, constants + tile * 4 * ROW_CONSTANTS, page_scales, units, cap,
                        tile == ROW_TILES - 1, [&](int number) { push(passed + number + RING); });
            weigh(x, page_scales + KEY_SCALES * PAGE, from, to, round_weights + warp * WEIGHT_BYTES + tile * WEIGHT_TILE,
                  round_stats + (warp * ROWS + tile * 4) * STATS);
        }
        __syncthreads();
        const int present = min(last - round, WARPS);
        sum.begin_round(round_stats, present);
#pragma unroll (VALUE_WORDS * ROW_TILES == 1 ? WARPS : 1)
        for (int i = 0; i < WARPS; i++) {
#pragma unroll
            for (int k = 0; k < VALUE_WORDS; k++) {
                const int number = KEY_PIECES + i * VALUE_WORDS + k;
                ring.await();
                const u32 at = ring.slot(number) + lane * 16;
                const uint4 a[2] = {load_shared_16(at), load_shared_16(at + PIECE / 2)};
                __syncwarp();
                push(number + RING);
                if (i < present && warp * VALUE_WORDS + k < value_head.words)
                    sum.add(k, a, round_weights + i * WEIGHT_BYTES, i,
                            VALUE_GROUPS == 1 ? 0 : value_groups[h * (width / 32) + warp * VALUE_WORDS + k]);
            }
        }
        if (BUFFERS == 1) __syncthreads();
        keys = next_keys;
        values = next_values;
        next_keys = key_page(round + 2 * WARPS);
        next_values = value_entry(round + 2 * WARPS);
        buffer ^= 1;
    }
    const i64 record = ((i64)h * gridDim.x + blockIdx.x) * rows + row_first;
    sum.store(partials + record * width, sums + record * SUMS, width, rows - row_first, value_head.words,
              value_groups + h * (width / 32));
}
