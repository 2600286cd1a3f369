// The parts of attend_wide.cu.
#pragma once
#include "weights.cuh"
#include "wgmma.cuh"

#define OWN (ROWS / 4)  // rows of a lane: 8 (i / 2) + 2 t + i % 2, i < OWN
#define LOW_BITS (PLANES - 8)  // of a query's integers, in bytes of their own
#define HALVES (LOW_BITS ? 2 : 1)
#define WEIGHT_HALVES (WEIGHT_PLANES > 8 ? 2 : 1)
#define QUERY_COLUMNS (HALVES * ROWS)
#define WEIGHT_COLUMNS (WEIGHT_HALVES * ROWS)
#define QUERY_BYTES (UNITS * 8 * COLUMN_BYTES(QUERY_COLUMNS))
#define ALL_WEIGHTS (8 * COLUMN_BYTES(WEIGHT_COLUMNS))
#define KEY_BYTES (UNITS * CHUNKS * PIECE)
#define STAGE (KEY_BYTES + WARPS * VALUE_WORDS * PIECE + 2 * 512)
#define ROUND (8 * ROWS)  // a page's number for each row and page of a round

// Bits 4 b + step % 4 of the half step / 4 of a word as bytes b, -1 or 0: a nibble chooses among eight bytes, by all of its bits
// but the highest, which extends the sign of what is chosen.
struct Choices {
    u32 by_lowest, by_second;

    // In registers once: constants that the compiler knows it would load for each choice. No multiprocessor has such a number.
    __device__ __forceinline__ Choices() {
        u32 nothing;
        asm volatile("{.reg .u32 n; mov.u32 n,%%smid; shr.u32 %0,n,20;}" : "=r"(nothing));
        by_lowest = nothing | 0xff00ff00;
        by_second = nothing | 0xffff0000;
    }

    __device__ __forceinline__ u32 bytes_of(u32 word, int step) const {
        const u32 nibbles = word >> ((step >> 2) * 16 + ((step & 3) == 3 ? 3 : 0));
        if ((step & 3) == 2) return select_bytes(0, 0xffffffff, nibbles);
        return (step & 3) == 1 ? select_bytes(by_second, by_second, nibbles) : select_bytes(by_lowest, by_lowest, nibbles);
    }
};

// Four words as A operands of four steps.
struct Bytes {
    uint4 steps[4];

    __device__ __forceinline__ Bytes(const Choices& choices, uint4 words, int part) {
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const int step = part * 4 + i;
            steps[i] = {choices.bytes_of(words.x, step), choices.bytes_of(words.y, step), choices.bytes_of(words.z, step), choices.bytes_of(words.w, step)};
        }
    }
};

// Integers in the order of floats.
__device__ __forceinline__ int ordered(float v) {
    const int bits = __float_as_int(v);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ __forceinline__ float from_ordered(int v) { return __int_as_float(v < 0 ? v ^ 0x7fffffff : v); }

// threadIdx.x, read where this stands: what is made of it takes no register through a loop.
__device__ __forceinline__ int thread_here() {
    int thread;
    asm volatile("mov.u32 %0,%%tid.x;" : "=r"(thread));
    return thread;
}

// A lane's rows have neighbouring slots.
__device__ __forceinline__ int row_of(int t, int i) { return 8 * (i >> 1) + 2 * t + (i & 1); }
__device__ __forceinline__ int row_of_slot(int slot) { return row_of(slot / OWN, slot % OWN); }

// Byte of a B of `columns` columns: byte `byte` of the four that lanes t read of it.
__device__ __forceinline__ int in_columns(int half_bytes, int column, int half, int t) {
    return half * half_bytes + (column >> 3) * 128 + (column & 7) * 16 + t * 4;
}

// Query rows as columns, [UNITS][8 steps of bytes_of]; low bits follow the rows.
struct QueryColumns {
    u8* columns;

    template <int COUNT>
    __device__ __forceinline__ void put(int row, int unit, int first, const int (&integers)[COUNT]) const {
        const int bit = threadIdx.x & 31, step = bit / 16 * 4 + bit % 4, byte = bit / 4 % 4;
        u8* step_columns = columns + (unit * 8 + step) * COLUMN_BYTES(QUERY_COLUMNS) + byte;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int slot = first + i;
            u8* at = step_columns + in_columns(HALF_BYTES(QUERY_COLUMNS), row, slot >> 2, slot & 3);
            at[0] = (u8)(integers[i] >> LOW_BITS);
            if (LOW_BITS) at[ROWS * 16] = (u8)(integers[i] & ((1 << LOW_BITS) - 1));
        }
    }
};

