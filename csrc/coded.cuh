// Slots of any codec on a GPU: 8 elements to a thread, neighbours where a block or a random number is shared,
// so that a warp has whole blocks. The end of a tensor, misaligned and strided tensors differ in their
// accesses only.
#pragma once

#include "moves.cuh"
#include "philox.h"

namespace {

// Where a parameter's random numbers begin.
struct Stream {
  uint32_t seed, step, ordinal;
  uint64_t drawn;
};

// An element of a codec that stores every value for itself, with random bits of its own.
template <class Codec>
struct RandomElement : Element<Codec, EIGHT> {
  const uint64_t* drawn;

  FO_INLINE U random() const {
    return static_cast<U>(drawn[this->element / 2]) >> this->element % 2 * 16 & 0xffff;
  }
};

// Of bf16_split8, four elements at a time.
FO_INLINE void join_24_bits(const Words<EIGHT>& words, F* x) {
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    // A byte with its sign, 8 bits up.
    U low = bytes_of(words.word[4 + e / 4], 0, 0x8804 + e % 4 * 0x1110), pair = words.word[e / 2];
    x[e] = as_float((e % 2 ? pair & 0xffff0000u : pair << 16) + low);
  }
}
FO_INLINE void split_24_bits(const F* x, Words<EIGHT>& words) {
#pragma unroll
  for (int i = 0; i < EIGHT; i += 4) {
    U bits[4], upper[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) upper[e] = (bits[e] = bf16_split8::rounded(x[i + e])) + 0x8000u;
    words.word[i / 2] = bytes_of(upper[0], upper[1], 0x7632);
    words.word[i / 2 + 1] = bytes_of(upper[2], upper[3], 0x7632);
    words.word[4 + i / 4] = four_bytes<1>(bits);
  }
}

template <class Codec>
FO_INLINE void encode_random(const Place& place, const Stream& stream, uint32_t slot, const F* x,
                             Words<EIGHT>& words) {
  uint64_t eighth = stream.drawn + place.first / EIGHT;
  uint64_t drawn[] = {eighth, eighth >> 32, stream.ordinal, slot};
  philox(drawn, stream.seed, stream.step);
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) Codec::encode(x[e], RandomElement<Codec>{{words, e}, drawn});
}

template <class Codec>
FO_INLINE void encode_each(const Place& place, const Stream& stream, uint32_t slot, const F* x,
                           Words<EIGHT>& words) {
  if constexpr (Codec::random) {
    encode_random<Codec>(place, stream, slot, x, words);
  } else if constexpr (std::is_same_v<Codec, bf16>) {
    encode_pairs(x, words);
  } else if constexpr (std::is_same_v<Codec, bf16_split8>) {
    split_24_bits(x, words);
  } else {
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) Codec::encode(x[e], Element<Codec, EIGHT>{words, e});
  }
}

// The largest of a block's keys, of which each thread has one.
FO_INLINE uint32_t largest_of_block(const Storage& storage, uint32_t key) {
  auto meet = [&](int distance) {
    uint32_t other = __shfl_xor_sync(~0u, key, distance);
    key = key > other ? key : other;
  };
  // Of 64 elements at least.
  if (storage.block_shift > 7) meet(16);
  if (storage.block_shift > 6) meet(8);
  meet(4);
  meet(2);
  meet(1);
  return key;
}

// Every thread of the warp must be here. One piece of code for all codecs, because its division has a call.
FO_INLINE AnyScaling scaling_of(const Storage& storage, const F* x) {
  uint32_t key = 0;
  auto count = [&](uint32_t own) { key = key > own ? key : own; };
  if (storage.signed_scale) {
    // A sign stands below the magnitude, so that one maximum finds both.
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) count(magnitude(x[e]) << 1 | (~as_bits(x[e]) >> 31));
  } else {
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) count(as_bits(x[e]) << 1);
  }
  key = largest_of_block(storage, key);
  U top = key >> 1, positive = key & 1 ? top : 0x80000000u;
  return AnyScaling(top, positive, storage.bits[1] == 16, storage.signed_scale);
}

// The codes of zeros, in all bits of a word.
template <class Codec>
constexpr U zeros = std::is_same_v<Codec, int8>   ? 0x7f7f7f7fu
                    : std::is_same_v<Codec, int4> ? 0x77777777u
                                                  : 0u;

