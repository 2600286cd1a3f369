// Logits of stored sign sketches, [rows, tokens], from device pages: <q, k^> in exact integers, then scales and soft cap.
//
// Grid (splits, H, ceil(R / ROWS)), 8 warps: a block takes the pages of one split of one head and ROWS = 4 ROW_TILES query
// rows, a warp every eighth page. Layout of a page and of the products: logits.cuh; of the queries: query.cuh.
//
// slab: device pages; table int [pages]: where each page begins, in 512-byte units. heads: Head [H]. unit_words int
// [H][UNITS][9]: query.cuh. y: what expand.cu wrote. out float32 or (OUT_HALF) float16 [T, Hq, out_stride], written at
// columns `position - origin` for positions in [first, end) alone; origin and out_stride are multiples of 8.
// maxima u32 [T, Hq, groups]: if MAXIMA, the key of the largest logit of each 64 << group_shift tokens from column 0 on, at most
// a page; 0 where none is in [first, end).
// Macros: UNITS, PLANES, KEY_GROUPS, KEY_OFFSETS, SOFT_CAP, ROW_TILES, OUT_HALF, MAXIMA.
#define DEBIAS 0
#define WARPS 8
#include "key.cuh"
#include "logits.cuh"

#define SCALE_BYTES (KEY_SCALES * 512)

// As many registers as keep all values out of memory: with several units or groups that leaves one block a multiprocessor.
#if UNITS > 1 || KEY_GROUPS > 1
#define BOUNDS __launch_bounds__(256, 1)
#elif ROW_TILES > 1 && __CUDA_ARCH__ >= 900
#define BOUNDS __launch_bounds__(256, 2)
#else
#define BOUNDS TWO_BLOCKS
#endif

#if OUT_HALF
typedef u16 Logit;
__device__ __forceinline__ Logit to_logit(float v) { return (u16)to_halves(v, v); }
__device__ __forceinline__ void store_pair(Logit* out, float a, float b) { *(u32*)out = to_halves(a, b); }
#else
typedef float Logit;
__device__ __forceinline__ Logit to_logit(float v) { return v; }
__device__ __forceinline__ void store_pair(Logit* out, float a, float b) { *(float2*)out = make_float2(a, b); }
#endif

// Of COUNT numbers the largest each over the lanes that differ in bits BIT .. 16 alone. A lane ends with one of them: bit BIT
// chooses the half of the numbers, the next bit the half of these, and so on.
template <int COUNT, int BIT>
__device__ __forceinline__ float largest_over_lanes(const float (&v)[COUNT]) {
    if constexpr (BIT == 32) {
        return v[0];
    } else if constexpr (COUNT == 1) {
        return largest_over_lanes<1, 2 * BIT>({fmaxf(v[0], __shfl_xor_sync(ALL_LANES, v[0], BIT))});
    } else {
        const bool upper = threadIdx.x & BIT;
        float own[COUNT / 2];
#pragma unroll
        for (int i = 0; i < COUNT / 2; i++) {
            const float other = __shfl_xor_sync(ALL_LANES, upper ? v[i] : v[COUNT / 2 + i], BIT);
            own[i] = fmaxf(upper ? v[COUNT / 2 + i] : v[i], other);
        }
        return largest_over_lanes<COUNT / 2, 2 * BIT>(own);
    }
}

// The key of the largest logit of tokens [64 i, 64 (i + 1)) of a page within [from, to), for the row 2 (t % 2) + t / 2 and
// i = g % 2 * 2 + g / 2 % 2; or, with `shift`, for that many neighbours together.
__device__ __forceinline__ u32 group_maximum(const PageLogits& x, int from, int to, int shift) {
    const int lane = threadIdx.x & 31;
    float most[8];
#pragma unroll
    for (int r = 0; r < 2; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
            float& own = most[4 * r + i];
            own = __int_as_float(0xff800000);
#pragma unroll
            for (int n = 0; n < 4; n++) {
                const int c = 2 * i + n / 2, token = token_of(lane, c, n % 2);
                if (token >= from && token < to) own = fmaxf(own, x[c][n % 2][r]);
            }
        }
    float all = largest_over_lanes<8, 2>(most);
    for (int d = 8; d > 8 >> shift; d /= 2) all = fmaxf(all, __shfl_xor_sync(ALL_LANES, all, d));
    const int first = ((lane >> 1 & 2) | (lane >> 3 & 1)) >> shift << shift;
    return first * 64 < to && (first + (1 << shift)) * 64 > from ? key_of(__float_as_uint(all)) : 0;
}

