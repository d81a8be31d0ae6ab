// Tables of the 8-bit dynamic map, which kernels/lookup.py builds, and of the map of 4 bits.
#pragma once

#include "pack.h"

namespace {

// A table's first parts, in bytes: the value of every code; by the upper half of a number's bits what makes
// its sum with all of them show sign and code.
constexpr int VALUES = 0, STEPS = 1024;

FO_INLINE const float* part_of(const char* table, int part) {
  return reinterpret_cast<const float*>(table + part);
}

FO_INLINE F not_negative(F n) { return as_float(at_least(as_bits(n), U(0u))); }
// An unsigned code of what is more than zero is more than zero: a second moment divides.
FO_INLINE U code_above_zero(F n, U code) { return at_least(code, at_most(as_bits(n), U(1u))); }

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

FO_TABLE float four_bit_values[16] = {-.8875f, -.6625f, -.4375f, -.2125f, -.0775f, -.0325f, -.0055f, 0.0f,
                                      .0055f,  .0325f,  .0775f,  .2125f,  .4375f,  .6625f,  .8875f,  1.0f};
// Between the entries from 0 on.
FO_TABLE float four_bit_middles[8] = {(0.0f + .0055f) / 2,   (.0055f + .0325f) / 2, (.0325f + .0775f) / 2,
                                      (.0775f + .2125f) / 2, (.2125f + .4375f) / 2, (.4375f + .6625f) / 2,
                                      (.6625f + .8875f) / 2, (.8875f + 1.0f) / 2};

}  // namespace
