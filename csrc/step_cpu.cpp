// A step and a sum of squares over a range of elements, compiled once per instruction set (FO_ISA).
#include "isa.h"
#include "stage.h"

namespace {

using namespace fo;

// The LANES elements from i on.
struct Lanes {
  char* const* planes;
  int64_t i;

  template <class T>
  FO_INLINE Pack<T> get(int plane) const {
    return ::load<T>(planes[plane] + i * static_cast<int64_t>(sizeof(T)));
  }
  template <class T>
  FO_INLINE void put(int plane, Pack<T> x) const {
    ::store(planes[plane] + i * static_cast<int64_t>(sizeof(T)), x);
  }
};

// A slot whose codec is known at run time only: one switch per vector, and values stay in registers.
struct Any : Slot {
  FO_INLINE F load(int64_t i) const {
    return with_codec(codec, [&](auto c) FO_LAMBDA { return c.decode(Lanes{planes, i}); });
  }
  FO_INLINE void store(int64_t i, F x) const {
    with_codec(codec, [&](auto c) FO_LAMBDA { c.encode(x, Lanes{planes, i}); });
  }
};

// Unrolled, or GCC keeps the slots' values in memory on some instruction sets.
#define FO_EACH_SLOT _Pragma("GCC unroll 8") for (int slot = 0; slot < Rule::slots; ++slot)

// Everything a rule reads and writes of one tensor.
template <class Rule, class Param = Any, class Grad = Any, class State = Any>
struct Slots {
  Param param;
  Grad grad;
  State states[Rule::slots + (Rule::slots == 0)];

  // Full vectors of elements [begin, end).
  FO_INLINE void update(Rule rule, F g_scale, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; i += LANES) {
      F p = param.load(i), g = grad.load(i) * g_scale, s[Rule::slots + 1];
      FO_EACH_SLOT s[slot] = states[slot].load(i);
      rule(p, g, s);
      param.store(i, p);
      FO_EACH_SLOT states[slot].store(i, s[slot]);
    }
  }

  // Up to LANES elements that do not fill a vector in memory.
  void update_staged(const Rule& rule, F g_scale, const Elements& in_param, const Elements& in_states,
                     const Elements& in_grad) const {
    Stage param_lanes, grad_lanes, state_lanes[Rule::slots + 1];
    Slots<Rule> lanes;
    lanes.param = Any{param_lanes.fetch(param, in_param)};
    lanes.grad = Any{grad_lanes.fetch(grad, in_grad)};
    for (int slot = 0; slot < Rule::slots; ++slot) {
      lanes.states[slot] = Any{state_lanes[slot].fetch(states[slot], in_states)};
    }
    lanes.update(rule, g_scale, 0, LANES);
    param_lanes.put_back(param, in_param);
    for (int slot = 0; slot < Rule::slots; ++slot) state_lanes[slot].put_back(states[slot], in_states);
  }
};

template <class Rule>
Slots<Rule> slots_of(const Step& step, int64_t tensor) {
  Slots<Rule> slots;
  int column = HEADER;
  slots.param = Any{take(step.codecs[0], step.table, tensor, column)};
  for (int slot = 0; slot < Rule::slots; ++slot) {
    slots.states[slot] = Any{take(step.codecs[2 + slot], step.table, tensor, column)};
  }
  slots.grad = Any{take(step.codecs[1], step.table, tensor, column)};
  return slots;
}

template <class Rule>
void update_dense(const Slots<Rule>& slots, const Rule& rule, F g_scale, int64_t begin, int64_t end) {
  int64_t full = end - (end - begin) % LANES;
  slots.update(rule, g_scale, begin, full);
  if (full < end) {
    Elements rest{static_cast<int>(end - full), full};
    slots.update_staged(rule, g_scale, rest, rest, rest);
  }
}

template <class Rule>
void update_strided(const Slots<Rule>& slots, const Rule& rule, F g_scale, Layout layout, int64_t begin,
                    int64_t end) {
  Odometer odometer(layout, begin);
  int64_t in_param[LANES], in_grad[LANES];
  for (int64_t i = begin; i < end; i += LANES) {
    int count = end - i < LANES ? static_cast<int>(end - i) : LANES;
    odometer.take(count, in_param, in_grad);
    slots.update_staged(rule, g_scale, {count, 0, in_param}, {count, i}, {count, 0, in_grad});
  }
}

