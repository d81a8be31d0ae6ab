// A step and a sum of squares over a range of elements, compiled once per instruction set (FO_ISA).
#include "chunk.h"
#include "tensor_masks.h"

namespace {

using namespace fo;

// The core itself fetches what comes next, but never from beyond a page.
constexpr int64_t PAGE = 4096;

// Vectors that share the switches of their codecs: as many as there are registers for.
constexpr int AT_ONCE = PARTS == 1 ? 2 : 1;

// A slot of a plain codec, known at run time only: one switch for some vectors, and values stay in
// registers.
struct Plain : Slot {
  FO_INLINE F load(int64_t i) const {
    return with_plain(codec, [&](auto c) FO_LAMBDA { return c.decode(Lanes{planes, i}); });
  }
  // COUNT vectors with one switch; asks for memory further on as well.
  template <int COUNT>
  FO_INLINE void load(int64_t i, int64_t bytes_ahead, F (&x)[COUNT]) const {
    with_plain(codec, [&](auto c) FO_LAMBDA {
      FO_UNROLL for (int k = 0; k < COUNT; ++k) {
        __builtin_prefetch(planes[0] + (i + k * LANES) * c.bits(0) / 8 + bytes_ahead);
        x[k] = c.decode(Lanes{planes, i + k * LANES});
      }
    });
  }
  FO_INLINE F load(int64_t i, int64_t bytes_ahead) const {
    F x[1];
    load(i, bytes_ahead, x);
    return x[0];
  }
  template <int COUNT>
  FO_INLINE void store(int64_t i, const F (&x)[COUNT]) const {
    with_plain(codec, [&](auto c) FO_LAMBDA {
      FO_UNROLL for (int k = 0; k < COUNT; ++k) c.encode(x[k], Lanes{planes, i + k * LANES});
    });
  }
  FO_INLINE void store(int64_t i, F x) const {
    const F one[1] = {x};
    store(i, one);
  }
};

// Unrolled, or GCC keeps the slots' values in memory on some instruction sets.
#define FO_EACH_SLOT _Pragma("GCC unroll 8") for (int slot = 0; slot < Rule::slots; ++slot)

// What a step of one tensor needs beside its slots.
template <class Rule>
struct Task {
  Rule rule;
  F g_scale;
  // Neighbours that compete for a place in the mask, if this step makes a new one.
  int group;
};

// Everything a rule reads and writes of one tensor.
template <class Rule>
struct Slots {
  Plain param, grad, states[Rule::slots + (Rule::slots == 0)];
  // A masked rule's last state, the weights before pruning, may be missing.
  bool keeps_dense;

  FO_INLINE bool has(int slot) const { return !is_masked<Rule> || keeps_dense || slot + 1 < Rule::slots; }

  // Calls visit(slot, number) for what a step writes.
  template <class Visit>
  FO_INLINE void each_written(Visit visit) {
    visit(param, 0);
    FO_EACH_SLOT {
      if (has(slot)) visit(states[slot], 1 + slot);
    }
  }

  // Vectors of elements [begin, end), the last of which has `lanes` elements.
  FO_INLINE void update(const Task<Rule>& task, int64_t begin, int64_t end, int64_t ahead = 0,
                        int lanes = LANES) const {
    if constexpr (is_masked<Rule>) {
      update_masked(task, begin, end, ahead, lanes);
    } else {
      update_dense(task, begin, end, ahead);
    }
  }
  FO_INLINE void update_dense(const Task<Rule>& task, int64_t begin, int64_t end, int64_t ahead) const {
    const Rule rule = task.rule;
    const F g_scale = task.g_scale;
    int64_t i = begin;
    for (; i + AT_ONCE * LANES <= end; i += AT_ONCE * LANES) update_some<AT_ONCE>(rule, g_scale, i, ahead);
    for (; i < end; i += LANES) update_some<1>(rule, g_scale, i, ahead);
  }
  template <int COUNT>
  FO_INLINE void update_some(const Rule& rule, F g_scale, int64_t i, int64_t ahead) const {
    F p[COUNT], g[COUNT], s[Rule::slots + 1][COUNT];
    param.load(i, ahead, p), grad.load(i, ahead, g);
    FO_EACH_SLOT states[slot].load(i, ahead, s[slot]);
    FO_UNROLL for (int k = 0; k < COUNT; ++k) {
      F own[Rule::slots + 1];
      FO_EACH_SLOT own[slot] = s[slot][k];
      rule(p[k], g[k] * g_scale, own);
      FO_EACH_SLOT s[slot][k] = own[slot];
    }
    param.store(i, p);
    FO_EACH_SLOT states[slot].store(i, s[slot]);
  }

  // Updates PASS elements before it says which of them are kept: one loop would have a chain of operations so
  // long that a core finds no room for the next vectors. Not inlined: its copies were half of the library.
  __attribute__((noinline)) void update_masked(const Task<Rule>& task, int64_t begin, int64_t end,
                                               int64_t ahead, int lanes) const {
    constexpr int PASS = 512;
    alignas(64) float updated[PASS];
    for (; begin < end; begin += PASS) {
      int64_t last = begin + PASS < end ? begin + PASS : end;
      update_weights(task, begin, last, ahead, updated);
      prune(task, begin, last, lanes, updated);
    }
  }

  FO_INLINE void update_weights(const Task<Rule>& task, int64_t begin, int64_t end, int64_t ahead,
                                float* updated) const {
    constexpr int own = Rule::own_slots;
    const Slots slots = *this;
    const Rule rule = task.rule;
    const F g_scale = task.g_scale;
    const Plain weights = keeps_dense ? slots.states[own + 1] : slots.param;
    const char* const mask = slots.states[own].planes[0];
    const int64_t bytes = with_plain(slots.param.codec, [](auto c) { return c.bits(0) / 8; });
    for (int64_t i = begin; i < end; i += LANES) {
      F p = weights.load(i, ahead), g = slots.grad.load(i, ahead) * g_scale, s[own + 1];
      FO_UNROLL for (int slot = 0; slot < own; ++slot) s[slot] = slots.states[slot].load(i, ahead);
      rule.update(p, g, s, load_mask(mask + i / 8));
      store(updated + (i - begin), p);
      // Which is only written, and so no load asks for it.
      if (slots.keeps_dense) __builtin_prefetch(slots.param.planes[0] + i * bytes + ahead, 1);
      FO_UNROLL for (int slot = 0; slot < own; ++slot) slots.states[slot].store(i, s[slot]);
    }
  }

  FO_INLINE void prune(const Task<Rule>& task, int64_t begin, int64_t end, int lanes,
                       const float* updated) const {
    constexpr int own = Rule::own_slots;
    const Slots slots = *this;
    const Rule rule = task.rule;
    const int group = task.group;
    char* const mask = slots.states[own].planes[0];
    const Mask there = first_lanes(lanes);
    for (int64_t i = begin; i < end; i += LANES) {
      F p = load<float>(updated + (i - begin));
      Mask keep = group ? largest_of_groups(p, group, rule.kept, there) : load_mask(mask + i / 8);
      slots.param.store(i, rule.shown(p, keep));
      if (slots.keeps_dense) slots.states[own + 1].store(i, p);
      store_mask(mask + i / 8, keep & there);
    }
  }

  // Elements [begin, end), of which the last ones do not fill a vector in memory.
  __attribute__((noinline)) void update_all(const Task<Rule>& task, int64_t begin, int64_t end,
                                            int64_t ahead = 0) {
    int64_t full = end - (end - begin) % LANES;
    update(task, begin, full, ahead);
    if (full == end) return;
    Stage stages[Rule::slots + 2];
    int count = static_cast<int>(end - full);
    Slots lanes;
    lanes.keeps_dense = keeps_dense;
    lanes.grad = Plain{stages[Rule::slots + 1].fetch(grad, full, count)};
    lanes.param = Plain{stages[0].fetch(param, full, count)};
    FO_EACH_SLOT {
      if (has(slot)) lanes.states[slot] = Plain{stages[1 + slot].fetch(states[slot], full, count)};
    }
    lanes.update(task, 0, LANES, 0, count);
    each_written([&](const Slot& slot, int number) { stages[number].put_back(slot, full, count); });
  }
};

template <class Rule>
Slots<Rule> slots_of(const Step& step, int64_t tensor) {
  Slots<Rule> slots;
  const int32_t* codecs = step.work.codecs;
  int column = HEADER;
  slots.keeps_dense = step.work.n_codecs == 2 + Rule::slots;
  slots.param = Plain{take(codecs[0], step.table, tensor, column)};
  FO_EACH_SLOT {
    if (slots.has(slot)) slots.states[slot] = Plain{take(codecs[2 + slot], step.table, tensor, column)};
  }
  slots.grad = Plain{take(codecs[1], step.table, tensor, column)};
  return slots;
}

// Whether a slot's values pass through a buffer.
FO_INLINE bool is_staged(const Slot& slot) { return slot.codec >= PLAIN_COUNT && slot.codec != id_mask; }

// Elements of a tensor that are not all in plain codecs, or strided: CHUNK of them at a time.
template <class Rule>
class Chunk {
 public:
  Chunk(const Slots<Rule>& home, int64_t first, int count) : first_(first), count_(count), slots_(home) {
    slots_.grad = Plain{from_element(home.grad, first)};
    slots_.each_written([&](Slot& slot, int) { slot = from_element(slot, first); });
  }

