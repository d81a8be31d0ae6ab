// A step on a GPU: one launch for all tensors of a bucket, one block per tile.
//
// Compiled twice: FO_EXACT=1 rounds every operation, FO_EXACT=0 may contract and approximate.
#include "coded.cuh"

#define FO_API extern "C" __attribute__((visibility("default")))
#if FO_EXACT
#define FO_ARITHMETIC(name) name##_exact
#else
#define FO_ARITHMETIC(name) name##_fast
#endif

namespace {

using namespace fo;

struct Launch {
  Table table;
  const int2* tiles;
  const int64_t* layouts;
  const float* rows;
  int64_t row_length;
  // Of the parameter, the gradient and the states.
  Storage storages[2 + most_states()];
  // Whether a thread takes 8 neighbours: if they are one access in every plane, and where they share
  // something.
  bool neighbours;
};

template <class Rule>
struct Slots {
  Slot param, grad, states[Rule::slots + 1];

  FO_INLINE Slots(const Launch& launch, int64_t tensor) {
    param = take(launch.storages[0], launch.table, tensor);
    grad = take(launch.storages[1], launch.table, tensor);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i) states[i] = take(launch.storages[2 + i], launch.table, tensor);
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
#pragma unroll
    for (int e = 0; e < COUNT; ++e) {
      F of_element[Rule::slots + 1];
#pragma unroll
      for (int i = 0; i < Rule::slots; ++i) of_element[i] = s[i][e];
      rule(p[e], g[e] * g_scale, of_element);
#pragma unroll
      for (int i = 0; i < Rule::slots; ++i) s[i][e] = of_element[i];
    }
  }
};

template <class Rule, int COUNT>
FO_INLINE void update(const Slots<Rule>& slots, const Rule& rule, F g_scale, Bits<Rule, COUNT>& bits) {
  Values<Rule, COUNT> values;
  decode(slots.param.codec, bits.param, values.p);
  decode(slots.grad.codec, bits.grad, values.g);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) decode(slots.states[i].codec, bits.states[i], values.s[i]);
  values.update(rule, g_scale);
  encode(slots.param.codec, values.p, bits.param);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) encode(slots.states[i].codec, values.s[i], bits.states[i]);
}

// Fetches everything before any arithmetic, so that all loads of a thread are under way together.
template <class Rule, class Where>
FO_INLINE void update(const Slots<Rule>& slots, const Rule& rule, F g_scale, const Where& in_param,
                      const Where& in_states, const Where& in_grad) {
  Bits<Rule, Where::COUNT> bits;
  move<FETCH>(slots.param, in_param, bits.param);
  move<FETCH>(slots.grad, in_grad, bits.grad);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) move<FETCH>(slots.states[i], in_states, bits.states[i]);
  update(slots, rule, g_scale, bits);
  move<PUT>(slots.param, in_param, bits.param);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) move<PUT>(slots.states[i], in_states, bits.states[i]);
}

// Unaligned and strided tensors, and the last elements of all others.
template <class Rule>
FO_INLINE void update_singles(const Launch& launch, int64_t tensor, const Slots<Rule>& slots,
                              const Rule& rule, F g_scale, int64_t start, int64_t end) {
#pragma unroll 1
  for (int64_t i = start + threadIdx.x; i < end; i += THREADS) {
    Single in_states{i}, in_param{i}, in_grad{i};
    if (launch.layouts) {
      Layout layout{launch.layouts + launch.table.at(LAYOUT, tensor) * LAYOUT_LENGTH};
      in_param.offset = offset(layout, layout.param_strides(), i);
      in_grad.offset = offset(layout, layout.grad_strides(), i);
    }
    update(slots, rule, g_scale, in_param, in_states, in_grad);
  }
}

// Blocks that a multiprocessor must hold so that it waits for enough bytes at once even if every plane is
// narrow: 48 KiB is what CUB asks of an H200 (32 of an H100). More than ten blocks would leave a thread too
// few registers.
constexpr int blocks_in_flight(int planes) {
  int bytes = planes * THREADS * Groups::COUNT * 2, blocks = (48 * 1024 + bytes - 1) / bytes;
  return blocks < 10 ? blocks : 10;
}

// Tensors whose codecs are all plain.
template <class Rule>
__global__ void __launch_bounds__(THREADS, blocks_in_flight(2 + Rule::slots))
    step_kernel(const __grid_constant__ Launch launch) {
  int2 tile = launch.tiles[blockIdx.x];
  int64_t tensor = tile.x, n = launch.table.at(NUMEL, tensor);
  const float* row = launch.rows + launch.table.at(ROW, tensor) * launch.row_length;
  Slots<Rule> slots(launch, tensor);
  Rule rule = with_scalars<Rule>(row + SCALARS);
  F g_scale = row[G_SCALE];
  if (row[ACTIVE] == 0) return;
  int64_t start = tile.y * static_cast<int64_t>(TILE), end = start + TILE < n ? start + TILE : n;
  if (!launch.layouts && launch.table.at(ALIGNED, tensor)) {
    bool neighbours = launch.neighbours;
    Groups groups{start + threadIdx.x * (neighbours ? 8 : 4), neighbours ? 4 : 4 * THREADS};
#pragma unroll 1
    for (; start + ROUND <= end; start += ROUND, groups.first += ROUND) {
      update(slots, rule, g_scale, groups, groups, groups);
    }
  }
  update_singles(launch, tensor, slots, rule, g_scale, start, end);
}

// What all threads of a block must know of their tensor. It stands in shared memory: registers are needed for
// elements.
template <class Rule>
struct Task {
  Slots<Rule> slots;
  Rule rule;
  F g_scale;
  Stream stream;
  int64_t start, end;
  bool aligned;
  Lie of_param, of_grad;

