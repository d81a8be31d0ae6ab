// Slots of any codec on a GPU: 8 elements to a thread, neighbours where a block or a random number is shared,
// so that a warp has whole blocks. The end of a tensor, misaligned and strided tensors differ in their
// accesses only.
#pragma once

#include "philox.h"
#include "registers.cuh"

namespace {

constexpr int EIGHT = 8;

// The planes of a codec, for a kernel that learns of it when it runs.
struct Storage {
  int32_t codec, column;
  // Of a value in each plane; in plane 1 nothing if there is none, or of a scale.
  uint32_t bits[2];
  // Elements to a scale, as a power of two.
  int32_t block_shift;
  bool lookup, random, write_only, signed_scale;
};

template <class Codec>
constexpr Storage storage_of(int32_t id) {
  Storage storage{id, 0, {Codec::bits(0)}, 0, Codec::lookup, Codec::random, Codec::write_only, false};
  if (Codec::planes > 1) storage.bits[1] = Codec::bits(1);
  while (Codec::block >> storage.block_shift > 1) ++storage.block_shift;
  if constexpr (Codec::block > 1) storage.signed_scale = Codec::signed_scale;
  return storage;
}
#define FO_STORAGE(codec) storage_of<codec>(id_##codec),
constexpr Storage storages[] = {FO_CODECS(FO_STORAGE)};
#undef FO_STORAGE

FO_INLINE Slot take(const Storage& storage, const fo::Table& table, int64_t tensor) {
  Slot slot{storage.codec, {table.plane(storage.column, tensor)}, nullptr};
  if (storage.bits[1]) slot.planes[1] = table.plane(storage.column + 1, tensor);
  if (storage.lookup) slot.lookup = table.plane(storage.column + 2, tensor);
  return slot;
}

// The elements of a thread: in vectors two groups of four, `gap` apart, else `count` neighbours.
struct Place {
  int64_t first;
  int gap, count;
  bool vectors;
};

// How a plane lies in memory: dense without strides.
struct Lie {
  const int64_t *layout, *strides;

  FO_INLINE int64_t operator()(int64_t element) const {
    return strides ? offset(fo::Layout{layout}, strides, element) : element;
  }
};

// One entry of a plane. The upper bits of what is put may be anything.
template <Direction direction>
FO_INLINE void move_entry(char* memory, uint32_t bytes, uint32_t* entry) {
  if (direction == FETCH) *entry = 0;
  if (bytes == 4) {
    move<direction, uint32_t>(memory, entry);
  } else if (bytes == 2) {
    move<direction, uint16_t>(memory, entry);
  } else {
    move<direction, uint8_t>(memory, entry);
  }
}

// `count` entries from element `first` on. They pass through the words as through a queue of bits, because a
// register has no index.
template <Direction direction, int WORDS>
FO_INLINE void move_entries(char* plane, uint32_t bytes, int64_t first, int count, const Lie& lie,
                            uint32_t* words) {
#pragma unroll 1
  for (int i = 0; i < EIGHT; ++i) {
    uint32_t entry = direction == FETCH ? 0 : words[0];
    if (i < count) {
      move_entry<direction>(plane + lie(first + i) * bytes, bytes, &entry);
    }
#pragma unroll
    for (int k = 0; k < WORDS; ++k) {
      words[k] = __funnelshift_rc(words[k], k + 1 < WORDS ? words[k + 1] : entry, 8 * bytes);
    }
  }
  if (direction == PUT) return;
  // Entries of less than the longest have filled the upper words only.
  if (bytes == 2 && WORDS == EIGHT) {
#pragma unroll
    for (int k = 0; k < 4; ++k) words[k] = words[k + WORDS - 4];
  }
  if (bytes == 1) {
#pragma unroll
    for (int k = 0; k < 2; ++k) words[k] = words[k + WORDS - 2];
  }
}

// A plane of entries of `bits`, of which an element has one; two of 4 bits share a byte.
template <Direction direction, int WORDS>
FO_INLINE void move(char* plane, uint32_t bits, const Place& place, const Lie& lie, uint32_t* words) {
  if (!place.vectors) {
    bool shared = bits == 4;
    return move_entries<direction, WORDS>(plane, shared ? 1 : bits >> 3, place.first >> shared,
                                          (place.count + shared) >> shared, lie, words);
  }
  char *here = plane + (place.first * bits >> 3), *there = here + place.gap * (bits >> 3);
  if (bits == 32 && WORDS == EIGHT) {
    move<direction, uint4>(here, words);
    move<direction, uint4>(there, words + 4);
  } else if (bits == 4) {
    move<direction, uint32_t>(here, words);
  } else if (place.gap == 4) {
    if (bits == 16) move<direction, uint4>(here, words);
    if (bits == 8) move<direction, uint2>(here, words);
  } else if (bits == 16) {
    move<direction, uint2>(here, words);
    move<direction, uint2>(there, words + 2);
  } else {
    move<direction, uint32_t>(here, words);
    move<direction, uint32_t>(there, words + 1);
  }
}

// The second plane, or the scale of a block.
template <Direction direction>
FO_INLINE void move_second(const Storage& storage, char* plane, const Place& place, uint32_t* words) {
  if (storage.block_shift == 0) {
    return move<direction, EIGHT / 2>(plane, storage.bits[1], place, Lie{}, words);
  }
  bool first_of_block = (place.first & ((1 << storage.block_shift) - 1)) == 0;
  if (place.count > 0 && (direction == FETCH || first_of_block)) {
    uint32_t bytes = storage.bits[1] >> 3;
    move_entry<direction>(plane + (place.first >> storage.block_shift) * bytes, bytes, words);
  }
}

// All planes; only the first may have strides. The second one begins at word 4, and is written first because
// a first one that is put entry by entry leaves nothing behind.
template <Direction direction>
FO_INLINE void move(const Storage& storage, const Slot& slot, const Place& place, const Lie& lie,
                    Words<EIGHT>& words) {
  if (direction == FETCH && storage.write_only) return;
  bool second = storage.bits[1] != 0;
  if (direction == PUT && second) move_second<direction>(storage, slot.planes[1], place, words.word + 4);
  move<direction, EIGHT>(slot.planes[0], storage.bits[0], place, lie, words.word);
  if (direction == FETCH && second) move_second<direction>(storage, slot.planes[1], place, words.word + 4);
}

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

template <class Codec>
FO_INLINE void encode_each(const Place& place, const Stream& stream, uint32_t slot, const F* x,
                           Words<EIGHT>& words) {
  uint64_t eighth = stream.drawn + static_cast<uint64_t>(place.first) / EIGHT;
  uint64_t drawn[] = {eighth, eighth >> 32, stream.ordinal, slot};
  if (Codec::random) philox(drawn, stream.seed, stream.step);
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) Codec::encode(x[e], RandomElement<Codec>{{words, e}, drawn});
}

