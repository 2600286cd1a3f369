// Vectors rebuilt from sign sketches, x^ = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g ), on sparse tensor cores.
//
// t_1 e_1 + t_2 e_2 is t_1 (e_1 + e_2) where the bits are equal, else t_1 (e_1 - e_2): of the two rows e_1 + e_2 and e_1 - e_2
// one counts and one does not. So two rows of E cost what one does: alpha with the sign of a pair's first bit is a nonzero of A,
// the xor of both bits says which of two neighbours it is, and a word of bits makes its own metadata. alpha and the sums are
// exact or float32, so that one sum takes all groups; E's sums and differences are rounded to float16, far below what a sketch
// loses. A slot is a word of bits, or for beta_g f_g a word of ones before the two halves that make up f_g.
//
// Hopper multiplies 64 tokens of a group of four warps at once and reads E from shared memory by itself. A group's other
// instructions wait until its products are under way, so groups take turns at them: while one multiplies, the others prepare
// or store. Elsewhere, and where E does not fit shared memory, each warp multiplies by itself; two share their tokens and halve
// the channels, so that what is read of E serves twice. Lanes hold the same of A and of the sums either way.
//
// Grid (X, HEAD_DIM / CHANNELS, HEADS), WARP_GROUPS times four warps, each 16 tokens and CHANNELS channels; a group takes every
// X WARP_GROUPSth run of 64 tokens. Its words arrive in the background a run ahead.
//
// words u32 [N, width]; scales half [N, scale_count]. plans int [H][PLAN]: where the head's words begin in a token's row, how many
// it has, how many slots (a multiple of 4), then for each slot its scale in a token's row or -1. factors [2][H][HEAD_DIM / 32][SLOTS][4][4]
// of 8 x 8 halves: [k][q][r][i] is at channel 8 (r / 2) + 2 q + r % 2, so that a lane ends with eight neighbours, the sum (i
// even) or difference of rows 8 k + i & ~1 and the next, then what rounding it to a half leaves. One of a sum is worth `unit`. mean float [H, HEAD_DIM]; out [N, H,
// HEAD_DIM] of OUT (0 float32, 1 float16, 2 bfloat16).
// Macros: HEADS, HEAD_DIM, SLOTS (of the head that has most), SCALES (a token has in a head), PIECE (words copied at once: 4 where all
// heads' words lie in whole fours), OUT, CHANNELS, WARP_GROUPS, RESIDENT (factors in shared memory).
#include "ptx.cuh"

#define THREADS (WARP_GROUPS * 128)
#define TOKENS 16          // of a warp
#define PITCH (SLOTS | 4)  // so that eight rows of 16 bytes meet no bank conflict
#define STAGED (4 * 2 * TOKENS * PITCH)  // words of a group of warps
#define PLAN (3 + SLOTS)
#define BYTES (OUT ? 2 : 4)
#define SLICES (CHANNELS / 32)
#define RUN (64 * WARP_GROUPS)
#define PARTS (OUT ? 1 : 2)  // of the factors: float32 adds what rounding them to halves leaves
#if RESIDENT && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WIDTH (CHANNELS == 128 ? 128 : 32)  // channels of a product of a group of warps
#define TILES 1  // of 16 tokens, of a warp
#define CHUNK 8  // slots multiplied at once
#define KEEP_MEANS (SLOTS <= CHUNK)  // in registers
#define BEHIND (warp / 4 * 64)  // tokens, the block's first group of warps: every group takes as many turns
#else
#define TILES (SLICES % 2 ? 1 : 2)
#define CHUNK 2
#define KEEP_MEANS 0
#define BEHIND 0
#endif
#define OWN_SLICES (SLICES / TILES)
#define HALF (CHUNK < 4 ? CHUNK : 4)  // a head's slots are a multiple of it

