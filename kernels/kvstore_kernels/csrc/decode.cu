// Vectors rebuilt from sign sketches, x^ = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g ), on sparse tensor cores.
//
// t_1 e_1 + t_2 e_2 is t_1 (e_1 + e_2) where the bits are equal, else t_1 (e_1 - e_2): of the two rows e_1 + e_2 and e_1 - e_2
// one counts and one does not. So two rows of E cost what one does: alpha with the sign of a pair's first bit is a nonzero of A,
// the xor of both bits says which of two neighbours it is, and a word of bits makes its own metadata. alpha and the sums are
// exact or float32, so that one sum takes all groups; E's sums and differences are rounded to float16, far below what a sketch
// loses. A slot is a word of bits, or for beta_g f_g a word of ones before the two halves that make up f_g.
//
// Hopper multiplies 64 tokens of a group of four warps at once and reads E from shared memory by itself. Elsewhere, and where E
// does not fit shared memory, each warp multiplies by itself; two share their tokens and halve the channels, so that what is
// read of E serves twice. Lanes hold the same of A and of the sums either way.
//
// Grid (X, HEAD_DIM / CHANNELS, H), WARP_GROUPS times four warps, each 16 tokens and CHANNELS channels; a group takes every
// X WARP_GROUPSth run of 64 tokens. Its words arrive in the background a run ahead.
//
// words u32 [N, width]; scales half [N, scale_count]. plans int [H][PLAN]: how many words the head has, how many slots (a multiple
// of CHUNK), then for each slot its word in a token's row, then its scale there or -1. factors [H][HEAD_DIM / 32][SLOTS][4][4]
// of 8 x 8 halves: [k][q][r][i] is at channel 8 (r / 2) + 2 q + r % 2, so that a lane ends with eight neighbours, the sum (i
// even) or difference of rows 8 k + i & ~1 and the next. One of a sum is worth `unit`. mean float [H, HEAD_DIM]; out [N, H,
// HEAD_DIM] of OUT (0 float32, 1 float16, 2 bfloat16).
// Macros: HEAD_DIM, SLOTS (of the head that has most), SCALES (a token has in a head), OUT, CHANNELS, WARP_GROUPS, RESIDENT
// (factors in shared memory).
#include "ptx.cuh"

#define THREADS (WARP_GROUPS * 128)
#define TOKENS 16          // of a warp
#define CHUNK 4            // slots multiplied at once
#define PITCH (SLOTS | 1)  // so that eight rows meet no bank conflict
#define STAGED (4 * 2 * TOKENS * PITCH)  // words of a group of warps
#define PLAN (2 + 2 * SLOTS)
#define SLICES (CHANNELS / 32)
#define RUN (64 * WARP_GROUPS)
#if RESIDENT && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WIDTH (CHANNELS % 64 ? 32 : 64)  // channels of a product of a group of warps
#define TILES 1                          // of 16 tokens, of a warp
#else
#define TILES (SLICES % 2 ? 1 : 2)
#endif
#define OWN_SLICES (SLICES / TILES)

// Where the eight rows k of the factors of 32 channels lie, in u32.
#define PART(slice, k) ((RESIDENT ? (k) * SLICES + (slice) : (slice) * SLOTS * 4 + (k)) * 128)

__device__ __forceinline__ void copy_async_4(u32 shared, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared), "l"(from) : "memory");
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

    __device__ __forceinline__ void set(int slot, const u32 (&alpha)[2], const u32 (&words)[2]) {
        const int t = threadIdx.x & 3;
#pragma unroll
        for (int i = 0; i < 4; i++) {
            const u32 bits = (words[i % 2] >> i / 2 * 16 & 5u << 4 * t) * (0x20008000u >> 4 * t);  // at 15 and 31
            of[slot][i] = alpha[i % 2] ^ (~bits & 0x80008000u);
        }
        const u32 own = __byte_perm(words[0], words[1], t & 1 ? 0x7632 : 0x5410);
        if (slot % 2 == 0 || t >> 1) metadata[slot / 2] = ((own ^ own >> 1) & 0x55555555u) | 0x88888888u;
    }
};

