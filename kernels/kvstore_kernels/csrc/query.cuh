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

// Where attend.cu and score.cu have the integers: as bit planes. A warp calls with its 32 rows of E.
struct BitPlanes {
    uint2* planes;

    __device__ __forceinline__ void put(int row, int unit, int slot, int integer) const {
        const int lane = threadIdx.x & 31;
        u32 mine = 0;
#pragma unroll
        for (int p = 0; p < PLANES; p++) {
            const u32 plane = __ballot_sync(ALL_LANES, integer >> (PLANES - 1 - p) & 1);
            if (lane == p) mine = plane;
        }
        u32* at = (u32*)(planes + ((row >> 2) * UNITS + unit) * STEPS * 32);
        const int column = (row & 3) + (lane < STEPS ? 0 : 4), step = lane < STEPS ? lane : lane - STEPS;
        if (lane < PLANES) at[((step * 8 + column) * 4 + (slot & 3)) * 2 + (slot >> 2)] = mine;
    }
};

// Fills `constants`, and `integers` by `put(row, unit, slot of 8 words in it, this lane's integer)`. Every warp of the block
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
        float most = 0, values[8];
#pragma unroll 1
        for (int u = UNITS - 1; u >= 0; u--)
#pragma unroll
            for (int slot = 0; slot < 8; slot++) {
                const int word = unit_word(units, u, slot);
                values[slot] = present && word < head.words ? own[word * 32] : 0;
                most = fmaxf(most, fabsf(values[slot]));
            }
        float step = warp_max(most) / (float)((1 << (PLANES - 1)) - 1);
        if (!(step >= 1.17549435e-38f)) step = 0;
        float sum[KEY_GROUPS], spread[KEY_GROUPS];
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) sum[g] = spread[g] = 0;
#pragma unroll 1
        for (int u = 0; u < UNITS; u++) {
            const int group = unit_group(units, u);
#pragma unroll
            for (int slot = 0; slot < 8; slot++) {
                const int word = unit_word(units, u, slot);
                float value = values[slot];
                if (u) value = present && word < head.words ? own[word * 32] : 0;
                const float integer = step > 0 ? rintf(value / step) : 0;
#pragma unroll
                for (int g = 0; g < KEY_GROUPS; g++)
                    if (g == group) {
                        sum[g] += integer;
                        if (DEBIAS && word < head.words) spread[g] += noise[word * 32 + lane] * value * value;
                    }
                if (slot / slots == share) integers.put(row, u, slot, (int)integer);
            }
        }
        float* out = constants + row * ROW_CONSTANTS;
        const float* extra = own - lane + q.y_extra;
        if (lane == 0 && share == 0) out[0] = present ? extra[0] * q.unit : 0;
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) {
            const float total = warp_sum(sum[g]), variance = DEBIAS ? warp_sum(spread[g]) : 0;
            if (lane == 0 && share == 0) {
                out[SLOPE(g)] = 2 * step * q.unit;
                out[SHIFT(g)] = -total * step * q.unit;
                out[SPREAD(g)] = -q.half_debias * q.unit * variance;
                out[ALONG(g)] = KEY_OFFSETS && present ? extra[1 + g] * q.unit : 0;
            }
        }
    }
}