// Where the eight rows k of the factors of 32 channels lie, in u32.
#define FACTORS (SLOTS * SLICES * 512)  // a part of a block's factors, in u32
#define ALL_FACTORS (HEADS * HEAD_DIM / 32 * SLOTS * 512)
#define PART(slice, k) ((RESIDENT ? (k) * SLICES + (slice) : (slice) * SLOTS * 4 + (k)) * 128)

// Copies PIECE words to shared memory in the background.
__device__ __forceinline__ void copy_piece(u32* to, const u32* from) {
    if (PIECE == 4)
        copy_async(shared_address(to), from);
    else
        asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// Without a branch, which would split the warps of a product.
__device__ __forceinline__ u32 load_or_zero(const u16* from, bool present) {
    u16 v;
    asm("{.reg .pred p; setp.ne.b32 p,%2,0; mov.b16 %0,0; @p ld.global.nc.u16 %0,[%1];}" : "=h"(v) : "l"(from), "r"((int)present));
    return v;
}

__device__ __forceinline__ void store_16(void* to, u32 a, u32 b, u32 c, u32 d, bool present) {
    asm volatile("{.reg .pred p; setp.ne.b32 p,%5,0; @p st.global.v4.b32 [%0],{%1,%2,%3,%4};}" ::"l"(to), "r"(a), "r"(b), "r"(c),
                 "r"(d), "r"((int)present)
                 : "memory");
}

__device__ __forceinline__ void store_8(u8* to, const float (&v)[8], bool present) {
    if (OUT == 0) {
        store_16(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]), present);
        store_16(to + 16, __float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7]), present);
    } else if (OUT == 1) {
        store_16(to, to_halves(v[0], v[1]), to_halves(v[2], v[3]), to_halves(v[4], v[5]), to_halves(v[6], v[7]), present);
    } else {
        store_16(to, to_bfloats(v[0], v[1]), to_bfloats(v[2], v[3]), to_bfloats(v[4], v[5]), to_bfloats(v[6], v[7]), present);
    }
}

// Of a chunk: for each word the nonzeros, two pairs of bits 16 apart to a register, for each two words which neighbours they are.
struct Signs {
    u32 of[CHUNK][4], metadata[CHUNK / 2];

    __device__ __forceinline__ void set_nonzeros(int slot, const u32 (&alpha)[2], u32 upper, u32 lower) {
        const int t = threadIdx.x & 3;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 bits = ((i % 2 ? lower : upper) >> i / 2 * 16 & 5u << 4 * t) * (0x20008000u >> 4 * t);  // at 15 and 31
            of[slot][i] = alpha[i % 2] ^ (~bits & 0x80008000u);
        }
    }

    __device__ __forceinline__ void set_metadata(int pair, uint2 upper, uint2 lower) {
        const int t = threadIdx.x & 3;
        const u32 own = __byte_perm(t >> 1 ? upper.y : upper.x, t >> 1 ? lower.y : lower.x, t & 1 ? 0x7632 : 0x5410);
        metadata[pair] = ((own ^ own >> 1) & 0x55555555u) | 0x88888888u;
    }

    // Asks the compiler to have all of them by now. The assembler still moves some of their last operations behind it.
    __device__ __forceinline__ void settle() {
#pragma unroll
        for (int i = 0; i < CHUNK; i++) asm volatile("" : "+r"(of[i][0]), "+r"(of[i][1]), "+r"(of[i][2]), "+r"(of[i][3]), "+r"(metadata[i / 2]));
    }
};

// Groups of warps one after another: each waits for the one before to let it pass.
struct Turn {
    int group = threadIdx.x >> 7;

    __device__ __forceinline__ void await() const { asm volatile("bar.sync %0,256;" ::"r"(1 + group) : "memory"); }

    __device__ __forceinline__ void pass() const {
        asm volatile("bar.arrive %0,256;" ::"r"(group == WARP_GROUPS - 1 ? 1 : 2 + group) : "memory");
    }
};

