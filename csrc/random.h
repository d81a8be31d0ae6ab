// Random bits on a CPU: the words of sixteen counters side by side.
#pragma once

#include "philox.h"

namespace {

#define FO_EACH_WIDE _Pragma("GCC unroll 8") for (int i = 0; i < 2 * PARTS; ++i)

// LANES numbers of 64 bits.
struct Wide {
  typedef uint64_t Part __attribute__((vector_size(sizeof(U::Part))));
  Part part[2 * PARTS];

  Wide() = default;
  FO_INLINE explicit Wide(uint64_t x) { FO_EACH_WIDE part[i] = x - Part{}; }

  friend FO_INLINE Wide operator^(Wide a, Wide b) {
    FO_EACH_WIDE a.part[i] ^= b.part[i];
    return a;
  }
  friend FO_INLINE Wide operator>>(Wide a, int bits) {
    FO_EACH_WIDE a.part[i] >>= bits;
    return a;
  }
};

// Of the lower halves.
FO_INLINE Wide product(Wide a, uint32_t b) {
#if defined(__AVX512F__)
  FO_EACH_WIDE a.part[i] = reinterpret_cast<Wide::Part>(_mm512_maskz_mul_epu32(
      0xff, reinterpret_cast<__m512i>(a.part[i]), _mm512_set1_epi32(static_cast<int>(b))));
#elif defined(__AVX2__)
  FO_EACH_WIDE a.part[i] = reinterpret_cast<Wide::Part>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(a.part[i]), _mm256_set1_epi32(static_cast<int>(b))));
#elif defined(__SSE2__)
  FO_EACH_WIDE a.part[i] = reinterpret_cast<Wide::Part>(
      _mm_mul_epu32(reinterpret_cast<__m128i>(a.part[i]), _mm_set1_epi32(static_cast<int>(b))));
#else
  FO_EACH_WIDE a.part[i] = (a.part[i] & 0xffffffffu) * b;
#endif
  return a;
}

// Where a parameter's random numbers begin.
struct Stream {
  uint32_t seed, step, ordinal, slot;
  uint64_t drawn;

  // Writes 16 bits for each of the elements from `first` on: whole groups of 8 * LANES, as many as `count`
  // needs.
  void fill(int64_t first, int count, uint16_t* bits) const {
    for (int i = 0; i < count; i += 8 * LANES) {
      uint64_t counter = drawn + (static_cast<uint64_t>(first + i) >> 3), lanes[LANES];
      for (int lane = 0; lane < LANES; ++lane) lanes[lane] = counter + static_cast<uint64_t>(lane);
      Wide words[4];
      memcpy(&words[0], lanes, sizeof lanes);
      words[1] = words[0] >> 32, words[2] = Wide(ordinal), words[3] = Wide(slot);
      philox(words, seed, step);
      put(words, bits + i);
    }
  }

 private:
  // Counter after counter, the four words of each side by side.
  static FO_INLINE void put(const Wide (&words)[4], uint16_t* bits) {
    constexpr int N = sizeof(Wide::Part) / 8;
    Wide::Part low, high;
    for (int lane = 0; lane < N; ++lane) {
      low[lane] = static_cast<uint64_t>(lane / 2 + lane % 2 * N);
      high[lane] = low[lane] + N / 2;
    }
    FO_EACH_WIDE {
      Wide::Part first = (words[0].part[i] & 0xffffffffu) | words[1].part[i] << 32;
      Wide::Part second = (words[2].part[i] & 0xffffffffu) | words[3].part[i] << 32;
      Wide::Part mixed[2] = {__builtin_shuffle(first, second, low), __builtin_shuffle(first, second, high)};
      memcpy(bits + i * 8 * N, mixed, sizeof mixed);
    }
  }
};

}  // namespace
