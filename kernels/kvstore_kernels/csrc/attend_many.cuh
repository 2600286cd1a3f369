// The parts of attend_many.cu: operands of the byte products, what warps find together, a page's logits and a warp's sums.
#pragma once
#include "weights.cuh"

#define BLOCK_ROWS 16
#define ROW_BLOCKS (ROWS / BLOCK_ROWS)
#define OWN (2 * ROW_BLOCKS)  // rows of a lane: g + 8 i, i < OWN
#define LOW_BITS (PLANES - 8)  // of a query's integers, in bytes of their own
#define HALVES (LOW_BITS ? 2 : 1)
#define WEIGHT_HALVES (WEIGHT_PLANES > 8 ? 2 : 1)
#define FRAGMENT 512  // bytes of an A operand, 16 x 32
#define QUERY_BYTES (HALVES * UNITS * ROW_BLOCKS * 8 * FRAGMENT)
#define KEY_BYTES (UNITS * CHUNKS * PIECE)
#define STAGE (KEY_BYTES + WARPS * VALUE_WORDS * PIECE + 2 * 512)
#define ALL_WEIGHTS (WEIGHT_HALVES * CHUNKS * ROW_BLOCKS * FRAGMENT)
#define ROUND (8 * ROWS)  // a page's number for each row and page of a round

// C + A B: A is 16 rows x 32 bytes of type T, B 32 signed bytes x 8 columns. Lane (g, t) holds of A the bytes 4t .. 4t + 3 of rows g and
// g + 8, then 4t + 16 .. of both; of B those of column g; of C what mma_and_popc says.
#define MMA_BYTES(name, T)                                                                                                   \
    __device__ __forceinline__ void name(Accumulators& c, uint4 a, u32 b0, u32 b1) {                                         \
        asm("mma.sync.aligned.m16n8k32.row.col.s32." T ".s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"           \
            : "+r"(c.x), "+r"(c.y), "+r"(c.z), "+r"(c.w)                                                                    \
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));                                                    \
    }
MMA_BYTES(mma_signed, "s8")
MMA_BYTES(mma_unsigned, "u8")

// Bits 4 b + step % 4 of the half step / 4 of a word as bytes b, -1 or 0: a nibble chooses among eight bytes, by all of its bits
// but the highest, which extends the sign of what is chosen.
__device__ __forceinline__ u32 bytes_of(u32 word, int step) {
    const u32 low[4] = {0xff00ff00, 0xffff0000, 0, 0xff00ff00}, high[4] = {0xff00ff00, 0xffff0000, 0xffffffff, 0xff00ff00};
    return select_bytes(low[step & 3], high[step & 3], word >> ((step >> 2) * 16 + ((step & 3) == 3 ? 3 : 0)));
}

__device__ __forceinline__ Accumulators all(int v) { return Accumulators{v, v, v, v}; }

// Sums so far, the bits of floats above OFFSET, times 2^bits.
__device__ __forceinline__ void shift_up(Accumulators& c, int bits) {
    const int offset = (int)((u32)FLOATING - ((u32)FLOATING << bits));
    c = {(c.x << bits) + offset, (c.y << bits) + offset, (c.z << bits) + offset, (c.w << bits) + offset};
}

// Integers in the order of floats.
__device__ __forceinline__ int ordered(float v) {
    const int bits = __float_as_int(v);
    return bits < 0 ? bits ^ 0x7fffffff : bits;
}

__device__ __forceinline__ float from_ordered(int v) { return __int_as_float(v < 0 ? v ^ 0x7fffffff : v); }

__device__ __forceinline__ uint4 fragment(const u8* fragments, int number) {
    return *(const uint4*)(fragments + number * FRAGMENT + (threadIdx.x & 31) * 16);
}

// Query rows as A operands, [HALVES][UNITS][ROW_BLOCKS][8 steps of bytes_of].
struct QueryBytes {
    u8* fragments;

    template <int COUNT>
    __device__ __forceinline__ void put(int row, int unit, int first, const int (&integers)[COUNT]) const {
        const int bit = threadIdx.x & 31, step = bit / 16 * 4 + bit % 4, byte = bit / 4 % 4;
#pragma unroll
        for (int i = 0; i < COUNT; i++) {
            const int slot = first + i;
            const int at = ((unit * ROW_BLOCKS + row / BLOCK_ROWS) * 8 + step) * FRAGMENT + ((row & 7) * 4 + (slot & 3)) * 16 +
                           ((slot >> 2) * 2 + (row >> 3 & 1)) * 4 + byte;
            fragments[at] = (u8)(integers[i] >> LOW_BITS);
            if (LOW_BITS) fragments[QUERY_BYTES / HALVES + at] = (u8)(integers[i] & ((1 << LOW_BITS) - 1));
        }
    }
};

