// Vectors rebuilt from sign sketches, x^ = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g ), on tensor cores in half precision.
//
// A row of the first operand is a token: alpha with the sign of each bit, which is exact, so that one sum in float32 takes all
// groups. The second operand is E, rounded to float16: the error is that of one rounding of E, far below what a sketch loses.
// A slot is a word of bits, or for beta_g f_g a word of ones before the two halves that make up f_g.
// Hopper multiplies a warp group's 64 tokens at once and reads E from shared memory by itself; elsewhere, and where E does not
// fit shared memory, each warp multiplies its 16 tokens. Lanes hold the same of both operands and of the sums either way.
//
// Grid (X, HEAD_DIM / CHANNELS, H), GROUPS_OF_WARPS times 4 warps, each 16 tokens and CHANNELS channels; a group of warps takes
// every X GROUPS_OF_WARPSth run of 64 tokens. Its words arrive in the background a run ahead.
//
// words u32 [N, width]; scales half [N, scale_count]. plans int [H][PLAN]: how many words the head has, how many slots (a multiple
// of CHUNK), then for each slot its word in a token's row, then its scale there or -1. factors [H][HEAD_DIM / 32][SLOTS][2][2][4]
// of 8 x 8 halves: [i][c][q][r][2 t + b] is row 16 b + 4 t + 2 i + c of the slot's word at channel 8 (r / 2) + 2 q + r % 2, so
// that one shift brings two bits to the signs of two halves and a lane ends with eight neighbours. One of a sum is worth `unit`.
// mean float [H, HEAD_DIM]; out [N, H, HEAD_DIM] of OUT (0 float32, 1 float16, 2 bfloat16).
// Macros: HEAD_DIM, SLOTS (of the head that has most), SCALES (a token has in a head), OUT, CHANNELS, WARP_GROUPS, RESIDENT
// (factors in shared memory).
#include "ptx.cuh"

#define THREADS (WARP_GROUPS * 128)
#define TOKENS 16  // of a warp
#define CHUNK 4    // slots multiplied at once
#define PITCH (SLOTS | 1)  // so that eight rows meet no bank conflict
#define STAGED (4 * 2 * TOKENS * PITCH)  // words of a group of warps
#define PLAN (2 + 2 * SLOTS)
#define SLICES (CHANNELS / 32)
#define RUN (64 * WARP_GROUPS)
#if RESIDENT && defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define WIDTH (CHANNELS % 64 ? 32 : 64)  // channels of a product of a group of warps
#endif

// Where part k = 4 slot + 2 i + c of the factors of 32 channels lies, in u32 (4 x 32 each).
#define PART(slice, k) ((RESIDENT ? (k) * SLICES + (slice) : (slice) * SLOTS * 4 + (k)) * 128)

__device__ __forceinline__ void copy_async_4(u32 shared, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0],[%1],4;" ::"r"(shared), "l"(from) : "memory");
}

