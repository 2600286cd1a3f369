// attend.cu's sums, bit for bit, for many query rows of a KV head: on integer tensor cores, whose products take sixteen rows
// at once. Bits become bytes 0 and -1 in registers on their way there, once for all rows of the block.
//
// Grid and arguments: attend.cu's; ROWS rows in blocks of 16. A block takes the pages of its split one after another, all
// warps one page. Warp w scores tokens 32 c + 4 w + t, c < 8, t < 4, against all rows, so that lane (g, t) has the logits of
// eight of these tokens for rows g, g + 8, ..; the rows' largest logit and weight are found among the warps. The weights are left in
// shared memory as bytes, A operand of products with 256 tokens' bits of values, of which warp w has VALUE_WORDS times 32 rows.
//
// Macros: attend.cu's without BUFFERS, for one scale a key and a value and no offsets; ROW_TILES 4 or 8; STAGES pages in shared
// memory. Sums over all units must stay below 2^22.
// One H100, 32 rows, 1,048,576 tokens of 8 heads of 256 bits: attend.cu 1,103 us; v1, this with a mask for each bit, 722 us; v2,
// scales, places and units made once for all warps, 675 us; v3, a nibble of the sketch choosing the byte, 652 us; v4, weights stored four
// at once and splits merged once, 636 us. attend_wide.cu is for Hopper.
#include "attend_many.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    attend_many(const u8* __restrict__ key_slab, const int* __restrict__ key_table, const u8* __restrict__ value_slab,
                const int* __restrict__ value_table, const Head* __restrict__ key_heads, const Head* __restrict__ value_heads,
                const int* __restrict__ unit_words, const u8* __restrict__ value_groups, const float* __restrict__ y,
                const float* __restrict__ noise, float* __restrict__ partials, float* __restrict__ sums, i64 page_first,
                i64 page_end, i64 split_pages, i64 first, i64 end, i64 rows, i64 y_stride, i64 y_extra, i64 width, float unit,
                float cap, float half_debias) {
    let_next_kernel_start();
    extern __shared__ __align__(128) u8 shared[];
    u8* stages = shared;
    u8* queries = stages + STAGES * STAGE;
    u8* weights = queries + QUERY_BYTES;
    u8* found_both = weights + ALL_WEIGHTS;
    float* constants = (float*)(found_both + 2 * FOUND_BYTES);
    Totals* totals = (Totals*)(constants + ROWS * ROW_CONSTANTS);  // of each row: registers are short
    Head* heads = (Head*)(totals + ROWS);
    float4* row_constants = (float4*)(heads + 2);  // constant, slope of a sum as score_page has it, shift, spread
    float* alphas_of_page = (float*)(row_constants + ROWS);
    const Room room((u8*)(alphas_of_page + 2 * PAGE));
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, h = blockIdx.y;
    const i64 row_first = (i64)blockIdx.z * ROWS;
    const int split_first = (int)(page_first + blockIdx.x * split_pages), last = (int)min(page_end, split_first + split_pages);

    if (threadIdx.x < ROWS) {
        totals[threadIdx.x].clear();
        room.top[threadIdx.x] = LOWEST;
    }
    if (threadIdx.x < 2) heads[threadIdx.x] = (threadIdx.x ? value_heads : key_heads)[h];
    __syncthreads();

    // Where in a page lies what this thread asks for: of keys the chunk `warp` of words t and t + 4 of each unit (any other if a
    // level reads no such word), the warp's words of values, in the first two warps scales; -1 if there is nothing.
    int* places = (int*)((u8*)room.unit + ROOM_BYTES) + threadIdx.x;
    {
        const Head head = heads[0], value_head = heads[1];
        const KeyWalk walk{nullptr, head, nullptr};
        for (int i = 0; i < 2 * UNITS; i++) {
            const int at = (int)((i64)walk.word_at((const u8*)0, warp, i * 4 + lane / 8)) + head.word_start * 1024 + lane % 8 * 16;
            places[i * WARPS * 32] = head.words ? at : -1;
        }
        for (int k = 0; k < VALUE_WORDS; k++) {
            const int word = warp * VALUE_WORDS + k;
            places[(2 * UNITS + k) * WARPS * 32] = word < value_head.words ? (value_head.word_start + word) * 1024 + lane * 16 : -1;
        }
        const Head scaled = heads[warp & 1];
        places[(2 * UNITS + VALUE_WORDS) * WARPS * 32] = warp < 2 && scaled.stored ? scaled.scale_start * 512 + lane * 16 : -1;
    }
    auto push = [&](u8* stage, int key_entry, int value_entry) {
        const u8 *key_page = key_slab + (i64)key_entry * 512, *value_page = value_slab + (i64)value_entry * 512;
        const u32 to = shared_address(stage) + warp * PIECE + lane / 8 * 128 + ((lane & 7) ^ (lane / 8 | (warp & 1) << 2)) * 16;
        const u32 own = shared_address(stage + KEY_BYTES) + warp * VALUE_WORDS * PIECE + lane * 16;
#pragma unroll
        for (int i = 0; i < 2 * UNITS; i++) {
            const int at = places[i * WARPS * 32];
            if (at >= 0) copy_async(to + i / 2 * CHUNKS * PIECE + i % 2 * (PIECE / 2), key_page + at);
        }
#pragma unroll
        for (int k = 0; k < VALUE_WORDS; k++) {
            const int at = places[(2 * UNITS + k) * WARPS * 32];
            if (at < 0) continue;
            copy_async(own + k * PIECE, value_page + at);
            copy_async(own + k * PIECE + PIECE / 2, value_page + at + PIECE / 2);
        }
        if (warp < 2) {
            const int at = places[(2 * UNITS + VALUE_WORDS) * WARPS * 32];
            if (at >= 0) copy_async(shared_address(stage + STAGE - 2 * 512) + threadIdx.x * 16, (warp ? value_page : key_page) + at);
        }
        close_copies();
    };
    auto key_entry = [&](int page) { return key_table[min(page, last - 1)]; };
    auto value_entry = [&](int page) { return value_table[min(page, last - 1)]; };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) push(stages + i * STAGE, key_entry(split_first + i), value_entry(split_first + i));
    int next_key = key_entry(split_first + STAGES - 1), next_value = value_entry(split_first + STAGES - 1);
    Found(found_both).clear();
    Found(found_both + FOUND_BYTES).clear();

    await_previous_kernel();
    prepare_queries(QueryBytes{queries}, constants,
                    Queries{y + (i64)h * rows * y_stride, rows, row_first, y_stride, y_extra, unit, half_debias}, heads[0], nullptr,
                    noise + h * y_extra);
    await_copies<STAGES - 2>();
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const float* own = constants + threadIdx.x * ROW_CONSTANTS;
        row_constants[threadIdx.x] = {own[0], -own[SLOPE(0)], own[SHIFT(0)], own[SPREAD(0)]};
    }
    convert_scales(alphas_of_page, stages + STAGE - 2 * 512, heads);
    __syncthreads();

    ManySums sum;
    sum.clear();
    int slot = 0;  // of the page's stage
