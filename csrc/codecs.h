// How values live in memory. A codec is one struct and one line in FO_CODECS.
//
// `at.get<T>(plane)` reads the bits of the values at hand from one of the codec's planes, `at.put` writes
// them; `bytes` says how wide an element of each plane is. Encoding rounds to nearest, ties to even.
#pragma once

#include "pack.h"

namespace {

struct fp32 {
  static constexpr int bytes[] = {4};

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
  static constexpr int bytes[] = {2};

  template <class At>
  static FO_INLINE F decode(At at) {
    return as_float(widen(at.template get<uint16_t>(0)) << 16);
  }
  template <class At>
  static FO_INLINE void encode(F x, At at) {
    U bits = as_bits(x);
    U rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
    // Rounding could carry a NaN's payload into infinity; setting the quiet bit keeps it a NaN.
    at.put(0, narrow(select(x != x, bits | 0x400000u, rounded) >> 16));
  }
};

struct fp16 {
  static constexpr int bytes[] = {2};

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

template <class Codec>
constexpr int planes_of = sizeof(Codec::bytes) / sizeof(int);

#define FO_MORE_PLANES(codec) planes = planes_of<codec> > planes ? planes_of<codec> : planes;
constexpr int most_planes() {
  int planes = 1;
  FO_CODECS(FO_MORE_PLANES)
  return planes;
}
#undef FO_MORE_PLANES

// One value of an element in memory: a codec and where its planes begin.
struct Slot {
  int codec;
  char* planes[most_planes()];
};

}  // namespace
