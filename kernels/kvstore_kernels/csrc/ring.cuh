// A warp's stream of 1024-byte pieces from device memory: RING pieces are always under way, in shared memory. Where eight
// lanes' copies do not fill one aligned row of 128 bytes there, the hardware splits them, and the L2 works twice.
#pragma once
#include "ptx.cuh"

#define RING 8
#define PIECE 1024

struct Ring {
    u32 base;  // shared-memory address of piece 0

    __device__ __forceinline__ explicit Ring(const void* shared) : base(shared_address(shared)) {}

    __device__ __forceinline__ u32 slot(int number) const { return base + number % RING * PIECE; }

    // Asks for piece `number` in the place of piece `number - RING`, which no lane reads any more: 16 bytes from `first` to
    // `to` in the piece's first half, 16 from `second` to the same place in the other. Copies asked for since the last push
    // belong to the piece.
    __device__ __forceinline__ void push(int number, u32 to, const u8* first, const u8* second, bool present) const {
        if (present) {
            copy_async(slot(number) + to, first);
            copy_async(slot(number) + to + PIECE / 2, second);
        }
        close_copies();
    }

    // Waits for the oldest of RING pieces under way, then every lane may read all of it.
    __device__ __forceinline__ void await() const {
        await_copies<RING - 1>();
        __syncwarp();
    }
};
