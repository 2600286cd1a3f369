// The best k of each row of scores and their positions, best first, of equal ones the lower position: exact for any scores.
//
// Grid (rows), 1024 threads. A candidate is a key of topk.cuh above its slot counted from the end: all are distinct. The k
// groups with the best maxima hold the k best scores, for each of them has one that beats every score of another group; what
// lies below the least of these maxima falls away. If more is left than the block can sort, the digits of the candidates are
// counted, eight bits a pass, until the k best are known. So a row of equal scores takes longer, but no buffer overflows,
// and the answer never depends on an order in time.
//
// scores as topk_maxima.cu says. maxima u32 [rows, groups]: of groups of `lanes` chunks, by topk_maxima.cu or score.cu; if there are no groups, all
// chunks of the row are read. positions i64 [rows, k]; best float32 [rows, k]. `slot_mask`: 2^b - 1, not below any slot.
// Macros: HALF.
// One H100, 256 of 1,048,576 float16 scores of 32 rows: v1, a score a lane, 91 us; v2, eight scores a lane and the maxima in shared
// memory, 60 us, 29 of them topk_maxima.cu; v3, this one, shows only scores whose upper bits are not below the bound.
#include "topk.cuh"

#define THREADS 1024
#define CANDIDATES 8192  // that a block sorts
#define GROUPS_MOST 4096
#define NO_CHUNK 0xffffffffu
#define SCORE_DIGITS (HALF ? 2 : 4)
#define SPARE 8  // one group more in so many may be read, which saves a pass over the maxima

struct Shared {
    u64 candidates[CANDIDATES];
    u32 chosen[GROUPS_MOST];  // groups
    u32 counts[256];          // of a digit
    u32 found, digit, above, within;
};

// Counts `digit` of the lanes where it is `present`; many equal digits, as of equal scores, cost no more than one.
__device__ __forceinline__ void tally(u32* counts, bool present, u32 digit) {
    const u32 lanes = __ballot_sync(ALL_LANES, present);
    if (!lanes) return;
    const int leader = __ffs(lanes) - 1;
    const u32 first = __shfl_sync(ALL_LANES, digit, leader);
    if (__all_sync(ALL_LANES, !present || digit == first)) {
        if ((threadIdx.x & 31) == leader) atomicAdd(counts + first, __popc(lanes));
    } else if (present) {
        atomicAdd(counts + digit, 1u);
    }
}

// The first warp finds the digit of the `wanted`th largest: how many digits are above it, how many are equal.
__device__ __forceinline__ void find_digit(Shared& s, u32 wanted) {
    if (threadIdx.x >= 32) return;
    const int lane = threadIdx.x, highest = 255 - 8 * lane;
    u32 own = 0;
#pragma unroll
    for (int i = 0; i < 8; i++) own += s.counts[highest - i];
    u32 sum = own;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
        const u32 other = __shfl_up_sync(ALL_LANES, sum, d);
        if (lane >= d) sum += other;
    }
    u32 above = sum - own;
    if (above >= wanted || sum < wanted) return;
    for (int digit = highest;; digit--) {
        const u32 count = s.counts[digit];
        if (above + count >= wanted) {
            s.digit = digit;
            s.above = above;
            s.within = count;
            return;
        }
        above += count;
    }
}

// A bound that the `wanted` largest of distinct keys reach, and at most `spare` others. `from.each(visit)` calls
// visit(present, key) with whole warps.
template <class Keys>
__device__ __forceinline__ u64 bound_of(Shared& s, u32 wanted, u32 spare, u64 slot_mask, const Keys& from) {
    u64 bound = 0, known = 0;
    for (int shift = 56;; shift -= 8) {
        if (shift == 56 - 8 * SCORE_DIGITS) shift = 24;
        while (shift < 32 && slot_mask >> shift == 0) shift -= 8;
        if (threadIdx.x < 256) s.counts[threadIdx.x] = 0;
        __syncthreads();
        from.each([&](bool present, u64 key) { tally(s.counts, present && ((key ^ bound) & known) == 0, (u32)(key >> shift) & 255); });
        __syncthreads();
        find_digit(s, wanted);
        __syncthreads();
        bound |= (u64)s.digit << shift;
        known |= 255ull << shift;
        wanted -= s.above;
        if (s.within <= wanted + spare) return bound;
    }
}

// The maxima of all groups of a row, above the groups counted from the end.
struct Groups {
    const u32* maxima;
    u32 count, last;

    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
        for (u32 base = threadIdx.x & ~31u; base < count; base += THREADS) {
            const u32 group = base + (threadIdx.x & 31);
            visit(group < count, group < count ? (u64)maxima[group] << 32 | (last - group) : 0);
        }
    }
};

// The candidates of a row that are not below `least`: in all its chunks or, where groups of 2^bits chunks are `chosen`, in
// theirs. A lane reads a chunk at once.
struct Scores {
    const Row& row;
    const u32* chosen;
    u32 count, bits, last;
    u64 least;

    template <class Visit>
    __device__ __forceinline__ void each(Visit visit) const {
#pragma unroll 1
        for (u32 base = threadIdx.x & ~31u; base < count; base += THREADS) {
            const u32 i = base + (threadIdx.x & 31);
            const u32 chunk = i >= count ? NO_CHUNK : chosen ? chosen[i >> bits] << bits | (i & ((1u << bits) - 1)) : i;
            u32 keys[CHUNK], shown = 0;
            if (i < count) row.read(keys, chunk);
#pragma unroll
            for (int j = 0; j < CHUNK; j++) shown |= (keys[j] >= (u32)(least >> 32)) << j;
            if (chunk == NO_CHUNK) shown = 0;
            for (; __any_sync(ALL_LANES, shown); shown &= shown - 1) {
                const int at = __ffs(shown) - 1;
                const u32 slot = chunk * CHUNK + at;
                u32 own = 0;
#pragma unroll
                for (int j = 0; j < CHUNK; j++) own = j == at ? keys[j] : own;
                const u64 key = (u64)own << 32 | (last - slot);
                visit(shown && row.holds(slot) && key >= least, key);
            }
        }
    }
};

