// From the logits of a page to bit planes of integer weights, and from those to sums over the value rows.
#pragma once
#include "logits.cuh"

#define WARPS 8
#define VALUE_SCALES (VALUE_GROUPS * (1 + VALUE_OFFSETS))
#define WEIGHT_STEPS (WEIGHT_PLANES / 2)
#define WEIGHT_TILE (WEIGHT_STEPS * 256)  // bytes of one group's planes for 4 rows
#define WEIGHT_BYTES (VALUE_GROUPS * ROW_TILES * WEIGHT_TILE)
#define WEIGHT_MOST ((1 << WEIGHT_PLANES) - 1)

// What a page leaves of each row beside its planes: the power of two that its exponents are relative to, sum p, then for
// each group the value of one weight unit and the sum of weights, then sum p beta.
#define STATS (2 + VALUE_GROUPS * (2 + VALUE_OFFSETS))
#define TOP 0
#define TOTAL 1
#define UNIT(g) (2 + 2 * (g))
#define WEIGHT(g) (3 + 2 * (g))
#define OFFSET_SUM(g) (2 + 2 * VALUE_GROUPS + (g))

// What a split leaves of each row beside its sums over value rows.
#define SUMS (2 + VALUE_GROUPS * VALUE_OFFSETS)

#define LOWEST -1e30f  // below any logit, and finite, so that differences stay numbers

// What p alpha is multiplied by to become a weight, of the page's largest.
__device__ __forceinline__ float weights_a_unit(float most) { return most > 1e-30f ? WEIGHT_MOST * inverse_fast(most) : 0; }

// Over the sixteen lanes that hold the same rows.
__device__ __forceinline__ float rows_max(float v) {
#pragma unroll
    for (int d = 2; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, d));
    return v;
}

template <class T>
__device__ __forceinline__ T rows_sum(T v) {
#pragma unroll
    for (int d = 2; d < 32; d *= 2) v += __shfl_xor_sync(ALL_LANES, v, d);
    return v;
}

// Eight words of four bytes each to eight words of bit planes: bit i of byte j of word p was bit p of byte j of word i.
__device__ __forceinline__ void to_planes(u32 (&w)[8]) {
    const u32 masks[3] = {0x0f0f0f0f, 0x33333333, 0x55555555};
#pragma unroll
    for (int stage = 0; stage < 3; stage++) {
        const int d = 4 >> stage;
        const u32 low = masks[stage];
#pragma unroll
        for (int i = 0; i < 8; i++)
            if (!(i & d)) {
                const u32 a = w[i], b = w[i + d];
                w[i] = (a & low) | (b << d & ~low);
                w[i + d] = (a >> d & low) | (b & ~low);
            }
    }
}

// Byte `at` of four words, in their order.
__device__ __forceinline__ u32 bytes_at(const u32 (&w)[4], int at) {
    const u32 select = at | (4 + at) << 4;
    return __byte_perm(__byte_perm(w[0], w[1], select), __byte_perm(w[2], w[3], select), 0x5410);
}

__device__ __forceinline__ bool in_range(int token, int from, int to) { return token >= from && token < to; }

// sum over this lane's tokens of p beta, for its two rows.
__device__ __forceinline__ void sum_offsets(float (&along)[2], const PageLogits& p, const u16* betas, int lane, int from, int to) {
    along[0] = along[1] = 0;
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int c = i >> 2, j = i >> 1 & 1, r = i & 1;
        const u32 pair = scale_pair(betas, lane, c);
        const float product = p[c][j][r] * (j ? high_half(pair) : low_half(pair));
        along[r] += in_range(token_of(lane, c, j), from, to) ? product : 0;
    }
}

