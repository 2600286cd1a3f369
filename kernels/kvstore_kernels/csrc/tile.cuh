// A warp's vectors as the A operand of tensor-core products, and the products with a matrix: encode.cu says in what order
// things lie.
#pragma once
#include "vectors.cuh"

#define TILE (16 * TILES)
#define ROWS (2 * TILES)
#define UNIT_PIECES (16 * PIECES * 32)  // 16-byte pieces of the matrix in a unit of 128 columns
#define MEAN_ROW (HEAD_DIM + 4)         // numbers: two heads' rows begin in different banks
#define RAW_PIECES (ROWS * PIECES * PARTS * 32)

// Where one head's sketch lies in a token's row, and the greatest magnitude of its mean, which the kernel fills in.
struct Place {
    int head, word, scale;
    float most;
};

// The places and means of a code's heads, in shared memory.
struct Means {
    Place* places;
    float* rows;

    __device__ __forceinline__ void read(int slot, Place place, const float* mean, int lane) const {
        place.most = 0;
        for (int i = lane; i < HEAD_DIM; i += 32) {
            const float v = mean[place.head * HEAD_DIM + i];
            rows[slot * MEAN_ROW + i] = v;
            place.most = fmaxf(place.most, fabsf(v));
        }
        for (int d = 16; d; d >>= 1) place.most = fmaxf(place.most, __shfl_xor_sync(ALL_LANES, place.most, d));
        if (lane == 0) places[slot] = place;
    }
};

// The vectors of a code, and how they lie in x and in the words.
struct Source {
    const void* x;
    int count, shared_heads, width;
    i64 stride;
};

// The vector of the tile that a lane answers for, row t % ROWS of its quad; row r of a quad is vector 8 r + g of the tile.
struct Owned {
    int token, slot;  // slot: of its head among those of the code
    bool present;     // past the end the last vector stands in

    __device__ __forceinline__ Owned(int first, const Source& source) {
        const int vector = first + 8 * (threadIdx.x % ROWS) + (threadIdx.x >> 2 & 7);
        present = vector < source.count;
        token = min(vector, source.count - 1) / source.shared_heads;
        slot = min(vector, source.count - 1) - token * source.shared_heads;
    }
};

// What the lane that answers for row r of its quad knows.
template <class T>
__device__ __forceinline__ T of_row(T value, int r) {
    return __shfl_sync(ALL_LANES, value, (threadIdx.x & 28) | r);
}

// Starts to copy a tile's vectors to `raw`, every lane what it will read.
__device__ __forceinline__ void fetch(uint4* raw, const Source& source, const Owned& owned, const Means& means) {
    const int lane = threadIdx.x & 31;
    const i64 own = owned.token * source.stride + means.places[owned.slot].head * HEAD_DIM;
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        const u8* from = (const u8*)source.x + (of_row(own, r) + 8 * (lane & 3)) * NUMBER_BYTES;
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int i = 0; i < PARTS; i++)
                copy_async(shared_address(raw + ((r * PIECES + p) * PARTS + i) * 32 + lane), from + p * 32 * NUMBER_BYTES + i * 16);
    }
}

struct Tile {
    uint4 x[ROWS][PIECES];  // halves of (x - mean) / unscale
    float energy[GROUPS];   // |x - mean|^2 / unscale^2 over a group's channels, of the vector that the lane answers for
    float unscale;
};

// A power of two that brings `most` to 2^14 .. 2^15, and its inverse. Vectors below 2^-111 stay below.
__device__ __forceinline__ float scale_for(float most, float& unscale) {
    const u32 exponent = min(268 - (__float_as_uint(most) >> 23 & 255), 253u);
    unscale = __uint_as_float((254 - exponent) << 23);
    return __uint_as_float(exponent << 23);
}

// Keeps what is row t % ROWS of a quad.
__device__ __forceinline__ void keep_own(float& own, float value, int r) {
    if (r == (threadIdx.x % ROWS)) own = value;
}

