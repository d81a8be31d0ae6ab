// What a kernel learns of codecs when it runs, and how a thread moves 8 elements between planes and
// registers.
#pragma once

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

// Its planes from element `start` on, at which a tile begins.
FO_INLINE Slot take(const Storage& storage, const fo::Table& table, int64_t tensor, int64_t start) {
  Slot slot{storage.codec, {table.plane(storage.column, tensor) + start * storage.bits[0] / 8}, nullptr};
  if (storage.bits[1]) {
    int64_t first = (start >> storage.block_shift) * storage.bits[1] / 8;
    slot.planes[1] = table.plane(storage.column + 1, tensor) + first;
  }
  if (storage.lookup) slot.lookup = table.plane(storage.column + 2, tensor);
  return slot;
}

// The elements of a thread, counted from the tile's first: in vectors two groups of four, else `count`
// neighbours.
struct Place {
  uint32_t first;
  int count;
  bool vectors, neighbours;

  // Where the groups are in a plane of elements of so many bytes.
  FO_INLINE char* here(char* plane, uint32_t bytes) const { return at(plane, first, bytes); }
  FO_INLINE char* there(char* plane, uint32_t bytes) const {
    return here(plane, bytes) + (neighbours ? 4 : 4 * THREADS) * bytes;
  }

 private:
  // One instruction.
  static FO_INLINE char* at(char* plane, uint32_t element, uint32_t bytes) {
    return plane + static_cast<uint64_t>(element) * bytes;
  }
};

// How a plane lies in memory: with strides from the tensor's begin, else from the tile's, which is at
// `start`.
struct Lie {
  const int64_t *layout, *strides;
  int64_t start;

  FO_INLINE int64_t operator()(uint32_t element) const {
    return strides ? offset(fo::Layout{layout}, strides, start + element) : element;
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
FO_INLINE void move_entries(char* plane, uint32_t bytes, uint32_t first, int count, const Lie& lie,
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

// Eight elements of BYTES each, in a whole round.
template <Direction direction, int BYTES>
FO_INLINE void move_eight(char* plane, const Place& place, uint32_t* words) {
  using Eight = std::conditional_t<BYTES == 2, uint4, uint2>;
  using Four = std::conditional_t<BYTES == 2, uint2, uint32_t>;
  if (place.neighbours) return move<direction, Eight>(place.here(plane, BYTES), words);
  move<direction, Four>(place.here(plane, BYTES), words);
  move<direction, Four>(place.there(plane, BYTES), words + BYTES);
}

// The scale of a block; only its first thread puts it.
template <Direction direction>
FO_INLINE void move_scale(const Storage& storage, char* plane, const Place& place, uint32_t* words) {
  uint32_t block = place.first >> storage.block_shift;
  if (direction == PUT && place.first != block << storage.block_shift) return;
  plane += static_cast<uint64_t>(block) * (storage.bits[1] / 8);
  if (storage.bits[1] == 32) {
    move<direction, uint32_t>(plane, words);
  } else {
    if (direction == FETCH) *words = 0;
    move<direction, uint16_t>(plane, words);
  }
}

// All planes in a whole round, of a codec with an id below END. The second plane begins at word 4.
template <Direction direction, int END>
FO_INLINE void move_round(const Storage& storage, const Slot& slot, const Place& place, Words<EIGHT>& words) {
  char* plane = slot.planes[0];
  if (storage.bits[0] == 32) {
    if (END > PLAIN_COUNT && direction == FETCH && storage.write_only) return;
    move<direction, uint4>(place.here(plane, 4), words.word);
    move<direction, uint4>(place.there(plane, 4), words.word + 4);
  } else if (END <= ELEMENTWISE_COUNT || storage.bits[0] == 16) {
    move_eight<direction, 2>(plane, place, words.word);
    if (END == PLAIN_COUNT || storage.bits[1] == 0) return;
    if (storage.bits[1] == 16) {
      move_eight<direction, 2>(slot.planes[1], place, words.word + 4);
    } else {
      move_eight<direction, 1>(slot.planes[1], place, words.word + 4);
    }
  } else {
    // Threads have neighbours here.
    if (storage.bits[0] == 8) {
      move<direction, uint2>(plane + place.first, words.word);
    } else {
      move<direction, uint32_t>(plane + place.first / 2, words.word);
    }
    move_scale<direction>(storage, slot.planes[1], place, words.word + 4);
  }
}

// A plane of entries of `bits`, of which an element has one; two of 4 bits share a byte.
template <Direction direction, int WORDS>
FO_INLINE void move_some(char* plane, uint32_t bits, const Place& place, const Lie& lie, uint32_t* words) {
  bool shared = bits == 4;
  move_entries<direction, WORDS>(plane, shared ? 1 : bits >> 3, place.first >> shared,
                                 (place.count + shared) >> shared, lie, words);
}

// All planes; only the first may have strides. The second one is written first because a first one that is
// put entry by entry leaves nothing behind.
template <Direction direction>
FO_INLINE void move_some(const Storage& storage, const Slot& slot, const Place& place, const Lie& lie,
                         Words<EIGHT>& words) {
  if (direction == FETCH && storage.write_only) return;
  auto second = [&] {
    if (storage.bits[1] == 0) return;
    if (storage.block_shift == 0) {
      move_some<direction, EIGHT / 2>(slot.planes[1], storage.bits[1], place, Lie{}, words.word + 4);
    } else if (place.count > 0) {
      move_scale<direction>(storage, slot.planes[1], place, words.word + 4);
    }
  };
  if (direction == PUT) second();
  move_some<direction, EIGHT>(slot.planes[0], storage.bits[0], place, lie, words.word);
  if (direction == FETCH) second();
}

template <int END>
FO_INLINE void put(const Storage& storage, const Slot& slot, const Place& place, const Lie& lie,
                   Words<EIGHT>& words) {
  if (place.vectors) {
    move_round<PUT, END>(storage, slot, place, words);
  } else {
    move_some<PUT>(storage, slot, place, lie, words);
  }
}

}  // namespace
