// How values live in memory. A codec is one struct and one line in FO_CODECS.
//
// `at.get<T>(plane)` reads the bits of the values at hand from one of the codec's planes, `at.put` writes
// them; `bytes(plane)` is the width of an element. Encoding rounds to nearest, ties to even.
#pragma once

#include "pack.h"

namespace {

struct fp32 {
  static constexpr int planes = 1;
  static constexpr FO_ANYWHERE int bytes(int) { return 4; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return as_float(at.template get<uint32_t>(0));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, as_bits(x));
  }
};

struct bf16 {
  static constexpr int planes = 1;
  static constexpr FO_ANYWHERE int bytes(int) { return 2; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return as_float(widen(at.template get<uint16_t>(0)) << 16);
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, float_to_bfloat(x));
  }
};

struct fp16 {
  static constexpr int planes = 1;
  static constexpr FO_ANYWHERE int bytes(int) { return 2; }

  template <class At>
  static FO_INLINE F decode(At at) {
    return half_to_float(at.template get<uint16_t>(0));
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    at.put(0, float_to_half(x));
  }
};

}  // namespace

#define FO_CODECS(CODEC) CODEC(fp32) CODEC(bf16) CODEC(fp16)

namespace {

#define FO_ID(codec) id_##codec,
enum CodecId { FO_CODECS(FO_ID) CODEC_COUNT };
#undef FO_ID

// Calls visit with the codec that has this id.
template <class Visit>
FO_INLINE auto with_codec(int id, Visit visit) {
  switch (id) {
#define FO_CASE(codec) \
  case id_##codec:     \
    return visit(codec{});
    FO_CODECS(FO_CASE)
#undef FO_CASE
  }
  __builtin_unreachable();
}

}  // namespace
