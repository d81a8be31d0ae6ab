// What step_cpu.cpp offers to cpu.cpp once for every instruction set.
#pragma once

#include "table.h"

namespace fo {

// Threads share a bucket's work in units of this many neighbouring elements of one tensor.
constexpr int64_t STEP_UNIT = 1024;
constexpr int64_t SUM_UNIT = 16384;

struct Isa {
  // Updates units [first, last).
  void (*step)(const Step& step, int64_t first, int64_t last);
  // Writes the sum of squares of every unit in [first, last) to sums[unit].
  void (*square_sums)(const Gradients& gradients, int64_t first, int64_t last, double* sums);
};

extern const Isa portable, avx2, avx512;

}  // namespace fo
