// The C interface of libfused_optim_cpu.so, and the sharing of work between threads.
#include <omp.h>
#include <pthread.h>

#include <cfenv>
#include <memory>

#include "isa.h"
#include "slot.h"

#define FO_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fo;

// A forked child has none of its parent's OpenMP threads, and waiting for them would never end.
bool forked = false;
__attribute__((constructor)) void watch_forks() {
  pthread_atfork(nullptr, nullptr, [] { forked = true; });
}

struct NamedIsa {
  const char* name;
  const Isa* isa;
  bool runs_here;
};

// From the most to the least preferred.
const NamedIsa* isas() {
#ifdef FO_HAVE_AVX512
  static const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const bool bytes = wide && __builtin_cpu_supports("avx512vbmi");
  static const NamedIsa gathers{"avx512", &avx512, wide}, permutes{"avx512_permute", &avx512_permute, bytes};
  static const bool slow_gathers = bytes && __builtin_cpu_is("amd");
#endif
  static const NamedIsa list[] = {
#ifdef FO_HAVE_AVX512
      slow_gathers ? permutes : gathers,
      slow_gathers ? gathers : permutes,
#endif
#ifdef FO_HAVE_AVX2
      {"avx2", &avx2, __builtin_cpu_supports("avx2") && __builtin_cpu_supports("f16c")},
#endif
#ifdef FO_HAVE_PORTABLE
      {"portable", &portable, true},
#endif
      {nullptr, nullptr, false},
  };
  return list;
}

const Isa* isa_at(int index) {
  for (const NamedIsa* entry = isas(); entry->name; ++entry) {
    if (index-- == 0) return entry->runs_here ? entry->isa : nullptr;
  }
  return nullptr;
}

// A second thread takes longer to wake up than this many elements take, and a tensor as long as some
// elements.
constexpr int64_t ELEMENTS_WORTH_A_THREAD = 32768, ELEMENTS_WORTH_A_TENSOR = 64;

// How many units the table's tensors have, and how many threads should share them.
struct Shares {
  int64_t units = 0;
  int threads;

  Shares(const Table& table, int64_t unit, int most_threads) {
    int64_t elements = table.n * ELEMENTS_WORTH_A_TENSOR;
    for (int64_t tensor = 0; tensor < table.n; ++tensor) {
      int64_t numel = table.at(NUMEL, tensor);
      units += (numel + unit - 1) / unit;
      elements += numel;
    }
    int64_t useful = forked ? 1 : elements / ELEMENTS_WORTH_A_THREAD;
    threads = static_cast<int>(useful < most_threads ? useful : most_threads);
  }

  Shares(int64_t count, int64_t elements, int most_threads) : units(count) {
    int64_t useful = forked ? 1 : elements / ELEMENTS_WORTH_A_THREAD;
    threads = static_cast<int>(useful < most_threads ? useful : most_threads);
  }

  // Calls work(first, last) so that every unit is covered once.
  template <class Work>
  void run(Work work) const {
    if (threads <= 1) return work(0, units);
    // All threads round as the caller does, who may flush denormals (torch.set_flush_denormal).
    fenv_t callers;
    fegetenv(&callers);
#pragma omp parallel num_threads(threads)
    {
      int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
      fenv_t own;
      fegetenv(&own), fesetenv(&callers);
      work(units * part / parts, units * (part + 1) / parts);
      fesetenv(&own);
    }
  }
};

}  // namespace

FO_API int fused_optim_cpu_abi() { return ABI; }

// Names in the order of their ids, then a null.
FO_API const char* const* fused_optim_cpu_rules() { return rule_names; }
FO_API const char* const* fused_optim_cpu_codecs() { return codec_names; }

// The compiled instruction sets, best first, then a null; and whether one runs on this machine.
FO_API const char* fused_optim_cpu_isa(int isa) { return isas()[isa].name; }
FO_API int fused_optim_cpu_runs(int isa) { return isas()[isa].runs_here; }

FO_API int fused_optim_cpu_step(int rule, int group, const int32_t* codecs, int n_codecs,
                                const int64_t* table, int64_t n, const float* rows, int64_t row_length,
                                const int64_t* layouts, int threads, int isa) {
  Work work{rule, group, codecs, n_codecs};
  if (Error error = check(work)) return error;
  const Isa* code = isa_at(isa);
  if (!code) return UNKNOWN_ISA;
  Step step{work, {table, n}, rows, row_length, layouts};
  Shares(step.table, STEP_UNIT, threads).run([&](int64_t first, int64_t last) {
    code->step(step, first, last);
  });
  return OK;
}

// Writes to `sum` the sum of squares of the gradients in `column`: the same bits for any number of threads.
FO_API int fused_optim_cpu_square_sum(int codec, int column, const int64_t* table, int64_t n,
                                      const int64_t* layouts, int threads, int isa, double* sum) {
  if (codec < 0 || codec >= PLAIN_COUNT) return UNKNOWN_CODEC;
  const Isa* code = isa_at(isa);
  if (!code) return UNKNOWN_ISA;
  Gradients gradients{codec, column, {table, n}, layouts};
  Shares shares(gradients.table, SUM_UNIT, threads);
  std::unique_ptr<double[]> sums(new double[shares.units]);
  shares.run([&](int64_t first, int64_t last) { code->square_sums(gradients, first, last, sums.get()); });
  *sum = 0;
  for (int64_t unit = 0; unit < shares.units; ++unit) *sum += sums[unit];
  return OK;
}

// Writes to `bits` which of `count` values are among the `kept` largest magnitudes of their group of
// neighbours.
FO_API int fused_optim_cpu_nm_mask(const void* x, int codec, int64_t count, int group, int kept,
                                   uint8_t* bits, int threads, int isa) {
  if (codec < 0 || codec >= PLAIN_COUNT) return UNKNOWN_CODEC;
  if (group < 2 || group > LARGEST_GROUP) return UNKNOWN_GROUP;
  const Isa* code = isa_at(isa);
  if (!code) return UNKNOWN_ISA;
  Values values{codec, static_cast<const char*>(x)};
  int64_t unit = 64 * group;
  Shares((count + unit - 1) / unit, count, threads).run([&](int64_t first, int64_t last) {
    int64_t end = last * unit < count ? last * unit : count;
    code->nm_mask(values, first * unit, end, group, kept, bits);
  });
  return OK;
}

// Writes to `bits` the best mask of a matrix's 4x4 blocks with two in every row and column (tensor_masks.h).
FO_API int fused_optim_cpu_transposable_mask(const void* x, int codec, int64_t rows, int64_t columns,
                                             uint8_t* bits, int threads, int isa) {
  if (codec < 0 || codec >= PLAIN_COUNT) return UNKNOWN_CODEC;
  if (rows % 4 || columns % 4) return UNKNOWN_GROUP;
  const Isa* code = isa_at(isa);
  if (!code) return UNKNOWN_ISA;
  Values values{codec, static_cast<const char*>(x)};
  Shares(rows / 4, rows * columns, threads).run([&](int64_t first, int64_t last) {
    code->transposable_mask(values, columns, 4 * first, 4 * last, bits);
  });
  return OK;
}