// What the warps find of each row on each page of a round: the largest logit, rounded up, the largest weight, the sum of weights
// in units of it, and of p for each warp's tokens.
struct Found {
    int *top, *most, *weight;  // [8][ROWS]
    float* totals;             // [8][ROWS][WARPS]

    __device__ __forceinline__ explicit Found(u8* shared) : top((int*)shared), most(top + ROUND), weight(most + ROUND), totals((float*)(weight + ROUND)) {}

    __device__ __forceinline__ void clear() const {
        for (int i = threadIdx.x; i < ROUND; i += WARPS * 32) {
            top[i] = 1 << 31;
            most[i] = weight[i] = 0;
        }
    }

    __device__ __forceinline__ float page_top(int page, int row) const { return from_ordered(top[page * ROWS + row]); }

    // The value of one weight.
    __device__ __forceinline__ float unit(int page, int row) const { return __int_as_float(most[page * ROWS + row]) * (1.0f / WEIGHT_MOST); }

    // What attend.cu calls stats, of one page and row.
    __device__ __forceinline__ void stats(float (&out)[STATS], int page, int row) const {
        const int i = page * ROWS + row;
        const float4 a = *(const float4*)(totals + i * WARPS), b = *(const float4*)(totals + i * WARPS + 4);
        out[TOP] = page_top(page, row);
        out[TOTAL] = ((a.x + a.y) + (a.z + a.w)) + ((b.x + b.y) + (b.z + b.w));
        out[UNIT(0)] = unit(page, row);
        out[WEIGHT(0)] = (float)(u32)weight[i];
    }
};
#define FOUND_BYTES (ROUND * 4 * (3 + WARPS))

// Of the OWN rows that four lanes t have in common, joined over them: lane t < OWN gets row t's. Lanes t and t ^ 1 are joined first.
template <class T, class Join>
__device__ __forceinline__ T join_lanes(const T (&v)[OWN], Join join) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
    T pair[ROW_BLOCKS];
#pragma unroll
    for (int m = 0; m < ROW_BLOCKS; m++)
        pair[m] = join(odd ? v[2 * m + 1] : v[2 * m], __shfl_xor_sync(ALL_LANES, odd ? v[2 * m] : v[2 * m + 1], 1));
    if (ROW_BLOCKS == 1) return join(pair[0], __shfl_xor_sync(ALL_LANES, pair[0], 2));
    return join(upper ? pair[ROW_BLOCKS - 1] : pair[0], __shfl_xor_sync(ALL_LANES, upper ? pair[0] : pair[ROW_BLOCKS - 1], 2));
}

__device__ __forceinline__ int row_of(int i) { return ((threadIdx.x & 31) >> 2) + 8 * i; }

// This lane's logits, of rows row_of(i) and of the tokens of its chunks t % 2 * 2 + {0, 1} + {0, 4}, the first two numbers of
// what a token is in them: c's lowest and second bit; its highest says which of the pair t / 2 of the warp's four.
__device__ __forceinline__ int token_at(int c) {
    const int t = threadIdx.x & 3;
    return 32 * ((t & 1) * 2 + (c & 1) + (c & 2) * 2) + 4 * (threadIdx.x >> 5) + (t >> 1) * 2 + (c >> 2);
}
typedef float Logits[OWN][CHUNKS];

// The scales of a page's keys and of its values as floats, [WARPS][4 t][8 c] each, c of token_at; the first warp makes those of keys, of the 16
// bytes that each lane has asked for, the second those of values.
__device__ __forceinline__ void convert_scales(float* alphas, const u8* halves, const Head* heads) {
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
    if (warp > 1) return;
    const uint4 pairs = *(const uint4*)(halves + warp * 512 + lane * 16);
    const u32 own[4] = {pairs.x, pairs.y, pairs.z, pairs.w};
    const bool stored = heads[warp].stored;
    alphas += warp * PAGE + (lane & 3) * 64 + (lane >> 3 & 1) * 8 + (lane >> 4) * 2 + (lane >> 2 & 1);
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const u32 pair = warp ? clamp_halves(own[i >> 1]) : own[i >> 1];
        alphas[(i >> 2) * 32 + (i >> 1 & 1) * 16 + (i & 1) * 4] = stored ? i & 1 ? high_half(pair) : low_half(pair) : 0;
    }
}

