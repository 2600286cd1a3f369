// A row of scores, read in chunks of eight as integers that sort as the numbers do.
//
// A row may begin anywhere: its slots count from the 16-byte boundary at or before the place `margin` numbers before it, so that
// position p has slot p + shift, and chunk c has slots 8 c .. 8 c + 7. What lies outside the row is never read, and counts as
// key 0.
#pragma once
#include "key.cuh"

#define CHUNK 8
#if HALF
typedef u16 Score;
#else
typedef u32 Score;
#endif
#define WORDS (CHUNK * (int)sizeof(Score) / 4)  // of a chunk

// The key of a half has its lower 16 bits clear.
__device__ __forceinline__ u32 key_of_score(Score score) {
    return HALF ? key_of((u32)score << 16) & 0xffff0000u : key_of((u32)score);
}

struct Row {
    const Score* slots;
    u32 shift, end;  // slots [shift, end) hold the row

    // Row `row` of [T, heads, tokens] with these strides.
    __device__ __forceinline__ Row(const void* scores, i64 row, i64 heads, i64 token_stride, i64 head_stride, i64 tokens, i64 margin) {
        const Score* first = (const Score*)scores + row / heads * token_stride + row % heads * head_stride;
        shift = (u32)margin + (u32)((u64)(first - margin) & 15) / sizeof(Score);
        slots = first - shift;
        end = shift + (u32)tokens;
    }

    __device__ __forceinline__ bool holds(u32 slot) const { return slot >= shift && slot < end; }

    // The keys of a chunk that lies wholly inside the row.
    __device__ __forceinline__ void read_whole(u32 (&keys)[CHUNK], u32 chunk) const {
        u32 words[WORDS];
#pragma unroll
        for (int i = 0; i < WORDS; i += 4) *(uint4*)(words + i) = ((const uint4*)(slots + (i64)chunk * CHUNK))[i / 4];
#pragma unroll
        for (int i = 0; i < CHUNK; i++) keys[i] = key_of_score((Score)(HALF ? words[i / 2] >> i % 2 * 16 : words[i % WORDS]));
    }

    __device__ __forceinline__ void read(u32 (&keys)[CHUNK], u32 chunk) const {
        if (chunk * CHUNK >= shift && (chunk + 1) * CHUNK <= end) return read_whole(keys, chunk);
#pragma unroll
        for (int i = 0; i < CHUNK; i++) keys[i] = holds(chunk * CHUNK + i) ? key_of_score(slots[chunk * CHUNK + i]) : 0;
    }
};

__device__ __forceinline__ u32 largest(const u32 (&keys)[CHUNK]) {
    u32 most = keys[0];
#pragma unroll
    for (int i = 1; i < CHUNK; i++) most = max(most, keys[i]);
    return most;
}
