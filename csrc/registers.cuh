// How a CUDA thread holds the raw bits of its elements, and moves them between memory and registers.
#pragma once

#include <cuda_runtime.h>

#include <type_traits>

#include "slot.h"

namespace {

constexpr int THREADS = 128;
// More than one round, because reading a tile's description takes three loads that wait for each other.
constexpr int ROUNDS = 4;

// The bits of COUNT elements as they are in memory, plane after plane.
template <int COUNT>
struct Words {
  uint32_t word[COUNT];
};
template <class Codec, int COUNT>
constexpr FO_ANYWHERE int words_before(int plane) {
  return plane == 0 ? 0 : Codec::bits(0) * COUNT / 32;
}

// One of those elements, as a codec sees it.
template <class Codec, int COUNT>
struct Element {
  Words<COUNT>& words;
  int element;

  template <class T>
  FO_INLINE T get(int plane) const {
    return static_cast<T>(word<T>(plane) >> shift<T>());
  }
  // Elements that share a word must be put in rising order.
  template <class T>
  FO_INLINE void put(int plane, T bits) const {
    uint32_t before = shift<T>() == 0 ? 0 : word<T>(plane);
    word<T>(plane) = before | static_cast<uint32_t>(bits) << shift<T>();
  }

 private:
  template <class T>
  FO_INLINE int shift() const {
    return element * sizeof(T) * 8 % 32;
  }
  template <class T>
  FO_INLINE uint32_t& word(int plane) const {
    return words.word[words_before<Codec, COUNT>(plane) + element * sizeof(T) / 4];
  }
};

template <int COUNT>
FO_INLINE void decode(int codec, Words<COUNT>& words, F* values) {
  with_plain(codec, [&](auto c) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) values[e] = c.decode(Element<decltype(c), COUNT>{words, e});
  });
}
// To bf16, two with one instruction.
template <int COUNT>
FO_INLINE void encode_pairs(const F* values, Words<COUNT>& words) {
#pragma unroll
  for (int e = 0; e < COUNT; e += 2) words.word[e / 2] = bfloat_pair(values[e], values[e + 1]);
}
template <int COUNT>
FO_INLINE void encode(int codec, const F* values, Words<COUNT>& words) {
  with_plain(codec, [&](auto c) {
    if constexpr (std::is_same_v<decltype(c), bf16> && COUNT > 1) {
      encode_pairs(values, words);
    } else {
#pragma unroll
      for (int e = 0; e < COUNT; ++e) c.encode(values[e], Element<decltype(c), COUNT>{words, e});
    }
  });
}

enum Direction { FETCH, PUT };

// Streaming accesses, because nothing is read again before the next step. Through plain pointers the compiler
// would also take vector stores apart, to share pieces between branches, and allow for addresses in shared
// memory.
template <Direction direction, class Bits>
FO_INLINE void move(char* memory, uint32_t* words) {
  Bits bits;
  if (direction == FETCH) {
    bits = __ldcs(reinterpret_cast<const Bits*>(memory));
    memcpy(words, &bits, sizeof bits);
  } else {
    memcpy(&bits, words, sizeof bits);
    __stcs(reinterpret_cast<Bits*>(memory), bits);
  }
}

// Two groups of four neighbouring elements, `gap` apart, in planes that start on 16 bytes. The groups of a
// warp are neighbours as well, so that each of its accesses covers whole cache lines.
struct Groups {
  static constexpr int COUNT = 8;
  // Counted from the first element of a plane's part.
  uint32_t first, gap;

  template <Direction direction, int BYTES>
  FO_INLINE void plane(char* memory, uint32_t* words) const {
    char* here = memory + static_cast<uint64_t>(first) * BYTES;
    char* there = memory + static_cast<uint64_t>(first + gap) * BYTES;
    if (BYTES == 4) {
      move<direction, uint4>(here, words);
      move<direction, uint4>(there, words + 4);
    } else if (gap == 4) {
      move<direction, uint4>(here, words);
    } else {
      move<direction, uint2>(here, words);
      move<direction, uint2>(there, words + 2);
    }
  }
};

// One element, of a plane without alignment.
struct Single {
  static constexpr int COUNT = 1;
  int64_t offset;

  template <Direction direction, int BYTES>
  FO_INLINE void plane(char* memory, uint32_t* words) const {
    if (BYTES == 4) {
      move<direction, uint32_t>(memory + offset * 4, words);
    } else {
      move<direction, uint16_t>(memory + offset * 2, words);
    }
  }
};

template <Direction direction, class Where>
FO_INLINE void move(const Slot& slot, const Where& where, Words<Where::COUNT>& words) {
  with_plain(slot.codec,
             [&](auto c) { where.template plane<direction, c.bits(0) / 8>(slot.planes[0], words.word); });
}

// Elements of a block in one round of Groups, and of a block.
constexpr int ROUND = THREADS * Groups::COUNT;
constexpr int TILE = ROUND * ROUNDS;

// Where something is in shared memory: kept in a register, because ptxas knows no better than to compute the
// address of a variable for every access.
#ifdef __CUDA_ARCH__
using Address = uint32_t;
FO_INLINE Address address_of(const void* shared) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(shared));
}
FO_INLINE const void* at_address(Address address) { return __cvta_shared_to_generic(address); }
#else
using Address = const void*;
FO_INLINE Address address_of(const void* shared) { return shared; }
FO_INLINE const void* at_address(Address address) { return address; }
#endif

FO_INLINE int64_t offset(fo::Layout layout, const int64_t* strides, int64_t i) {
  int64_t offset = 0;
#pragma unroll 1
  for (int dim = layout.dims() - 1; dim >= 0; --dim) {
    int64_t size = layout.size(dim), rest = i / size;
    offset += (i - rest * size) * strides[dim];
    i = rest;
  }
  return offset;
}

// One block per tile. The device is set because this library has a CUDA runtime of its own beside torch's.
template <class... Parameters, class... Arguments>
int launch_tiles(void (*kernel)(Parameters...), int n_tiles, int device, void* stream,
                 Arguments... arguments) {
  if (cudaError_t error = cudaSetDevice(device)) return error;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(n_tiles);
  config.blockDim = dim3(THREADS);
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace
