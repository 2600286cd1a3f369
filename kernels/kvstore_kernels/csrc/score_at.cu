// Logits of chosen tokens of keys on device pages: of no other token are bits read.
//
// Grid (ceil(C / CHOSEN), R, H), 8 warps: a block keeps one query row's integers, as query.cuh has them, and takes CHOSEN of
// the tokens that the row asks for, a warp one at a time. A lane sums the integers of every 32nd word.
//
// Row r of KV head h is query token r / group, query head h * group + r % group. y float32 [H, R, length]: the head's rows of
// E, at `width` <q, mean>, then <q, f_g>. positions int64 [T, Hq, C], counted from `first`; out float32 [T, Hq, C].
// groups u8 [H, width / 32]. Pages: logits.cuh.
// Macros: KEY_GROUPS, KEY_OFFSETS, PLANES, SOFT_CAP.
#include "page.cuh"
#include "warp.cuh"

#define CHOSEN 64
#define WARPS 8
#define INTEGERS 33  // of one word, in shared memory: no two lanes meet in a bank

extern "C" __global__ void __launch_bounds__(WARPS * 32)
    score_at(const u8* __restrict__ slab, const int* __restrict__ table, const Head* __restrict__ heads, const u8* __restrict__ groups,
             const float* __restrict__ y, const i64* __restrict__ positions, float* __restrict__ out, i64 first, i64 count, i64 query_heads,
             i64 group, i64 length, i64 width, float unit, float cap) {
    extern __shared__ int integers[];
    __shared__ float largest[WARPS];
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.z;
    const int r = blockIdx.y, rows = (int)group;  // 64-bit division would call a function
    const float* own = y + ((i64)h * gridDim.y + r) * length;
    const Head head = heads[h];
    float most = 0;
    for (int i = threadIdx.x; i < width; i += WARPS * 32) most = fmaxf(most, fabsf(own[i]));
    most = warp_max(most);
    if (lane == 0) largest[warp] = most;
    __syncthreads();
    for (int i = 0; i < WARPS; i++) most = fmaxf(most, largest[i]);
    float step = most / (float)((1 << (PLANES - 1)) - 1);
    if (!(step >= 1.17549435e-38f)) step = 0;
    for (int i = threadIdx.x; i < width; i += WARPS * 32)
        integers[(i >> 5) * INTEGERS + (i & 31)] = step > 0 ? (int)rintf(own[i] / step) : 0;
    __syncthreads();

    const i64 row_place = (r / rows * query_heads + h * group + r % rows) * count;
    const i64 begin = (i64)blockIdx.x * CHOSEN, end = min(begin + CHOSEN, count);
    for (i64 c = begin + warp; c < end; c += WARPS) {
        const i64 token = first + positions[row_place + c];
        const u8* page = slab + (i64)table[token / PAGE] * 512;
        const int row = (int)(token % PAGE), g = row % 32 / 4, turned = (row & 3) ^ (g >> 1 & 1);
        const int in_chunk = 4 * g + ((turned & 1) << 1 | turned >> 1);
        int sums[KEY_GROUPS] = {};
        for (int word = lane; word < head.words; word += 32) {
            const int block = word & ~7, block_words = min(8, head.stored - block);
            const u32* words = (const u32*)(page + (i64)(head.word_start + block) * 1024);
            const u32 bits = words[(row / 32 * block_words + word - block) * 32 + in_chunk];
            const int* weights = integers + word * INTEGERS;
            int sum = 0;
#pragma unroll
            for (int j = 0; j < 32; j++) sum += bits >> j & 1 ? weights[j] : -weights[j];
#pragma unroll
            for (int k = 0; k < KEY_GROUPS; k++)
                if (KEY_GROUPS == 1 || groups[h * (width / 32) + word] == k) sums[k] += sum;
        }
        float logit = own[width];
        const u16* scales = (const u16*)(page + (i64)head.scale_start * 512) + row;
#pragma unroll
        for (int k = 0; k < KEY_GROUPS; k++) {
            const int sum = __reduce_add_sync(ALL_LANES, sums[k]);
            if (head.stored) {
                logit += from_half(scales[k * PAGE]) * step * (float)sum;
                if (KEY_OFFSETS) logit += from_half(scales[(KEY_GROUPS + k) * PAGE]) * own[width + 1 + k];
            }
        }
        logit *= unit;
        if (lane == 0) out[row_place + c] = SOFT_CAP ? cap * tanhf(logit) : logit;
    }
}
