#pragma once
#ifndef SYNC
#define SYNC 1
#endif
// Copies to shared memory of many bytes by one thread, and waits that begin before they have to end. sm_90.
#include "ptx.cuh"

// An arrival is a 64-bit barrier in shared memory; it ends a phase when `count` threads have come and what they announced is there.
__device__ __forceinline__ void begin_arrival(u32 arrival, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],%1;" ::"r"(arrival), "r"(count) : "memory");
}

// By a warp, whose one thread comes for all: what they wrote to shared memory is there for who awaits the phase.
__device__ __forceinline__ void arrive_warp(u32 arrival) {
    if (SYNC) return;
    __syncwarp();
    if ((threadIdx.x & 31) == 0) asm volatile("mbarrier.arrive.shared::cta.b64 _,[%0];" ::"r"(arrival) : "memory");
}

// By the thread that copies, before it does.
__device__ __forceinline__ void announce(u32 arrival, int bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _,[%0],%1;" ::"r"(arrival), "r"(bytes) : "memory");
}

// A multiple of 16 bytes.
__device__ __forceinline__ void copy_bulk(u32 shared, const void* from, int bytes, u32 arrival) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0],[%1],%2,[%3];" ::"r"(shared), "l"(from),
                 "r"(bytes), "r"(arrival)
                 : "memory");
}

// `phase`: the number of the phase modulo 2.
__device__ __forceinline__ void await_arrival(u32 arrival, u32 phase) {
    asm volatile("{.reg .pred p;\n"
                 "again%=: mbarrier.try_wait.parity.shared::cta.b64 p,[%0],%1;\n"
                 "@!p bra again%=;}" ::"r"(arrival),
                 "r"(phase)
                 : "memory");
}

__device__ __forceinline__ void meet(u32 arrival, u32 phase) {
    if (SYNC) __syncthreads(); else await_arrival(arrival, phase);
}
