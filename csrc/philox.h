// Random bits as a function of seed, step, parameter, slot and element: Philox-4x32-10 (Salmon et al., 2011).
#pragma once

#include "pack.h"

namespace {

// Four words of as many counters as a W holds lanes of 64 bits, of which the upper halves may be anything.
template <class W>
FO_INLINE void philox(W (&words)[4], uint32_t seed, uint32_t step) {
  FO_UNROLL for (int round = 0; round < 10; ++round) {
    W left = product(words[0], 0xd2511f53u), right = product(words[2], 0xcd9e8d57u);
    words[0] = (right >> 32) ^ words[1] ^ W(seed);
    words[1] = right;
    words[2] = (left >> 32) ^ words[3] ^ W(step);
    words[3] = left;
    seed += 0x9e3779b9u;
    step += 0xbb67ae85u;
  }
}

}  // namespace
