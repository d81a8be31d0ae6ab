// Masks on a GPU: a thread has 8 neighbours, and so a byte of the mask, the first of them in its lowest bit.
#pragma once

#include "coded.cuh"
#include "masked.h"

namespace {

// 1 or 0. Keys are at most 31 bits or ~0, and so their difference says it without a predicate.
FO_INLINE uint32_t below(uint32_t a, uint32_t b) { return (a - b) >> 31; }

// Adds what each of a thread's keys loses to others in the same thread, at indices that differ by DISTANCE
// and up to twice that, in binary: 1, 2 and 4 together are groups of eight. Of equal keys the first one wins.
template <int DISTANCE>
FO_INLINE void count_winners(const uint32_t* keys, uint32_t* winners) {
#pragma unroll
  for (int second = 1; second < EIGHT; ++second) {
#pragma unroll
    for (int first = 0; first < second; ++first) {
      if ((first ^ second) / DISTANCE != 1) continue;
      uint32_t second_wins = below(keys[first], keys[second]);
      winners[first] += second_wins;
      winners[second] += 1 - second_wins;
    }
  }
}

// The same for the other half of a group of 16, which the next or the last thread has.
FO_INLINE void count_winners_of_neighbour(const uint32_t* keys, uint32_t* winners) {
  uint32_t comes_second = threadIdx.x & 1;
#pragma unroll
  for (int other = 0; other < EIGHT; ++other) {
    uint32_t key = __shfl_xor_sync(~0u, keys[other], 1);
#pragma unroll
    for (int own = 0; own < EIGHT; ++own) winners[own] += below(keys[own] - comes_second, key);
  }
}

// The bits of those among the `kept` largest magnitudes of their group of 2, 4, 8 or 16. Every thread of the
// warp must be here, also one whose elements, `count` of them, are none.
FO_INLINE uint32_t largest_of_groups(const F* x, int count, int group, uint32_t kept) {
  uint32_t keys[EIGHT], winners[EIGHT] = {}, bits = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) keys[e] = e < count ? rank_key(x[e]) : ~0u;
  count_winners<1>(keys, winners);
  if (group > 2) count_winners<2>(keys, winners);
  if (group > 4) count_winners<4>(keys, winners);
  if (group > 8) count_winners_of_neighbour(keys, winners);
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) bits |= below(winners[e], kept) << e;
  return bits;
}

FO_INLINE uint32_t fetch_mask(char* plane, const Place& place) {
  uint32_t bits = 0;
  if (place.count > 0) move<FETCH, uint8_t>(plane + place.first / EIGHT, &bits);
  return bits;
}
// Bits behind the last element are zero.
FO_INLINE void put_mask(char* plane, const Place& place, uint32_t bits) {
  bits &= (1u << place.count) - 1;
  if (place.count > 0) move<PUT, uint8_t>(plane + place.first / EIGHT, &bits);
}

}  // namespace
