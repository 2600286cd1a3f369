// Vectors rebuilt from sign sketches, x^ = mean + sum_g ( alpha_g E_g^T t_g + beta_g f_g ), on sparse integer tensor cores.
//
// t_1 e_1 + t_2 e_2 is t_1 (e_1 + e_2) where the bits are equal, else t_1 (e_1 - e_2): of the two rows e_1 + e_2 and e_1 - e_2
// one counts and one does not. So two rows of E cost what one does: the first bit of a pair is the sign of a nonzero of A, the
// xor of both says which of two neighbours it is, and a word of bits makes its own metadata. E is held to 16 bits of
// each channel's largest row, in two bytes (hi, lo), and summed exactly: the error is that of one rounding of E, 2^-16 of a
// channel's largest value a row, far below what float16 loses of the result.
//
// Grid (X, HEAD_DIM / 32 / SLICES, H), 4 warps, TILES times 16 tokens and SLICES times 32 channels each; a warp takes every 4 Xth such run of tokens. Its
// words arrive in the background a run ahead, in the order of the products.
//
// words u32 [N, width]; scales half [N, scale_count]. plans int [H][PLAN]: where the head's scales begin in a token's row or -1,
// for each group its first step and after the last its end, then for each step the two words of a token's row whose 64
// bits it takes. factors [H][HEAD_DIM / 32][STEPS][4 tiles of 8 channels][hi, lo][32 lanes] of 16 bytes: bytes k of register r are rows
// 16 r + 4 t + k of the step, where row 32 j + 2 p is e_1 + e_2 of pair p of word j and the next e_1 - e_2; column c of tile n is
// channel 8 (c / 2) + 2 n + c % 2, so that a lane ends with eight neighbours. constants float [H][HEAD_DIM / 32][CONSTANTS][32]: mean,
// the value of one unit of each group, f. out [N, H, HEAD_DIM] of OUT (0 float32, 1 float16, 2 bfloat16).
// Macros: HEAD_DIM, STEPS (of the head that has most), GROUPS, OFFSETS, OUT, TILES, RESIDENT (factors in shared memory), BLOCKS (a
// multiprocessor), SLICES.
#include "ptx.cuh"

#define WARPS 4
#define TOKENS (16 * TILES)
#define SLOTS (2 * STEPS)  // words of a token
#define PITCH (2 * (STEPS | 1))  // so that sixteen rows meet no bank conflict
#define PLAN (2 + GROUPS + SLOTS)
#define CONSTANTS (1 + GROUPS * (1 + OFFSETS))
#define HELD ((TOKENS + 31) / 32)  // tokens whose scales a lane has

// C + A B in integers, or A B if `fresh`: A is 16 rows x 64 columns, of which every pair has one nonzero, B 64 x 8. Lane (g, t)
// holds of A the bytes of columns 8t .. 8t + 7 of rows g and g + 8, then those 32 columns on; of B rows 16 r + 4 t + k of column
// g; of the metadata columns 32 (t / 2) .. + 31 of row g + 8 (t % 2), two bits a nonzero.
__device__ __forceinline__ void mma_sparse(int (&c)[4], const u32 (&a)[4], uint4 b, u32 metadata, bool fresh) {
#if __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1205
#define SPARSE "mma.sp::ordered_metadata.sync"
#else
#define SPARSE "mma.sp.sync"
#endif
    asm(SPARSE ".aligned.m16n8k64.row.col.s32.s8.s8.s32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9,%10,%11},{%12,%13,%14,%15},%16,0;"
        : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y), "r"(b.z), "r"(b.w), "r"(fresh ? 0 : c[0]),
          "r"(fresh ? 0 : c[1]), "r"(fresh ? 0 : c[2]), "r"(fresh ? 0 : c[3]), "r"(metadata));
}

// The first bits of the four pairs of byte `t`, each as a byte 64 or -64.
__device__ __forceinline__ u32 signs_of(u32 word, u32 select) {
    const u32 bits = __byte_perm(word, 0, select) & 0x40100401u;  // bit 2i in byte i
    return ((bits + 0x40707c7fu) & 0x80808080u) ^ 0xc0c0c0c0u;
}

__device__ __forceinline__ u32 metadata_of(u32 word) { return ((word ^ word >> 1) & 0x55555555u) | 0x88888888u; }

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

// The sums of one group over its steps, of which one is always taken, upper and lower bytes of E apart.
struct Sums {
    int hi[SLICES][TILES][4][4], lo[SLICES][TILES][4][4];

    __device__ __forceinline__ void run(const uint4* factors, const u32* words, int step, int end) {
        take<true>(factors, words, min(step, STEPS - 1));
#pragma unroll 1
        while (++step < end) take<false>(factors, words, step);
    }

  private:
    template <bool FIRST>
    __device__ __forceinline__ void take(const uint4* factors, const u32* words, int step) {
        const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
        u32 a[TILES][4], metadata[TILES];
#pragma unroll
        for (int tile = 0; tile < TILES; tile++) {
            const u32* row = words + (tile * 16 + g) * PITCH + 2 * step;
            const uint2 upper = *(const uint2*)row, lower = *(const uint2*)(row + 8 * PITCH);
            a[tile][0] = signs_of(upper.x, t * 0x1111);
            a[tile][1] = signs_of(lower.x, t * 0x1111);
            a[tile][2] = signs_of(upper.y, t * 0x1111);
            a[tile][3] = signs_of(lower.y, t * 0x1111);
            metadata[tile] = metadata_of(row[(t & 1) * 8 * PITCH + (t >> 1)]);
        }
        factors += step * 256 + lane;
#pragma unroll
        for (int i = 0; i < SLICES * 4; i++) {
            const int slice = i / 4, n = i % 4;
            const uint4* from = factors + slice * STEPS * 256 + n * 64;
            const uint4 upper = from[0], lower = from[32];
#pragma unroll
            for (int tile = 0; tile < TILES; tile++) {
                mma_sparse(hi[slice][tile][n], a[tile], upper, metadata[tile], FIRST);
                mma_sparse(lo[slice][tile][n], a[tile], lower, metadata[tile], FIRST);
            }
        }
    }
};

