// Quantiser cells of the coordinates z, and rows made of the bits of their numbers.
//
// columns: for each code float4 [CONSTANTS][units * 32] in the order in which `project` gives columns two tiles at a time: 1 /
// sigma (0 for a coordinate that is not coded), 1 / width of a cell, 1.5 * 2^23 plus half its number of cells, its last
// cell, then (CODED_ENERGY) for each group 1 if it codes the coordinate, then for each group and bit, from the lowest, the
// weight of the rows that store it. All for z as `project` gives it, with the power of two of its column.
// rows: u16 [words * 32 / GRAIN], in what bit of a vector's plane words [units * 4][PLANES] GRAIN rows begin; bit j of word
// (k, p) is bit p of the cell of coordinate 32 k + j. Where all rows come in eights (GRAIN 8) whole bytes are copied.
#pragma once
#include "tile.cuh"

#define WHOLE 12582912.0f  // 1.5 * 2^23: float32 from here to 2^24 are the whole numbers
#define CODED 4
#define WEIGHTS (CODED + CODED_ENERGY * GROUPS)
#define CONSTANTS (WEIGHTS + GROUPS * PLANES)
#define GRAINS (32 / GRAIN)
#define UNIT_STEPS 16  // of `project`, a tile at a time: registers hold no more of what comes with it

struct Planes {
    const float4* columns;
    const u16* rows;
    u32* bits;
    int constant, row;  // float4 of a constant; words of a vector's bits

    template <class Code>
    __device__ __forceinline__ Planes(u8* shared, int warp, const float4* all_columns, const uint2* all_rows, const Code& code,
                                      i64 units_most, i64 words_most) {
        float4* own_columns = (float4*)shared;
        uint2* own_rows = (uint2*)(own_columns + CONSTANTS * units_most * 32);
        constant = code.units * 32;
        row = code.units * 4 * PLANES + 1;
        bits = (u32*)(own_rows + words_most * GRAINS / 4) + warp * TILE * (units_most * 4 * PLANES + 1);
        columns = own_columns;
        rows = (const u16*)own_rows;
        for (int i = threadIdx.x; i < CONSTANTS * constant; i += WARPS * 32) own_columns[i] = all_columns[(i64)code.unit * CONSTANTS * 32 + i];
        for (int i = threadIdx.x; i < code.words * GRAINS / 4; i += WARPS * 32) own_rows[i] = all_rows[(i64)code.word * GRAINS / 4 + i];
    }

    // A constant of the two columns of a step.
    __device__ __forceinline__ void load(float (&v)[2], int which, int step) const {
        const float2 both = ((const float2*)(columns + which * constant + step / 2 * 4 + (threadIdx.x & 3)))[step % 2];
        v[0] = both.x, v[1] = both.y;
    }