extern "C" __global__ void BOUNDS
    score(const u8* __restrict__ slab, const int* __restrict__ table, const Head* __restrict__ heads,
          const int* __restrict__ unit_words, const float* __restrict__ y, Logit* __restrict__ out, i64 page_first, i64 page_end,
          i64 split_pages, i64 first, i64 end, i64 origin, i64 out_stride, i64 rows, i64 query_heads, i64 group, i64 y_stride,
          i64 y_extra, float unit, float cap,
          u32* __restrict__ maxima, i64 groups, i64 group_shift) {
    let_next_kernel_start();
    extern __shared__ __align__(128) u8 shared[];
    u8* pieces = shared;
    u8* scales = pieces + WARPS * RING * PIECE;
    uint2* planes = (uint2*)(scales + WARPS * 2 * SCALE_BYTES);
    float* constants = (float*)((u8*)planes + QUERY_PLANES_BYTES);
    int* places = (int*)((u8*)constants + QUERY_CONSTANTS_BYTES);  // of the rows among those of `out`; -1 past the last
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, h = blockIdx.y;
    const i64 row_first = (i64)blockIdx.z * ROWS;
    scales += warp * 2 * SCALE_BYTES;
    const Ring ring(pieces + warp * RING * PIECE);
    const Head head = heads[h];
    const int* units = unit_words + h * UNITS * 9;
    const int last = (int)min(page_end, page_first + (blockIdx.x + 1) * split_pages);
    int page = (int)(page_first + blockIdx.x * split_pages) + warp;

    // This page and the next; where the one after begins is read a page before it is needed. Past the end: any page.
    auto page_at = [&](int entry) { return slab + (i64)entry * 512; };
    auto entry_of = [&](int of) { return table[min(of, last - 1)]; };
    const u8* here = page_at(entry_of(page));
    const u8* next = page_at(entry_of(page + WARPS));
    int buffer = 0;
    KeyWalk walk{here, head, units};
    // Asks for piece `number` of the passes over this page, or over the next.
    auto push = [&](int number) {
        const bool after = number >= KEY_PIECES;
        const int own = after ? number - KEY_PIECES : number;
        const u8* from = after ? next : here;
        if (own == 0)
            for (int s = 0; s < KEY_SCALES; s++)
                copy_async_or_zero(shared_address(scales + (buffer ^ after) * SCALE_BYTES + s * 512 + lane * 16),
                                   from + (i64)(head.scale_start + s) * 512 + lane * 16, head.stored);
        walk.push(ring, number, from, own % PASS_PIECES);
    };
    for (int i = 0; i < RING; i++) push(i);

    if (threadIdx.x < ROWS) {
        const int row = (int)row_first + threadIdx.x;
        places[threadIdx.x] = row < rows ? row / (int)group * (int)query_heads + h * (int)group + row % (int)group : -1;
    }

    await_previous_kernel();
    prepare_queries(BitPlanes{planes}, constants, Queries{y + (i64)h * rows * y_stride, rows, row_first, y_stride, y_extra, unit, 0}, head,
                    units, nullptr);
    __syncthreads();

    for (; page < last; page += WARPS) {
        const int after_next = entry_of(page + 2 * WARPS);
        const i64 start = (i64)page * PAGE;
        const int from = (int)max(first - start, 0ll), to = (int)min(end - start, (i64)PAGE);
#pragma unroll 1
        for (int tile = 0; tile < ROW_TILES; tile++) {
            PageLogits x;
            const int passed = REREAD ? 0 : tile * PASS_PIECES;
            page_logits(x, ring, planes + tile * UNITS * STEPS * 32, constants + tile * 4 * ROW_CONSTANTS,
                        (const u16*)(scales + buffer * SCALE_BYTES), units, cap, tile == ROW_TILES - 1, [&](int number) { push(passed + number + RING); });
#pragma unroll
            for (int r = 0; r < 2; r++) {
                const int place = places[tile * 4 + 2 * (lane & 1) + r];
                if (place < 0) continue;
                Logit* row = out + place * out_stride + (start - origin) + token_of(lane, 0, 0);
                if (from == 0 && to == PAGE) {
#pragma unroll
                    for (int c = 0; c < CHUNKS; c++) store_pair(row + 32 * c, x[c][0][r], x[c][1][r]);
                    continue;
                }
#pragma unroll
                for (int i = 0; i < 2 * CHUNKS; i++) {
                    const int token = token_of(lane, i / 2, i % 2);
                    if (token >= from && token < to) row[32 * (i / 2) + i % 2] = to_logit(x[i / 2][i % 2][r]);
                }
            }
            if (MAXIMA) {
                const u32 key = group_maximum(x, from, to, (int)group_shift);
                const int place = places[tile * 4 + 2 * (lane & 1) + (lane >> 1 & 1)], i = (lane >> 1 & 2) | (lane >> 3 & 1);
                if (lane < 16 && place >= 0 && i >> group_shift << group_shift == i)
                    maxima[place * groups + ((page - page_first) * 4 + i >> group_shift)] = key;
            }
        }
        here = next;
        next = page_at(after_next);
        buffer ^= 1;
        __syncwarp();
    }
}
