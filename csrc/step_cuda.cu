// A step on a GPU: one launch for all tensors of a bucket, one block per tile.
//
// Compiled twice: FO_EXACT=1 rounds every operation, FO_EXACT=0 may contract and approximate.
#include "task.cuh"

#define FO_API extern "C" __attribute__((visibility("default")))
#if FO_EXACT
#define FO_ARITHMETIC(name) name##_exact
#else
#define FO_ARITHMETIC(name) name##_fast
#endif

namespace {

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
FO_INLINE void update_singles(const Launch& launch, int2 tile, const Slots<Rule>& slots, const Rule& rule,
                              F g_scale, uint32_t first, uint32_t end) {
#pragma unroll 1
  for (uint32_t i = first + threadIdx.x; i < end; i += THREADS) {
    Single in_states{i}, in_param{i}, in_grad{i};
    if (launch.layouts) {
      Layout layout{launch.layouts + launch.table.at(LAYOUT, tile.x) * LAYOUT_LENGTH};
      in_param.offset = offset(layout, layout.param_strides(), start_of(tile) + i);
      in_grad.offset = offset(layout, layout.grad_strides(), start_of(tile) + i);
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
  const float* row = launch.rows + launch.table.at(ROW, tile.x) * launch.row_length;
  Slots<Rule> slots(launch, tile.x, start_of(tile));
  Rule rule = with_scalars<Rule>(row + SCALARS);
  F g_scale = row[G_SCALE];
  if (row[ACTIVE] == 0) return;
  uint32_t first = 0, length = length_of(tile, launch.table.at(NUMEL, tile.x));
  if (!launch.layouts && launch.table.at(ALIGNED, tile.x)) {
    bool neighbours = launch.neighbours;
    Groups groups{threadIdx.x * (neighbours ? 8 : 4), neighbours ? 4u : 4u * THREADS};
#pragma unroll 1
    for (; first + ROUND <= length; first += ROUND, groups.first += ROUND) {
      update(slots, rule, g_scale, groups, groups, groups);
    }
  }
  update_singles(launch, tile, slots, rule, g_scale, first, length);
}

template <class Rule, class Computed, class Home>
FO_INLINE void fetch(const Storage* storages, const Task<Rule, Computed>& task, const Home& weights,
                     const Place& place, Values<Rule, EIGHT>& values) {
  const Slots<Rule>& slots = task.slots;
  Bits<Rule, EIGHT> bits;
  if (place.vectors) {
    move_round<FETCH, ELEMENTWISE_COUNT>(weights.storage, weights.slot, place, bits.param);
    move_round<FETCH, PLAIN_COUNT>(storages[1], slots.grad, place, bits.grad);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i)
      move_round<FETCH, CODEC_COUNT>(storages[2 + i], slots.states[i], place, bits.states[i]);
  } else {
    move_some<FETCH>(weights.storage, weights.slot, place, weights.lie, bits.param);
    move_some<FETCH>(storages[1], slots.grad, place, task.of_grad, bits.grad);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i)
      move_some<FETCH>(storages[2 + i], slots.states[i], place, Lie{}, bits.states[i]);
  }
  decode_elements(weights.storage, bits.param, values.p);
  decode(storages[1].codec, bits.grad, values.g);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i)
    decode_state(storages[2 + i], slots.states[i], bits.states[i], values.s[i]);
}

template <class Rule, class Computed>
FO_INLINE void put_states(const Storage* storages, const Task<Rule, Computed>& task, const Place& place,
                          Values<Rule, EIGHT>& values) {
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) {
    Words<EIGHT> words;
    encode_state(storages[2 + i], task.slots.states[i], i, place, task.stream, values.s[i], words);
    put<CODEC_COUNT>(storages[2 + i], task.slots.states[i], place, Lie{}, words);
  }
}

template <class Home>
FO_INLINE void put(const Home& weights, const Stream& stream, const Place& place, const F* p) {
  Words<EIGHT> words;
  encode_elements(weights.storage, place, stream, weights.number, p, words);
  put<ELEMENTWISE_COUNT>(weights.storage, weights.slot, place, weights.lie, words);
}

// The weights are put last, when the division of indices has registers again.
template <class Rule>
FO_INLINE void update(const Storage* storages, const Task<Rule>& task, const Place& place) {
  Home<const Storage&, const Slot&, const Lie&> weights{storages[0], task.slots.param, task.of_param, 0};
  Values<Rule, EIGHT> values;
  fetch(storages, task, weights, place, values);
  values.update(task.rule, task.g_scale);
  put_states(storages, task, place, values);
  put(weights, task.stream, place, values.p);
}