// The sums of a warp: lane (g, t) has of tokens g and g + 8 of a tile channels 32 (n / 4) + 8 t + 2 (n % 4) and the next.
struct Sums {
    float of[TILES][OWN_SLICES * 4][4];

    // Adds, or sets if it is the first, the products of a chunk from slot `at` of `slots` on.
    __device__ __forceinline__ void take(Signs (&signs)[TILES], const u32* factors, int at, int slots, Turn turn) {
        const bool first = at == 0;
#ifdef WIDTH
        // Shared memory in 16 bytes: where, from one 8 x 8 matrix to the next along rows of E, along channels.
        const u64 matrices = (u64)(shared_address(factors + PART(0, 4 * at)) >> 4) | (u64)(SLICES * 32) << 16 | (u64)8 << 32;
        signs[0].settle();
        turn.await();
#pragma unroll
        for (int slot = 0; slot < CHUNK; slot++) {
            if (slot % HALF == 0) {
                if (slot && at + slot >= slots) break;
                asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
            }
#pragma unroll
            for (int n = 0; n < SLICES * 4; n += WIDTH / 8) {
                const u64 from = matrices + slot * SLICES * 128 + n * 8;
#pragma unroll
                for (int part = 0; part < PARTS; part++) {
                    const u64 own = from + part * (FACTORS / 4);
                    if (slot % 2)
                        multiply<1>(&of[0][n], signs[0].of[slot], signs[0].metadata[slot / 2], own, true);
                    else
                        multiply<0>(&of[0][n], signs[0].of[slot], signs[0].metadata[slot / 2], own, part || slot || !first);
                }
            }
            if (slot % HALF == HALF - 1) asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        turn.pass();
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
        factors += threadIdx.x & 31;
#pragma unroll
        for (int slot = 0; slot < CHUNK; slot++) {
#pragma unroll
            for (int i = 0; i < OWN_SLICES * 4 * PARTS; i++) {
                const int n = i / PARTS, part = i % PARTS;
                const u32* from = factors + part * (RESIDENT ? FACTORS : ALL_FACTORS) + PART(n / 4, 4 * (at + slot)) + n % 4 * 32;
                const u32 b[4] = {from[0], from[PART(0, 1)], from[PART(0, 2)], from[PART(0, 3)]};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    float(&c)[4] = of[tile][n];
                    if (first && !slot && !part) c[0] = c[1] = c[2] = c[3] = 0;
                    if (slot % 2)
                        multiply<1>(c, signs[tile].of[slot], signs[tile].metadata[slot / 2], b);
                    else
                        multiply<0>(c, signs[tile].of[slot], signs[tile].metadata[slot / 2], b);
                }
            }
        }
#endif
    }

  private:
    // A is 64 or 16 tokens x 32 columns, of which every pair has one nonzero. Lane (g, t) has of it columns 4 t .. 4 t + 3 of
    // rows g and g + 8, then those 16 columns on; of the metadata, if t / 2 is WHICH, columns 16 (t % 2) .. + 15 of both rows.
#ifdef WIDTH
#define FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
    template <int WHICH>
    __device__ static __forceinline__ void multiply(float (*c)[4], const u32 (&a)[4], u32 metadata, u64 b, bool add) {
#if WIDTH == 128
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p,%71,0; wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.f16.f16 {%0,%1,%2,%3,%4,%5,"
            "%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,"
            "%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"
            "%61,%62,%63},{%64,%65,%66,%67},%68,%69,%70,p,1,1,0;}"
            : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10), FOUR(11), FOUR(12),
              FOUR(13), FOUR(14), FOUR(15)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(WHICH), "r"((int)add));
#else
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p,%23,0; wgmma.mma_async.sp.sync.aligned.m64n32k32.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,"
            "%8,%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,%21,%22,p,1,1,0;}"
            : FOUR(0), FOUR(1), FOUR(2), FOUR(3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata), "n"(WHICH), "r"((int)add));