  void update(const Task<Rule>& task, Stream stream) {
    Slots<Rule> plain = slots_;
    plain.each_written([&](Slot& slot, int number) {
      if (is_staged(slot)) slot = Slot{id_fp32, {reinterpret_cast<char*>(values_[number])}, nullptr};
    });
    slots_.each_written([&](const Slot& slot, int number) {
      if (is_staged(slot)) decode(slot, count_, values_[number]);
    });
    plain.update_all(task, 0, count_);
    slots_.each_written([&](const Slot& slot, int number) {
      stream.slot = static_cast<uint32_t>(number);
      if (is_staged(slot)) encode(slot, count_, values_[number], stream, first_, ahead(number));
    });
  }

  // The same for a parameter and gradient with strides, whose elements are copied side by side.
  void update_strided(const Task<Rule>& task, Stream stream, const Slots<Rule>& home, Odometer odometer) {
    Odometer back = odometer;
    int bytes = bytes_of(home.param), grad_bytes = bytes_of(home.grad);
    for (int i = 0; i < count_; ++i, odometer.advance()) {
      copy_entry(param_ + i * bytes, home.param.planes[0] + odometer.param() * bytes, bytes);
      copy_entry(grad_ + i * grad_bytes, home.grad.planes[0] + odometer.grad() * grad_bytes, grad_bytes);
    }
    slots_.param.planes[0] = param_;
    slots_.grad.planes[0] = grad_;
    update(task, stream);
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
  // What a tensor some places further on starts with: small ones are more places than elements.
  if (int64_t next = tensor + 8; next < step.table.n) {
    // Every codec has at least one plane.
    for (int column = HEADER; column < HEADER + step.work.n_codecs; ++column) {
      __builtin_prefetch(step.table.plane(column, next), 1);
    }
  }
  auto slots = slots_of<Rule>(step, tensor);
  bool new_mask = is_masked<Rule> && row[SCALARS + scalar_count<Rule> - 1] > 0;
  Task<Rule> task{with_scalars<Rule>(row + SCALARS), row[G_SCALE], new_mask ? step.work.group : 0};
  bool plain = true;
  slots.each_written([&](const Slot& slot, int) { plain = plain && !is_staged(slot); });
  if (plain && !step.layouts) return slots.update_all(task, begin, end, PAGE);
  Stream stream{0, 0, static_cast<uint32_t>(step.table.at(ORDINAL, tensor)), 0,
                static_cast<uint64_t>(step.table.at(DRAWN, tensor))};
  memcpy(&stream.seed, row + SEED, 4), memcpy(&stream.step, row + fo::STEP, 4);
  for (int64_t first = begin; first < end; first += CHUNK) {
    Chunk<Rule> chunk(slots, first, static_cast<int>(end - first < CHUNK ? end - first : CHUNK));
    if (step.layouts) {
      Layout layout{step.layouts + step.table.at(LAYOUT, tensor) * LAYOUT_LENGTH};
      chunk.update_strided(task, stream, slots, Odometer(layout, first));
    } else {
      chunk.update(task, stream);
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
#define FO_DENSE_CASE(rule) \
  case id_##rule:           \
    return with(update<rule>);
#define FO_MASKED_CASE(rule) \
  case id_##rule:            \
    return with(update<masked<rule>>);
  if (is_masked_work(step.work)) {
    switch (step.work.rule) { FO_RULES(FO_MASKED_CASE) }
  } else {
    switch (step.work.rule) { FO_DENSE_RULES(FO_DENSE_CASE) }
  }
#undef FO_MASKED_CASE
#undef FO_DENSE_CASE
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
const Isa FO_ISA{step, square_sums, nm_mask, transposable_mask};
}  // namespace fo
