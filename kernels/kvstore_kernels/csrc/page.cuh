// What the kernels know of a device page.
#pragma once
#include "ptx.cuh"

#define PAGE 256  // tokens

// One KV head's part of a page.
struct Head {
    int word_start;   // 1024-byte row
    int scale_start;  // 512-byte row, from the start of the page
    int words;        // that this level reads
    int stored;       // words; a head that stores none has no scales
};