// What the warps find of each row on each page of a round: the largest logit, rounded up, the largest weight, the sum of weights
// in units of it, and of p for each warp's tokens.
struct Found {
    int *top, *most;  // [8][ROWS slots]
    int* weight;      // [8][ROWS]
    float* totals;    // [8][ROWS slots][WARPS]

    __device__ __forceinline__ explicit Found(u8* shared) : top((int*)shared), most(top + ROUND), weight(most + ROUND), totals((float*)(weight + ROUND)) {}

    __device__ __forceinline__ void clear() const {
        for (int i = thread_here(); i < ROUND; i += WARPS * 32) {
            top[i] = 1 << 31;
            most[i] = weight[i] = 0;
        }
    }

    __device__ __forceinline__ float page_top(int page, int slot) const { return from_ordered(top[page * ROWS + slot]); }

    // The value of one weight.
    __device__ __forceinline__ float unit(int page, int slot) const { return __int_as_float(most[page * ROWS + slot]) * (1.0f / WEIGHT_MOST); }

    // What attend.cu calls stats, of one page and row.
    __device__ __forceinline__ void stats(float (&out)[STATS], int page, int slot) const {
        const int i = page * ROWS + slot;
        const float4 a = *(const float4*)(totals + i * WARPS), b = *(const float4*)(totals + i * WARPS + 4);
        out[TOP] = page_top(page, slot);
        out[TOTAL] = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        out[UNIT(0)] = unit(page, slot);
        out[WEIGHT(0)] = (float)(u32)weight[page * ROWS + row_of_slot(slot)];
    }
};
#define FOUND_BYTES (ROUND * 4 * (3 + WARPS))

// Of the OWN rows that eight lanes g have in common, joined over them: lane g % OWN gets row g's. Lanes g and g ^ 1 are joined
// first.
template <class Join>
__device__ __forceinline__ float join_lanes(const float (&v)[OWN], Join join) {
    float left[OWN];
#pragma unroll
    for (int i = 0; i < OWN; i++) left[i] = v[i];
#pragma unroll
    for (int level = 0; level < 3; level++) {
        const int count = OWN >> level;
        const bool upper = threadIdx.x >> 2 + level & 1;
        if (count > 1) {
#pragma unroll
            for (int i = 0; i < count / 2; i++)
                left[i] = join(upper ? left[2 * i + 1] : left[2 * i], __shfl_xor_sync(ALL_LANES, upper ? left[2 * i] : left[2 * i + 1], 4 << level));
        } else {
            left[0] = join(left[0], __shfl_xor_sync(ALL_LANES, left[0], 4 << level));
        }
    }
    return left[0];
}

// What lane (i, t) has: its own row's, for lanes (g, t).
__device__ __forceinline__ float of_row(float v, int i) {
    float out;
    asm volatile("shfl.sync.idx.b32 %0,%1,%2,0x31f,0xffffffff;" : "=f"(out) : "f"(v), "r"(i * 4));  // t stays
    return out;
}

// This lane's logits, of rows row_of(t, i) and tokens 32 (g % 4 + 4 c) + 4 warp + 2 (g / 4) + j, at [c][i + OWN j]
typedef float Logits[2][2][OWN];

