// Scores as integers that sort as they do.
#pragma once
#include "ptx.cuh"

// Of the bits of a float32. Zeros of either sign are equal; 0 is below every number.
__device__ __forceinline__ u32 key_of(u32 bits) {
    const u32 sign = 0x80000000u, number = bits == sign ? 0 : bits;
    return number & sign ? ~number : number | sign;
}
