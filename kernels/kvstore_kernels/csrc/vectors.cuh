// Vectors of any float dtype as the encoders read them, and the record of those that cannot be encoded. Four neighbouring
// lanes, a quad, share a vector: lane t of them has channels 32 p + 8 t .. 32 p + 8 t + 7 of each piece p.
// Macros: HEAD_DIM, a multiple of 32; INPUT (0 float32, 1 float16, 2 bfloat16).
#pragma once
#include "ptx.cuh"

#define PIECES (HEAD_DIM / 32)
#define FP16_MAX 65504.0f
#define FLOAT_MAX 3.4028235e38f
#define FLOAT_INFINITY __uint_as_float(0x7f800000)

#define NUMBER_BYTES (INPUT ? 2 : 4)
#define PARTS (NUMBER_BYTES / 2)  // 16-byte parts of eight channels

// Eight channels as they lie in memory.
struct Piece {
    u32 raw[4 * PARTS];

    __device__ __forceinline__ void set(int part, uint4 v) {
        raw[4 * part] = v.x, raw[4 * part + 1] = v.y, raw[4 * part + 2] = v.z, raw[4 * part + 3] = v.w;
    }
};

// Channel i of a piece; i is known to the compiler.
__device__ __forceinline__ float channel(const Piece& piece, int i) {
    if (INPUT == 0) return __uint_as_float(piece.raw[i]);
    const u16 half = (u16)(piece.raw[i / 2] >> (i % 2 * 16));
    return INPUT == 1 ? from_half(half) : from_bfloat(half);
}

__device__ __forceinline__ void load_eight(float (&v)[8], const float* from) {
    const float4 a = ((const float4*)from)[0], b = ((const float4*)from)[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}

// The larger of a and |b|, or NaN if one is.
__device__ __forceinline__ float max_or_nan(float a, float b) {
    asm("{.reg .f32 t; abs.f32 t,%1; max.NaN.f32 %0,%0,t;}" : "+f"(a) : "f"(b));
    return a;
}

// The same for the two numbers in a word of a piece.
__device__ __forceinline__ u32 max_or_nan(u32 a, u32 b) {
    if (INPUT == 0) return __float_as_uint(max_or_nan(__uint_as_float(a), __uint_as_float(b)));
    if (INPUT == 1)
        asm("{.reg .b32 t; abs.f16x2 t,%1; max.NaN.f16x2 %0,%0,t;}" : "+r"(a) : "r"(b));
    else
        asm("{.reg .b32 t; abs.bf16x2 t,%1; max.NaN.bf16x2 %0,%0,t;}" : "+r"(a) : "r"(b));
    return a;
}

// The greatest magnitudes met so far, in a word of a piece.
__device__ __forceinline__ u32 greatest(u32 most, const Piece& piece) {
#pragma unroll
    for (int i = 0; i < 4 * PARTS; i++) most = max_or_nan(most, piece.raw[i]);
    return most;
}

// The greatest of a quad's lanes, in each of them.
__device__ __forceinline__ float quad_most(u32 most) {
    const Piece both = {most};
    float m = INPUT ? max_or_nan(channel(both, 0), channel(both, 1)) : channel(both, 0);
    m = max_or_nan(m, __shfl_xor_sync(ALL_LANES, m, 1));
    return max_or_nan(m, __shfl_xor_sync(ALL_LANES, m, 2));
}

// The sum over a quad, in each of its lanes.
__device__ __forceinline__ float quad_sum(float v) {
    v += __shfl_xor_sync(ALL_LANES, v, 1);
    return v + __shfl_xor_sync(ALL_LANES, v, 2);
}

// The places of the first vector that is not finite and of the first whose scale fp16 cannot hold, as token * H + head.
struct Record {
    i64 not_finite, beyond;
};