#endif
    }
#else
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define SPARSE "mma.sp::ordered_metadata.sync"
#else
#define SPARSE "mma.sp.sync"
#endif
    template <int WHICH>
    __device__ static __forceinline__ void multiply(float (&c)[4], const u32 (&a)[4], u32 metadata, const u32 (&b)[4]) {
        asm(SPARSE ".aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%0,%1,%2,%3},%12,%13;"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(metadata),
              "n"(WHICH));
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const u32* __restrict__ words, const u16* __restrict__ scales, const int* __restrict__ plans,
           const u32* __restrict__ factors, const float* __restrict__ mean, u8* __restrict__ out, i64 tokens, i64 width,
           i64 scale_count, float unit) {
    extern __shared__ __align__(128) u8 shared[];
    u32* resident = (u32*)shared;
    float* own_mean = (float*)(resident + RESIDENT * PARTS * FACTORS);
    u32* staged = (u32*)(own_mean + CHANNELS);
    int* plan = (int*)(staged + WARP_GROUPS * STAGED);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, h = blockIdx.z;
    const int part = h * gridDim.y + blockIdx.y;
    factors += (i64)part * FACTORS;
    for (int i = threadIdx.x; i < RESIDENT * PARTS * FACTORS / 4; i += THREADS) {
        const int own = i % (FACTORS / 4), to = PART(own / (SLOTS * 128), own / 32 % (SLOTS * 4)) + own % 32 * 4;
        const int part = i / (FACTORS / 4);
        copy_async(shared_address(resident + part * FACTORS + to), factors + part * ALL_FACTORS + own * 4);
    }
    close_copies();
    for (int i = threadIdx.x; i < PLAN; i += THREADS) plan[i] = plans[h * PLAN + i];
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) own_mean[i] = mean[part * CHANNELS + i];
    for (int i = threadIdx.x; i < WARP_GROUPS * STAGED; i += THREADS) staged[i] = ~0u;
    await_copies<0>();