__device__ __forceinline__ void load_alphas(float (&v)[CHUNKS], const float* alphas) {
    const float4* from = (const float4*)(alphas + ((threadIdx.x >> 5) * 4 + (threadIdx.x & 3)) * CHUNKS);
    const float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

__device__ __forceinline__ void score_page(Logits& x, const u8* keys, const u8* queries, const float4* rows, const float* key_alphas, float cap) {
    // Column 2 t + e of product j is lane t's token 2 j + e.
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, t = lane & 3, of = lane >> 3, odd = lane >> 2 & 1;
    const u8* from = keys + ((of & 1) * 2 + odd) * PIECE + t * 128 + (warp ^ (t | odd << 2)) * 16 + (of >> 1) * 4;
    Accumulators sums[ROW_BLOCKS][4];
#pragma unroll
    for (int i = 0; i < ROW_BLOCKS * 4; i++) sums[i / 4][i % 4] = all(FLOATING);
#pragma unroll 1
    for (int pass = 0; pass < HALVES * UNITS; pass++) {
        if (LOW_BITS && pass == UNITS)
#pragma unroll
            for (int i = 0; i < ROW_BLOCKS * 4; i++) shift_up(sums[i / 4][i % 4], LOW_BITS);
        const u8* unit = from + (LOW_BITS && pass >= UNITS ? pass - UNITS : pass) * CHUNKS * PIECE;
        u32 words[4][2];
#pragma unroll
        for (int i = 0; i < 8; i++) words[i >> 1][i & 1] = *(const u32*)(unit + (i >> 1 & 1) * 4 * PIECE + ((i >> 2) ^ (warp >> 1 & 1)) * 8 + (i & 1) * (PIECE / 2));
#pragma unroll
        for (int step = 0; step < 8; step++) {
            uint4 a[ROW_BLOCKS];
#pragma unroll
            for (int m = 0; m < ROW_BLOCKS; m++) a[m] = fragment(queries, (pass * ROW_BLOCKS + m) * 8 + step);
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const u32 b0 = bytes_of(words[j][0], step), b1 = bytes_of(words[j][1], step);
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) mma_signed(sums[m][j], a[m], b0, b1);
            }
        }
    }
    float alphas[CHUNKS];
    load_alphas(alphas, key_alphas);
#pragma unroll
    for (int i = 0; i < OWN; i++) {
        const float4 row = rows[row_of(i)];
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            const Accumulators& sum = sums[i >> 1][c >> 1];
            const int own = i & 1 ? (c & 1 ? sum.w : sum.z) : (c & 1 ? sum.y : sum.x);
            float inner = fmaf(row.y, __int_as_float(own) - OFFSET, row.z);
            if (DEBIAS) inner = fmaf(alphas[c], row.w, inner);
            const float logit = fmaf(alphas[c], inner, row.x);
            x[i][c] = SOFT_CAP ? capped(logit, cap) : logit;
        }
    }
}

// What a page needs to be added to sums that are relative to another power of two; one thread a row keeps it.
struct Room {
    float *unit, *factor, *top;  // [8 g][OWN] what one weight counts and what sums so far have to be multiplied by; [ROWS]
    int* grows;                  // whether any factor is not 1

    __device__ __forceinline__ explicit Room(u8* shared) : unit((float*)shared), factor(unit + ROWS), top(factor + ROWS), grows((int*)(top + ROWS)) {}

    // By the first warp.
    __device__ __forceinline__ void make(const Found& found, int page) const {
        const int row = threadIdx.x;
        bool grew = false;
        if (row < ROWS) {
            const int at = (row & 7) * OWN + (row >> 3);
            const float page_top = found.page_top(page, row), highest = fmaxf(top[row], page_top), own = exp2_fast(top[row] - highest);
            unit[at] = -found.unit(page, row) * exp2_fast(page_top - highest);  // products are with -1
            factor[at] = own;
            top[row] = highest;
            grew = own != 1;
        }
        grew = __any_sync(ALL_LANES, grew);
        if (row == 0) *grows = grew;
    }
};
#define ROOM_BYTES (ROWS * 12 + 16)

