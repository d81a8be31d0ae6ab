// Codecs that are not plain, a chunk of neighbouring elements at a time: from memory to floats in a buffer
// that stays in the first cache, and back. One switch per chunk, and constants stay in registers.
#pragma once

#ifdef FO_PERMUTES
#include "permute.h"
#endif
#include "random.h"
#include "stage.h"

namespace {

// Blocks lie within a chunk, and the scales of a chunk's blocks fill at most one vector.
constexpr int CHUNK = 1024;
// The LANES elements from i on.
struct Lanes {
  char* const* planes;
  int64_t i;
  const uint16_t* random_bits = nullptr;

  template <class T>
  FO_INLINE Pack<T> get(int plane) const {
    return ::load<T>(planes[plane] + i * static_cast<int64_t>(sizeof(T)));
  }
  template <class T>
  FO_INLINE void put(int plane, Pack<T> x) const {
    ::store(planes[plane] + i * static_cast<int64_t>(sizeof(T)), x);
  }
  FO_INLINE U random() const { return widen(::load<uint16_t>(random_bits + i)); }
};

// What the next chunk will read from memory, which has nothing else to do while codes are computed.
struct Ahead {
  const char* from[2];
  int bytes[2];

  FO_INLINE void fetch(int64_t i) const {
    __builtin_prefetch(from[0] + i * bytes[0], 0, 2);
    __builtin_prefetch(from[1] + i * bytes[1], 0, 2);
  }
};

// The same slot from element `first` on.
inline Slot from_element(Slot slot, int64_t first) {
  with_codec(slot.codec, [&](auto c) {
    for (int plane = 0; plane < c.planes; ++plane) {
      slot.planes[plane] += (plane == 0 ? first : first / c.block) * c.bits(plane) / 8;
    }
  });
  return slot;
}

template <int BITS>
FO_INLINE U get_codes(const char* codes, int i) {
  return widen(BITS == 4 ? load_halves(codes + i / 2) : ::load<uint8_t>(codes + i));
}
template <int BITS>
FO_INLINE void put_codes(char* codes, int i, U x) {
  if (BITS == 4) {
    store_halves(codes + i / 2, low_byte(x));
  } else {
    ::store(codes + i, low_byte(x));
  }
}

// How many neighbours are converted at once.
#ifdef FO_PERMUTES
template <class Codec>
constexpr int WIDTH = Codec::lookup ? MANY : LANES;
#else
template <class Codec>
constexpr int WIDTH = LANES;
#endif
template <class Codec>
FO_INLINE void decode_codes(Codec c, const char* codes, const char* lookup, F scale, float* values) {
#ifdef FO_PERMUTES
  if constexpr (Codec::lookup) return decode_many(codes, lookup, scale, values);
#endif
  store(values, c.value(get_codes<c.bits(0)>(codes, 0), lookup) * scale);
}
template <class Codec>
FO_INLINE void encode_codes(Codec c, const float* values, F times, const char* lookup, char* codes) {
#ifdef FO_PERMUTES
  if constexpr (Codec::lookup) return encode_many(c, values, times, lookup, codes);
#endif
  put_codes<c.bits(0)>(codes, 0, c.code(load<float>(values) * times, lookup));
}

// Calls body(slot, at, i) for every COUNT of elements [begin, end): `at` is where element i is in the slot.
// If memory ends within the last ones, these are in a copy, which is put back if `written`.
template <int COUNT = LANES, class Body>
FO_INLINE void each_vector(const Slot& home, int begin, int end, bool written, Body body) {
  int i = begin;
  // A copy, because a store to a plane might change the slot itself for all that the compiler knows.
  const Slot slot = home;
  _Pragma("GCC unroll 4") for (; i + COUNT <= end; i += COUNT) body(slot, i, i);
  if (i >= end) return;
  Stage rest;
  body(rest.fetch(home, i, end - i), 0, i);
  if (written) rest.put_back(home, i, end - i);
}

template <class Codec>
void decode_split(Codec c, const Slot& slot, int count, float* values) {
  each_vector(slot, 0, count, false, [&](const Slot& from, int at, int i) FO_LAMBDA {
    store(values + i, c.decode(Lanes{from.planes, at}));
  });
}

template <class Codec>
void encode_split(Codec c, const Slot& slot, int count, const float* values, const uint16_t* random) {
  each_vector(slot, 0, count, true, [&](const Slot& to, int at, int i) FO_LAMBDA {
    // What the next chunk reads; its first plane is fetched while states are encoded.
    if (c.planes > 1 && i % 64 == 0) __builtin_prefetch(slot.planes[1] + (i + CHUNK) * c.bits(1) / 8, 1, 2);
    // `at` is 0 in a copy, where random bits still are those of element i.
    c.encode(load<float>(values + i), Lanes{to.planes, at, random + (i - at)});
  });
}

template <class Codec>
float scale_at(const char* scales, int block) {
  uint32_t bits = 0;
  constexpr int bytes = Codec::bits(1) / 8;
  memcpy(reinterpret_cast<char*>(&bits) + 4 - bytes, scales + block * bytes, bytes);
  float scale;
  memcpy(&scale, &bits, 4);
  return scale;
}

template <class Codec>
void decode_blocks(Codec c, const Slot& slot, int count, float* values) {
  for (int begin = 0, block = 0; begin < count; begin += c.block, ++block) {
    int end = begin + c.block < count ? begin + c.block : count;
    F scale(scale_at<Codec>(slot.planes[1], block));
    each_vector<WIDTH<Codec>>(slot, begin, end, false, [&](const Slot& from, int at, int i) FO_LAMBDA {
      decode_codes(c, from.planes[0] + at * c.bits(0) / 8, slot.lookup, scale, values + i);
    });
  }
}

// The largest magnitude of every block, as integers, and of its values that are not negative.
template <class Codec>
void find_tops(const float* values, int count, uint32_t* top, uint32_t* positive) {
  for (int begin = 0; begin < count; begin += Codec::block) {
    int end = begin + Codec::block < count ? begin + Codec::block : count;
    // The zeros behind the last element are positive.
    U most(0u), most_positive(end - begin < Codec::block ? 0u : 0x80000000u);
    auto look = [&](int i) FO_LAMBDA {
      F x = load<float>(values + i);
      most = at_least(most, magnitude(x));
      if (Codec::signed_scale) most_positive = at_least(most_positive, as_bits(x));
    };
    if (end - begin == Codec::block) {
      _Pragma("GCC unroll 4") for (int k = 0; k < Codec::block; k += LANES) look(begin + k);
    } else {
      for (int i = begin; i < end; i += LANES) look(i);
    }
    *top++ = largest(most);
    if (Codec::signed_scale) *positive++ = largest(most_positive);
  }
}

template <class Codec>
void put_scales(const Scaling<Codec>& scaling, char* scales, int blocks) {
  if (Codec::bits(1) == 16) {
    H narrowed = high_half(as_bits(scaling.scale));
    memcpy(scales, &narrowed, blocks * 2);
  } else {
    memcpy(scales, &scaling.scale, blocks * 4);
  }
}

// `values` go on with zeros to the end of a vector.
template <class Codec>
void encode_blocks(Codec c, const Slot& slot, int count, float* values, Ahead ahead) {
  constexpr int width = WIDTH<Codec>;
  alignas(64) uint32_t top[LANES] = {}, positive[LANES] = {}, alive[LANES];
  alignas(64) float inverse[LANES];
  find_tops<Codec>(values, count, top, positive);
  Scaling<Codec> all(load<uint32_t>(top), load<uint32_t>(positive));
  store(inverse, all.inverse), store(alive, all.alive);
  put_scales(all, slot.planes[1], (count + c.block - 1) / c.block);
  char* const codes = slot.planes[0];
  const char* const lookup = slot.lookup;
  for (int begin = 0, block = 0; begin < count; begin += c.block, ++block) {
    int end = begin + c.block < count ? begin + c.block : count;
    const F times(inverse[block]);
    if (!alive[block]) memset(values + begin, 0, sizeof(float) * (end - begin));
    auto encode = [&](char* to, int i) FO_LAMBDA { encode_codes(c, values + i, times, lookup, to); };
    if (end - begin == c.block) {
      // The codes of the next chunk: the core itself never fetches from beyond a page.
      for (int k = 0; k < c.block * c.bits(0) / 8; k += 64) {
        __builtin_prefetch(codes + (begin + CHUNK) * c.bits(0) / 8 + k, 1, 2);
      }
      _Pragma("GCC unroll 4") for (int k = 0; k < c.block; k += width) {
        for (int near = 0; near < width; near += LANES) ahead.fetch(begin + k + near);
        encode(codes + (begin + k) * c.bits(0) / 8, begin + k);
      }
      continue;
    }
    int full = end - (end - begin) % width;
    for (int i = begin; i < full; i += width) encode(codes + i * c.bits(0) / 8, i);
    if (full < end) {
      alignas(64) char rest[width];
      encode(rest, full);
      int bits = (end - full) * c.bits(0);
      if (bits % 8) rest[bits / 8] &= 15;
      memcpy(codes + full * c.bits(0) / 8, rest, (bits + 7) / 8);
    }
  }
}

// From a slot that is not plain to `values`; the vector in which the slot ends is filled up.
inline void decode(const Slot& slot, int count, float* values) {
  if (slot.codec < ELEMENTWISE_COUNT) {
    with_split(slot.codec, [&](auto c) { decode_split(c, slot, count, values); });
  } else {
    with_block(slot.codec, [&](auto c) { decode_blocks(c, slot, count, values); });
  }
}

// Back again. `first` is the slot's first element in `stream`.
inline void encode(const Slot& slot, int count, float* values, const Stream& stream, int64_t first,
                   Ahead ahead) {
  if (slot.codec < ELEMENTWISE_COUNT) {
    with_split(slot.codec, [&](auto c) {
      alignas(64) uint16_t random[c.random ? CHUNK : LANES];
      if (c.random) stream.fill(first, count, random);
      encode_split(c, slot, count, values, random);
    });
  } else {
    // What a rule made of the lanes behind the last element must not count.
    for (int i = count; i % LANES; ++i) values[i] = 0;
    with_block(slot.codec, [&](auto c) { encode_blocks(c, slot, count, values, ahead); });
  }
}

}  // namespace