    // 1 / the token's rms of z / sigma over coded coordinates, in each lane; coded energy.
    __device__ __forceinline__ void take_gains(Tile& tile, float (&inverse_gain)[ROWS], const uint4* matrix, const float share, int units) const {
        float square[ROWS] = {}, energy[GROUPS][ROWS] = {};
        project<1>(tile, matrix, units * UNIT_STEPS, [&](int step, const float (&z)[ROWS][2]) {
            float inverse_sigma[2], coded[GROUPS][2];
            load(inverse_sigma, 0, step);
#pragma unroll
            for (int group = 0; group < CODED_ENERGY * GROUPS; group++) load(coded[group], CODED + group, step);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    square[r] += (z[r][i] * inverse_sigma[i]) * (z[r][i] * inverse_sigma[i]);
#pragma unroll
                    for (int group = 0; group < CODED_ENERGY * GROUPS; group++)
                        energy[group][r] += (z[r][i] * coded[group][i]) * (z[r][i] * coded[group][i]);
                }
        });
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            const float mean = quad_sum(square[r]) * share;
            inverse_gain[r] = mean > 0 ? 1 / sqrtf(mean) : 1;
#pragma unroll
            for (int group = 0; group < CODED_ENERGY * GROUPS; group++) keep_own(tile.energy[group], quad_sum(energy[group][r]), r);
        }
    }

    // The cell of z: rounding down brings a number to a whole one.
    __device__ __forceinline__ static u32 cell_of(float z, float inverse_width, float half, float last) {
        if (last == 1) return z > 0;
        const int cell = __float_as_int(__fmaf_rd(z, inverse_width, half)) - __float_as_int(WHOLE);
        return min(max(cell, 0), (int)last);
    }

    // Plane words of one unit, each bit the other way round, and <z, y> of each group over this lane's columns.
    __device__ __forceinline__ void take_unit(const Tile& tile, const float (&inverse_gain)[ROWS], const uint4* matrix, int unit,
                                              u32 (&plane)[PLANES][ROWS], float (&along)[GROUPS][ROWS]) const {
        project<1>(tile, matrix + unit * UNIT_PIECES, UNIT_STEPS, [&](int step, const float (&z)[ROWS][2]) {
            float inverse_width[2], half[2], last[2], weight[GROUPS * PLANES][2];
            load(inverse_width, 1, unit * UNIT_STEPS + step);
            load(half, 2, unit * UNIT_STEPS + step);
            load(last, 3, unit * UNIT_STEPS + step);
#pragma unroll
            for (int i = 0; i < GROUPS * PLANES; i++) load(weight[i], WEIGHTS + i, unit * UNIT_STEPS + step);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    const u32 cell = cell_of(z[r][i], inverse_width[i] * inverse_gain[r], half[i], last[i]);
                    float y[GROUPS] = {};
#pragma unroll
                    for (int bit = 0; bit < PLANES; bit++) {
                        const u32 absent = ~cell << (31 - bit);
                        plane[bit][r] = __funnelshift_l(absent, plane[bit][r], 1);
#pragma unroll
                        for (int group = 0; group < GROUPS; group++)
                            y[group] += __uint_as_float(__float_as_uint(weight[group * PLANES + bit][i]) ^ (absent & 0x80000000u));
                    }
#pragma unroll
                    for (int group = 0; group < GROUPS; group++) along[group][r] += z[r][i] * y[group];
                }
        });
    }

    // The rows of the tile's vectors: a lane makes a word of one vector at a time.
    __device__ __forceinline__ void pack(int out, int words_each, u32* words) const {
        const int lane = threadIdx.x & 31, lanes = words_each > 16 ? 32 : words_each > 8 ? 16 : words_each > 4 ? 8 : words_each > 2 ? 4 : 2;
        for (int word = lane % lanes; word - lane % lanes < words_each; word += 32) {
            const u16* from = rows + min(word, words_each - 1) * GRAINS;
            for (int vector = lane / lanes; vector < TILE; vector += 32 / lanes) {
                const u8* own = (const u8*)(bits + vector * row);
                u32 value = 0;
#pragma unroll
                for (int i = 0; i < GRAINS; i++) value |= (own[from[i] >> 3] >> (from[i] & 7) & ((1 << GRAIN) - 1)) << GRAIN * i;
                const int to = __shfl_sync(ALL_LANES, out, vector % 8 * 4 + vector / 8);
                if (to >= 0 && word < words_each) words[to + word] = value;
            }
        }
    }

    // As take_signs of encode.cu.
    template <class Code>
    __device__ __forceinline__ void take(Tile& tile, const Code& code, const uint4* matrix, int out, u32* words, float (&along)[GROUPS]) const {
        const int g = threadIdx.x >> 2 & 7, t = threadIdx.x & 3;
        float inverse_gain[ROWS], sums[GROUPS][ROWS] = {};
        take_gains(tile, inverse_gain, matrix, code.factor, code.units);
#pragma unroll 1
        for (int unit = 0; unit < code.units; unit++) {
            u32 plane[PLANES][ROWS] = {};
            take_unit(tile, inverse_gain, matrix, unit, plane, sums);
#pragma unroll
            for (int r = 0; r < ROWS; r++)
#pragma unroll
                for (int bit = 0; bit < PLANES; bit++) bits[(8 * r + g) * row + (4 * unit + t) * PLANES + bit] = ~plane[bit][r];
        }
        __syncwarp();
        pack(out, code.words, words);
        __syncwarp();
#pragma unroll
        for (int group = 0; group < GROUPS; group++)
#pragma unroll
            for (int r = 0; r < ROWS; r++) keep_own(along[group], quad_sum(sums[group][r]), r);
    }
};
