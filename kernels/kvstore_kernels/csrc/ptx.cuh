// The few instructions CUDA C++ has no spelling for, each under a plain name, and the types they take.
// No header of the toolkit is needed: NVRTC compiles these sources with nothing installed beside it.
#pragma once

typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned char u8;
typedef unsigned long long u64;
typedef long long i64;

#define ALL_LANES 0xffffffffu

struct Accumulators {
    int x, y, z, w;
};

// C + popcount(A & B): A is 16 rows x 256 bits, B 256 bits x 8 columns. Lane (g = lane / 4, t = lane % 4) holds of A the
// words t of rows g and g + 8, then words t + 4 of both; of B words t and t + 4 of column g; of C rows g, g, g + 8, g + 8
// at columns 2t, 2t + 1, 2t, 2t + 1.
__device__ __forceinline__ Accumulators mma_and_popc(u32 a0, u32 a1, u32 a2, u32 a3, uint2 b, Accumulators c) {
    Accumulators d;
    asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};"
        : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w)
        : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b.x), "r"(b.y), "r"(c.x), "r"(c.y), "r"(c.z), "r"(c.w));
    return d;
}

// C + A B in float32 of 16 x 16 and 16 x 8 halves, two to a register; lanes as above with pairs of columns for words.
__device__ __forceinline__ void mma_half(float (&c)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// C + A B in float64 of 8 x 4 and 4 x 8: lane (g, t) holds of A row g, column t; of B row t, column g; of C row g, columns 2t
// and 2t + 1.
__device__ __forceinline__ void mma_double(double (&c)[2], double a, double b) {
    asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1},{%2},{%3},{%0,%1};" : "+d"(c[0]), "+d"(c[1]) : "d"(a), "d"(b));
}

// Four 8 x 8 matrices of halves from shared memory; lane i names row i % 8 of matrix i / 8.
__device__ __forceinline__ uint4 load_matrices(u32 shared) {
    uint4 m;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3},[%4];"
                 : "=r"(m.x), "=r"(m.y), "=r"(m.z), "=r"(m.w)
                 : "r"(shared)
                 : "memory");
    return m;
}

// The transpose of an 8 x 8 matrix of 16-bit values: lane (g, t) gives row g, columns 2t (low half) and 2t + 1.
__device__ __forceinline__ u32 transpose_8x8(u32 pair) {
    u32 out;
    asm("movmatrix.sync.aligned.m8n8.trans.b16 %0,%1;" : "=r"(out) : "r"(pair));
    return out;
}

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// Copies 16 bytes to shared memory in the background.
__device__ __forceinline__ void copy_async(u32 shared, const void* from) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16;" ::"r"(shared), "l"(from) : "memory");
}

// The same of 8 bytes.
__device__ __forceinline__ void copy_async_8(u32 shared, const void* from) {
    asm volatile("cp.async.ca.shared.global [%0],[%1],8;" ::"r"(shared), "l"(from) : "memory");
}

// 16 bytes, or zeros if not `present`.
__device__ __forceinline__ void copy_async_or_zero(u32 shared, const void* from, bool present) {
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;" ::"r"(shared), "l"(from), "r"(present ? 16 : 0) : "memory");
}

__device__ __forceinline__ void close_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `PENDING` of this thread's latest groups of copies are unfinished.
template <int PENDING>
__device__ __forceinline__ void await_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

__device__ __forceinline__ uint4 load_shared_16(u32 shared) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3},[%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(shared) : "memory");
    return v;
}

__device__ __forceinline__ uint2 load_shared_8(u32 shared) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "r"(shared) : "memory");
    return v;
}

__device__ __forceinline__ float exp2_fast(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float inverse_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

__device__ __forceinline__ float from_half(u16 h) {
    float f;
    asm("cvt.f32.f16 %0,%1;" : "=f"(f) : "h"(h));
    return f;
}

__device__ __forceinline__ float low_half(u32 pair) { return from_half((u16)pair); }

__device__ __forceinline__ float high_half(u32 pair) { return from_half((u16)(pair >> 16)); }

__device__ __forceinline__ float from_bfloat(u16 b) { return __uint_as_float((u32)b << 16); }

// Two float32 rounded to a pair of halves.
__device__ __forceinline__ u32 to_halves(float low, float high) {
    u32 pair;
    asm("cvt.rn.f16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

__device__ __forceinline__ u32 to_bfloats(float low, float high) {
    u32 pair;
    asm("cvt.rn.bf16x2.f32 %0,%1,%2;" : "=r"(pair) : "f"(high), "f"(low));
    return pair;
}

// Bytes of a and b, chosen by the nibbles of the lower half of `selector`; bit 3 of a nibble fills the byte with its sign.
__device__ __forceinline__ u32 select_bytes(u32 a, u32 b, u32 selector) {
    u32 out;
    asm("prmt.b32 %0,%1,%2,%3;" : "=r"(out) : "r"(a), "r"(b), "r"(selector));
    return out;
}

// Both halves brought into [0, 65504]; NaN becomes 0.
__device__ __forceinline__ u32 clamp_halves(u32 pair) {
    u32 out;
    asm("{.reg .b32 t; max.f16x2 t,%1,%2; min.f16x2 %0,t,%3;}" : "=r"(out) : "r"(pair), "r"(0), "r"(0x7bff7bff));
    return out;
}

// A kernel that follows another on its stream may start while that one ends; what the other wrote may be read after the
// wait. Before Hopper a kernel starts when the one before has ended, and both lines are nothing.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

__device__ __forceinline__ void await_previous_kernel() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