#ifdef WIDTH
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the products read what copies wrote
#endif
    __syncthreads();
    const int own_words = plan[1], slots = plan[2], *own_scales = plan + 3;
    staged += warp * 2 * TOKENS * PITCH;

    // Of a run of the group of warps: where this warp's tokens begin, and this lane's of those that the warp multiplies; `left`
    // tokens remain. The next run lies `step` further on; one more than there are stays below 2^31.
    const int place = warp % TILES, seat = warp % 4 * TOKENS, own = seat - place * TOKENS + g, step = gridDim.x * RUN;
    const int start = blockIdx.x * RUN + warp / 4 * 64;
    const u32* own_row = words + (start + seat) * width + plan[0];
    const u16* scale_row = scales + (start + own) * scale_count;
    u8* out_row = out + (((i64)(start + own) * HEADS + h) * HEAD_DIM + blockIdx.y * CHANNELS + place * OWN_SLICES * 32 + 8 * t) * BYTES;

    // Asks for the warp's words of the run that begins at `own_row`.
    auto stage = [&](int left, u32* to) {
        const int pitch = (int)width;
#pragma unroll(TOKENS* SLOTS / PIECE / 32 > 4 ? 1 : 4)
        for (int i = lane; i < TOKENS * SLOTS / PIECE; i += 32) {
            const int token = i / (SLOTS / PIECE), word = i % (SLOTS / PIECE) * PIECE;
            if (token < left && word < own_words) copy_piece(to + token * PITCH + word, own_row + token * pitch + word);
        }
        close_copies();
    };
    // One scale of the tokens g and g + 8 of the tiles from `scale_row` on, or zero.
    auto load_scales = [&](int left, int which, u32 (&to)[TILES][2]) {
#pragma unroll
        for (int i = 0; i < TILES * 2; i++)
            to[i / 2][i % 2] = load_or_zero(scale_row + i * 8 * (int)scale_count + which, which >= 0 && i * 8 < left);
    };
    auto twice = [](u32 (&scales)[TILES][2]) {
#pragma unroll
        for (int i = 0; i < TILES * 2; i++) scales[i / 2][i % 2] *= 0x10001u;
    };
    // The warps that share tokens.
    auto sync = [&]() {
        if (TILES == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0,%1;" ::"r"(1 + warp / TILES), "n"(TILES * 32) : "memory");
    };
    const int only_scale = own_scales[0];
    u32 next[TILES][2];
    int left = (int)tokens - start, buffer = 0;
    stage(left - seat, staged);
    if (SCALES == 1) load_scales(left - own, only_scale, next);
    float means[OWN_SLICES][8];
    auto load_means = [&](int slice) {
        const float4* from = (const float4*)(own_mean + (place * OWN_SLICES + slice) * 32 + 8 * t);
        *(float4*)means[slice] = from[0], *(float4*)(means[slice] + 4) = from[1];
    };
    const Turn turn;
#pragma unroll
    for (int slice = 0; slice < OWN_SLICES; slice++)
        if (KEEP_MEANS) load_means(slice);
#ifdef WIDTH
    if (turn.group == WARP_GROUPS - 1) turn.pass();
#endif
    for (; left + BEHIND > 0; left -= step, buffer ^= 1) {
        u32 alpha[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES * 2; i++) alpha[i / 2][i % 2] = next[i / 2][i % 2];
        twice(alpha);
        own_row += step * width;
        stage(left - step - seat, staged + (buffer ^ 1) * TOKENS * PITCH);
        if (SCALES == 1) scale_row += step * scale_count, load_scales(left - step - own, only_scale, next);
        await_copies<1>();
        sync();
        const u32* row = staged + ((buffer - 2 * place) * TOKENS + g) * PITCH;
        Sums sums;
#pragma unroll 1
        for (int at = 0; at < (SLOTS <= CHUNK ? SLOTS : slots); at += CHUNK) {  // of a single chunk `at` is a constant
            Signs signs[TILES];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
#pragma unroll
                for (int slot = 0; slot < CHUNK; slot += 2) {
                    if (slot && slot % HALF == 0 && at + slot >= slots) break;
                    const u32* from = row + tile * 2 * TOKENS * PITCH + at + slot;
                    const uint2 upper = *(const uint2*)from, lower = *(const uint2*)(from + 8 * PITCH);
                    signs[tile].set_metadata(slot / 2, upper, lower);
                    if (SCALES > 1) load_scales(left - own, own_scales[at + slot], alpha), twice(alpha);
                    signs[tile].set_nonzeros(slot, alpha[tile], upper.x, lower.x);
                    if (SCALES > 1) load_scales(left - own, own_scales[at + slot + 1], alpha), twice(alpha);
                    signs[tile].set_nonzeros(slot + 1, alpha[tile], upper.y, lower.y);
                }
            }
            sums.take(signs, (RESIDENT ? resident : factors) + PART(place * OWN_SLICES, 0), at, slots, turn);
        }
        if (SCALES > 1) scale_row += step * scale_count;
#pragma unroll
        for (int slice = 0; slice < OWN_SLICES; slice++) {
            if (!KEEP_MEANS) load_means(slice);
#pragma unroll
            for (int i = 0; i < TILES * 2; i++) {
                float x[8];
#pragma unroll
                for (int c = 0; c < 8; c++) x[c] = fmaf(sums.of[i / 2][slice * 4 + c / 2][i % 2 * 2 + c % 2], unit, means[slice][c]);
                store_8(out_row + i * 8 * HEADS * HEAD_DIM * BYTES + slice * 32 * BYTES, x, own + i * 8 < left);
            }
        }
        out_row += (i64)step * HEADS * HEAD_DIM * BYTES;
        sync();
    }
#ifdef WIDTH
    if (turn.group == 0) turn.await();
#endif
}