__device__ __forceinline__ void load_own(float (&v)[OWN], const float* from) {
#pragma unroll
    for (int i = 0; i < OWN; i++) v[i] = from[((threadIdx.x & 31) >> 2) * OWN + i];
}

// A warp's sums over its value rows: of the rows of A and columns 2t, 2t + 1 of eight value rows.
struct ManySums {
    float rows[VALUE_WORDS][4][ROW_BLOCKS][4];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int i = 0; i < VALUE_WORDS * ROW_BLOCKS * 16; i++) rows[i / (ROW_BLOCKS * 16)][i / (ROW_BLOCKS * 4) % 4][i / 4 % ROW_BLOCKS][i % 4] = 0;
    }

    __device__ __forceinline__ void scale(const float (&factor)[OWN]) {
#pragma unroll
        for (int i = 0; i < VALUE_WORDS * ROW_BLOCKS * 16; i++)
            rows[i / (ROW_BLOCKS * 16)][i / (ROW_BLOCKS * 4) % 4][i / 4 % ROW_BLOCKS][i % 4] *= factor[i / 4 % ROW_BLOCKS * 2 + i / 2 % 2];
    }

    // Adds word k of this warp's, whose bits are at `values`.
    __device__ __forceinline__ void add(int k, const u8* values, const u8* weights, const float (&unit)[OWN]) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        const uint4 a[2] = {*(const uint4*)(values + lane * 16), *(const uint4*)(values + PIECE / 2 + lane * 16)};
        const u32 words[4][2] = {{a[0].x, a[0].z}, {a[0].y, a[0].w}, {a[1].x, a[1].z}, {a[1].y, a[1].w}};
        const uint4* from = (const uint4*)weights + (g * 4 + (t ^ g >> 1));
        Accumulators sums[4][ROW_BLOCKS];
#pragma unroll
        for (int i = 0; i < 4 * ROW_BLOCKS; i++) sums[i / ROW_BLOCKS][i % ROW_BLOCKS] = all(FLOATING);
#pragma unroll 1
        for (int half = WEIGHT_HALVES - 1; half >= 0; half--) {
#pragma unroll
            for (int c = 0; c < CHUNKS; c++) {
                uint4 w[ROW_BLOCKS];
#pragma unroll
                for (int m = 0; m < ROW_BLOCKS; m++) w[m] = from[((half * CHUNKS + c) * ROW_BLOCKS + m) * (FRAGMENT / 16)];
#pragma unroll
                for (int n = 0; n < 4; n++) {
                    const u32 b0 = bytes_of(words[n][0], c), b1 = bytes_of(words[n][1], c);
#pragma unroll
                    for (int m = 0; m < ROW_BLOCKS; m++) mma_unsigned(sums[n][m], w[m], b0, b1);
                }
            }
            if (WEIGHT_HALVES > 1 && half)
#pragma unroll
                for (int i = 0; i < 4 * ROW_BLOCKS; i++) shift_up(sums[i / ROW_BLOCKS][i % ROW_BLOCKS], 8);
        }
#pragma unroll
        for (int i = 0; i < 4 * ROW_BLOCKS; i++) {
            const int n = i / ROW_BLOCKS, m = i % ROW_BLOCKS;
            const int counts[4] = {sums[n][m].x, sums[n][m].y, sums[n][m].z, sums[n][m].w};
#pragma unroll
            for (int j = 0; j < 4; j++) rows[k][n][m][j] = fmaf(unit[2 * m + (j >> 1)], __int_as_float(counts[j]) - OFFSET, rows[k][n][m][j]);
        }
    }

    // As Sums::store; `totals` [ROWS].
    __device__ __forceinline__ void store(float* partials, const Totals* totals, i64 stride, i64 present, int words) const {
        const int warp = threadIdx.x >> 5, t = threadIdx.x & 3;
#pragma unroll
        for (int k = 0; k < VALUE_WORDS; k++) {
            const int word = warp * VALUE_WORDS + k;
            if (word >= words) break;
#pragma unroll
            for (int i = 0; i < 4 * OWN; i++) {
                const int n = i / OWN, row = row_of(i % OWN);
                const float* own = &rows[k][n][i % OWN / 2][i % 2 * 2];
                const float of_all = totals[row].all[0];
                if (row < present) *(float2*)(partials + row * stride + word * 32 + n * 8 + 2 * t) = make_float2(2 * own[0] - of_all, 2 * own[1] - of_all);
            }
        }
    }
};
