// Groups of 32 channels a vector as min/max codes of PLANES bits: x^ = beta + alpha sum_p 2^(PLANES - 1 - p) t_p.
//
// Grid (ceil(N H / 64)), 8 warps: a quad of lanes takes a vector, a lane eight channels of each of its groups.
//
// x, mean and record as in encode.cu. places int [H, 2]: the head's first word, -1 if it has none, and its first scale.
// words int [N, width]: word p * D / 32 + g of a head is plane p of its group g, most significant first. scales halves
// [N, scale_width]: a head's alphas, then its betas.
//
// Numbers: those of the reference, which are float64: where float32 cannot say which code is nearest, float64 does.
// Macros: HEAD_DIM, INPUT, PLANES (1..8).
//
// 131,072 tokens x 8 heads of 128 channels from fp16, 2 planes (H100, which copies 3.0 TB/s):
//   v1 a quad takes a group, every code checked by itself, words by two shuffles each: 235 us
//   v2 a quad takes a vector, codes checked eight at a time, bytes transposed: 135 us, 80 % of the copy
#include "vectors.cuh"

#define THREADS 256
#define TOP ((1 << PLANES) - 1)
#define WHOLE 12582912.0f            // 1.5 * 2^23: added to a float32, rounds it to a whole number, half to even
#define UNSURE (0.5f - TOP * 0x1p-20f)  // from the nearest code: with the errors of float32 perhaps half way to another
#define QUADS (THREADS / 4)
#define FOURS ((PIECES + 3) / 4)

// The codes of eight channels, a byte each.
__device__ __forceinline__ uint2 codes_of(const float (&v)[8], float low, float high) {
    const float inverse = high > low ? 1 / (high - low) : 1;
    u32 codes[2] = {};
    float farthest = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) {
        const float place = (v[i] - low) * inverse * TOP, whole = place + WHOLE;
        farthest = fmaxf(farthest, fabsf(place - (whole - WHOLE)));
        codes[i / 4] |= (__float_as_uint(whole) & TOP) << i % 4 * 8;
    }
    if (farthest < UNSURE) return make_uint2(codes[0], codes[1]);
    const double width = (double)high - low;
    codes[0] = codes[1] = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) codes[i / 4] |= ((u32)rint(((double)v[i] - low) / (width > 0 ? width : 1) * TOP) & TOP) << i % 4 * 8;
    return make_uint2(codes[0], codes[1]);
}

// Bit `plane` of eight bytes as a byte: four bits each by a product whose terms do not overlap.
__device__ __forceinline__ u32 byte_of(uint2 codes, int plane) {
    const u32 low = (codes.x >> plane & 0x01010101) * 0x10204080 >> 28, high = (codes.y >> plane & 0x01010101) * 0x10204080 >> 28;
    return low | high << 4;
}

// Byte t of lane i of a quad becomes byte i of lane t.
__device__ __forceinline__ u32 transpose_bytes(u32 bytes) {
    const int t = threadIdx.x & 3;
    u32 other = __shfl_xor_sync(ALL_LANES, bytes, 2);
    bytes = t & 2 ? __byte_perm(other, bytes, 0x7632) : __byte_perm(bytes, other, 0x5410);
    other = __shfl_xor_sync(ALL_LANES, bytes, 1);
    return t & 1 ? __byte_perm(other, bytes, 0x7351) : __byte_perm(bytes, other, 0x6240);
}

extern "C" __global__ void __launch_bounds__(THREADS)
    affine(const void* __restrict__ x, const float* __restrict__ mean, const int2* __restrict__ places, u32* __restrict__ words,
           u16* __restrict__ scales, Record* __restrict__ record, i64 tokens, i64 stride, i64 heads, i64 width, i64 scale_width) {
    let_next_kernel_start();
    const int t = threadIdx.x & 3, count = (int)(tokens * heads), own = blockIdx.x * QUADS + (threadIdx.x >> 2);
    const int vector = min(own, count - 1), token = vector / (int)heads, head = vector - token * (int)heads;
    Piece pieces[PIECES];
    const u8* from = (const u8*)x + (token * stride + head * HEAD_DIM + 8 * t) * NUMBER_BYTES;
    u32 most = 0, bytes[PLANES][FOURS] = {};
#pragma unroll
    for (int p = 0; p < PIECES; p++)
#pragma unroll
        for (int i = 0; i < PARTS; i++) pieces[p].set(i, *(const uint4*)(from + p * 32 * NUMBER_BYTES + i * 16));
    const int2 place = places[head];
    const bool present = own < count && place.x >= 0;
    u16* to = scales + token * scale_width + place.y + (t & 1) * PIECES;
#pragma unroll
    for (int p = 0; p < PIECES; p++) {
        float v[8], own_mean[8];
        load_eight(own_mean, mean + head * HEAD_DIM + p * 32 + 8 * t);
        most = greatest(most, pieces[p]);
#pragma unroll
        for (int i = 0; i < 8; i++) v[i] = channel(pieces[p], i) - own_mean[i];
        float low = v[0], high = v[0];
#pragma unroll
        for (int i = 1; i < 8; i++) low = fminf(low, v[i]), high = fmaxf(high, v[i]);
#pragma unroll
        for (int d = 1; d < 4; d *= 2) {
            low = fminf(low, __shfl_xor_sync(ALL_LANES, low, d));
            high = fmaxf(high, __shfl_xor_sync(ALL_LANES, high, d));
        }
        const uint2 codes = codes_of(v, low, high);
#pragma unroll
        for (int plane = 0; plane < PLANES; plane++) bytes[plane][p / 4] |= byte_of(codes, PLANES - 1 - plane) << p % 4 * 8;
        const double scale = t ? ((double)high + low) / 2 : ((double)high - low) * (0.5 / TOP);
        if (present && t < 2) {
            if (!(fabs(scale) <= FP16_MAX)) atomicMin(&record->beyond, vector);
            to[p] = (u16)to_halves((float)scale, 0);
        }
    }
    if (!(quad_most(most) <= FLOAT_MAX)) atomicMin(&record->not_finite, vector);
#pragma unroll
    for (int plane = 0; plane < PLANES; plane++)
#pragma unroll
        for (int i = 0; i < FOURS; i++) {
            const u32 word = transpose_bytes(bytes[plane][i]);
            if (present && 4 * i + t < PIECES) words[token * width + place.x + plane * PIECES + 4 * i + t] = word;
        }
    await_previous_kernel();
}