__device__ __forceinline__ void store_16(void* to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("st.global.v4.b32 [%0],{%1,%2,%3,%4};" ::"l"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

__device__ __forceinline__ void store_8(void* out, i64 at, const float (&v)[8]) {
    if (OUT == 0) {
        float* to = (float*)out + at;
        store_16(to, __float_as_uint(v[0]), __float_as_uint(v[1]), __float_as_uint(v[2]), __float_as_uint(v[3]));
        store_16(to + 4, __float_as_uint(v[4]), __float_as_uint(v[5]), __float_as_uint(v[6]), __float_as_uint(v[7]));
    } else if (OUT == 1) {
        store_16((u16*)out + at, to_halves(v[0], v[1]), to_halves(v[2], v[3]), to_halves(v[4], v[5]), to_halves(v[6], v[7]));
    } else {
        store_16((u16*)out + at, to_bfloats(v[0], v[1]), to_bfloats(v[2], v[3]), to_bfloats(v[4], v[5]), to_bfloats(v[6], v[7]));
    }
}

// `alpha` twice with the signs that bits 15 and 31 of `bits` give: set for plus.
__device__ __forceinline__ u32 signed_pair(u32 alpha, u32 bits) { return alpha ^ (~bits & 0x80008000u); }

// The sums of 16 tokens: lane (g, t) has of tokens g and g + 8 channels 32 (n / 4) + 8 t + 2 (n % 4) and the next.
struct Sums {
    float of[SLICES * 4][4];

    // Adds, or sets if `first`, the products of CHUNK slots from slot `at` on.
    __device__ __forceinline__ void take(const u32 (&a)[CHUNK * 2][4], const u32* factors, int at, bool first) {
#ifdef WIDTH
        // Shared memory in 16 bytes: where, from one 8 x 8 matrix to the next along rows of E, along channels.
        const u64 matrices = (u64)(shared_address(factors + PART(0, 4 * at)) >> 4) | (u64)(SLICES * 32) << 16 | (u64)8 << 32;
        asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
        for (int k = 0; k < CHUNK * 2; k++) {
#pragma unroll
            for (int n = 0; n < SLICES * 4; n += WIDTH / 8)
                multiply(&of[n], a[k], matrices + k * SLICES * 64 + n * 8, k || !first);
        }
        asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#else
        factors += threadIdx.x & 31;
#pragma unroll
        for (int k = 0; k < CHUNK * 2; k++) {
#pragma unroll
            for (int n = 0; n < SLICES * 4; n++) {
                const u32* from = factors + PART(n / 4, 4 * at + 2 * k) + n % 4 * 32;
                if (first && !k) of[n][0] = of[n][1] = of[n][2] = of[n][3] = 0;
                mma_half(of[n], a[k], from[0], from[PART(0, 1)]);
            }
        }
#endif
    }

#ifdef WIDTH
  private:
#define FOUR(n) "+f"(c[n][0]), "+f"(c[n][1]), "+f"(c[n][2]), "+f"(c[n][3])
    __device__ static __forceinline__ void multiply(float (*c)[4], const u32 (&a)[4], u64 b, bool add) {
#if CHANNELS % 64 == 0
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p,%37,0; wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,"
            "%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31},{%32,%33,%34,%35},%36,"
            "p,1,1,0;}"
            : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#else
        asm volatile(
            "{.reg .pred p; setp.ne.b32 p,%21,0; wgmma.mma_async.sync.aligned.m64n32k16.f32.f16.f16 {%0,%1,%2,%3,%4,%5,%6,%7,%8,"
            "%9,%10,%11,%12,%13,%14,%15},{%16,%17,%18,%19},%20,p,1,1,0;}"
            : FOUR(0), FOUR(1), FOUR(2), FOUR(3)
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"((int)add));
#endif
    }
#endif
};

extern "C" __global__ void __launch_bounds__(THREADS, 1)
    decode(const u32* __restrict__ words, const u16* __restrict__ scales, const int* __restrict__ plans,
           const u32* __restrict__ factors, const float* __restrict__ mean, void* __restrict__ out, i64 tokens, i64 width,
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
#pragma unroll (SLOTS > 8 ? 1 : 2)
        for (int slot = lane & 7; slot < own_words; slot += 8) {
            const u32* from = words + (first + token) * width + plan[2 + slot];
#pragma unroll
            for (int i = 0; i < TOKENS; i += 4, from += 4 * width)
                if (i < left - token) copy_async_4(shared_address(to + (i + token) * PITCH + slot), from);
        }
        close_copies();
    };
    // Twice one scale of the tokens g and g + 8 of a run, or zero.
    auto load_scales = [&](i64 first, int which, u32 (&to)[2]) {
#pragma unroll
        for (int half = 0; half < 2; half++)
            to[half] = which < 0 ? 0 : scales[min(first + half * 8 + g, tokens - 1) * scale_count + which] * 0x10001u;
    };
    i64 first = (i64)blockIdx.x * RUN + warp * TOKENS;
    u32 alpha[2], next[2];
    stage(first, staged);
    load_scales(first, own_scales[0], next);
    int buffer = 0;
    // A group of warps goes on as long as its first one has tokens.
    for (i64 left = tokens - (first - warp % 4 * TOKENS); left > 0; left -= step, first += step, buffer ^= 1) {
        alpha[0] = next[0], alpha[1] = next[1];
        stage(first + step, staged + (buffer ^ 1) * TOKENS * PITCH);
        load_scales(first + step, own_scales[0], next);
        await_copies<1>();
        __syncwarp();
        const u32* row = staged + (buffer * TOKENS + g) * PITCH;
        Sums sums;
#pragma unroll 1
        for (int at = 0; at < slots; at += CHUNK) {
            u32 a[CHUNK * 2][4];
#pragma unroll
            for (int slot = 0; slot < CHUNK; slot++) {
                if (SCALES > 1) load_scales(first, own_scales[at + slot], alpha);
#pragma unroll
                for (int i = 0; i < 8; i++) {
                    const u32 word = row[i % 2 * 8 * PITCH + at + slot] << (12 - 4 * t);
                    a[slot * 2 + i / 4][i % 4] = signed_pair(alpha[i % 2], word << (3 - i / 2));
                }
            }
            sums.take(a, RESIDENT ? resident : factors, at, at == 0);
        }
#pragma unroll
        for (int i = 0; i < SLICES * 2; i++) {
            const int slice = i / 2, half = i % 2;
            const i64 token = first + half * 8 + g;
            const float* own = own_mean + slice * 32 + 8 * t;
            float x[8];
#pragma unroll
            for (int c = 0; c < 8; c++) x[c] = fmaf(sums.of[slice * 4 + c / 2][half * 2 + c % 2], unit, own[c]);
            if (token < tokens) store_8(out, (token * gridDim.z + h) * HEAD_DIM + blockIdx.y * CHANNELS + slice * 32 + 8 * t, x);
        }
        __syncwarp();
    }
}