// Leaves the planes of integer weights in `planes`: lane (g, t) holds of row g % 4 the words (t, 0) and (t, 1), of the upper
// planes if g < 4. `low` and `high` are the lower and the upper bytes of a lane's weights, gather_bytes by gather_bytes.
__device__ __forceinline__ void store_planes(uint2* planes, u32 (&low)[8], u32 (&high)[8], int lane) {
    to_planes(low);
    if (WEIGHT_PLANES > 8) to_planes(high);
    const bool upper = lane < 16;
#pragma unroll
    for (int s = 0; s < WEIGHT_STEPS; s++) {
        const int p = WEIGHT_PLANES - 1 - s, q = WEIGHT_STEPS - 1 - s;
        // Column g of the transpose is row g % 4 with the tokens of lanes t < 2 if g < 4, else of lanes t >= 2.
        const u32 above = transpose_8x8(p < 8 ? low[p & 7] : high[p & 7]), below = transpose_8x8(low[q]);
        const u32 other = __shfl_xor_sync(ALL_LANES, upper ? below : above, 16);
        planes[s * 32 + lane] = upper ? make_uint2(above, other) : make_uint2(other, below);
    }
}

// From the logits of a page, of tokens [from, to) alone, to the planes of its weights and its stats, for the rows of one
// tile: `planes` [VALUE_GROUPS][ROW_TILES][WEIGHT_TILE] from this tile's, `stats` [4][STATS]. Negative scales count as zero.
__device__ __forceinline__ void weigh(PageLogits& x, const u16* scales, int from, int to, u8* planes, float* stats) {
    const int lane = threadIdx.x & 31;
    const bool whole = from == 0 && to == PAGE;
    float top[2] = {LOWEST, LOWEST};
    if (!whole) {
        asm volatile("");  // keeps this a branch
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int c = i >> 2, j = i >> 1 & 1, r = i & 1;
            x[c][j][r] = in_range(token_of(lane, c, j), from, to) ? x[c][j][r] : LOWEST;
        }
    }
#pragma unroll
    for (int i = 0; i < 32; i++) top[i & 1] = fmaxf(top[i & 1], x[i >> 2][i >> 1 & 1][i & 1]);
#pragma unroll
    for (int r = 0; r < 2; r++) top[r] = ceilf(fmaxf(rows_max(top[r]), LOWEST / 2));  // above LOWEST: no token weighs 0
#pragma unroll
    for (int i = 0; i < 32; i++) {
        const int c = i >> 2, j = i >> 1 & 1, r = i & 1;
        x[c][j][r] = exp2_fast(x[c][j][r] - top[r]);
    }
    float* own = stats + 2 * lane * STATS;  // written by lanes 0 and 1, whose rows are 0 .. 3
#pragma unroll
    for (int r = 0; r < 2; r++) {
        float total[4];  // in the order in which attend_wide.cu's and attend_many.cu's lanes have the tokens
#pragma unroll
        for (int c = 0; c < 4; c++) total[c] = (x[c][0][r] + x[c + 4][0][r]) + (x[c][1][r] + x[c + 4][1][r]);
        const float all = rows_sum((total[0] + total[1]) + (total[2] + total[3]));
        if (lane < 2) {
            own[r * STATS + TOP] = top[r];
            own[r * STATS + TOTAL] = all;
        }
    }
#pragma unroll 1
    for (int group = 0; group < VALUE_GROUPS; group++) {
        float weighted[8][2][2], most[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < 32; i++) {
            const int c = i >> 2, j = i >> 1 & 1, r = i & 1;
            const u32 pair = clamp_halves(scale_pair(scales + group * PAGE, lane, c));
            weighted[c][j][r] = x[c][j][r] * (j ? high_half(pair) : low_half(pair));
            most[r] = fmaxf(most[r], weighted[c][j][r]);
        }
        float inverse[2];
        u32 sum[2] = {0, 0}, low[8], high[8];
#pragma unroll
        for (int r = 0; r < 2; r++) {
            most[r] = rows_max(most[r]);
            inverse[r] = weights_a_unit(most[r]);
        }
#pragma unroll
        for (int c = 0; c < 8; c++) {
            u32 w[4];  // of both tokens of a row, then of the other
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = i >> 1, r = i & 1;
                w[2 * r + j] = __float_as_uint(fmaf(weighted[c][j][r], inverse[r], OFFSET));
                sum[r] += w[2 * r + j];
            }
            low[c] = bytes_at(w, 0);
            high[c] = bytes_at(w, 1);
        }
        store_planes((uint2*)(planes + group * ROW_TILES * WEIGHT_TILE), low, high, lane);
        float along[2];
        if (VALUE_OFFSETS) sum_offsets(along, x, scales + (VALUE_GROUPS + group) * PAGE, lane, from, to);