// Appends `value` of the lanes where it is `present` to `list`, which keeps the first `most`; s.found counts all.
template <class T>
__device__ __forceinline__ void append(Shared& s, T* list, u32 most, bool present, T value) {
    const u32 lanes = __ballot_sync(ALL_LANES, present), lane = threadIdx.x & 31;
    if (!lanes) return;
    u32 at = 0;
    if (lane == 0) at = atomicAdd(&s.found, __popc(lanes));
    at = __shfl_sync(ALL_LANES, at, 0) + __popc(lanes & ((1u << lane) - 1));
    if (present && at < most) list[at] = value;
}

__device__ __forceinline__ u32 restart(Shared& s) {
    __syncthreads();
    const u32 found = s.found;
    __syncthreads();
    if (threadIdx.x == 0) s.found = 0;
    __syncthreads();
    return found;
}

// Key i of a bitonic sort after its exchanges with keys of the same warp, from STEP apart down, in runs of `run`.
template <u32 STEP>
__device__ __forceinline__ u64 exchanged(u64 key, u32 i, u32 run) {
#pragma unroll
    for (u32 step = STEP; step; step /= 2) {
        const u64 other = __shfl_xor_sync(ALL_LANES, key, step);
        const bool larger = ((i & step) == 0) == ((i & run) == 0);  // of the two is kept
        key = (key > other) == larger ? key : other;
    }
    return key;
}

// Largest first; `size` is a power of two and at least 32.
__device__ __forceinline__ void sort(u64* keys, u32 size) {
    __syncthreads();
    for (u32 i = threadIdx.x; i < size; i += THREADS) {
        const u64 eights = exchanged<4>(exchanged<2>(exchanged<1>(keys[i], i, 2), i, 4), i, 8);
        keys[i] = exchanged<16>(exchanged<8>(eights, i, 16), i, 32);
    }
    for (u32 run = 64; run <= size; run *= 2) {
        for (u32 step = run / 2; step >= 32; step /= 2) {
            __syncthreads();
            for (u32 i = threadIdx.x; i < size / 2; i += THREADS) {
                const u32 low = 2 * i - (i & (step - 1)), high = low + step;
                const u64 a = keys[low], b = keys[high];
                if ((a < b) == ((low & run) == 0)) {
                    keys[low] = b;
                    keys[high] = a;
                }
            }
        }
        __syncthreads();
        for (u32 i = threadIdx.x; i < size; i += THREADS) keys[i] = exchanged<16>(keys[i], i, run);
    }
    __syncthreads();
}

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    topk(const void* __restrict__ scores, const u32* maxima, i64* __restrict__ positions, float* __restrict__ best,
         i64 heads, i64 token_stride, i64 head_stride, i64 tokens, i64 groups, i64 lanes, i64 margin, i64 k, i64 slot_mask) {
    extern __shared__ __align__(16) u8 shared[];
    Shared& s = *(Shared*)shared;
    const i64 row = blockIdx.x;
    const Row all(scores, row, heads, token_stride, head_stride, tokens, margin);
    const u32 last = (u32)slot_mask;
    if (threadIdx.x == 0) s.found = 0;
    await_previous_kernel();
    __syncthreads();

    Scores from{all, nullptr, (all.end + CHUNK - 1) / CHUNK, (u32)__ffs((int)lanes) - 1, last, 0};
    if (groups) {
        maxima += row * groups;
        if (groups <= 2 * CANDIDATES) {  // they are read several times, and the place is not needed yet
            u32* kept = (u32*)s.candidates;
            for (u32 group = threadIdx.x; group < groups; group += THREADS) kept[group] = maxima[group];
            maxima = kept;
        }
        __syncthreads();
        const Groups maxima_of_row{maxima, (u32)groups, last};
        const u64 bound = bound_of(s, (u32)k, min((u32)k / SPARE, GROUPS_MOST - (u32)k), slot_mask, maxima_of_row);
        maxima_of_row.each([&](bool present, u64 key) { append(s, s.chosen, GROUPS_MOST, present && key >= bound, last - (u32)key); });
        from.count = restart(s) << from.bits;
        from.chosen = s.chosen;
        from.least = bound & ~0xffffffffull;
    }
    u32 found;
    for (;;) {
        from.each([&](bool present, u64 key) { append(s, s.candidates, CANDIDATES, present, key); });
        found = restart(s);
        if (found <= CANDIDATES) break;
        from.least = bound_of(s, (u32)k, CANDIDATES - (u32)k, slot_mask, from);
    }
    u32 size = 32;
    while (size < found) size *= 2;
    for (u32 i = found + threadIdx.x; i < size; i += THREADS) s.candidates[i] = 0;
    sort(s.candidates, size);
    for (i64 i = threadIdx.x; i < k; i += THREADS) {
        const u32 slot = last - (u32)s.candidates[i];
        const Score score = all.slots[slot];
        positions[row * k + i] = slot - all.shift;
        best[row * k + i] = HALF ? from_half((u16)score) : __uint_as_float((u32)score);
    }
}