// The scales of a page's keys and of its values as floats, [WARPS][8 g][2 c][2 j] each, by a warp those of one.
__device__ __forceinline__ void convert_scales(float* alphas, const u8* halves, const Head* heads, int of_values) {
    const int lane = thread_here() & 31;
    const uint4 pairs = *(const uint4*)(halves + of_values * 512 + lane * 16);
    const u32 own[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    const bool stored = heads[of_values].stored;
    alphas += of_values * PAGE + (lane & 3) * 64 + (lane >> 2 & 3) * 4 + (lane >> 4) * 2;
#pragma unroll
    for (int i = 0; i < 4; i++) {
        const u32 pair = of_values ? clamp_halves(own[i]) : own[i];
        *(float2*)(alphas + (i >> 1) * 32 + (i & 1) * 16) = stored ? make_float2(low_half(pair), high_half(pair)) : make_float2(0, 0);
    }
}

__device__ __forceinline__ float4 load_alphas(const float* alphas) {
    return ((const float4*)alphas)[(threadIdx.x >> 5) * 8 + (threadIdx.x >> 2 & 7)];
}

// Of numbers that are not negative, as integers, whose largest of three is one instruction.
__device__ __forceinline__ float largest_of(float a, float b, float c, float d) {
    return __int_as_float(max(max(max(__float_as_int(a), __float_as_int(b)), __float_as_int(c)), __float_as_int(d)));
}

__device__ __forceinline__ void score_page(Logits& x, const Choices& choices, const u8* keys, u64 queries, const float4* rows, const float* key_alphas, float cap) {
    const int thread = thread_here(), lane = thread & 31, warp = thread >> 5, t = lane & 3, chunk = lane >> 2 & 3;
    const u8* from = keys + chunk * PIECE + t * 128 + (warp ^ (t | (chunk & 1) << 2)) * 16 + (lane >> 4) * 4;
    const int first = (warp >> 1 & 1) * 8;  // of its four tokens' second and third, of which this lane has one each
    int sums[2][QUERY_COLUMNS / 2];
#pragma unroll
    for (int c = 0; c < 2; c++) {
#pragma unroll
        for (int u = 0; u < UNITS; u++) {
            const u8* unit = from + (u * CHUNKS + 4 * c) * PIECE;
            const uint4 words = {*(const u32*)(unit + first), *(const u32*)(unit + (first ^ 8)), *(const u32*)(unit + PIECE / 2 + first),
                                 *(const u32*)(unit + PIECE / 2 + (first ^ 8))};
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (LOW_BITS ? c + u + part : c + u) await_products<LOW_BITS == 0>();  // its registers take these bytes
                const Bytes a(choices, words, part);
                begin_products();
#pragma unroll
                for (int i = 0; i < 4; i++)
                    product_signed(sums[c], a.steps[i], queries + (u * 8 + part * 4 + i) * (COLUMN_BYTES(QUERY_COLUMNS) >> 4), !(u || part || i));
                close_products();
            }
        }
        if (!LOW_BITS) continue;
        await_products<0>(sums[c]);
#pragma unroll
        for (int i = 0; i < 2 * OWN; i++) sums[c][i] = (sums[c][i] << LOW_BITS) + sums[c][i + (HALVES - 1) * 2 * OWN];
    }
    if (!LOW_BITS) {
        await_products<0>(sums[0]);
        await_products<0>(sums[1]);
    }
    const float4 of_tokens = load_alphas(key_alphas);
    const float alphas[4] = {of_tokens.x, of_tokens.y, of_tokens.z, of_tokens.w};
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const float4 row = rows[row_of(t, i)];
#pragma unroll
        for (int n = 0; n < 4; n++) {
            float inner = fmaf(row.y, (float)sums[n / 2][(i >> 1) * 4 + n % 2 * 2 + (i & 1)], row.z);
            if (DEBIAS) inner = fmaf(alphas[n], row.w, inner);
            const float logit = fmaf(alphas[n], inner, row.x);
            x[n / 2][n % 2][i] = SOFT_CAP ? capped(logit, cap) : logit;
        }
    }
}

// What a page needs to be added to sums that are relative to another power of two; one thread a row keeps it.
struct Room {
    float *unit, *factor, *top;  // [ROWS slots]: what one weight counts and what sums so far have to be multiplied by
    int* grows;                  // whether any factor is not 1

    __device__ __forceinline__ explicit Room(u8* shared) : unit((float*)shared), factor(unit + ROWS), top(factor + ROWS), grows((int*)(top + ROWS)) {}

    // By the first warp.
    __device__ __forceinline__ void make(const Found& found, int page) const {
        const int slot = thread_here();
        bool grew = false;
        if (slot < ROWS) {
            const float page_top = found.page_top(page, slot), highest = fmaxf(top[slot], page_top), own = exp2_fast(top[slot] - highest);
            unit[slot] = -found.unit(page, slot) * exp2_fast(page_top - highest);  // products are with -1
            factor[slot] = own;
            top[slot] = highest;
            grew = own != 1;
        }
        grew = __any_sync(ALL_LANES, grew);
        if (slot == 0) *grows = grew;
    }
};
#define ROOM_BYTES (ROWS * 12 + 16)

template <class T>
__device__ __forceinline__ void load_own(T (&v)[OWN], const T* slots) {
    const int4* from = (const int4*)(slots + (threadIdx.x & 3) * OWN);
#pragma unroll
    for (int i = 0; i < OWN / 4; i++) *(int4*)(v + 4 * i) = from[i];
}

