// What step_cpu.cpp offers to cpu.cpp once for every instruction set.
#pragma once

#include "table.h"

namespace fo {

// Threads share a bucket's work in units of this many neighbouring elements of one tensor.
constexpr int64_t STEP_UNIT = 1024;
constexpr int64_t SUM_UNIT = 16384;

constexpr int LARGEST_GROUP = 32;

// A dense tensor of a plain codec.
struct Values {
  int codec;
  const char* memory;
};

struct Isa {
  // Updates units [first, last).
  void (*step)(const Step& step, int64_t first, int64_t last);
  // Writes the sum of squares of every unit in [first, last) to sums[unit].
  void (*square_sums)(const Gradients& gradients, int64_t first, int64_t last, double* sums);
  // Set the bits of elements [begin, end), and of rows [first, last); both start with a byte.
  void (*nm_mask)(const Values& x, int64_t begin, int64_t end, int group, int kept, uint8_t* bits);
  void (*transposable_mask)(const Values& x, int64_t columns, int64_t first, int64_t last, uint8_t* bits);
};

extern const Isa portable, avx2, avx512, avx512_permute;

}  // namespace fo