// The sums of a warp: lane (g, t) has of tokens g and g + 8 of a tile channels 32 (n / 4) + 8 t + 2 (n % 4) and the next.
struct Sums {
    float of[TILES][OWN_SLICES * 4][4];

    // Adds, or sets if `first`, the products of a chunk from slot `at` on.
    __device__ __forceinline__ void take(const Signs (&signs)[TILES], const u32* factors, int at, bool first) {
#ifdef WIDTH
        // Shared memory in 16 bytes: where, from one 8 x 8 matrix to the next along rows of E, along channels.
        const u64 matrices = (u64)(shared_address(factors + PART(0, 4 * at)) >> 4) | (u64)(SLICES * 32) << 16 | (u64)8 << 32;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int slot = 0; slot < CHUNK; slot++) {
#pragma unroll
            for (int n = 0; n < SLICES * 4; n += WIDTH / 8) {
                const u64 from = matrices + slot * SLICES * 128 + n * 8;
                if (slot % 2)
                    multiply<1>(&of[0][n], signs[0].of[slot], signs[0].metadata[slot / 2], from, true);
                else
                    multiply<0>(&of[0][n], signs[0].of[slot], signs[0].metadata[slot / 2], from, slot || !first);
            }
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
        factors += threadIdx.x & 31;
#pragma unroll
        for (int slot = 0; slot < CHUNK; slot++) {
#pragma unroll
            for (int n = 0; n < OWN_SLICES * 4; n++) {
                const u32* from = factors + PART(n / 4, 4 * (at + slot)) + n % 4 * 32;
                const u32 b[4] = {from[0], from[PART(0, 1)], from[PART(0, 2)], from[PART(0, 3)]};
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    float(&c)[4] = of[tile][n];
                    if (first && !slot) c[0] = c[1] = c[2] = c[3] = 0;
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
#if WIDTH == 64
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p,%39,0; wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,"
            "%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},{%32,%33,%34,%35},"
            "%36,%37,%38,p,1,1,0;}"
            : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
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
    float* own_mean = (float*)(resident + RESIDENT * SLOTS * SLICES * 512);
    u32* staged = (u32*)(own_mean + CHANNELS);
    int* plan = (int*)(staged + WARP_GROUPS * STAGED);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, h = blockIdx.z;
    const i64 part = (i64)h * gridDim.y + blockIdx.y, step = (i64)gridDim.x * RUN;
    factors += part * SLICES * SLOTS * 512;
    for (int i = threadIdx.x; i < RESIDENT * SLICES * SLOTS * 128; i += THREADS)
        copy_async(shared_address(resident + PART(i / (SLOTS * 128), i / 32 % (SLOTS * 4)) + i % 32 * 4), factors + i * 4);
    close_copies();
    for (int i = threadIdx.x; i < PLAN; i += THREADS) plan[i] = plans[h * PLAN + i];
    for (int i = threadIdx.x; i < CHANNELS; i += THREADS) own_mean[i] = mean[part * CHANNELS + i];
    for (int i = threadIdx.x; i < WARP_GROUPS * STAGED; i += THREADS) staged[i] = ~0u;
    await_copies<0>();
#ifdef WIDTH
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");  // the products read what copies wrote
#endif
    __syncthreads();
    const int own_words = plan[0], slots = plan[1], *own_scales = plan + 2 + SLOTS;
    staged += warp * 2 * TOKENS * PITCH;

    // Asks for the words of the run that begins at `first`: eight words of four tokens at a time.
    auto stage = [&](i64 first, u32* to) {
        const int left = (int)min(tokens - first, (i64)TOKENS), token = lane >> 3;
#pragma unroll (SLOTS > 8 ? 2 : 1)
        for (int slot = lane & 7; slot < own_words; slot += 8) {
            const u32* from = words + (first + token) * width + plan[2 + slot];
#pragma unroll
            for (int i = 0; i < TOKENS; i += 4, from += 4 * width)
                if (i < left - token) copy_async_4(shared_address(to + (i + token) * PITCH + slot), from);
        }
        close_copies();
    };
    // One scale of the tokens g and g + 8 of the tiles from `first` on, or zero.
    auto load_scales = [&](i64 first, int which, u32 (&to)[TILES][2]) {
#pragma unroll
        for (int i = 0; i < TILES * 2; i++)
            to[i / 2][i % 2] = which < 0 ? 0 : scales[min(first + i * 8 + g, tokens - 1) * scale_count + which];
    };
    // The warps that share tokens.
    auto sync = [&]() {
        if (TILES == 1)
            __syncwarp();
        else
            asm volatile("bar.sync %0,%1;" ::"r"(1 + warp / TILES), "n"(TILES * 32) : "memory");
    };
    const int place = warp % TILES;
    i64 first = (i64)blockIdx.x * RUN + warp * TOKENS;
    u32 next[TILES][2];
    stage(first, staged);
    load_scales(first - place * TOKENS, own_scales[0], next);
    int buffer = 0;
    // A group of warps goes on as long as its first one has tokens.
    for (i64 left = tokens - (first - warp % 4 * TOKENS); left > 0; left -= step, first += step, buffer ^= 1) {
        const i64 own_first = first - place * TOKENS + g;
        u32 alpha[TILES][2];
#pragma unroll
        for (int i = 0; i < TILES * 2; i++) alpha[i / 2][i % 2] = next[i / 2][i % 2] * 0x10001u;
        stage(first + step, staged + (buffer ^ 1) * TOKENS * PITCH);
        load_scales(first - place * TOKENS + step, own_scales[0], next);
        await_copies<1>();
        sync();
        const u32* row = staged + ((buffer - 2 * place) * TOKENS + g) * PITCH;
        Sums sums;
#pragma unroll 1
        for (int at = 0; at < slots; at += CHUNK) {
            Signs signs[TILES];
#pragma unroll
            for (int slot = 0; slot < CHUNK; slot++) {
                if (SCALES > 1) {
                    load_scales(first - place * TOKENS, own_scales[at + slot], alpha);
#pragma unroll
                    for (int i = 0; i < TILES * 2; i++) alpha[i / 2][i % 2] *= 0x10001u;
                }
#pragma unroll
                for (int tile = 0; tile < TILES; tile++) {
                    const u32* from = row + tile * 2 * TOKENS * PITCH + at + slot;
                    const u32 both[2] = {from[0], from[8 * PITCH]};
                    signs[tile].set(slot, alpha[tile], both);
                }
            }
            sums.take(signs, RESIDENT ? resident + PART(place * OWN_SLICES, 0) : factors + PART(place * OWN_SLICES, 0), at, at == 0);
        }
#pragma unroll
        for (int slice = 0; slice < OWN_SLICES; slice++) {
            const int channel = (place * OWN_SLICES + slice) * 32 + 8 * t;
            const float4 *own = (const float4*)(own_mean + channel), own_0 = own[0], own_1 = own[1];
            const float own_all[8] = {own_0.x, own_0.y, own_0.z, own_0.w, own_1.x, own_1.y, own_1.z, own_1.w};
            u8* to = out + ((own_first * gridDim.z + h) * HEAD_DIM + blockIdx.y * CHANNELS + channel) * (OUT ? 2 : 4);
#pragma unroll
            for (int i = 0; i < TILES * 2; i++) {
                float x[8];
#pragma unroll
                for (int c = 0; c < 8; c++) x[c] = fmaf(sums.of[i / 2][slice * 4 + c / 2][i % 2 * 2 + c % 2], unit, own_all[c]);
                store_8(to + (i64)i * 8 * gridDim.z * HEAD_DIM * (OUT ? 2 : 4), x, own_first + i * 8 < tokens);
            }
        }
        sync();
    }
}
