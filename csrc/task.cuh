// What a launch is given, what a block knows of its tensor, and what a thread holds of its elements.
#pragma once

#include "masks.cuh"

namespace {

using namespace fo;

struct Launch {
  Table table;
  const int2* tiles;
  const int64_t* layouts;
  const float* rows;
  int64_t row_length;
  // Of the parameter, the gradient and the states; then of the mask and of dense weights.
  Storage storages[2 + most_states() + 2];
  // Whether a thread takes 8 neighbours: if they are one access in every plane, and where they share
  // something.
  bool neighbours;
  bool keeps_dense;
  int group;
};

// The first element of a tile, and how many it has.
FO_INLINE int64_t start_of(int2 tile) { return tile.y * static_cast<int64_t>(TILE); }
FO_INLINE uint32_t length_of(int2 tile, int64_t elements) {
  int64_t left = elements - start_of(tile);
  return left < TILE ? static_cast<uint32_t>(left) : TILE;
}

template <class Rule>
struct Slots {
  Slot param, grad, states[Rule::slots + 1];

  // What has strides is taken from its begin on.
  FO_INLINE Slots(const Launch& launch, int64_t tensor, int64_t start) {
    param = take(launch.storages[0], launch.table, tensor, start);
    grad = take(launch.storages[1], launch.table, tensor, start);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i)
      states[i] = take(launch.storages[2 + i], launch.table, tensor, start);
    if (!launch.layouts) return;
    param.planes[0] = launch.table.plane(launch.storages[0].column, tensor);
    grad.planes[0] = launch.table.plane(launch.storages[1].column, tensor);
  }
};

template <class Rule, int COUNT>
struct Bits {
  Words<COUNT> param, grad, states[Rule::slots + 1];
};

// What the bits become: parameter, gradient and states of COUNT elements.
template <class Rule, int COUNT>
struct Values {
  F p[COUNT], g[COUNT], s[Rule::slots + 1][COUNT];

  FO_INLINE void update(const Rule& rule, F g_scale) {
    each([&](int e, F* states) { rule(p[e], g[e] * g_scale, states); });
  }
  // Bit e of `mask` is that of element e.
  FO_INLINE void update(const masked<Rule>& rule, F g_scale, uint32_t mask) {
    each([&](int e, F* states) { rule.update(p[e], g[e] * g_scale, states, mask >> e & 1); });
  }

 private:
  template <class Visit>
  FO_INLINE void each(Visit visit) {
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      F of_element[Rule::slots + 1];
#pragma unroll
      for (int i = 0; i < Rule::slots; ++i) of_element[i] = s[i][e];
      visit(e, of_element);
#pragma unroll
      for (int i = 0; i < Rule::slots; ++i) s[i][e] = of_element[i];
    }
  }
};

// Where weights are: a parameter, or dense weights beside it. `number` is that of their random bits.
template <class Storage, class Slot, class Lie>
struct Home {
  Storage storage;
  Slot slot;
  Lie lie;
  uint32_t number;
};

// What all threads of a block must know of their tensor. It stands in shared memory: registers are needed for
// elements. `Computed` is the rule, masked or not.
template <class Rule, class Computed = Rule>
struct Task {
  Slots<Rule> slots;
  Computed rule;
  F g_scale;
  Stream stream;
  // How many elements the tile has, and how many of them may be moved in vectors.
  uint32_t length, whole;
  Lie of_param, of_grad;

  FO_INLINE Task(const Launch& launch, int2 tile, const float* row)
      : slots(launch, tile.x, start_of(tile)),
        rule(with_scalars<Computed>(row + SCALARS)),
        g_scale(row[G_SCALE]),
        stream{as_bits(row[SEED]), as_bits(row[STEP]),
               static_cast<uint32_t>(launch.table.at(ORDINAL, tile.x)),
               static_cast<uint64_t>(launch.table.at(DRAWN, tile.x) + start_of(tile) / EIGHT)},
        length(length_of(tile, launch.table.at(NUMEL, tile.x))),
        whole(!launch.layouts && launch.table.at(ALIGNED, tile.x) ? length : 0),
        of_param(),
        of_grad() {
    if (!launch.layouts) return;
    Layout strided{launch.layouts + launch.table.at(LAYOUT, tile.x) * LAYOUT_LENGTH};
    of_param = {strided.record, strided.param_strides(), start_of(tile)};
    of_grad = {strided.record, strided.grad_strides(), start_of(tile)};
  }

  // A thread's elements in the round that begins at `first`.
  FO_INLINE Place place(uint32_t first, bool neighbours) const {
    bool vectors = first + ROUND <= whole;
    neighbours = neighbours || !vectors;
    first += threadIdx.x * (neighbours ? 8 : 4);
    int left = static_cast<int>(length - first), count = left < 0 ? 0 : left < EIGHT ? left : EIGHT;
    return {first, count, vectors, neighbours};
  }
};

// A rule with a mask. Which weights are read and written is known at run time only, and so everything about
// them is here: one address in registers.
template <class Rule>
struct MaskedTask : Task<Rule, masked<Rule>> {
  static constexpr int MASK = 2 + Rule::slots, DENSE = MASK + 1;
  char* mask;
  // Of the parameter, and of dense weights if they are kept.
  Home<Storage, Slot, Lie> weights[2];
  int keeps_dense;
  // If this step makes a new mask.
  int group;
  uint32_t kept;

  FO_INLINE MaskedTask(const Launch& launch, int2 tile, const float* row)
      : Task<Rule, masked<Rule>>(launch, tile, row),
        mask(launch.table.plane(launch.storages[MASK].column, tile.x) + start_of(tile) / EIGHT),
        weights{{launch.storages[0], this->slots.param, this->of_param, 0}, {}},
        keeps_dense(launch.keeps_dense),
        group(this->rule.kept > 0 ? launch.group : 0),
        kept(static_cast<uint32_t>(this->rule.kept)) {
    if (!keeps_dense) return;
    const Storage& dense = launch.storages[DENSE];
    weights[1] = {dense, take(dense, launch.table, tile.x, start_of(tile)), Lie{}, DENSE - 1};
  }
};

}  // namespace