#pragma unroll 1
    for (int page = split_first; page < last; page++, slot = slot == STAGES - 1 ? 0 : slot + 1) {
        const int number = page - split_first, of_round = number % 8;
        const Found found(found_both + number / 8 % 2 * FOUND_BYTES);
        const u8* stage = stages + slot * STAGE;
        Logits x;
        float found_of[OWN];
        score_page(x, stage, queries, row_constants, alphas_of_page, cap);
        if (page == page_first || page == page_end - 1) {
            const i64 start = (i64)page * PAGE;
            const int from = (int)max(0ll, first - start), to = (int)min(end - start, (i64)PAGE);
#pragma unroll
            for (int i = 0; i < OWN * CHUNKS; i++)
                x[i / CHUNKS][i % CHUNKS] = in_range(token_at(i % CHUNKS), from, to) ? x[i / CHUNKS][i % CHUNKS] : LOWEST;
        }
        const int mine = of_round * ROWS + row_of(t);
        const auto larger = [](float a, float b) { return fmaxf(a, b); };
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            found_of[i] = LOWEST / 2;  // above LOWEST: no token weighs 0
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) found_of[i] = fmaxf(found_of[i], x[i][c]);
        }
        const float top = join_lanes(found_of, larger);
        if (t < OWN) atomicMax(found.top + mine, ordered(ceilf(top)));
        __syncthreads();
        // All warps are done with the page before.
        push(stages + (slot ? slot - 1 : STAGES - 1) * STAGE, next_key, next_value);
        next_key = key_entry(page + STAGES);
        next_value = value_entry(page + STAGES);
        if (of_round == 0) Found(found_both + (number / 8 + 1) % 2 * FOUND_BYTES).clear();
        float alphas[CHUNKS];
        load_alphas(alphas, alphas_of_page + PAGE);
        float totals_of[OWN];
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float page_top = found.page_top(of_round, row_of(i));
            found_of[i] = 0;
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) x[i][c] = exp2_fast(x[i][c] - page_top);
            totals_of[i] = ((x[i][0] + x[i][2]) + (x[i][4] + x[i][6])) + ((x[i][1] + x[i][3]) + (x[i][5] + x[i][7]));
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                x[i][c] *= alphas[c];
                found_of[i] = fmaxf(found_of[i], x[i][c]);
            }
        }
        const float total = join_lanes(totals_of, [](float a, float b) { return a + b; }), most = join_lanes(found_of, larger);
        if (t < OWN) {
            found.totals[mine * WARPS + warp] = total;
            atomicMax(found.most + mine, __float_as_int(most));
        }
        __syncthreads();
        const float largest = t < OWN ? __int_as_float(found.most[mine]) : 0;
        const float inverse = weights_a_unit(largest);
        u32 weights_of[OWN];
        u8* const words = weights + ((warp & 1) * 4 + (t & 1) * 2) * ROW_BLOCKS * FRAGMENT + (g * 4 + (warp >> 1 ^ g >> 1)) * 16 + (t >> 1) * 8;
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float scale = __shfl_sync(ALL_LANES, inverse, (lane & 28) + i);
            weights_of[i] = 0;
