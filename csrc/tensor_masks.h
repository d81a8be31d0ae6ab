// Masks of whole tensors on a CPU, outside of any step.
#pragma once

#include "chunk.h"
#include "groups.h"
#include "isa.h"

namespace {

// `count` values from element `first` on; the last vector is filled with zeros.
inline void read(const fo::Values& x, int64_t first, int count, float* values) {
  const Slot home{x.codec, {const_cast<char*>(x.memory)}, nullptr};
  each_vector(from_element(home, first), 0, count, false, [&](const Slot& from, int at, int i) {
    store(values + i, with_plain(from.codec, [&](auto c) { return c.decode(Lanes{from.planes, at}); }));
  });
}

// Groups of any size, a comparison at a time.
inline void mark_largest(const float* values, int count, int group, int kept, uint8_t* bits) {
  uint32_t keys[fo::LARGEST_GROUP * 8];
  for (int i = 0; i < count; i += LANES) store(keys + i, rank_key(load<float>(values + i)));
  memset(bits, 0, (count + 7) / 8);
  for (int first = 0; first < count; first += group) {
    int end = first + group < count ? first + group : count;
    for (int i = first; i < end; ++i) {
      int winners = 0;
      for (int other = first; other < i; ++other) winners += keys[other] >= keys[i];
      for (int other = i + 1; other < end; ++other) winners += keys[other] > keys[i];
      bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | (winners < kept) << i % 8);
    }
  }
}

// Marks the `kept` largest magnitudes of every group among elements [begin, end); bit i is that of element i.
void nm_mask(const fo::Values& x, int64_t begin, int64_t end, int group, int kept, uint8_t* bits) {
  const bool in_vectors = group == 2 || group == 4 || group == 8 || group == 16;
  const int step = in_vectors ? 16 * LANES : 8 * group;
  alignas(64) float values[fo::LARGEST_GROUP * 8];
  for (; begin < end; begin += step) {
    int count = static_cast<int>(end - begin < step ? end - begin : step);
    read(x, begin, count, values);
    int full = in_vectors ? count - count % LANES : 0;
    for (int i = 0; i < full; i += LANES) {
      Mask largest =
          largest_of_groups(load<float>(values + i), group, F(static_cast<float>(kept)), first_lanes(LANES));
      store_mask(reinterpret_cast<char*>(bits) + (begin + i) / 8, largest);
    }
    if (full < count) mark_largest(values + full, count - full, group, kept, bits + (begin + full) / 8);
  }
}

// The 4x4 matrices with two ones in every row and column, by the halves of their 16 bits: bit 4 * row +
// column.
struct Patterns {
  int count;
  uint8_t upper[90], lower[90];
};
constexpr int PAIRS = 6;
constexpr int pairs[PAIRS] = {3, 5, 6, 9, 10, 12};

constexpr Patterns all_patterns() {
  Patterns patterns{};
  for (int lower = 0; lower < PAIRS * PAIRS; ++lower) {
    for (int upper = 0; upper < PAIRS * PAIRS; ++upper) {
      int rows[] = {pairs[upper % PAIRS], pairs[upper / PAIRS], pairs[lower % PAIRS], pairs[lower / PAIRS]};
      bool fits = true;
      for (int column = 0; column < 4; ++column) {
        int ones = 0;
        for (int row : rows) ones += row >> column & 1;
        fits = fits && ones == 2;
      }
      if (!fits) continue;
      patterns.upper[patterns.count] = static_cast<uint8_t>(upper);
      patterns.lower[patterns.count++] = static_cast<uint8_t>(lower);
    }
  }
  return patterns;
}
constexpr Patterns patterns = all_patterns();
static_assert(patterns.count == 90, "");

FO_INLINE int first_of(int pair) { return __builtin_ctz(pairs[pair]); }
FO_INLINE int second_of(int pair) { return 31 - __builtin_clz(pairs[pair]); }

// The best pattern of LANES blocks; `sizes[4 * row + column]` are the magnitudes there. Upper halves are
// added up once, because patterns that begin alike share them.
inline U best_patterns(const F* sizes) {
  F upper[PAIRS * PAIRS];
  for (int i = 0; i < PAIRS * PAIRS; ++i) {
    int pair = i % PAIRS, next = i / PAIRS;
    upper[i] = sizes[first_of(pair)] + sizes[second_of(pair)] + sizes[4 + first_of(next)] +
               sizes[4 + second_of(next)];
  }
  F best(-1.0f);
  U chosen(0u);
  for (uint32_t i = 0; i < 90; ++i) {
    int pair = patterns.lower[i] % PAIRS, next = patterns.lower[i] / PAIRS;
    F score = upper[patterns.upper[i]] + sizes[8 + first_of(pair)] + sizes[8 + second_of(pair)] +
              sizes[12 + first_of(next)] + sizes[12 + second_of(next)];
    Mask better = score > best;
    best = select(better, score, best);
    chosen = select(better, U(i), chosen);
  }
  return chosen;
}

// Of every 4x4 block in rows [first, last) of a matrix the two largest in all rows and columns together: the
// pattern with the largest sum of the magnitudes it keeps, added in their order in memory, NaN being zero; of
// equal ones the one whose 16 bits are the smallest number.
void transposable_mask(const fo::Values& x, int64_t columns, int64_t first, int64_t last, uint8_t* bits) {
  constexpr int WIDTH = 4 * LANES;
  alignas(64) float values[4][WIDTH], of_place[16][LANES];
  alignas(64) uint32_t chosen[LANES];
  memset(bits + first * columns / 8, 0, (last - first) * columns / 8);
  for (int64_t top = first; top < last; top += 4) {
    for (int64_t left = 0; left < columns; left += WIDTH) {
      int width = static_cast<int>(columns - left < WIDTH ? columns - left : WIDTH);
      for (int row = 0; row < 4; ++row) read(x, (top + row) * columns + left, width, values[row]);
      for (int place = 0; place < 16; ++place) {
        for (int block = 0; block < LANES; ++block) {
          of_place[place][block] = 4 * block < width ? values[place / 4][4 * block + place % 4] : 0.0f;
        }
      }
      F sizes[16];
      for (int place = 0; place < 16; ++place) {
        F x = load<float>(of_place[place]);
        sizes[place] = select(x != x, F(0.0f), as_float(magnitude(x)));
      }
      store(chosen, best_patterns(sizes));
      for (int block = 0; 4 * block < width; ++block) {
        int upper = patterns.upper[chosen[block]], lower = patterns.lower[chosen[block]];
        int rows[] = {pairs[upper % PAIRS], pairs[upper / PAIRS], pairs[lower % PAIRS], pairs[lower / PAIRS]};
        for (int row = 0; row < 4; ++row) {
          int64_t i = (top + row) * columns + left + 4 * block;
          bits[i / 8] = static_cast<uint8_t>(bits[i / 8] | rows[row] << i % 8);
        }
      }
    }
  }
}

}  // namespace