  FO_INLINE Task(const Launch& launch, int2 tile, const float* row)
      : slots(launch, tile.x),
        rule(with_scalars<Rule>(row + SCALARS)),
        g_scale(row[G_SCALE]),
        stream{as_bits(row[SEED]), as_bits(row[STEP]),
               static_cast<uint32_t>(launch.table.at(ORDINAL, tile.x))},
        start(tile.y * static_cast<int64_t>(TILE)),
        aligned(!launch.layouts && launch.table.at(ALIGNED, tile.x)),
        of_param(),
        of_grad() {
    int64_t n = launch.table.at(NUMEL, tile.x);
    end = start + TILE < n ? start + TILE : n;
    if (!launch.layouts) return;
    Layout strided{launch.layouts + launch.table.at(LAYOUT, tile.x) * LAYOUT_LENGTH};
    of_param = {strided.record, strided.param_strides()};
    of_grad = {strided.record, strided.grad_strides()};
  }

  // A thread's elements in the round that begins at `first`.
  FO_INLINE Place place(int64_t first, bool neighbours) const {
    bool vectors = aligned && first + ROUND <= end;
    neighbours = neighbours || !vectors;
    first += threadIdx.x * (neighbours ? 8 : 4);
    int64_t left = end - first;
    int count = left < 0 ? 0 : left < EIGHT ? static_cast<int>(left) : EIGHT;
    return {first, neighbours ? 4 : 4 * THREADS, count, vectors};
  }
};

template <class Rule>
FO_INLINE void update(const Storage* storages, const Task<Rule>& task, const Place& place) {
  const Slots<Rule>& slots = task.slots;
  Bits<Rule, EIGHT> bits;
  move<FETCH>(storages[0], slots.param, place, task.of_param, bits.param);
  move<FETCH>(storages[1], slots.grad, place, task.of_grad, bits.grad);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i)
    move<FETCH>(storages[2 + i], slots.states[i], place, Lie{}, bits.states[i]);
  Values<Rule, EIGHT> values;
  decode_param(slots.param, bits.param, values.p);
  decode(slots.grad.codec, bits.grad, values.g);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) decode_state(slots.states[i], bits.states[i], values.s[i]);
  values.update(task.rule, task.g_scale);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) {
    Words<EIGHT> words;
    encode_state(storages[2 + i], slots.states[i], i, place, task.stream, values.s[i], words);
    move<PUT>(storages[2 + i], slots.states[i], place, Lie{}, words);
  }
  // Last, when the division of indices has registers again.
  Words<EIGHT> words;
  encode_param(slots.param, place, task.stream, values.p, words);
  move<PUT>(storages[0], slots.param, place, task.of_param, words);
}

// By the number of states. With one block more for one or two states ptxas keeps 16 to 64 bytes of registers
// in memory on some architecture (nvcc 13.0, November 2026); three states take 128 registers already.
constexpr int coded_blocks_in_flight[] = {6, 5, 4, 4};

// Tensors of any codecs. All threads of a block make every round, because they ask each other for maxima.
template <class Rule>
__global__ void __launch_bounds__(THREADS, coded_blocks_in_flight[Rule::slots])
    step_coded_kernel(const __grid_constant__ Launch launch) {
  int2 tile = launch.tiles[blockIdx.x];
  const float* row = launch.rows + launch.table.at(ROW, tile.x) * launch.row_length;
  if (row[ACTIVE] == 0) return;
  alignas(Task<Rule>) __shared__ char memory[sizeof(Task<Rule>)];
  auto& task = *reinterpret_cast<Task<Rule>*>(memory);
  if (threadIdx.x == 0) new (memory) Task<Rule>(launch, tile, row);
  __syncthreads();
#pragma unroll 1
  for (int64_t first = task.start; first < task.end; first += ROUND) {
    update(launch.storages, task, task.place(first, launch.neighbours));
  }
}

int launch_step(const Work& work, Launch launch, int n_tiles, int device, void* stream) {
  if (Error error = check(work)) return -error;
  if (is_masked_work(work)) return -UNKNOWN_RULE;
  const int32_t* codecs = work.codecs;
  bool plain = true, wide = false, shared = false;
  int column = HEADER;
  auto use = [&](int i) {
    Storage& storage = launch.storages[i] = storages[codecs[i]];
    storage.column = column;
    column += 1 + (storage.bits[1] != 0) + storage.lookup;
    plain = plain && storage.codec < PLAIN_COUNT;
    wide = wide || storage.bits[0] == 32;
    shared = shared || storage.block_shift > 0 || storage.random;
  };
  use(0);
  for (int i = 2; i < mask_of(work); ++i) use(i);
  use(1);
  launch.neighbours = shared || !wide;
  switch (work.rule) {
#define FO_CASE(rule) \
  case id_##rule:     \
    return launch_tiles(plain ? step_kernel<rule> : step_coded_kernel<rule>, n_tiles, device, stream, launch);
    FO_DENSE_RULES(FO_CASE)
#undef FO_CASE
  }
  return -UNKNOWN_RULE;
}

}  // namespace

// Returns 0, CUDA's error, or minus one of ours. Pointers are the device's, save `codecs`.
FO_API int FO_ARITHMETIC(fused_optim_cuda_step)(int rule, int group, const int32_t* codecs, int n_codecs,
                                                const int64_t* table, int64_t n, const int32_t* tiles,
                                                int n_tiles, const float* rows, int64_t row_length,
                                                const int64_t* layouts, int device, void* stream) {
  Launch launch{{table, n}, reinterpret_cast<const int2*>(tiles), layouts, rows, row_length, {}, false};
  return launch_step({rule, group, codecs, n_codecs}, launch, n_tiles, device, stream);
}