extern "C" __global__ void __launch_bounds__(WARPS * 32, BLOCKS)
    decode(const u32* __restrict__ words, const u16* __restrict__ scales, const int* __restrict__ plans,
           const uint4* __restrict__ factors, const float* __restrict__ constants, void* __restrict__ out, i64 tokens, i64 width,
           i64 scale_count) {
    extern __shared__ __align__(16) u8 shared[];
    uint4* resident = (uint4*)shared;
    float* own_constants = (float*)(resident + RESIDENT * SLICES * STEPS * 256);
    u32* staged = (u32*)(own_constants + SLICES * CONSTANTS * 32);
    int* plan = (int*)(staged + WARPS * 2 * TOKENS * PITCH);
    const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane >> 2, t = lane & 3, h = blockIdx.z;
    const i64 slice = ((i64)h * gridDim.y + blockIdx.y) * SLICES, step = (i64)gridDim.x * WARPS * TOKENS;
    factors += slice * STEPS * 256;
    staged += warp * 2 * TOKENS * PITCH;
    for (int i = threadIdx.x; i < PLAN; i += WARPS * 32) plan[i] = plans[h * PLAN + i];
    for (int i = threadIdx.x; i < RESIDENT * SLICES * STEPS * 256; i += WARPS * 32) resident[i] = factors[i];
    for (int i = threadIdx.x; i < SLICES * CONSTANTS * 32; i += WARPS * 32) own_constants[i] = constants[slice * CONSTANTS * 32 + i];
    __syncthreads();
    const int scale_start = plan[0], steps = plan[1 + GROUPS];

    // Asks for the words of the run that begins at `first`: eight words of four tokens at a time.
    auto stage = [&](i64 first, u32* to) {
        const int left = (int)min(tokens - first, (i64)TOKENS), token = lane >> 3;
#pragma unroll (SLOTS > 16 ? 1 : 2)
        for (int slot = lane & 7; slot < SLOTS && steps; slot += 8) {
            const u32* from = words + (first + token) * width + plan[2 + GROUPS + slot];
#pragma unroll
            for (int i = 0; i < TOKENS; i += 4, from += 4 * width)
                if (i < left - token) copy_async_4(shared_address(to + (i + token) * PITCH + slot), from);
        }
        close_copies();
    };
    i64 first = ((i64)blockIdx.x * WARPS + warp) * TOKENS;
    stage(first, staged);
    int buffer = 0;
    for (; first < tokens; first += step, buffer ^= 1) {
        stage(first + step, staged + (buffer ^ 1) * TOKENS * PITCH);
        float x[SLICES][TILES][2][8];
#pragma unroll 1
        for (int group = 0; group < GROUPS; group++) {
            const int begin = plan[1 + group], end = plan[2 + group];
            u16 alphas[HELD], betas[HELD];  // lane i has those of tokens i, i + 32
#pragma unroll
            for (int i = 0; i < HELD; i++) {
                const u16* own = scales + min(first + i * 32 + lane, tokens - 1) * scale_count + scale_start + group;
                alphas[i] = begin == end ? 0 : own[0];
                betas[i] = !OFFSETS || scale_start < 0 ? 0 : own[GROUPS];
            }
            await_copies<1>();
            __syncwarp();
            Sums sums;
            sums.run(RESIDENT ? resident : factors, staged + buffer * TOKENS * PITCH, begin, end);
#pragma unroll
            for (int i = 0; i < SLICES * TILES * 2; i++) {
                const int slice = i / (TILES * 2), tile = i / 2 % TILES, half = i % 2, from = tile % 2 * 16 + half * 8 + g;
                const float* at = own_constants + slice * CONSTANTS * 32 + 8 * t;
                const float alpha = from_half((u16)__shfl_sync(ALL_LANES, (u32)alphas[tile / 2], from));
                const float beta = OFFSETS ? from_half((u16)__shfl_sync(ALL_LANES, (u32)betas[tile / 2], from)) : 0;
#pragma unroll
                for (int c = 0; c < 8; c++) {
                    const int n = c / 2, at_c = half * 2 + c % 2;
                    const float sum = (float)(sums.hi[slice][tile][n][at_c] * 256 + sums.lo[slice][tile][n][at_c]);
                    float own = group ? x[slice][tile][half][c] : at[c];
                    own = fmaf(alpha * at[(1 + group) * 32 + c], sum, own);
                    if (OFFSETS) own = fmaf(beta, at[(1 + GROUPS + group) * 32 + c], own);
                    x[slice][tile][half][c] = own;
                }
            }
        }
        void* to = (u8*)out + ((first + g) * gridDim.z + h) * (HEAD_DIM * (OUT ? 2 : 4));
#pragma unroll
        for (int i = 0; i < SLICES * TILES * 2; i++) {
            const int part = i / (TILES * 2), row = i % (TILES * 2);
            const i64 at = (i64)row * 8 * gridDim.z * HEAD_DIM + (blockIdx.y * SLICES + part) * 32 + 8 * t;
            if (first + row * 8 + g < tokens) store_8(to, at, x[part][row / 2][row % 2]);
        }
        __syncwarp();
    }
}