// Elements [begin, end) of one tensor.
template <class Rule>
void update(const Step& step, int64_t tensor, int64_t begin, int64_t end) {
  const float* row = step.rows + step.table.at(ROW, tensor) * step.row_length;
  if (row[ACTIVE] == 0) return;
  auto slots = slots_of<Rule>(step, tensor);
  auto rule = with_scalars<Rule>(row + SCALARS);
  F g_scale = row[G_SCALE];
  if (step.layouts) {
    Layout layout{step.layouts + step.table.at(LAYOUT, tensor) * LAYOUT_LENGTH};
    update_strided(slots, rule, g_scale, layout, begin, end);
  } else {
    update_dense(slots, rule, g_scale, begin, end);
  }
}

// Calls visit(tensor, begin, end) for the elements in units [first, last).
template <int64_t UNIT, class Visit>
void each_piece(const Table& table, int64_t first, int64_t last, Visit visit) {
  for (int64_t tensor = 0, start = 0; start < last; ++tensor) {
    int64_t numel = table.at(NUMEL, tensor), units = (numel + UNIT - 1) / UNIT;
    int64_t begin = first > start ? first - start : 0, end = last - start;
    if (begin < units) visit(tensor, begin * UNIT, end < units ? end * UNIT : numel);
    start += units;
  }
}

void step(const Step& step, int64_t first, int64_t last) {
  auto with = [&](auto update) {
    each_piece<STEP_UNIT>(step.table, first, last, [&](int64_t tensor, int64_t begin, int64_t end) {
      update(step, tensor, begin, end);
    });
  };
  switch (step.rule) {
#define FO_CASE(rule) \
  case id_##rule:     \
    return with(update<rule>);
    FO_RULES(FO_CASE)
#undef FO_CASE
  }
}

// Every lane has its own sum, so that the order of additions is the same on every instruction set.
struct LaneSums {
  typedef double Part __attribute__((vector_size(sizeof(F::Part))));
  typedef float Half __attribute__((vector_size(sizeof(F::Part) / 2)));
  Part part[2 * PARTS] = {};

  FO_INLINE void add_squares(F x) {
    FO_EACH_PART {
      Half halves[2];
      memcpy(halves, &x.part[i], sizeof halves);
      for (int half = 0; half < 2; ++half) {
        Part wide = __builtin_convertvector(halves[half], Part);
        part[2 * i + half] += wide * wide;
      }
    }
  }
  double total() const {
    double lanes[LANES], sum = 0;
    memcpy(lanes, part, sizeof lanes);
    for (double lane : lanes) sum += lane;
    return sum;
  }
};

double square_sum(const Gradients& gradients, int64_t tensor, int64_t begin, int64_t end) {
  int column = gradients.column;
  Any grad{take(gradients.codec, gradients.table, tensor, column)};
  LaneSums sums;
  auto add_staged = [&](const Elements& which) {
    Stage lanes;
    sums.add_squares(Any{lanes.fetch(grad, which)}.load(0));
  };
  if (gradients.layouts) {
    Odometer odometer({gradients.layouts + gradients.table.at(LAYOUT, tensor) * LAYOUT_LENGTH}, begin);
    int64_t in_param[LANES], in_grad[LANES];
    for (int64_t i = begin; i < end; i += LANES) {
      int count = end - i < LANES ? static_cast<int>(end - i) : LANES;
      odometer.take(count, in_param, in_grad);
      add_staged({count, 0, in_grad});
    }
    return sums.total();
  }
  int64_t full = end - (end - begin) % LANES;
  for (int64_t i = begin; i < full; i += LANES) sums.add_squares(grad.load(i));
  if (full < end) add_staged({static_cast<int>(end - full), full});
  return sums.total();
}

void square_sums(const Gradients& gradients, int64_t first, int64_t last, double* sums) {
  double* next = sums + first;
  each_piece<SUM_UNIT>(gradients.table, first, last, [&](int64_t tensor, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i += SUM_UNIT) {
      *next++ = square_sum(gradients, tensor, i, end - i < SUM_UNIT ? end : i + SUM_UNIT);
    }
  });
}

}  // namespace

namespace fo {
extern const Isa FO_ISA;
const Isa FO_ISA{step, square_sums};
}  // namespace fo