// A warp's sums over its value rows: of the lane's query rows, and of value rows g, g + 8, .. of 32.
struct WideSums {
    float rows[VALUE_WORDS][2][2][OWN];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < VALUE_WORDS * 4 * OWN; i++) rows[i / (4 * OWN)][i / (2 * OWN) % 2][i / OWN % 2][i % OWN] = 0;
    }

    __device__ __forceinline__ void scale(const float (&factor)[OWN]) {
#pragma unroll
        for (int i = 0; i < VALUE_WORDS * 4 * OWN; i++) rows[i / (4 * OWN)][i / (2 * OWN) % 2][i / OWN % 2][i % OWN] *= factor[i % OWN];
    }

    // Adds word k of this warp's; the page's values are at `values`.
    __device__ __forceinline__ void add(int k, const Choices& choices, const u8* values, u64 weights, const float* units) {
        int sums[2][WEIGHT_COLUMNS / 2];
        const int thread = thread_here();
        values += ((thread >> 5) * VALUE_WORDS + k) * PIECE + (thread & 31) * 16;
#pragma unroll
        for (int half = 0; half < 2; half++) {
            const uint4 words = *(const uint4*)(values + half * (PIECE / 2));
#pragma unroll
            for (int part = 0; part < 2; part++) {
                if (half) await_products<WEIGHT_HALVES == 1>();  // its registers take these bytes
                const Bytes a(choices, words, part);
                begin_products();
#pragma unroll
                for (int i = 0; i < 4; i++)
                    product_unsigned(sums[half], a.steps[i], weights + (part * 4 + i) * (COLUMN_BYTES(WEIGHT_COLUMNS) >> 4), !(part || i));
                close_products();
            }
        }
        float unit[OWN];
        load_own(unit, units);
        await_products<2>(sums[0]);
        take(rows[k][0], sums[0], unit);
        await_products<0>(sums[1]);
        take(rows[k][1], sums[1], unit);
    }

    // As Sums::store; `totals` [ROWS slots].
    __device__ __forceinline__ void store(float* partials, const Totals* totals, i64 stride, i64 present, int words) const {
        const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
#pragma unroll
        for (int k = 0; k < VALUE_WORDS; k++) {
            const int word = warp * VALUE_WORDS + k;
            if (word >= words) break;
#pragma unroll
            for (int i = 0; i < OWN; i++) {
                const int row = row_of(t, i);
                const float of_all = totals[t * OWN + i].all[0];
#pragma unroll
                for (int n = 0; n < 4; n++)
                    if (row < present) partials[row * stride + word * 32 + n * 8 + g] = 2 * rows[k][n / 2][n % 2][i] - of_all;
            }
        }
    }

  private:
    __device__ __forceinline__ static void take(float (&rows)[2][OWN], const int (&sums)[WEIGHT_COLUMNS / 2], const float (&unit)[OWN]) {
#pragma unroll
        for (int i = 0; i < 2 * OWN; i++) {
            const int own = i % OWN, at = (own >> 1) * 4 + i / OWN * 2 + (own & 1);
            const int sum = WEIGHT_HALVES == 1 ? sums[at] : sums[at] + 256 * sums[at + (WEIGHT_HALVES - 1) * ROWS / 2];
            rows[i / OWN][own] = fmaf(unit[own], (float)sum, rows[i / OWN][own]);
        }
    }
};

// Adds what the weights of a page sum to, by row; they are in shared memory. A warp has a step's, of a row in each lane.
__device__ __forceinline__ void sum_weights(int* of_row, const u8* weights) {
    const int thread = thread_here(), row = thread & 31;
    const u8* from = weights + (thread >> 5) * COLUMN_BYTES(WEIGHT_COLUMNS) + row * 16;
    u32 sum = 0;
#pragma unroll
    for (int i = 0; i < 2 * WEIGHT_HALVES; i++) {
        const uint4 bytes = *(const uint4*)(from + (i & 1) * HALF_BYTES(WEIGHT_COLUMNS) + i / 2 * ROWS * 16);
        u32 own = 0;
        own = __dp4a(bytes.x, 0x01010101u, own);
        own = __dp4a(bytes.y, 0x01010101u, own);
        own = __dp4a(bytes.z, 0x01010101u, own);
        own = __dp4a(bytes.w, 0x01010101u, own);
        sum += own << (i / 2 * 8);
    }
    if (row < ROWS) atomicAdd(of_row + row, (int)sum);
}

// Takes in the totals of the first `present` pages of a round, by a lane for each page and row.
__device__ __forceinline__ void take_round(const Found& found, Totals* totals, int present) {
    const int thread = thread_here(), page = thread >> 2 & 7, slot = (thread >> 5) * 4 + (thread & 3);
    if (slot >= ROWS) return;
    float stats[STATS], unused[1];
    found.stats(stats, min(page, present - 1), slot);
    Totals own = totals[slot];
    __syncwarp();
    own.take(stats, page < present, unused);
    if (page == 0) totals[slot] = own;
}
