// Block codecs: codes of 8 or 4 bits in plane 0, one scale for `block` neighbouring values in plane 1.
//
// A driver encodes a block x like this, and F may hold one value or several:
//   top = the largest magnitude(x); positive = the largest as_bits(x) as a signed number;
//   Scaling<Codec> scaling(top, positive); scaling.scale, rounded already, goes to plane 1;
//   code = Codec::code(scaling.normalised(x), lookup), whose upper bits may be anything if it has 8.
// It decodes Codec::value(code, lookup) * scale. In a short block, missing values count as zeros. `lookup` is
// the table whose address follows those of the planes if the codec has one (lookup.h). Of two codes of 4 bits
// the lower one belongs to the even index; the upper one without a value is 0.
#pragma once

#include "lookup.h"
#include "pack.h"

namespace {

struct InBlocks {
  static constexpr int planes = 2;
  static constexpr bool lookup = false;
  static constexpr bool random = false;
  static constexpr bool write_only = false;
  // Whether the scale has the sign of the value of largest magnitude, so that this value is exact.
  static constexpr bool signed_scale = false;
};

template <int BLOCK, int CODE_BITS, int SCALE_BITS>
struct BlocksOf : InBlocks {
  static constexpr int block = BLOCK;
  static constexpr FO_ANYWHERE int bits(int plane) { return plane == 0 ? CODE_BITS : SCALE_BITS; }
};

// A block's scale and what its values are multiplied with: a scale of 0, infinity or NaN leaves zeros.
struct AnyScaling {
  F scale, inverse;
  U alive;

  FO_INLINE AnyScaling(U top, U positive, bool short_scale, bool signed_scale) {
    U smallest_normal(0x00800000u), infinity(0x7f800000u);
    F most = as_float(select(above(smallest_normal, top), U(0u), top));
    scale = short_scale ? bfloat_to_float(float_to_bfloat(most)) : most;
    U size = as_bits(scale);
    alive = select(above(size, U(0u)), select(above(infinity, size), U(~0u), U(0u)), U(0u));
    if (signed_scale) scale = as_float(size | select(above(top, positive), U(0x80000000u), U(0u)));
    inverse = as_float(as_bits(quotient(F(1.0f), scale)) & alive);
  }
  FO_INLINE F normalised(F x) const { return as_float(as_bits(product(x, inverse)) & alive); }
};

template <class Codec>
struct Scaling : AnyScaling {
  FO_INLINE Scaling(U top, U positive)
      : AnyScaling(top, positive, Codec::bits(1) == 16, Codec::signed_scale) {}
};

// The 8-bit dynamic map of Dettmers et al.
struct int8 : BlocksOf<256, 8, 32> {
  static constexpr bool lookup = true;

  static FO_INLINE F value(U code, const char* table) { return dynamic_value(code, table); }
  static FO_INLINE U code(F n, const char* table) { return dynamic_code(n, table); }
};

struct int8_unsigned : BlocksOf<256, 8, 32> {
  static constexpr bool lookup = true;

  static FO_INLINE F value(U code, const char* table) { return dynamic_unsigned_value(code, table); }
  static FO_INLINE U code(F n, const char* table) { return dynamic_unsigned_code(n, table); }
};

// Even steps of n / (1 + |n|), which is steeper near zero.
struct int8_companded : BlocksOf<64, 8, 16> {
  static FO_INLINE F value(U code, const char*) {
    F q = to_float(signed_byte(code));
    return small_quotient(q, F(254.0f) - as_float(magnitude(q)));
  }
  static FO_INLINE U code(F n, const char*) {
    // Rounding of scale and inverse leave |n| below 1.003, and so this below 127.5.
    F size = as_float(magnitude(n));
    return round_to_integer(small_quotient(product(F(254.0f), n), sum(F(1.0f), size)));
  }
};

// Even steps of the square root.
struct int8_companded_unsigned : BlocksOf<128, 8, 32> {
  static FO_INLINE F value(U code, const char*) {
    F q = to_float(code);
    return product(product(q, q), F(1.0f / 65025.0f));
  }
  static FO_INLINE U code(F n, const char*) {
    // What is above zero has at least the code 1, because a second moment divides: that of 1 / 65025.
    F size = larger(n, F(1.0f / 65025.0f));
    return where_above_zero(n, round_to_integer(product(F(255.0f), small_root(size))));
  }
};

// Floats of 4 exponent and 3 mantissa bits; the largest one, 448, stands for the scale.
struct fp8 : BlocksOf<256, 8, 32> {
  static FO_INLINE F value(U code, const char*) { return product(e4m3_to_float(code), F(1.0f / 448.0f)); }
  static FO_INLINE U code(F n, const char*) { return float_to_e4m3(product(n, F(448.0f))); }
};

struct fp8_unsigned : fp8 {
  static FO_INLINE U code(F n, const char*) {
    return code_above_zero(n, float_to_e4m3(product(not_negative(n), F(448.0f))));
  }
};

// A dynamic map of 16 values.
struct int4 : BlocksOf<128, 4, 32> {
  static constexpr bool signed_scale = true;

  static FO_INLINE F value(U code, const char*) { return pick(four_bit_values, code); }
  static FO_INLINE U code(F n, const char*) {
    // A value between two neighbours belongs to the lower one, so a negative value to that of larger size.
    U size = magnitude(n) + (as_bits(n) >> 31), index(0u);
    FO_UNROLL for (int i = 0; i < 8; ++i) {
      index = select(above(size, as_bits(F(four_bit_middles[i]))), index + 1u, index);
    }
    return select(n < F(0.0f), U(7u) - at_most(index, U(7u)), U(7u) + index);
  }
};

// Even steps of the fourth root, without zero.
struct int4_unsigned : BlocksOf<128, 4, 32> {
  static FO_INLINE F value(U code, const char*) {
    F root = to_float(code + 1u), square = product(root, root);
    return product(product(square, square), F(1.0f / 65536.0f));
  }
  static FO_INLINE U code(F n, const char*) {
    // That of 1 / 65536 is the lowest code.
    F size = larger(n, F(1.0f / 65536.0f));
    return round_to_integer(product(F(16.0f), small_root(small_root(size)))) - 1u;
  }
};

}  // namespace
