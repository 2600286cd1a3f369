// Products of a warpgroup, four warps, in the background: C + A B in int32, A of 64 rows x 32 signed bytes in registers, B of
// 32 bytes x N columns in shared memory. sm_90a.
//
// Lane (g, t) of warp w holds of A the bytes 4t .. 4t + 3 of rows 16 w + g and + 8, then 4t + 16 .. of both; of C, for each eight
// columns, columns 2t and 2t + 1 of the first row, then of the second. B lies as [2][N / 8][8 columns][16 bytes], the halves
// HALF_BYTES(N) apart: what lanes write together then lies in as many banks as can be.
#pragma once
#include "ptx.cuh"

#define HALF_BYTES(N) ((N) * 16 + 16)
#define COLUMN_BYTES(N) (2 * HALF_BYTES(N))  // of all columns of a B

// Of this thread's writes to shared memory, before the barrier after which products read them.
__device__ __forceinline__ void show_to_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// Before the first product after A or C have changed.
__device__ __forceinline__ void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void close_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most PENDING groups are unfinished.
template <int PENDING>
__device__ __forceinline__ void await_products() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}

// The same; `c` can then be read.
template <int PENDING, int COUNT>
__device__ __forceinline__ void await_products(int (&c)[COUNT]) {
    await_products<PENDING>();
#pragma unroll
    for (int i = 0; i < COUNT; i++) asm volatile("" : "+r"(c[i])::"memory");
}

// Of a B of N columns at this address of shared memory.
template <int N>
__device__ __forceinline__ u64 columns_at(u32 shared) {
    return (u64)((shared & 0x3ffff) >> 4) | (u64)(HALF_BYTES(N) >> 4) << 16 | (u64)(128 >> 4) << 32;
}

#define OUT_8(o, i) o(c[i]), o(c[i + 1]), o(c[i + 2]), o(c[i + 3]), o(c[i + 4]), o(c[i + 5]), o(c[i + 6]), o(c[i + 7])
#define FIRST(v) "=&r"(v)
#define NEXT(v) "+r"(v)
#define NAMES_8 "%0,%1,%2,%3,%4,%5,%6,%7"
#define NAMES_16 NAMES_8 ",%8,%9,%10,%11,%12,%13,%14,%15"
#define NAMES_32 NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define OUTS_8(o) OUT_8(o, 0)
#define OUTS_16(o) OUTS_8(o), OUT_8(o, 8)
#define OUTS_32(o) OUTS_16(o), OUT_8(o, 16), OUT_8(o, 24)

// C = A B (`first`) or C + A B; T the type of B's bytes.
#define PRODUCT(name, T, N, HALF, a0, a1, a2, a3, b)                                                                              \
    __device__ __forceinline__ void name(int (&c)[HALF], uint4 a, u64 columns, bool first) {                                      \
        if (first)                                                                                                                \
            asm volatile("{.reg .pred p; setp.ne.b32 p,0,0; wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8." T                 \
                         " {" NAMES_##HALF "},{" a0 "," a1 "," a2 "," a3 "}," b ",p;}"                                            \
                         : OUTS_##HALF(FIRST)                                                                                     \
                         : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(columns));                                                 \
        else                                                                                                                      \
            asm volatile("{.reg .pred p; setp.ne.b32 p,1,0; wgmma.mma_async.sync.aligned.m64n" #N "k32.s32.s8." T                 \
                         " {" NAMES_##HALF "},{" a0 "," a1 "," a2 "," a3 "}," b ",p;}"                                            \
                         : OUTS_##HALF(NEXT)                                                                                      \
                         : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "l"(columns));                                                 \
    }
#define PRODUCTS(name, T)                                          \
    PRODUCT(name, T, 16, 8, "%8", "%9", "%10", "%11", "%12")       \
    PRODUCT(name, T, 32, 16, "%16", "%17", "%18", "%19", "%20")    \
    PRODUCT(name, T, 64, 32, "%32", "%33", "%34", "%35", "%36")
PRODUCTS(product_signed, "s8")
PRODUCTS(product_unsigned, "u8")
