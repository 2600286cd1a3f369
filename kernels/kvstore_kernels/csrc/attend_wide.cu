// attend.cu's sums, bit for bit, for many query rows of a KV head on Hopper: as attend_many.cu, but with products of warpgroups,
// which run in the background and read queries and weights from shared memory. sm_90a.
//
// Grid and arguments: attend.cu's; ROWS rows in a block, which takes the pages of its split one after another, all warps one page.
// The sketch's bits become the bytes of A operands in registers. Warp w scores tokens 32 c + 4 w + t, c < 8, t < 4, lane (g, t)
// those of chunks g % 4 and + 4 and of the pair g / 4, for query rows 2 t, 2 t + 1, 2 t + 8, ..; the rows' largest logit and weight
// are found among the warps. The weights are left in shared memory as bytes, of which 256 tokens' bits of values are summed; warp w
// has VALUE_WORDS times 32 rows of these. Keys are copied by all threads, which brings words into other banks, the rest by one.
//
// Macros: attend.cu's without BUFFERS, for one scale a key and a value and no offsets; WARPGROUPS; ROW_TILES 4 or 8; STAGES pages in
// shared memory, three or more.
// One H100, 32 rows, 1,048,576 tokens of 8 heads of 256 bits, a whole attention: attend_many.cu 636 us; v1, copies asked for before
// the fence that products need, which waits for them, 577 us; v2, after it, 558 to 573 us. Tried: barriers that begin before they
// end instead of three a page 584 us; two a page, a page's values added while the next one is weighed, 569 us; eight products a
// group instead of four the same; copies and sums of weights behind products with scales read as halves the same; with 12 planes
// upper and lower bits in one accumulator 665 us instead of 628. Without any products it is 445 us: the rest is the softmax, bound
// by waits for its own results.
#include "attend_wide.cuh"
#include "bulk.cuh"

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    attend_wide(const u8* __restrict__ key_slab, const int* __restrict__ key_table, const u8* __restrict__ value_slab,
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

    // Where in a page lies what this thread asks for of keys, the chunk `warp` of words t and t + 4 of each unit (any other if a
    // level reads no such word); -1 if there is nothing. One thread asks for all else.
    u64* arrivals = (u64*)((u8*)room.unit + ROOM_BYTES);
    int* places = (int*)(arrivals + 4) + threadIdx.x;
    {
        const Head head = heads[0];
        const KeyWalk walk{nullptr, head, nullptr};
        for (int i = 0; i < 2 * UNITS; i++) {
            const int at = (int)((i64)walk.word_at((const u8*)0, warp, i * 4 + lane / 8)) + head.word_start * 1024 + lane % 8 * 16;
            places[i * WARPS * 32] = head.words ? at : -1;
        }
    }
    if (threadIdx.x < STAGES) begin_arrival(shared_address(arrivals + threadIdx.x));
    show_to_products();
    __syncthreads();
    auto push = [&](int slot, int key_entry, int value_entry, bool present) {
        const u8 *key_page = key_slab + (i64)key_entry * 512, *value_page = value_slab + (i64)value_entry * 512;
        u8* stage = stages + slot * STAGE;
        const u32 to = shared_address(stage) + warp * PIECE + lane / 8 * 128 + ((lane & 7) ^ (lane / 8 | (warp & 1) << 2)) * 16;
#pragma unroll
        for (int i = 0; i < 2 * UNITS; i++) {
            const int at = places[i * WARPS * 32];
            if (at >= 0) copy_async(to + i / 2 * CHUNKS * PIECE + i % 2 * (PIECE / 2), key_page + at);
        }
        close_copies();
        if (threadIdx.x == WARPS * 32 - 32 && present) {
            const u32 arrival = shared_address(arrivals + slot), own = shared_address(stage + KEY_BYTES), scales = shared_address(stage + STAGE - 2 * 512);
            const Head head = heads[0], value_head = heads[1];
            announce(arrival, value_head.words * 1024 + (head.stored ? 512 : 0) + (value_head.stored ? 512 : 0));
            if (head.stored) copy_bulk(scales, key_page + (i64)head.scale_start * 512, 512, arrival);
            if (value_head.stored) copy_bulk(scales + 512, value_page + (i64)value_head.scale_start * 512, 512, arrival);
            if (value_head.words) copy_bulk(own, value_page + (i64)value_head.word_start * 1024, value_head.words * 1024, arrival);
        }
    };
    // A warp that reads what has come by one thread's hand.
    auto await_page = [&](int number) { await_arrival(shared_address(arrivals + number % STAGES), number / STAGES & 1); };
    auto key_entry = [&](int page) { return key_table[min(page, last - 1)]; };
    auto value_entry = [&](int page) { return value_table[min(page, last - 1)]; };
#pragma unroll
    for (int i = 0; i < STAGES - 1; i++) push(i, key_entry(split_first + i), value_entry(split_first + i), split_first + i < last);
    int next_key = key_entry(split_first + STAGES - 1), next_value = value_entry(split_first + STAGES - 1);
    Found(found_both).clear();
    Found(found_both + FOUND_BYTES).clear();

    await_previous_kernel();
    prepare_queries(QueryColumns{queries}, constants,
                    Queries{y + (i64)h * rows * y_stride, rows, row_first, y_stride, y_extra, unit, half_debias}, heads[0], nullptr,
                    noise + h * y_extra);
    await_copies<STAGES - 2>();
    __syncthreads();
    if (threadIdx.x < ROWS) {
        const float* own = constants + threadIdx.x * ROW_CONSTANTS;
        row_constants[threadIdx.x] = {own[0], -own[SLOPE(0)], own[SHIFT(0)], own[SPREAD(0)]};
    }
    if (warp < 2) {
        await_page(0);
        convert_scales(alphas_of_page, stages + STAGE - 2 * 512, heads, warp);
    }
    show_to_products();
    __syncthreads();

    const Choices choices;
    const u64 query_columns = columns_at<QUERY_COLUMNS>(shared_address(queries)), weight_columns = columns_at<WEIGHT_COLUMNS>(shared_address(weights));
    WideSums sum;
    sum.clear();
    int slot = 0;  // of the page's stage
#pragma unroll 1
    for (int page = split_first; page < last; page++, slot = slot == STAGES - 1 ? 0 : slot + 1) {
        const int number = page - split_first, of_round = number % 8;
        const Found found(found_both + number / 8 % 2 * FOUND_BYTES), other(found_both + (number / 8 + 1) % 2 * FOUND_BYTES);
        const u8* stage = stages + slot * STAGE;
        Logits x;
        float found_of[OWN];
        score_page(x, choices, stage, query_columns, row_constants, alphas_of_page, cap);
        if (page == page_first || page == page_end - 1) {
            const i64 start = (i64)page * PAGE;
            const int from = (int)max(0ll, first - start), to = (int)min(end - start, (i64)PAGE), thread = thread_here();
#pragma unroll
            for (int i = 0; i < 4 * OWN; i++) {
                const int c = i / OWN / 2, j = i / OWN % 2, token = 32 * ((thread >> 2 & 3) + 4 * c) + 4 * (thread >> 5) + 2 * (thread >> 4 & 1) + j;
                x[c][j][i % OWN] = in_range(token, from, to) ? x[c][j][i % OWN] : LOWEST;
            }
        }
        const auto larger = [](float a, float b) { return fmaxf(a, b); };
#pragma unroll
        for (int i = 0; i < OWN; i++) found_of[i] = fmaxf(fmaxf(x[0][0][i], x[0][1][i]), fmaxf(x[1][0][i], x[1][1][i]));
        const float top = fmaxf(join_lanes(found_of, larger), LOWEST / 2);  // above LOWEST: no token weighs 0
        const int thread = thread_here(), own_slot = (thread & 3) * OWN + (thread >> 2) % OWN, mine = of_round * ROWS + own_slot;
        if (g < OWN) atomicMax(found.top + mine, ordered(ceilf(top)));
        if (number) sum_weights((of_round ? found : other).weight + (of_round + 7) % 8 * ROWS, weights);  // of the page before
        __syncthreads();
        const float4 alphas = load_alphas(alphas_of_page + PAGE);
        float totals_of[OWN];
        const float own_top = found.page_top(of_round, own_slot);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float page_top = of_row(own_top, i);
#pragma unroll
            for (int n = 0; n < 4; n++) x[n / 2][n % 2][i] = exp2_fast(x[n / 2][n % 2][i] - page_top);
            totals_of[i] = (x[0][0][i] + x[1][0][i]) + (x[0][1][i] + x[1][1][i]);
            x[0][0][i] *= alphas.x;
            x[0][1][i] *= alphas.y;
            x[1][0][i] *= alphas.z;
            x[1][1][i] *= alphas.w;
            found_of[i] = largest_of(x[0][0][i], x[0][1][i], x[1][0][i], x[1][1][i]);
        }
        const float total = join_lanes(totals_of, [](float a, float b) { return a + b; }), most = join_lanes(found_of, larger);
        if (g < OWN) {
            found.totals[mine * WARPS + warp] = total;
            atomicMax(found.most + mine, __float_as_int(most));
        }
        __syncthreads();
        if (of_round == 0 && number) take_round(other, totals, 8);
        const float inverse = weights_a_unit(__int_as_float(found.most[mine]));
        // Of step 4 (warp % 2) + g % 4, the half g / 4 and the bytes of lanes t = warp / 2.
        u8* const words = weights + ((warp & 1) * 4 + (g & 3)) * COLUMN_BYTES(WEIGHT_COLUMNS) + in_columns(HALF_BYTES(WEIGHT_COLUMNS), 2 * t, g >> 2, warp >> 1);
#pragma unroll
        for (int i = 0; i < OWN; i++) {
            const float scale = of_row(inverse, i);
            u32 w[4];
#pragma unroll
            for (int n = 0; n < 4; n++) w[n] = __float_as_uint(fmaf(x[n % 2][n / 2][i], scale, OFFSET));
            u8* at = words + (i >> 1) * 128 + (i & 1) * 16;
            *(u32*)at = bytes_at(w, 0);
            if (WEIGHT_HALVES > 1) *(u32*)(at + ROWS / 8 * 128) = bytes_at(w, 1);
        }
        if (warp == 0) room.make(found, of_round);
        await_copies<STAGES - 3>();  // the next page is there
        if ((warp == 1 || warp == 2) && page + 1 < last) {
            await_page(number + 1);
            convert_scales(alphas_of_page, stages + (slot == STAGES - 1 ? 0 : slot + 1) * STAGE + STAGE - 2 * 512, heads, warp - 1);
        }
        show_to_products();
        __syncthreads();
        // All warps are done with the page before. Not earlier: the fence would wait for these copies.
        push(slot ? slot - 1 : STAGES - 1, next_key, next_value, page + STAGES - 1 < last);
        next_key = key_entry(page + STAGES);
        next_value = value_entry(page + STAGES);
        if (of_round == 0) other.clear();
        if (*room.grows) {
            float factor[OWN];
            load_own(factor, room.factor);
            sum.scale(factor);
        }
#pragma unroll
        for (int k = 0; k < VALUE_WORDS; k++) sum.add(k, choices, stage + KEY_BYTES, weight_columns, room.unit);
    }
    const int done = last - split_first;
    const Found found(found_both + (done - 1) / 8 % 2 * FOUND_BYTES);
    sum_weights(found.weight + (done - 1) % 8 * ROWS, weights);
    __syncthreads();
    take_round(found, totals, (done - 1) % 8 + 1);
    __syncthreads();
    const i64 record = ((i64)h * gridDim.x + blockIdx.x) * rows + row_first, present = rows - row_first;
    sum.store(partials + record * width, totals, width, present, heads[1].words);
    if (threadIdx.x < ROWS && row_of_slot(threadIdx.x) < present) totals[threadIdx.x].store(sums + (record + row_of_slot(threadIdx.x)) * SUMS);
}
