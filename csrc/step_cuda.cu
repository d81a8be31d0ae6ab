// A step on a GPU: one launch for all tensors of a bucket, one block per tile.
//
// Compiled twice: FO_EXACT=1 rounds every operation, FO_EXACT=0 may contract and approximate.
#include "registers.cuh"

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
  int32_t codecs[2 + most_states()];
  // Whether 8 neighbours are one access in every plane, so that a thread may take them.
  bool narrow;
};

template <class Rule>
struct Slots {
  Slot param, grad, states[Rule::slots + 1];

  FO_INLINE Slots(const Launch& launch, int64_t tensor) {
    int column = HEADER;
    param = take(launch.codecs[0], launch.table, tensor, column);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i)
      states[i] = take(launch.codecs[2 + i], launch.table, tensor, column);
    grad = take(launch.codecs[1], launch.table, tensor, column);
  }
};

template <class Rule, int COUNT>
struct Bits {
  Words<COUNT> param, grad, states[Rule::slots + 1];
};

template <class Rule, int COUNT>
FO_INLINE void update(const Slots<Rule>& slots, const Rule& rule, F g_scale, Bits<Rule, COUNT>& bits) {
  F p[COUNT], g[COUNT], s[Rule::slots + 1][COUNT];
  decode(slots.param.codec, bits.param, p);
  decode(slots.grad.codec, bits.grad, g);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) decode(slots.states[i].codec, bits.states[i], s[i]);
#pragma unroll
  for (int e = 0; e < COUNT; ++e) {
    F of_element[Rule::slots + 1];
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i) of_element[i] = s[i][e];
    rule(p[e], g[e] * g_scale, of_element);
#pragma unroll
    for (int i = 0; i < Rule::slots; ++i) s[i][e] = of_element[i];
  }
  encode(slots.param.codec, p, bits.param);
#pragma unroll
  for (int i = 0; i < Rule::slots; ++i) encode(slots.states[i].codec, s[i], bits.states[i]);
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
    Groups groups{start + threadIdx.x * (launch.narrow ? 8 : 4), launch.narrow ? 4 : 4 * THREADS};
#pragma unroll 1
    for (; start + ROUND <= end; start += ROUND, groups.first += ROUND) {
      update(slots, rule, g_scale, groups, groups, groups);
    }
  }
  update_singles(launch, tensor, slots, rule, g_scale, start, end);
}

template <class Codec>
constexpr bool is_narrow() {
  for (int plane = 0; plane < Codec::planes; ++plane) {
    if (Codec::bytes(plane) > 2) return false;
  }
  return true;
}

#define FO_NARROW(codec) is_narrow<codec>(),
constexpr bool narrow_codecs[] = {FO_CODECS(FO_NARROW)};
#undef FO_NARROW

int launch_step(int rule, Launch launch, const int32_t* codecs, int n_tiles, int device, void* stream) {
  if (Error error = check_ids(rule, codecs)) return -error;
  launch.narrow = true;
  for (int i = 0; i < 2 + state_counts[rule]; ++i) {
    launch.codecs[i] = codecs[i];
    launch.narrow = launch.narrow && narrow_codecs[codecs[i]];
  }
  switch (rule) {
#define FO_CASE(rule) \
  case id_##rule:     \
    return launch_tiles(step_kernel<rule>, n_tiles, device, stream, launch);
    FO_RULES(FO_CASE)
#undef FO_CASE
  }
  return -UNKNOWN_RULE;
}

}  // namespace

// Returns 0, CUDA's error, or minus one of ours. Pointers are the device's, save `codecs`.
FO_API int FO_ARITHMETIC(fused_optim_cuda_step)(int rule, const int32_t* codecs, const int64_t* table,
                                                int64_t n, const int32_t* tiles, int n_tiles,
                                                const float* rows, int64_t row_length, const int64_t* layouts,
                                                int device, void* stream) {
  Launch launch{{table, n}, reinterpret_cast<const int2*>(tiles), layouts, rows, row_length, {}, false};
  return launch_step(rule, launch, codecs, n_tiles, device, stream);
}
