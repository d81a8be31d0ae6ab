// A step and a sum of squares over a range of elements, compiled once per instruction set (FO_ISA).
#include "chunk.h"
#include "isa.h"

namespace {

using namespace fo;

// The core itself fetches what comes next, but never from beyond a page.
constexpr int64_t PAGE = 4096;

// A slot of a plain codec, known at run time only: one switch per vector, and values stay in registers.
struct Plain : Slot {
  FO_INLINE F load(int64_t i) const {
    return with_plain(codec, [&](auto c) FO_LAMBDA { return c.decode(Lanes{planes, i}); });
  }
  // Asks for memory further on as well.
  FO_INLINE F load(int64_t i, int64_t bytes_ahead) const {
    return with_plain(codec, [&](auto c) FO_LAMBDA {
      __builtin_prefetch(planes[0] + i * c.bits(0) / 8 + bytes_ahead);
      return c.decode(Lanes{planes, i});
    });
  }
  FO_INLINE void store(int64_t i, F x) const {
    with_plain(codec, [&](auto c) FO_LAMBDA { c.encode(x, Lanes{planes, i}); });
  }
};

// Unrolled, or GCC keeps the slots' values in memory on some instruction sets.
#define FO_EACH_SLOT _Pragma("GCC unroll 8") for (int slot = 0; slot < Rule::slots; ++slot)

// Everything a rule reads and writes of one tensor.
template <class Rule>
struct Slots {
  Plain param, grad, states[Rule::slots + (Rule::slots == 0)];

  // Calls visit(slot, number) for what a step writes.
  template <class Visit>
  FO_INLINE void each_written(Visit visit) {
    visit(param, 0);
    FO_EACH_SLOT visit(states[slot], 1 + slot);
  }

  // Full vectors of elements [begin, end).
  FO_INLINE void update(Rule rule, F g_scale, int64_t begin, int64_t end, int64_t ahead = 0) const {
    for (int64_t i = begin; i < end; i += LANES) {
      F p = param.load(i, ahead), g = grad.load(i, ahead) * g_scale, s[Rule::slots + 1];
      FO_EACH_SLOT s[slot] = states[slot].load(i, ahead);
      rule(p, g, s);
      param.store(i, p);
      FO_EACH_SLOT states[slot].store(i, s[slot]);
    }
  }

  // Elements [begin, end), of which the last ones do not fill a vector in memory.
  void update_all(const Rule& rule, F g_scale, int64_t begin, int64_t end, int64_t ahead = 0) {
    int64_t full = end - (end - begin) % LANES;
    update(rule, g_scale, begin, full, ahead);
    if (full == end) return;
    Stage stages[Rule::slots + 2];
    int count = static_cast<int>(end - full);
    Slots lanes;
    lanes.grad = Plain{stages[Rule::slots + 1].fetch(grad, full, count)};
    lanes.param = Plain{stages[0].fetch(param, full, count)};
    FO_EACH_SLOT lanes.states[slot] = Plain{stages[1 + slot].fetch(states[slot], full, count)};
    lanes.update(rule, g_scale, 0, LANES);
    each_written([&](const Slot& slot, int number) { stages[number].put_back(slot, full, count); });
  }
};

template <class Rule>
Slots<Rule> slots_of(const Step& step, int64_t tensor) {
  Slots<Rule> slots;
  int column = HEADER;
  slots.param = Plain{take(step.codecs[0], step.table, tensor, column)};
  FO_EACH_SLOT slots.states[slot] = Plain{take(step.codecs[2 + slot], step.table, tensor, column)};
  slots.grad = Plain{take(step.codecs[1], step.table, tensor, column)};
  return slots;
}

// Elements of a tensor that are not all in plain codecs, or strided: CHUNK of them at a time.
template <class Rule>
class Chunk {
 public:
  Chunk(const Slots<Rule>& home, int64_t first, int count) : first_(first), count_(count), slots_(home) {
    slots_.grad = Plain{from_element(home.grad, first)};
    slots_.each_written([&](Slot& slot, int) { slot = from_element(slot, first); });
  }

  void update(const Rule& rule, F g_scale, Stream stream) {
    Slots<Rule> plain = slots_;
    plain.each_written([&](Slot& slot, int number) {
      if (slot.codec >= PLAIN_COUNT) {
        slot = Slot{id_fp32, {reinterpret_cast<char*>(values_[number])}, nullptr};
      }
    });
    slots_.each_written([&](const Slot& slot, int number) {
      if (slot.codec >= PLAIN_COUNT) decode(slot, count_, values_[number]);
    });
    plain.update_all(rule, g_scale, 0, count_);
    slots_.each_written([&](const Slot& slot, int number) {
      stream.slot = static_cast<uint32_t>(number);
      if (slot.codec >= PLAIN_COUNT) encode(slot, count_, values_[number], stream, first_, ahead(number));
    });
  }