#pragma unroll
            for (int odd = 0; odd < 2; odd++) {
                u32 w[4];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    w[n] = __float_as_uint(fmaf(x[i][2 * n + odd], scale, OFFSET));
                    weights_of[i] += w[n];
                }
                u8* at = words + (odd * ROW_BLOCKS + (i >> 1)) * FRAGMENT + (i & 1) * 4;
                *(u32*)at = bytes_at(w, 0);
                if (WEIGHT_HALVES > 1) *(u32*)(at + CHUNKS * ROW_BLOCKS * FRAGMENT) = bytes_at(w, 1);
            }
        }
        const u32 weight = join_lanes(weights_of, [](u32 a, u32 b) { return a + b; });
        if (t < OWN) atomicAdd(found.weight + mine, (int)(weight - PAGE / WARPS * (u32)FLOATING));
        if (warp == 0) room.make(found, of_round);
        await_copies<STAGES - 2>();  // the next page is there
        convert_scales(alphas_of_page, stages + (slot == STAGES - 1 ? 0 : slot + 1) * STAGE + STAGE - 2 * 512, heads);
        __syncthreads();
        if (warp < ROW_TILES && (of_round == 7 || page == last - 1)) {
            float stats[STATS], unused[1];
            found.stats(stats, min(g, of_round), 4 * warp + t);
            Totals own = totals[4 * warp + t];
            __syncwarp();
            own.take(stats, g <= of_round, unused);
            if (g == 0) totals[4 * warp + t] = own;
        }
        float units[OWN];
        if (*room.grows) {
            load_own(units, room.factor);
            sum.scale(units);
        }
        load_own(units, room.unit);
#pragma unroll
        for (int k = 0; k < VALUE_WORDS; k++)
            if (warp * VALUE_WORDS + k < heads[1].words) sum.add(k, stage + KEY_BYTES + (warp * VALUE_WORDS + k) * PIECE, weights, units);
    }
    __syncthreads();
    const i64 record = ((i64)h * gridDim.x + blockIdx.x) * rows + row_first, present = rows - row_first;
    sum.store(partials + record * width, totals, width, present, heads[1].words);
    if (threadIdx.x < ROWS && threadIdx.x < present) totals[threadIdx.x].store(sums + (record + threadIdx.x) * SUMS);
}
