// Tables of the 8-bit dynamic map, which kernels/lookup.py builds, and of the map of 4 bits.
#pragma once

#include "pack.h"

namespace {

// A table's parts, in bytes: the value of every code; the magnitude above which index i should be i + 1; and
// an index that is right or one too low, by the upper bits of a magnitude from 2^-24 to 1.
constexpr int VALUES = 0, MIDDLES = 1024, GUESSES = 2048;
constexpr uint32_t GUESS_BASE = (127 - 24) << 7;

FO_INLINE F map_value(U code, const char* table) {
  return look_up(reinterpret_cast<const float*>(table + VALUES), code);
}

#if !defined(__AVX512F__)
template <bool SIGNED>
FO_INLINE U guess(F size, const char* table) {
  U steps = at_least(as_bits(size) >> 16, U(GUESS_BASE)) - GUESS_BASE;
  return look_up(reinterpret_cast<const uint8_t*>(table + GUESSES), steps);
}
#else
// The index is a straight line of the magnitude in every decade, a flatter one from each decade to the next,
// and so the lowest of all these lines. A range of two binades meets two lines at most.
struct Lines {
  alignas(64) float start[2][LANES], slope[2][LANES];
};
template <bool SIGNED>
constexpr Lines lines_of_ranges() {
  Lines lines{};
  for (int range = 0; range < LANES; ++range) {
    // The last range is that of 0.5 to 2.
    double from = 0.5, power = 1e-6;
    for (int i = range; i < LANES - 1; ++i) from /= 4;
    int decade = 0;
    while (decade < 6 && power < from) power *= 10, ++decade;
    for (int next = 0; next < 2; ++next) {
      double steps = 1 << (decade + !SIGNED), scale = 1;
      for (int i = decade; i < 6; ++i) scale *= 10;
      lines.slope[next][range] = static_cast<float>(steps * scale / 0.9);
      // Half an index is taken off: the guess must not be too high where a table is rounded.
      lines.start[next][range] = static_cast<float>(steps * 8 / 9 - !SIGNED - 0.5);
      decade += decade < 6;
    }
  }
  return lines;
}
template <bool SIGNED>
constexpr Lines lines = lines_of_ranges<SIGNED>();

// Arithmetic instead of a table, because a look-up in memory costs more than everything here together.
template <bool SIGNED>
FO_INLINE U guess(F size, const char*) {
  const Lines& of = lines<SIGNED>;
  // Every smaller magnitude has the index 0 as well.
  U range = at_least(as_bits(size), U(0x30000000u)) >> 24;
  F low = pick(of.start[0], range) + pick(of.slope[0], range) * size;
  F high = pick(of.start[1], range) + pick(of.slope[1], range) * size;
  low.part[0] = _mm512_maskz_min_ps(ALL, low.part[0], high.part[0]);
  return truncate(low);
}
#endif

// The index of the entry from zero on that is nearest to a magnitude.
template <bool SIGNED>
FO_INLINE U nearest(F size, const char* table) {
  U index = guess<SIGNED>(size, table);
  F middle = look_up(reinterpret_cast<const float*>(table + MIDDLES), index);
  return select(size > middle, index + 1u, index);
}

FO_INLINE F not_negative(F n) { return as_float(at_least(as_bits(n), U(0u))); }
// An unsigned code of what is more than zero is more than zero: a second moment divides.
FO_INLINE U code_above_zero(F n, U code) { return at_least(code, at_most(as_bits(n), U(1u))); }

FO_TABLE float four_bit_values[16] = {-.8875f, -.6625f, -.4375f, -.2125f, -.0775f, -.0325f, -.0055f, 0.0f,
                                      .0055f,  .0325f,  .0775f,  .2125f,  .4375f,  .6625f,  .8875f,  1.0f};
// Between the entries from 0 on.
FO_TABLE float four_bit_middles[8] = {(0.0f + .0055f) / 2,   (.0055f + .0325f) / 2, (.0325f + .0775f) / 2,
                                      (.0775f + .2125f) / 2, (.2125f + .4375f) / 2, (.4375f + .6625f) / 2,
                                      (.6625f + .8875f) / 2, (.8875f + 1.0f) / 2};

}  // namespace
