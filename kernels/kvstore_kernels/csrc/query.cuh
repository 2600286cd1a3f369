// Query rows in the form that the tensor cores read: from y = E q, float32, the integers round(y / step) in two's
// complement of PLANES bits, each bit plane packed as the rows of the sketch are.
//
// Eight columns of a product are four query rows twice, once with the upper half of the planes and once with the lower. A
// block keeps ROWS query rows of one KV head: `planes` uint2 [ROW_TILES][UNITS][PLANES / 2][32 lanes], most significant
// plane first, where a unit is up to 256 rows of E with one scale; lane (g, t) holds words t and t + 4 of the unit for row
// g % 4, of the upper planes if g < 4. `constants` float [ROWS][ROW_CONSTANTS]: with S_g the sum of a row's integers where
// t = +1 the logit, in the caller's unit, is
//     constant + sum_g ( alpha_g (slope_g S_g + shift_g + alpha_g spread_g) + beta_g along_g )
#pragma once
#include "page.cuh"
#include "warp.cuh"

#define ROWS (4 * ROW_TILES)
#define STEPS (PLANES / 2)  // products a tile of 16 tokens
#define ROW_CONSTANTS (1 + 4 * KEY_GROUPS)
#define SLOPE(g) (1 + 4 * (g))
#define SHIFT(g) (2 + 4 * (g))
#define SPREAD(g) (3 + 4 * (g))
#define ALONG(g) (4 + 4 * (g))
#define QUERY_PLANES_BYTES (ROW_TILES * UNITS * STEPS * 256)
#define QUERY_CONSTANTS_BYTES ((ROWS * ROW_CONSTANTS * 4 + 15) / 16 * 16)

// Which word of the head is `slot` of 8 in `unit`; not below `words` if none. `units` int [UNITS][9]: group, 8 words.
__device__ __forceinline__ int unit_word(const int* units, int unit, int slot) {
    return KEY_GROUPS == 1 ? unit * 8 + slot : units[unit * 9 + 1 + slot];
}

__device__ __forceinline__ int unit_group(const int* units, int unit) { return KEY_GROUPS == 1 ? 0 : units[unit * 9]; }

// What a block needs to know of the queries: y [R, y_stride] of its head, of which rows [first, first + ROWS) are its own:
// the head's rows of E, then, at y_extra, <q, mean> and <q, f_g>.
struct Queries {
    const float* y;
    i64 rows, first, y_stride, y_extra;
    float unit;         // turns a score into the caller's unit
    float half_debias;  // debias / 2 * sm_scale
};

// Bit i of lane j becomes bit j of lane i.
__device__ __forceinline__ u32 transpose_bits(u32 v) {
    const int lane = threadIdx.x & 31;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const u32 other = __shfl_xor_sync(ALL_LANES, v, d), lower = ALL_LANES / ((1u << d) + 1);  // d of each 2 d bits
        v = lane & d ? (v & ~lower) | (other >> d & lower) : (v & lower) | (other << d & ~lower);
    }
    return v;
}

// Where attend.cu and score.cu have the integers: as bit planes. A warp calls with its 32 rows of E.
struct BitPlanes {
    uint2* planes;

    // The integers of the words in slots first .. first + COUNT - 1: a transpose makes eight planes of four of them.
    template <int COUNT>
    __device__ __forceinline__ void put(int row, int unit, int first, const int (&integers)[COUNT]) const {
        const int lane = threadIdx.x & 31;
        u32* at = (u32*)(planes + ((row >> 2) * UNITS + unit) * STEPS * 32);
#pragma unroll
        for (int i = 0; i < COUNT; i += 4)
#pragma unroll
            for (int low = 0; low < PLANES; low += 8) {
                const int *four = integers + i, p = PLANES - 1 - low - lane % 8, slot = first + i + lane / 8;
                const u32 pairs[2] = {__byte_perm(four[0] >> low, four[1] >> low, 0x40), __byte_perm(four[2] >> low, four[3] >> low, 0x40)};
                const u32 plane = transpose_bits(__byte_perm(pairs[0], pairs[1], 0x5410));
                const int column = (row & 3) + (p < STEPS ? 0 : 4), step = p < STEPS ? p : p - STEPS;
                if (p >= 0) at[((step * 8 + column) * 4 + (slot & 3)) * 2 + (slot >> 2)] = plane;
            }
    }
};

// Fills `constants`, and `integers` by `put(row, unit, first of the slots of its 8 words, this lane's integers)`. Every warp of the block
// takes part, several to a row where there are more warps than rows; the caller synchronises.
template <class Integers>
__device__ __forceinline__ void prepare_queries(const Integers& integers, float* constants, const Queries& q, Head head,
                                                const int* units, const float* noise) {
    constexpr int warps = 8, shares = ROWS < warps ? warps / ROWS : 1, slots = 8 / shares;
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, share = warp / ROWS;
#pragma unroll 1
    for (int row = warp % ROWS; row < ROWS; row += warps) {
        const bool present = q.first + row < q.rows;
        const float* own = q.y + (q.first + row) * q.y_stride + lane;
        const float beside = present && lane <= KEY_GROUPS * KEY_OFFSETS ? own[q.y_extra] : 0;
        float most = 0, values[8];
#pragma unroll 1
        for (int u = UNITS - 1; u >= 0; u--)
#pragma unroll
            for (int slot = 0; slot < 8; slot++) {
                const int word = unit_word(units, u, slot);
                values[slot] = present && word < head.words ? own[word * 32] : 0;
                most = fmaxf(most, fabsf(values[slot]));
            }
        // Without their sign floats are in the order of their bits.
        most = __uint_as_float(__reduce_max_sync(ALL_LANES, __float_as_uint(most)));
        float step = most / (float)((1 << (PLANES - 1)) - 1);
        if (!(step >= 1.17549435e-38f)) step = 0;
        const float inverse = step > 0 ? 1 / step : 0;
        int sum[KEY_GROUPS] = {};
        float spread[KEY_GROUPS] = {};
#pragma unroll 1
        for (int u = 0; u < UNITS; u++) {
            const int group = unit_group(units, u);
            int integer[8], mine[slots];
#pragma unroll
            for (int slot = 0; slot < 8; slot++) {
                const int word = unit_word(units, u, slot);
                float value = values[slot];
                if (u) value = present && word < head.words ? own[word * 32] : 0;
                const float near = value * inverse;  // and Markstein's step to value / step, rounded to nearest
                integer[slot] = __float2int_rn(fmaf(fmaf(-near, step, value), inverse, near));
#pragma unroll
                for (int g = 0; g < KEY_GROUPS; g++)
                    if (g == group) {
                        sum[g] += integer[slot];
                        if (DEBIAS && word < head.words) spread[g] += noise[word * 32 + lane] * value * value;
                    }
            }
#pragma unroll
            for (int i = 0; i < slots; i++) mine[i] = share ? integer[8 - slots + i] : integer[i];
            integers.put(row, u, share * slots, mine);
        }
        if (share) continue;
        float* out = constants + row * ROW_CONSTANTS;
        if (lane <= KEY_GROUPS * KEY_OFFSETS) out[4 * lane] = beside * q.unit;  // 0, or ALONG(lane - 1)
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) {
            const float total = (float)__reduce_add_sync(ALL_LANES, sum[g]), variance = DEBIAS ? warp_sum(spread[g]) : 0;
            if (lane == 0) {
                out[SLOPE(g)] = 2 * step * q.unit;
                out[SHIFT(g)] = -total * step * q.unit;
                out[SPREAD(g)] = -q.half_debias * q.unit * variance;
            }
        }
    }
}
