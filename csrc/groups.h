// Masks on a CPU: 16 bits in memory for the lanes of a vector, and groups of lanes that compete for them.
#pragma once

#include <utility>

#include "masked.h"

namespace {

constexpr U::Part lane_numbers(int part) {
  U::Part numbers{};
  for (int lane = 0; lane < LANES / PARTS; ++lane) {
    numbers[lane] = static_cast<uint32_t>(part * (LANES / PARTS) + lane);
  }
  return numbers;
}
FO_INLINE U lane_numbers() {
  U numbers;
  FO_EACH_PART numbers.part[i] = lane_numbers(i);
  return numbers;
}
FO_INLINE Mask first_lanes(int count) { return lane_numbers() < U(static_cast<uint32_t>(count)); }

// Bit i is that of lane i.
FO_INLINE Mask load_mask(const char* from) {
  uint16_t bits;
  memcpy(&bits, from, sizeof bits);
#if defined(__AVX512F__)
  Mask mask;
  mask.part[0] = reinterpret_cast<Mask::Part>(_mm512_movm_epi32(bits));
  return mask;
#else
  return (U(bits) & (U(1u) << lane_numbers())) != U(0u);
#endif
}
FO_INLINE void store_mask(char* to, Mask mask) {
  int bits = 0;
#if defined(__AVX512F__)
  bits = _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask.part[0]));
#elif defined(__AVX2__)
  FO_EACH_PART bits |= _mm256_movemask_ps(reinterpret_cast<__m256>(mask.part[i])) << 8 * i;
#elif defined(__SSE2__)
  FO_EACH_PART bits |= _mm_movemask_ps(reinterpret_cast<__m128>(mask.part[i])) << 4 * i;
#else
  FO_EACH_PART for (int lane = 0; lane < LANES / PARTS; ++lane) {
    bits |= (mask.part[i][lane] & 1) << (i * LANES / PARTS + lane);
  }
#endif
  uint16_t narrowed = static_cast<uint16_t>(bits);
  memcpy(to, &narrowed, sizeof narrowed);
}

// Lane i is lane i ^ DISTANCE.
template <int DISTANCE, int... LANE>
FO_INLINE U exchanged(U x, std::integer_sequence<int, LANE...>) {
  constexpr int N = sizeof...(LANE);
  constexpr U::Part order = {(LANE ^ DISTANCE % N)...};
  U r;
  FO_EACH_PART r.part[i] = __builtin_shuffle(x.part[i ^ DISTANCE / N], order);
  return r;
}

// Adds one for every lane that a lane loses to: of equal keys the first one wins.
template <int DISTANCE>
FO_INLINE void count_winner(U keys, U& winners) {
  constexpr int top_bit = DISTANCE >= 8 ? 8 : DISTANCE >= 4 ? 4 : DISTANCE >= 2 ? 2 : 1;
  U others = exchanged<DISTANCE>(keys, std::make_integer_sequence<int, LANES / PARTS>());
  Mask other_is_first = (lane_numbers() & U(top_bit)) != U(0u);
  Mask lost = above(others, keys + as_unsigned(other_is_first));
  FO_EACH_PART winners.part[i] -= reinterpret_cast<U::Part>(lost.part[i]);
}
template <int... DISTANCE>
FO_INLINE void count_winners(U keys, U& winners, std::integer_sequence<int, DISTANCE...>) {
  (count_winner<sizeof...(DISTANCE) + DISTANCE>(keys, winners), ...);
}

// The lanes whose magnitudes are among the `kept` largest of their group of 2, 4, 8 or 16. Lanes that are not
// `there` are no members.
FO_INLINE Mask largest_of_groups(F x, int group, F kept, Mask there) {
  U keys = select(there, rank_key(x), U(~0u)), winners(0u);
  count_winners(keys, winners, std::make_integer_sequence<int, 1>());
  if (group > 2) count_winners(keys, winners, std::make_integer_sequence<int, 2>());
  if (group > 4) count_winners(keys, winners, std::make_integer_sequence<int, 4>());
  if (group > 8) count_winners(keys, winners, std::make_integer_sequence<int, 8>());
  return to_float(winners) < kept;
}

}  // namespace