template <class Rule>
FO_INLINE void update(const Storage* storages, const MaskedTask<Rule>& task, const Place& place) {
  uint32_t mask = fetch_mask(task.mask, place);
  Values<Rule, EIGHT> values;
  fetch(storages, task, task.weights[task.keeps_dense], place, values);
  values.update(task.rule, task.g_scale, mask);
  put_states(storages, task, place, values);
  if (task.group) mask = largest_of_groups(values.p, place.count, task.group, task.kept);
  put_mask(task.mask, place, mask);
  // One piece of code for both: dense weights first, then what is shown of them.
#pragma unroll 1
  for (int left = task.keeps_dense; left >= 0; --left) {
    if (left == 0) {
#pragma unroll
      for (int e = 0; e < EIGHT; ++e) values.p[e] = task.rule.shown(values.p[e], mask >> e & 1);
    }
    put(task.weights[left], task.stream, place, values.p);
  }
}

// All threads of a block make every round, because they ask each other for maxima and for magnitudes.
template <class Task>
FO_INLINE void update_tile(const Launch& launch) {
  int2 tile = launch.tiles[blockIdx.x];
  const float* row = launch.rows + launch.table.at(ROW, tile.x) * launch.row_length;
  if (row[ACTIVE] == 0) return;
  alignas(Task) __shared__ char memory[sizeof(Task)];
  __shared__ Address address;
  if (threadIdx.x == 0) {
    new (memory) Task(launch, tile, row);
    address = address_of(memory);
  }
  __syncthreads();
  const Task& task = *static_cast<const Task*>(at_address(address));
#pragma unroll 1
  for (uint32_t first = 0; first < task.length; first += ROUND) {
    update(launch.storages, task, task.place(first, launch.neighbours));
  }
}

// By the number of states. With one block more ptxas keeps 4 to 64 bytes of registers in memory on some
// architecture (nvcc 13.0, November 2026).
constexpr int coded_blocks_in_flight[] = {6, 5, 4, FO_EXACT ? 3 : 4};

// Tensors of any codecs.
template <class Rule>
__global__ void __launch_bounds__(THREADS, coded_blocks_in_flight[Rule::slots])
    step_coded_kernel(const __grid_constant__ Launch launch) {
  update_tile<Task<Rule>>(launch);
}

// One block less for one and three states, where ptxas would keep 12 and 16 bytes of registers in memory: the
// address of the weights and the mask take registers as well.
constexpr int masked_blocks_in_flight[] = {6, 4, 4, 3};

// The same with a mask.
template <class Rule>
__global__ void __launch_bounds__(THREADS, masked_blocks_in_flight[Rule::slots])
    step_masked_kernel(const __grid_constant__ Launch launch) {
  update_tile<MaskedTask<Rule>>(launch);
}

int launch_step(const Work& work, Launch launch, int n_tiles, int device, void* stream) {
  if (Error error = check(work)) return -error;
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
  for (int i = 2; i < work.n_codecs; ++i) use(i);
  use(1);
  bool with_mask = is_masked_work(work);
  launch.neighbours = with_mask || shared || !wide;
  launch.keeps_dense = work.n_codecs > mask_of(work) + 1;
  launch.group = work.group;
#define FO_DENSE_CASE(rule) \
  case id_##rule:           \
    return launch_tiles(plain ? step_kernel<rule> : step_coded_kernel<rule>, n_tiles, device, stream, launch);
#define FO_MASKED_CASE(rule) \
  case id_##rule:            \
    return launch_tiles(step_masked_kernel<rule>, n_tiles, device, stream, launch);
  if (with_mask) {
    switch (work.rule) { FO_RULES(FO_MASKED_CASE) }
  } else {
    switch (work.rule) { FO_DENSE_RULES(FO_DENSE_CASE) }
  }
#undef FO_MASKED_CASE
#undef FO_DENSE_CASE
  return -UNKNOWN_RULE;
}

}  // namespace

// Returns 0, CUDA's error, or minus one of ours. Pointers are the device's, save `codecs`.
FO_API int FO_ARITHMETIC(fused_optim_cuda_step)(int rule, int group, const int32_t* codecs, int n_codecs,
                                                const int64_t* table, int64_t n, const int32_t* tiles,
                                                int n_tiles, const float* rows, int64_t row_length,
                                                const int64_t* layouts, int device, void* stream) {
  Launch launch{{table, n}, reinterpret_cast<const int2*>(tiles), layouts, rows, row_length, {}, false, false,
                0};
  return launch_step({rule, group, codecs, n_codecs}, launch, n_tiles, device, stream);
}