// Eight channels of row r that have been fetched.
__device__ __forceinline__ Piece fetched(const uint4* raw, int r, int p) {
    Piece piece;
#pragma unroll
    for (int i = 0; i < PARTS; i++) {
        const uint4 part = load_shared_16(shared_address(raw + ((r * PIECES + p) * PARTS + i) * 32 + (threadIdx.x & 31)));
        piece.set(i, part);
    }
    return piece;
}

// Powers of two that scale the rows; notes a vector that is not finite.
__device__ __forceinline__ void find_scales(float (&scale)[ROWS], Tile& tile, const uint4* raw, const Owned& owned, const Means& means,
                                            i64* not_finite, i64 heads) {
#pragma unroll
    for (int r = 0; r < ROWS; r++) {
        u32 most = 0;
#pragma unroll
        for (int p = 0; p < PIECES; p++) most = greatest(most, fetched(raw, r, p));
        const float x_most = quad_most(most);
        const Place place = means.places[of_row(owned.slot, r)];
        const int token = of_row(owned.token, r);
        if (!(x_most <= FLOAT_MAX)) atomicMin(not_finite, token * heads + place.head);
        float unscale;
        scale[r] = scale_for(x_most + place.most, unscale);
        keep_own(tile.unscale, unscale, r);
    }
}

// Subtracts the means, scales and rounds to halves. `raw` is read again, because registers do not hold both.
__device__ __forceinline__ void fill(Tile& tile, const float (&scale)[ROWS], const uint4* raw, const Owned& owned, const Means& means,
                                     const float* support) {
    const int t = threadIdx.x & 3;
    float energy[GROUPS][ROWS] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        float mean[8], inside[GROUPS][8];
#pragma unroll
        for (int group = 0; group < (SUPPORT ? GROUPS : 0); group++) load_eight(inside[group], support + group * HEAD_DIM + 32 * p + 8 * t);
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
            if (r == 0 || !ALIKE) load_eight(mean, means.rows + of_row(owned.slot, r) * MEAN_ROW + 32 * p + 8 * t);
            const Piece piece = fetched(raw, r, p);
            float v[8];
#pragma unroll
            for (int i = 0; i < 8; i++) {
                v[i] = (channel(piece, i) - mean[i]) * scale[r];
#pragma unroll
                for (int group = 0; group < (CODED_ENERGY ? 0 : GROUPS); group++)
                    energy[group][r] += v[i] * v[i] * (SUPPORT ? inside[group][i] : 1.0f);
            }
            tile.x[r][p] = make_uint4(to_halves(v[0], v[1]), to_halves(v[2], v[3]), to_halves(v[4], v[5]), to_halves(v[6], v[7]));
        }
    }
#pragma unroll
    for (int group = 0; group < GROUPS; group++)
#pragma unroll
        for (int r = 0; r < ROWS; r++) keep_own(tile.energy[group], quad_sum(energy[group][r]), r);
}

// Columns of z = A B, 2 N neighbours of a lane's word at a time: take(step, z) with z[r] of row r the columns from
// 31 - 2 N step down. A unit has 16 / N steps.
template <int N, class Take>
__device__ __forceinline__ void project(const Tile& tile, const uint4* matrix, int steps, const Take& take) {
#pragma unroll 1
    for (int step = 0; step < steps; step++) {
        float sums[N][TILES][4] = {}, z[ROWS][2 * N];
#pragma unroll
        for (int p = 0; p < PIECES; p++)
#pragma unroll
            for (int n = 0; n < N; n++) {
                const uint4 b = matrix[((N * step + n) * PIECES + p) * 32];
#pragma unroll
                for (int i = 0; i < TILES; i++) {
                    const uint4 low = tile.x[2 * i][p], high = tile.x[2 * i + 1][p];
                    mma_half(sums[n][i], {low.x, high.x, low.y, high.y}, b.x, b.y);
                    mma_half(sums[n][i], {low.z, high.z, low.w, high.w}, b.z, b.w);
                }
            }
#pragma unroll
        for (int r = 0; r < ROWS; r++)
#pragma unroll
            for (int i = 0; i < 2 * N; i++) z[r][i] = sums[i / 2][r / 2][r % 2 * 2 + i % 2];
        take(step, z);
    }
}