// Every thread of the warp must be here. One piece of code for all codecs, because its division has a call.
FO_INLINE AnyScaling scaling_of(const Storage& storage, const F* x) {
  // A sign stands below the magnitude, so that one maximum finds both.
  uint32_t key = 0;
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    uint32_t own = magnitude(x[e]) << 1 | (~as_bits(x[e]) >> 31);
    key = key > own ? key : own;
  }
#pragma unroll 1
  for (int distance = 1 << storage.block_shift >> 4; distance > 0; distance /= 2) {
    uint32_t other = __shfl_xor_sync(~0u, key, distance);
    key = key > other ? key : other;
  }
  U top = key >> 1, positive = key & 1 ? top : 0x80000000u;
  return AnyScaling(top, positive, storage.bits[1] == 16, storage.signed_scale);
}

template <class Codec>
FO_INLINE void encode_block(const AnyScaling& scaling, const char* lookup, int count, const F* x,
                            Words<EIGHT>& words) {
  constexpr int bits = Codec::bits(0), each = 32 / bits;
  U codes[EIGHT / each] = {};
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    U code = Codec::code(scaling.normalised(x[e]), lookup) & ((1u << bits) - 1);
    codes[e / each] |= code << e % each * bits;
  }
  // The half of a byte behind the last element is zero.
  if (bits == 4 && count < EIGHT) codes[0] &= (1u << 4 * count) - 1;
#pragma unroll
  for (int i = 0; i < EIGHT / each; ++i) words.word[i] = codes[i];
  words.word[4] = as_bits(scaling.scale) >> (32 - Codec::bits(1));
}

template <class Codec>
FO_INLINE void decode_each(Words<EIGHT>& words, F* x) {
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) x[e] = Codec::decode(Element<Codec, EIGHT>{words, e});
}

template <class Codec>
FO_INLINE void decode_block(const char* lookup, Words<EIGHT>& words, F* x) {
  constexpr int bits = Codec::bits(0), each = 32 / bits;
  F scale = as_float(words.word[4] << (32 - Codec::bits(1)));
#pragma unroll
  for (int e = 0; e < EIGHT; ++e) {
    U code = words.word[e / each] >> e % each * bits & ((1u << bits) - 1);
    x[e] = product(Codec::value(code, lookup), scale);
  }
}

// Of a parameter: a switch without blocks.
FO_INLINE void decode_param(const Slot& slot, Words<EIGHT>& words, F* x) {
  with_elementwise(slot.codec, [&](auto c) { decode_each<decltype(c)>(words, x); });
}
FO_INLINE void encode_param(const Slot& slot, const Place& place, const Stream& stream, uint32_t number,
                            const F* x, Words<EIGHT>& words) {
  with_elementwise(slot.codec, [&](auto c) { encode_each<decltype(c)>(place, stream, number, x, words); });
}

FO_INLINE void decode_state(const Slot& slot, Words<EIGHT>& words, F* x) {
  with_values(slot.codec, [&](auto c) {
    if constexpr (decltype(c)::block == 1) {
      decode_each<decltype(c)>(words, x);
    } else {
      decode_block<decltype(c)>(slot.lookup, words, x);
    }
  });
}
FO_INLINE void encode_state(const Storage& storage, const Slot& slot, int state, const Place& place,
                            const Stream& stream, F* x, Words<EIGHT>& words) {
  if (storage.block_shift == 0) {
    with_elementwise(slot.codec,
                     [&](auto c) { encode_each<decltype(c)>(place, stream, 1 + state, x, words); });
    return;
  }
  if (!place.vectors) {
    // What a rule made of elements that are none must not count.
#pragma unroll
    for (int e = 0; e < EIGHT; ++e) x[e] = e < place.count ? x[e] : 0;
  }
  AnyScaling scaling = scaling_of(storage, x);
  with_block(slot.codec,
             [&](auto c) { encode_block<decltype(c)>(scaling, slot.lookup, place.count, x, words); });
}

}  // namespace