#pragma unroll
        for (int r = 0; r < 2; r++) {
            const u32 weight = rows_sum(sum[r] - 16u * FLOATING);
            const float offsets = VALUE_OFFSETS ? rows_sum(along[r]) : 0;
            if (lane < 2) {
                own[r * STATS + UNIT(group)] = most[r] * (1.0f / WEIGHT_MOST);
                own[r * STATS + WEIGHT(group)] = (float)weight;
                if (VALUE_OFFSETS) own[r * STATS + OFFSET_SUM(group)] = offsets;
            }
        }
    }
}

// Totals of the query rows of a tile, relative to 2^top: lane (page, row), of the eight pages of a round, has a copy of its row's.
struct Totals {
    float top, total, all[VALUE_GROUPS];  // all: of all weights
    float offsets[VALUE_OFFSETS ? VALUE_GROUPS : 1];

    __device__ __forceinline__ void clear() {
        top = LOWEST;
        total = 0;
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; g++) all[g] = 0;
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS * VALUE_OFFSETS; g++) offsets[g] = 0;
    }

    // Takes in what this lane's page, if it is there, has left in `stats`; `unit` becomes what one weight of it counts. What
    // was summed before has to be multiplied by the result.
    __device__ __forceinline__ float take(const float* stats, bool there, float (&unit)[VALUE_GROUPS]) {
        const float page_top = there ? stats[TOP] : LOWEST, highest = fmaxf(top, pages_max(page_top));
        const float weight = exp2_fast(page_top - highest), factor = exp2_fast(top - highest);
        top = highest;
        total = fmaf(total, factor, pages_sum(there ? stats[TOTAL] * weight : 0));
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS; g++) {
            unit[g] = there ? stats[UNIT(g)] * weight : 0;
            all[g] = fmaf(all[g], factor, pages_sum(there ? stats[WEIGHT(g)] * unit[g] : 0));
        }
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS * VALUE_OFFSETS; g++)
            offsets[g] = fmaf(offsets[g], factor, pages_sum(there ? stats[OFFSET_SUM(g)] * weight : 0));
        return factor;
    }

    __device__ __forceinline__ void store(float* sums) const {
        sums[TOP] = top;
        sums[TOTAL] = total;
#pragma unroll
        for (int g = 0; g < VALUE_GROUPS * VALUE_OFFSETS; g++) sums[2 + g] = offsets[g];
    }

  private:
    __device__ __forceinline__ static float pages_max(float v) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, d));
        return v;
    }

    __device__ __forceinline__ static float pages_sum(float v) {
#pragma unroll
        for (int d = 4; d < 32; d *= 2) v += __shfl_xor_sync(ALL_LANES, v, d);
        return v;
    }
};

// A warp's sums over its value rows and the totals: lanes t < 2 have value rows g of query rows 2t and 2t + 1, lanes t + 2
// value rows g + 8.
struct Sums {
    float rows[ROW_TILES][VALUE_WORDS][2][2];  // sum over t = +1 of the weights
    Totals totals[ROW_TILES];
    float unit[ROW_TILES][VALUE_GROUPS];

