// One warp, one page of 256 keys, four query rows: logits on binary tensor cores, no bit expanded.
//
// A page of keys holds each head's words in blocks of up to 8, [8 chunks of 32 tokens][words of the block][8 g][4 tokens],
// tokens 4g, 4g + 2, 4g + 1, 4g + 3 where g & 2 is 0, else 4g + 1, 4g + 3, 4g, 4g + 2, and its scales as [scales][256 tokens]
// halves. A piece is a chunk of one block. Lane (g, t) reads four tokens of word t and of word t + 4, which are rows g and
// g + 8 of two products; the order of tokens spares it bank conflicts and moves. Lanes t < 2 end
// with the upper half of the sums of query rows 2t and 2t + 1, lanes t + 2 with the lower half, and each takes over half of
// the tokens from the other: lane (g, t) has logits x[c][j][r] of tokens 32 c + 4 g + 2 (t / 2) + j, c < 8, j < 2, for query
// rows 2 (t % 2) + r.
#pragma once
#include "query.cuh"
#include "ring.cuh"

#define CHUNKS 8
#define PASS_PIECES (CHUNKS * UNITS)
#define REREAD (ROW_TILES > 1 && PASS_PIECES == RING)  // the ring holds a whole page: passes after the first find it there
#define KEY_PIECES (PASS_PIECES * (REREAD ? 1 : ROW_TILES))  // that a warp asks for, a page
#define KEY_SCALES (KEY_GROUPS * (1 + KEY_OFFSETS))

// Two blocks of 8 warps on a multiprocessor, that leave registers for the kernel before: its last blocks then run beside them.
// Before Hopper none does.
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1204 && __CUDA_ARCH__ >= 900
#define TWO_BLOCKS __maxnreg__(120)
#else
#define TWO_BLOCKS __launch_bounds__(256, 2)
#endif

typedef float PageLogits[CHUNKS][2][2];

// The integer FLOATING + n has the bits of the float32 OFFSET + n, |n| < 2^22.
#define FLOATING 0x4b400000
#define OFFSET 12582912.0f

__device__ __forceinline__ int token_of(int lane, int c, int j) { return 32 * c + (lane >> 2) * 4 + (lane & 2) + j; }

// Where the 16 bytes of word `t` and of tokens 4g .. 4g + 3 lie in half a piece: the eight g of a word fill one row of 128
// bytes, as requests that the hardware does not split must, and four words of four g meet no bank conflict.
__device__ __forceinline__ u32 in_piece(int g, int t) { return t * 128 + (g ^ ((t & 1) << 2 | (t & 2))) * 16; }

// A warp's walk over the pieces of a page's keys, in the order in which they are used. Lane (t, g = lane % 8) asks for word t
// of a block and for word t + 4; if a word is not there, for another: its bits meet planes of zeros.
struct KeyWalk {
    const u8* at;
    Head head;
    const int* units;

    __device__ __forceinline__ int block_words(int block) const { return min(8, head.stored - 8 * block); }

    // Asks for piece `number` of the walk over `page`, into place `to` of the ring.
    __device__ __forceinline__ void push(const Ring& ring, int to, const u8* page, int number) {
        const int unit = UNITS == 1 ? 0 : number / CHUNKS, chunk = number % CHUNKS;
        const int t = (threadIdx.x & 31) >> 3, g = threadIdx.x & 7;
        const u8* words = page + (i64)head.word_start * 1024 + g * 16;
        if (KEY_GROUPS > 1) {
            const u8* first = word_at(words, chunk, unit_word(units, unit, t));
            ring.push(to, in_piece(g, t), first, word_at(words, chunk, unit_word(units, unit, t + 4)), head.words > 0);
            return;
        }
        if (number == 0) at = words;
        const int left = head.words - unit * 8;
        ring.push(to, in_piece(g, t), at + (t < left ? t : 0) * 128, at + (t + 4 < left ? t + 4 : 0) * 128, left > 0);
        at += block_words(unit) * 128;
    }

    __device__ __forceinline__ const u8* word_at(const u8* words, int chunk, int word) const {
        word = word < head.words ? word : 0;
        return words + (i64)(word & ~7) * 1024 + (chunk * block_words(word >> 3) + (word & 7)) * 128;
    }
};

// cap tanh(x log(2) / 2). Not by a division, whose slow path is a call: registers do not suffice around it.
__device__ __forceinline__ float capped(float x, float cap) { return cap * (1 - 2 * inverse_fast(1 + exp2_fast(x))); }

// The halves of a lane's scales of tokens token_of(lane, c, 0) and + 1.
__device__ __forceinline__ u32 scale_pair(const u16* scales, int lane, int c) { return *(const u32*)(scales + token_of(lane, c, 0)); }

