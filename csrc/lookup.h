// Tables of the 8-bit dynamic map, which kernels/lookup.py builds, and of the map of 4 bits.
#pragma once

#ifdef FO_PERMUTES
#include "permute.h"
#else
#include "pack.h"
#endif

namespace {

// A table's parts, in bytes: the value of every code; by the upper half of a number's bits what makes its sum
// with all of them show sign and code; lines that lead to a magnitude's code.
constexpr int VALUES = 0, STEPS = 1024, LINES = STEPS + (4 << 16);

FO_INLINE const float* part_of(const char* table, int part) {
  return reinterpret_cast<const float*>(table + part);
}

FO_INLINE F not_negative(F n) { return as_float(at_least(as_bits(n), U(0u))); }
// An unsigned code of what is more than zero is more than zero: a second moment divides.
FO_INLINE U code_above_zero(F n, U code) { return at_least(code, at_most(as_bits(n), U(1u))); }

#ifdef FO_PERMUTES

// But for 1, which has no negative, the signed map is symmetric around the code of zero.
FO_INLINE F dynamic_value(U code, const char* table) {
  U m = code - 127u, sign = m & 0x80000000u;
  U size = select(above(U(0u), m), U(0u) - m, m);
  F value = select(above(size, U(127u)), F(1.0f), permuted<128>(part_of(table, VALUES) + 127, size));
  return as_float(as_bits(value) | sign);
}
FO_INLINE F dynamic_unsigned_value(U code, const char* table) {
  return permuted<256>(part_of(table, VALUES), code);
}
FO_INLINE U dynamic_code(F n, const char* table) {
  U count = count_below<128>(as_float(magnitude(n)), part_of(table, LINES)), zero(127u);
  return select(n < F(0.0f), zero - at_most(count, zero), zero + count);
}
FO_INLINE U dynamic_unsigned_code(F n, const char* table) {
  return code_above_zero(n, count_below<256>(not_negative(n), part_of(table, LINES)));
}

#else

FO_INLINE F dynamic_value(U code, const char* table) { return look_up(part_of(table, VALUES), code); }
FO_INLINE F dynamic_unsigned_value(U code, const char* table) { return dynamic_value(code, table); }

// The code in the third byte, complemented if the map has signs and the number's, on top, is set.
FO_INLINE U step(F n, const char* table) {
  U bits = as_bits(n);
  return as_bits(look_up(part_of(table, STEPS), bits >> 16)) + bits;
}
FO_INLINE U dynamic_code(F n, const char* table) {
  U sum = step(n, table);
  return (sum >> 16) ^ (U(0u) - (sum >> 31));
}
FO_INLINE U dynamic_unsigned_code(F n, const char* table) { return step(n, table) >> 16; }

#endif

FO_TABLE float four_bit_values[16] = {-.8875f, -.6625f, -.4375f, -.2125f, -.0775f, -.0325f, -.0055f, 0.0f,
                                      .0055f,  .0325f,  .0775f,  .2125f,  .4375f,  .6625f,  .8875f,  1.0f};
// Between the entries from 0 on.
FO_TABLE float four_bit_middles[8] = {(0.0f + .0055f) / 2,   (.0055f + .0325f) / 2, (.0325f + .0775f) / 2,
                                      (.0775f + .2125f) / 2, (.2125f + .4375f) / 2, (.4375f + .6625f) / 2,
                                      (.6625f + .8875f) / 2, (.8875f + 1.0f) / 2};

}  // namespace