// A word of codes.
template <class Codec>
FO_INLINE U codes_of(const F* n, const char* lookup) {
  constexpr int bits = Codec::bits(0), each = 32 / bits;
  U codes[each], word = 0;
#pragma unroll
  for (int e = 0; e < each; ++e) {
    if constexpr (std::is_same_v<Codec, int8>) {
      codes[e] = step(n[e], lookup);
    } else {
      codes[e] = Codec::code(n[e], lookup);
    }
  }
  if constexpr (std::is_same_v<Codec, int8>) {
    // Four of dynamic_code() at once: a byte is complemented by its sign.
    return four_bytes<2>(codes) ^ signs_of_four(codes);
  } else if constexpr (bits == 8) {
    return four_bytes<0>(codes);
  } else {
#pragma unroll
    for (int e = 0; e < each; ++e) word |= (codes[e] & ((1u << bits) - 1)) << e * bits;
    return word;
  }
}

template <class Codec>
FO_INLINE void encode_block(const AnyScaling& scaling, const char* lookup, int count, const F* x,
                            Words<EIGHT>& words) {
  constexpr int bits = Codec::bits(0), each = 32 / bits;
  F n[EIGHT];
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) n[e] = product(x[e], scaling.inverse);
#pragma unroll
  for (int i = 0; i < EIGHT / each; ++i) {
    // Without a branch.
    words.word[i] = (codes_of<Codec>(n + i * each, lookup) & scaling.alive) | (zeros<Codec> & ~scaling.alive);
  }
  // The half of a byte behind the last element is zero.
  if (bits == 4 && count < EIGHT) words.word[0] &= (1u << 4 * count) - 1;
  words.word[4] = as_bits(scaling.scale) >> (32 - Codec::bits(1));
}

template <class Codec>
FO_INLINE void decode_each(Words<EIGHT>& words, F* x) {
  if constexpr (std::is_same_v<Codec, bf16_split8>) {
    join_24_bits(words, x);
  } else {
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) x[e] = Codec::decode(Element<Codec, EIGHT>{words, e});
  }
}

template <class Codec>
FO_INLINE void decode_block(const char* lookup, Words<EIGHT>& words, F* x) {
  constexpr int bits = Codec::bits(0), each = 32 / bits;
  F scale = as_float(words.word[4] << (32 - Codec::bits(1)));
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    U code = words.word[e / each] >> e % each * bits & ((1u << bits) - 1);
    // So that the entry's address is one instruction: the compiler scales what it shifts itself.
    if (Codec::lookup) code = bytes_of(words.word[e / each], 0, 0x4440 + e % each);
    x[e] = product(Codec::value(code, lookup), scale);
  }
}

// Of a codec without blocks: plain ones first, which takes fewer branches than one switch.
template <class Visit>
FO_INLINE void with_each(int codec, Visit visit) {
  if (codec < PLAIN_COUNT) {
    with_plain(codec, visit);
  } else {
    with_split(codec, visit);
  }
}
FO_INLINE void decode_elements(const Storage& storage, Words<EIGHT>& words, F* x) {
  with_each(storage.codec, [&](auto c) { decode_each<decltype(c)>(words, x); });
}
FO_INLINE void encode_elements(const Storage& storage, const Place& place, const Stream& stream,
                               uint32_t number, const F* x, Words<EIGHT>& words) {
  with_each(storage.codec, [&](auto c) { encode_each<decltype(c)>(place, stream, number, x, words); });
}

FO_INLINE void decode_state(const Storage& storage, const Slot& slot, Words<EIGHT>& words, F* x) {
  if (storage.block_shift == 0) return decode_elements(storage, words, x);
  with_block(storage.codec, [&](auto c) { decode_block<decltype(c)>(slot.lookup, words, x); });
}
FO_INLINE void encode_state(const Storage& storage, const Slot& slot, int state, const Place& place,
                            const Stream& stream, F* x, Words<EIGHT>& words) {
  if (storage.block_shift == 0) return encode_elements(storage, place, stream, 1 + state, x, words);
  if (!place.vectors) {
    // What a rule made of elements that are none must not count.
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) x[e] = e < place.count ? x[e] : 0;
  }
  AnyScaling scaling = scaling_of(storage, x);
  with_block(storage.codec,
             [&](auto c) { encode_block<decltype(c)>(scaling, slot.lookup, place.count, x, words); });
}

}  // namespace