    __device__ __forceinline__ void clear() {
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
            for (int i = 0; i < VALUE_WORDS * 4; i++) rows[n][i / 4][i / 2 % 2][i % 2] = 0;
            totals[n].clear();
        }
    }

    // Makes room for the exponents of a round's first `present` pages and takes in their totals.
    __device__ __forceinline__ void begin_round(const float* stats, int present) {
        const int lane = threadIdx.x & 31, page = lane >> 2;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const float factor = totals[n].take(stats + (page * ROWS + n * 4 + (lane & 3)) * STATS, page < present, unit[n]);
            if (__any_sync(ALL_LANES, factor != 1))
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float own_factor = of_row(factor, 0, r);
#pragma unroll
                    for (int k = 0; k < VALUE_WORDS * 2; k++) rows[n][k / 2][k % 2][r] *= own_factor;
                }
        }
    }

    // Adds word k of this warp's, of page `page` of the round: `a` holds the bits of its 32 value rows, `planes` what `weigh`
    // left.
    __device__ __forceinline__ void add(int k, const uint4 (&a)[2], const u8* planes, int page, int group) {
        const int lane = threadIdx.x & 31;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
            const uint2* from = (const uint2*)(planes + (group * ROW_TILES + n) * WEIGHT_TILE) + lane;
            uint2 b[WEIGHT_STEPS];
#pragma unroll
            for (int s = 0; s < WEIGHT_STEPS; s++) b[s] = from[s * 32];
            const float mine = of_group(unit[n], group), units[2] = {of_row(mine, page, 0), of_row(mine, page, 1)};
#pragma unroll
            for (int half = 0; half < 2; half++) {
                Accumulators c = {0, 0, 0, 0};
#pragma unroll
                for (int s = 0; s < WEIGHT_STEPS; s++) {
                    if (s) c = Accumulators{2 * c.x, 2 * c.y, 2 * c.z, 2 * c.w};
                    c = mma_and_popc(a[half].x, a[half].y, a[half].z, a[half].w, b[s], c);
                }
                float counts[2];
                join_halves<WEIGHT_STEPS>(counts, c, lane);
#pragma unroll
                for (int r = 0; r < 2; r++) rows[n][k][half][r] = fmaf(units[r], counts[r], rows[n][k][half][r]);
            }
        }
    }

    // Leaves sum p alpha t of the first `present` rows in `partials` [ROWS, stride], and the other sums in `sums`
    // [ROWS, SUMS]. sum w t = 2 sum over t = +1 of w - sum w.
    __device__ __forceinline__ void store(float* partials, float* sums, i64 stride, i64 present, int words, const u8* groups) {
        const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
        for (int n = 0; n < ROW_TILES; n++) {
#pragma unroll
            for (int k = 0; k < VALUE_WORDS; k++) {
                const int word = warp * VALUE_WORDS + k;
                if (word >= words) break;
                const float sum_all = of_group(totals[n].all, VALUE_GROUPS == 1 ? 0 : groups[word]);
#pragma unroll
                for (int i = 0; i < 4; i++) {
                    const int half = i / 2, r = i % 2, row = n * 4 + 2 * (lane & 1) + r;
                    float* to = partials + row * stride + word * 32 + half * 16 + (lane & 2) * 4 + (lane >> 2);
                    const float of_all = of_row(sum_all, 0, r);
                    if (row < present) *to = 2 * rows[n][k][half][r] - of_all;
                }
            }
            const int row = n * 4 + lane;
            if (warp == 0 && lane < 4 && row < present) totals[n].store(sums + row * SUMS);
        }
    }

  private:
    // What the lane of `page` and of this lane's query row 2t + r, or 2 (t - 2) + r, has.
    __device__ __forceinline__ static float of_row(float v, int page, int r) {
        return __shfl_sync(ALL_LANES, v, page * 4 + 2 * (threadIdx.x & 1) + r);
    }

    __device__ __forceinline__ static float of_group(const float (&v)[VALUE_GROUPS], int group) {
        float own = v[0];
#pragma unroll
        for (int g = 1; g < VALUE_GROUPS; g++) own = g == group ? v[g] : own;
        return own;
    }
};
