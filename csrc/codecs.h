// How values live in memory. A codec is one struct and one word in FO_CODECS' lists.
//
// Plain and split codecs store every value for itself: `at.get<T>(plane)` reads the bits of the values at
// hand from a plane, `at.put` writes them, `at.random()` is 16 random bits for each. Block codecs: blocks.h.
// `bits(plane)` is what a value takes there. Encoding rounds to nearest, ties to even, if nothing else is
// said.
#pragma once

#include "blocks.h"
#include "pack.h"

namespace {

// What most codecs are.
struct EachForItself {
  static constexpr int planes = 1;
  static constexpr int block = 1;
  static constexpr bool lookup = false;
  static constexpr bool random = false;
  static constexpr bool write_only = false;
};

struct fp32 : EachForItself {
  static constexpr FO_ANYWHERE int bits(int) { return 32; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return as_float(at.template get<uint32_t>(0));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, as_bits(x));
  }
};

struct bf16 : EachForItself {
  static constexpr FO_ANYWHERE int bits(int) { return 16; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return bfloat_to_float(at.template get<uint16_t>(0));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, float_to_bfloat(x));
  }
};

struct fp16 : EachForItself {
  static constexpr FO_ANYWHERE int bits(int) { return 16; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return half_to_float(at.template get<uint16_t>(0));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, float_to_half(x));
  }
};

// Written only: zeros to begin with, whatever is in memory.
struct blank : fp32 {
  static constexpr bool write_only = true;

  template <class At>
  static FO_INLINE F decode(At) {
    return F(0.0f);
  }
};

// Rounds up as often as what is cut off is large: right on average.
struct bf16_sr : bf16 {
  static constexpr bool random = true;

  template <class At>
  static FO_INLINE void encode(F x, At at) {
    U infinity(0x7f800000u), bits = as_bits(x);
    U finite = bits + select(above(infinity, magnitude(x)), at.random(), U(0u));
    at.put(0, high_half(select(x != x, U(0x7fc00000u), finite)));
  }
};

// The second plane holds what rounding cut off the first.
struct bf16_kahan : EachForItself {
  static constexpr int planes = 2;
  static constexpr FO_ANYWHERE int bits(int) { return 16; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return sum(bfloat_to_float(at.template get<uint16_t>(0)), bfloat_to_float(at.template get<uint16_t>(1)));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    H rounded = float_to_bfloat(x);
    at.put(0, rounded);
    at.put(1, float_to_bfloat(cut_off(x, bfloat_to_float(rounded))));
  }
};

struct fp16_kahan : EachForItself {
  static constexpr int planes = 2;
  static constexpr FO_ANYWHERE int bits(int) { return 16; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return sum(half_to_float(at.template get<uint16_t>(0)), half_to_float(at.template get<uint16_t>(1)));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    H rounded = float_to_half(x);
    at.put(0, rounded);
    at.put(1, float_to_half(cut_off(x, half_to_float(rounded))));
  }
};

// The 16 bits below a bf16, as a signed number, because the bf16 is rounded and not cut.
struct bf16_split16 : EachForItself {
  static constexpr int planes = 2;
  static constexpr FO_ANYWHERE int bits(int) { return 16; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return as_float((widen(at.template get<uint16_t>(0)) << 16) + sign_extend(at.template get<uint16_t>(1)));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    U bits = canonical(x);
    at.put(0, high_half(bits + 0x8000u));
    at.put(1, narrow(bits));
  }
};

// The same without the last 8 bits.
struct bf16_split8 : EachForItself {
  static constexpr int planes = 2;
  static constexpr FO_ANYWHERE int bits(int plane) { return plane == 0 ? 16 : 8; }

  template <class At>
  static FO_INLINE F decode(At at) {
    U low = sign_extend(at.template get<uint8_t>(1)) << 8;
    return as_float((widen(at.template get<uint16_t>(0)) << 16) + low);
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    U bits = rounded(x);
    at.put(0, high_half(bits + 0x8000u));
    at.put(1, low_byte(bits >> 8));
  }
  // To 24 bits; no change to those of an infinity or of a NaN.
  static FO_INLINE U rounded(F x) {
    U bits = canonical(x);
    return bits + 0x7fu + ((bits >> 8) & 1u);
  }
};

// One bit for a weight, which masked rules read and write themselves.
struct mask : EachForItself {
  static constexpr FO_ANYWHERE int bits(int) { return 1; }
};

}  // namespace

// Those of gradients, the further ones of parameters and states, those of states only, and that of masks.
#define FO_PLAIN_CODECS(CODEC) CODEC(fp32) CODEC(bf16) CODEC(fp16)
#define FO_SPLIT_CODECS(CODEC) \
  CODEC(bf16_sr)               \
  CODEC(bf16_kahan) CODEC(fp16_kahan) CODEC(bf16_split16) CODEC(bf16_split8) CODEC(blank)
#define FO_BLOCK_CODECS(CODEC) \
  CODEC(int8)                  \
  CODEC(int8_unsigned)         \
  CODEC(int8_companded)        \
  CODEC(int8_companded_unsigned) CODEC(fp8) CODEC(fp8_unsigned) CODEC(int4) CODEC(int4_unsigned)
#define FO_VALUE_CODECS(CODEC) FO_PLAIN_CODECS(CODEC) FO_SPLIT_CODECS(CODEC) FO_BLOCK_CODECS(CODEC)
#define FO_CODECS(CODEC) FO_VALUE_CODECS(CODEC) CODEC(mask)

namespace {

#define FO_ID(codec) id_##codec,
enum CodecId { FO_CODECS(FO_ID) CODEC_COUNT };
#undef FO_ID

#define FO_ONE(codec) +1
constexpr int PLAIN_COUNT = FO_PLAIN_CODECS(FO_ONE);
constexpr int ELEMENTWISE_COUNT = PLAIN_COUNT FO_SPLIT_CODECS(FO_ONE);
#undef FO_ONE

#define FO_CASE(codec) \
  case id_##codec:     \
    return visit(codec{});

// Calls visit with the codec that has this id.
template <class Visit>
FO_INLINE auto with_codec(int id, Visit visit) {
  switch (id) { FO_CODECS(FO_CASE) }
  __builtin_unreachable();
}
// The same for one of values.
template <class Visit>
FO_INLINE auto with_values(int id, Visit visit) {
  switch (id) { FO_VALUE_CODECS(FO_CASE) }
  __builtin_unreachable();
}
// The same for an id below PLAIN_COUNT, and for all others: smaller switches.
template <class Visit>
FO_INLINE auto with_plain(int id, Visit visit) {
  switch (id) { FO_PLAIN_CODECS(FO_CASE) }
  __builtin_unreachable();
}
template <class Visit>
FO_INLINE auto with_split(int id, Visit visit) {
  switch (id) { FO_SPLIT_CODECS(FO_CASE) }
  __builtin_unreachable();
}
template <class Visit>
FO_INLINE auto with_elementwise(int id, Visit visit) {
  switch (id) { FO_PLAIN_CODECS(FO_CASE) FO_SPLIT_CODECS(FO_CASE) }
  __builtin_unreachable();
}
template <class Visit>
FO_INLINE auto with_block(int id, Visit visit) {
  switch (id) { FO_BLOCK_CODECS(FO_CASE) }
  __builtin_unreachable();
}
#undef FO_CASE

}  // namespace
