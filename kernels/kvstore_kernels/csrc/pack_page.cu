// Token-major sketches into device pages: rows [first, end) of the pages that `table` names, from words [N, W] and scales
// [N, S] of positions first, first + 1, ...
//
// Grid (pages touched, ceil(W / 32)), 8 warps: a block turns 32 words of the 256 rows of a page around in shared memory; the
// blocks with y = 0 also do the scales. Rows of the first page below `first` keep what they hold if `keep` is set; all
// other rows outside [first, end) become 0.
//
// Page: each head's words, 1024 bytes a word, then scale rows of 512 bytes, [S][256] halves. Keys lie in blocks of up to 8
// words of a head, as logits.cuh says: block_starts int [W] gives the first word of each word's block, block_words int [W]
// how many words it has. A word of values is 32 channels by bits, in two tiles of 16, as attend.cu says.
// Macros: VALUES (0 keys, 1 values).
#include "page.cuh"

#define TILE_WORDS 32
#define ROW (TILE_WORDS + 1)

// Bit p of the result of lane i was bit i of the word of lane p.
__device__ __forceinline__ u32 transpose_32x32(u32 x, int lane) {
    u32 mask = 0x0000ffff;
#pragma unroll
    for (int d = 16; d; d >>= 1) {
        const u32 other = __shfl_xor_sync(ALL_LANES, x, d);
        x = lane & d ? (x & ~mask) | (other >> d & mask) : (x & mask) | (other & mask) << d;
        mask ^= mask << (d >> 1);
    }
    return x;
}

extern "C" __global__ void __launch_bounds__(256)
    pack_page(const u32* __restrict__ words, const u16* __restrict__ scales, u8* __restrict__ slab, const int* __restrict__ table,
              const int* __restrict__ block_starts, const int* __restrict__ block_words, i64 first, i64 end, i64 width, i64 scale_count, i64 keep) {
    __shared__ u32 tile[PAGE * ROW];
#if VALUES
    __shared__ __align__(16) u32 turned[8][PAGE];
#endif
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, word_first = blockIdx.y * TILE_WORDS;
    const i64 page = first / PAGE + blockIdx.x, start = page * PAGE;
    u8* to = slab + (i64)table[page] * 512;
    const int low = (int)max(first - start, 0ll), high = (int)min(end - start, (i64)PAGE), kept = keep ? low : 0;

    for (int row = warp; row < PAGE; row += 8) {
        const bool present = row >= low && row < high && word_first + lane < width;
        tile[row * ROW + lane] = present ? words[(start + row - first) * width + word_first + lane] : 0;
    }
    __syncthreads();
    for (int w = warp; w < TILE_WORDS && word_first + w < width; w += 8) {
#if VALUES
        u32* out = (u32*)(to + (i64)(word_first + w) * 1024);
#pragma unroll
        for (int k = 0; k < 8; k++) {
            const int t = k >> 1, s = k & 1, i = lane >> 4, j = lane >> 3 & 1, c = lane & 7;
            const int row = 32 * c + 4 * (2 * t + i) + 2 * s + j;
            const u32 old = __ballot_sync(ALL_LANES, row < kept), bits = transpose_32x32(tile[row * ROW + w], lane);
            const int at = (lane >> 4) * 128 + ((lane & 7) * 4 + t) * 4 + 2 * s + (lane >> 3 & 1);
            turned[warp][at] = bits | (old ? out[at] & old : 0);
        }
        __syncwarp();
        for (int i = lane; i < PAGE / 4; i += 32) ((uint4*)out)[i] = ((const uint4*)turned[warp])[i];
        __syncwarp();
#else
        const int start = block_starts[word_first + w], words_of_block = block_words[word_first + w];
        u32* out = (u32*)(to + (i64)start * 1024) + (word_first + w - start) * 32;
        const int token = ((lane & 1) << 1 | (lane >> 1 & 1)) ^ (lane >> 3 & 1);
        for (int chunk = 0; chunk < 8; chunk++) {
            const int row = chunk * 32 + (lane & ~3) + token;
            if (row >= kept) out[chunk * words_of_block * 32 + lane] = tile[row * ROW + w];
        }
#endif
    }
    if (blockIdx.y) return;
    u16* to_scales = (u16*)(to + width * 1024);
    for (i64 i = threadIdx.x; i < scale_count * PAGE; i += 256) {
        const int row = (int)(i & (PAGE - 1));
        const i64 column = i / PAGE;
        const bool present = row >= low && row < high;
        if (row >= kept) to_scales[i] = present ? scales[(start + row - first) * scale_count + column] : 0;
    }
}
