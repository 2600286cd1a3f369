#pragma once
// Copies to shared memory of many bytes by one thread, and their arrival. sm_90.
#include "ptx.cuh"

// An arrival is a 64-bit barrier in shared memory; it ends a phase when what was announced is there.
__device__ __forceinline__ void begin_arrival(u32 arrival) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0],1;" ::"r"(arrival) : "memory");
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
