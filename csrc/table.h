// What a launch is given: the tables that kernels/plan.py fills, and their shapes.
#pragma once

#include <cstdint>

#include "inline.h"

namespace fo {

// Raised when a table or a C function changes, so that Python refuses a library of another build.
constexpr int ABI = 6;

// Columns of the tensor table. The addresses of the planes follow HEADER: parameter, states, gradient; a
// codec's look-up table follows its planes. ORDINAL counts the optimizer's parameters; DRAWN says how many
// counters of random bits belong to shards before this one.
enum Column { NUMEL, ROW, ALIGNED, LAYOUT, ORDINAL, DRAWN, HEADER };

// Floats of a row, SEED and STEP being bit patterns of integers; the rule's scalars follow.
enum RowEntry { ACTIVE, G_SCALE, SEED, STEP, SCALARS };

struct Table {
  const int64_t* columns;
  int64_t n;

  FO_ANYWHERE int64_t at(int column, int64_t tensor) const { return columns[column * n + tensor]; }
  FO_ANYWHERE char* plane(int column, int64_t tensor) const {
    return reinterpret_cast<char*>(at(column, tensor));
  }
};

constexpr int MAX_DIMS = 8;
constexpr int LAYOUT_LENGTH = 1 + 3 * MAX_DIMS;

// Where the elements of a strided parameter and of its gradient lie; states are dense.
struct Layout {
  const int64_t* record;

  FO_ANYWHERE int dims() const { return static_cast<int>(record[0]); }
  FO_ANYWHERE int64_t size(int dim) const { return record[1 + dim]; }
  FO_ANYWHERE const int64_t* param_strides() const { return record + 1 + MAX_DIMS; }
  FO_ANYWHERE const int64_t* grad_strides() const { return record + 1 + 2 * MAX_DIMS; }
};

enum Error { OK, UNKNOWN_RULE, UNKNOWN_CODEC, UNKNOWN_ISA, UNKNOWN_GROUP };

// What a bucket's step computes, as the C interface receives it. `codecs`: parameter, gradient, states in
// slot order. They say whether the rule is masked: the mask and the dense weights follow its own states.
// `group` neighbours compete for a place in the mask, none of them if it is 0.
struct Work {
  int rule, group;
  const int32_t* codecs;
  int n_codecs;
};

// A bucket's step.
struct Step {
  Work work;
  Table table;
  const float* rows;
  int64_t row_length;
  const int64_t* layouts;
};

// The gradients of a bucket; their addresses stand in `column`.
struct Gradients {
  int codec;
  int column;
  Table table;
  const int64_t* layouts;
};

}  // namespace fo