// The numbers whose upper parts lanes t < 2 have in `c`, for query rows 2t and 2t + 1, and lanes t + 2 the lower ones of BITS
// bits: lanes t < 2 end with those of the product's row g, lanes t + 2 with those of row g + 8.
template <int BITS>
__device__ __forceinline__ void join_halves(float (&d)[2], Accumulators c, int lane) {
    const bool upper = (lane & 2) == 0;
    const int x = __shfl_xor_sync(ALL_LANES, upper ? c.z : c.x, 2), y = __shfl_xor_sync(ALL_LANES, upper ? c.w : c.y, 2);
    const int own_factor = upper ? 1 << BITS : 1, other_factor = upper ? 1 : 1 << BITS;
    d[0] = __int_as_float(own_factor * (upper ? c.x : c.z) + (other_factor * x + FLOATING)) - OFFSET;
    d[1] = __int_as_float(own_factor * (upper ? c.y : c.w) + (other_factor * y + FLOATING)) - OFFSET;
}

// Sums of the integers where t = +1, over one unit, of 16 tokens: d, for the two rows of this lane and one of its tokens.
__device__ __forceinline__ void unit_dots(float (&d)[2], uint2 low, uint2 high, const uint2 (&b)[STEPS], int lane) {
    const int first_factor = (lane & 2) == 0 ? -2 : 2;
    Accumulators c = {0, 0, 0, 0};
#pragma unroll
    for (int s = 0; s < STEPS; s++) {
        const int factor = s == 1 ? first_factor : 2;  // the first upper plane counts -2^(PLANES - 1)
        if (s) c = Accumulators{factor * c.x, factor * c.y, factor * c.z, factor * c.w};
        c = mma_and_popc(low.x, low.y, high.x, high.y, b[s], c);
    }
    join_halves<STEPS>(d, c, lane);
}

// Takes a page's pieces from the ring, where the first has place 0, calling `refill(n)` once piece n is used; if not
// `last_pass` of several that read them again, leaves them there. `scales` are the page's rows of scales in shared memory.
// `planes` and `constants` begin at this pass's four rows.
template <class Refill>
__device__ __forceinline__ void page_logits(PageLogits& x, const Ring& ring, const uint2* planes, const float* constants,
                                            const u16* scales, const int* units, float cap, bool last_pass, Refill refill) {
    const int lane = threadIdx.x & 31;
    const float* rows[2] = {constants + 2 * (lane & 1) * ROW_CONSTANTS, constants + (2 * (lane & 1) + 1) * ROW_CONSTANTS};
    const u32 first = in_piece(lane >> 2, lane & 3) + (lane & 8), second = first ^ 8;  // the tokens of j = 0 and of j = 1
    if (REREAD) {
        await_copies<0>();
        __syncwarp();
    }
#pragma unroll 1
    for (int u = 0; u < UNITS; u++) {
        uint2 b[STEPS];
#pragma unroll
        for (int s = 0; s < STEPS; s++) b[s] = planes[(u * STEPS + s) * 32 + lane];
        const int group = unit_group(units, u);
        const float slope[2] = {rows[0][SLOPE(group)], rows[1][SLOPE(group)]};
#pragma unroll
        for (int c = 0; c < CHUNKS; c++) {
            if (!REREAD) ring.await();
            const u32 alphas = KEY_GROUPS == 1 ? 0 : scale_pair(scales + group * PAGE, lane, c);
#pragma unroll
            for (int j = 0; j < 2; j++) {
                const u32 at = ring.slot(c) + (j ? second : first);
                const uint2 low = load_shared_8(at), high = load_shared_8(at + PIECE / 2);
                float dots[2];
                unit_dots(dots, low, high, b, lane);
#pragma unroll
                for (int r = 0; r < 2; r++) {
                    const float part =
                        KEY_GROUPS == 1 ? dots[r] : (j ? high_half(alphas) : low_half(alphas)) * (slope[r] * dots[r]);
                    x[c][j][r] = UNITS == 1 || u == 0 ? part : x[c][j][r] + part;
                }
            }
            if (!REREAD || last_pass) {
                __syncwarp();
                refill(u * CHUNKS + c);
            }
        }
    }
#pragma unroll
    for (int c = 0; c < CHUNKS; c++) {
        float logit[2][2];
#pragma unroll
        for (int g = 0; g < KEY_GROUPS; g++) {
            const u32 alphas = scale_pair(scales + g * PAGE, lane, c);
            const u32 betas = KEY_OFFSETS ? scale_pair(scales + (KEY_GROUPS + g) * PAGE, lane, c) : 0;
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int j = i >> 1, r = i & 1;
                const float alpha = j ? high_half(alphas) : low_half(alphas);
                float inner = rows[r][SHIFT(g)];
                if (KEY_GROUPS == 1) inner = fmaf(rows[r][SLOPE(0)], x[c][j][r], inner);
                if (DEBIAS) inner = fmaf(alpha, rows[r][SPREAD(g)], inner);
                float sum = logit[j][r];
                if (g == 0) sum = KEY_GROUPS == 1 ? rows[r][0] : rows[r][0] + x[c][j][r];
                sum = fmaf(alpha, inner, sum);
                if (KEY_OFFSETS) sum = fmaf(j ? high_half(betas) : low_half(betas), rows[r][ALONG(g)], sum);
                logit[j][r] = sum;
            }
        }
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const float sum = logit[i >> 1][i & 1];
            x[c][i >> 1][i & 1] = SOFT_CAP ? capped(sum, cap) : sum;
        }
    }
}