  // The same for a parameter and gradient with strides, whose elements are copied side by side.
  void update_strided(const Rule& rule, F g_scale, Stream stream, const Slots<Rule>& home,
                      Odometer odometer) {
    Odometer back = odometer;
    int bytes = bytes_of(home.param), grad_bytes = bytes_of(home.grad);
    for (int i = 0; i < count_; ++i, odometer.advance()) {
      copy_entry(param_ + i * bytes, home.param.planes[0] + odometer.param() * bytes, bytes);
      copy_entry(grad_ + i * grad_bytes, home.grad.planes[0] + odometer.grad() * grad_bytes, grad_bytes);
    }
    slots_.param.planes[0] = param_;
    slots_.grad.planes[0] = grad_;
    update(rule, g_scale, stream);
    for (int i = 0; i < count_; ++i, back.advance()) {
      copy_entry(home.param.planes[0] + back.param() * bytes, param_ + i * bytes, bytes);
    }
  }

 private:
  // Shared between the first two states, if there are two.
  Ahead ahead(int number) const {
    const Slot* slots[] = {&slots_.param, &slots_.grad};
    const char* cached = reinterpret_cast<const char*>(values_[number]);
    Ahead next{{cached, cached}, {0, 0}};
    for (int i = 0; i < 2; ++i) {
      if (Rule::slots > 1 && number != 1 + i) continue;
      next.bytes[i] = bytes_of(*slots[i]);
      next.from[i] = slots[i]->planes[0] + static_cast<int64_t>(CHUNK) * next.bytes[i];
    }
    return next;
  }
  static int bytes_of(const Slot& slot) {
    return with_codec(slot.codec, [](auto c) { return c.bits(0) / 8; });
  }

  int64_t first_;
  int count_;
  Slots<Rule> slots_;
  // One more vector than a chunk, so that two buffers do not lie at the same place of their pages.
  alignas(64) float values_[Rule::slots + 1][CHUNK + LANES];
  alignas(64) char param_[CHUNK * 4], grad_[CHUNK * 4];
};

// Elements [begin, end) of one tensor.
template <class Rule>
void update(const Step& step, int64_t tensor, int64_t begin, int64_t end) {
  const float* row = step.rows + step.table.at(ROW, tensor) * step.row_length;
  if (row[ACTIVE] == 0) return;
  auto slots = slots_of<Rule>(step, tensor);
  auto rule = with_scalars<Rule>(row + SCALARS);
  F g_scale = row[G_SCALE];
  bool plain = true;
  slots.each_written([&](const Slot& slot, int) { plain = plain && slot.codec < PLAIN_COUNT; });
  if (plain && !step.layouts) return slots.update_all(rule, g_scale, begin, end, PAGE);
  Stream stream{0, 0, static_cast<uint32_t>(step.table.at(ORDINAL, tensor)), 0};
  memcpy(&stream.seed, row + SEED, 4), memcpy(&stream.step, row + fo::STEP, 4);
  for (int64_t first = begin; first < end; first += CHUNK) {
    Chunk<Rule> chunk(slots, first, static_cast<int>(end - first < CHUNK ? end - first : CHUNK));
    if (step.layouts) {
      Layout layout{step.layouts + step.table.at(LAYOUT, tensor) * LAYOUT_LENGTH};
      chunk.update_strided(rule, g_scale, stream, slots, Odometer(layout, first));
    } else {
      chunk.update(rule, g_scale, stream);
    }
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
  Plain grad{take(gradients.codec, gradients.table, tensor, column)};
  LaneSums sums;
  if (gradients.layouts) {
    Odometer odometer({gradients.layouts + gradients.table.at(LAYOUT, tensor) * LAYOUT_LENGTH}, begin);
    int bytes = with_plain(grad.codec, [](auto c) { return c.bits(0) / 8; });
    for (int64_t i = begin; i < end; i += LANES) {
      alignas(64) char side_by_side[LANES * 4] = {};
      for (int lane = 0; lane < LANES && i + lane < end; ++lane, odometer.advance()) {
        copy_entry(side_by_side + lane * bytes, grad.planes[0] + odometer.grad() * bytes, bytes);
      }
      sums.add_squares(Plain{Slot{grad.codec, {side_by_side}, nullptr}}.load(0));
    }
    return sums.total();
  }
  int64_t full = end - (end - begin) % LANES;
  for (int64_t i = begin; i < full; i += LANES) sums.add_squares(grad.load(i));
  if (full < end) {
    Stage rest;
    sums.add_squares(Plain{rest.fetch(grad, full, static_cast<int>(end - full))}.load(0));
  }
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
