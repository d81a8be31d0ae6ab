// Enough of CUDA's language and runtime to run the kernels of csrc/ on a CPU: one block after the other, its
// threads as coroutines that change places where they must wait for each other.
#pragma once

#include <math.h>
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __CUDACC__
#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct int2 {
  int x, y;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3(unsigned x = 1) : x(x) {}
};

inline dim3 threadIdx, blockIdx;

constexpr unsigned MOST_THREADS = 1024;

// The threads of a block, and where each has stopped. Contexts only begin them: every other change of place
// is a jump, because a change of context asks the kernel for the signal mask.
struct Block {
  unsigned size;
  std::function<void()> kernel;
  ucontext_t beginnings[MOST_THREADS];
  jmp_buf scheduler, threads[MOST_THREADS];
  bool begun[MOST_THREADS], finished[MOST_THREADS];

  void yield() {
    if (!_setjmp(threads[threadIdx.x])) _longjmp(scheduler, 1);
  }
  void resume(unsigned thread) {
    threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (begun[thread]) _longjmp(threads[thread], 1);
    begun[thread] = true;
    setcontext(&beginnings[thread]);
  }
};
inline Block* block;

// Lets a thread pass when `size` have come.
struct Barrier {
  unsigned waiting = 0, generation = 0;

  void wait(unsigned size) {
    unsigned own = generation;
    if (++waiting < size) {
      while (own == generation) block->yield();
    } else {
      waiting = 0;
      ++generation;
    }
  }
};
inline Barrier of_block, of_warp[MOST_THREADS / 32];

inline void __syncthreads() { of_block.wait(block->size); }

// Every lane of a warp gives a value and chooses from those of all.
template <class T, class Choose>
T exchange(unsigned mask, T value, Choose choose) {
  if (mask != ~0u) abort();
  static T values[MOST_THREADS];
  unsigned first = threadIdx.x / 32 * 32;
  Barrier& barrier = of_warp[threadIdx.x / 32];
  values[threadIdx.x] = value;
  barrier.wait(32);
  value = choose(values + first, threadIdx.x - first);
  barrier.wait(32);
  return value;
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance) {
  return exchange(mask, value, [=](const T* values, unsigned lane) {
    return values[lane + distance < 32 ? lane + distance : lane];
  });
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits) {
  return exchange(mask, value, [=](const T* values, unsigned lane) { return values[lane ^ bits]; });
}
template <class T>
T __shfl_sync(unsigned mask, T value, unsigned source) {
  return exchange(mask, value, [=](const T* values, unsigned) { return values[source % 32]; });
}
inline uint32_t __reduce_max_sync(unsigned mask, uint32_t value) {
  return exchange(mask, value, [](const uint32_t* values, unsigned) {
    uint32_t most = 0;
    for (int lane = 0; lane < 32; ++lane) most = values[lane] > most ? values[lane] : most;
    return most;
  });
}

// Vectors must be aligned, as on a GPU.
extern "C" inline int misaligned = 0;
template <class T>
T __ldcs(const T* address) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) misaligned = 1;
  T value;
  memcpy(&value, address, sizeof value);
  return value;
}
template <class T>
T __ldg(const T* address) {
  return __ldcs(address);
}
template <class T>
void __stcs(T* address, T value) {
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T)) misaligned = 1;
  memcpy(address, &value, sizeof value);
}

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

inline uint32_t __funnelshift_rc(uint32_t low, uint32_t high, uint32_t bits) {
  return (static_cast<uint64_t>(high) << 32 | low) >> (bits < 32 ? bits : 32);
}

// Functions that are never inlined, because nothing may be fused with them or approximate them.
#define ROUNDED __attribute__((noinline, optimize("fp-contract=off,no-reciprocal-math"))) inline
ROUNDED float __fmul_rn(float a, float b) { return a * b; }
ROUNDED float __fadd_rn(float a, float b) { return a + b; }
ROUNDED float __fsub_rn(float a, float b) { return a - b; }
ROUNDED float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline int __float2int_rn(float x) { return static_cast<int>(nearbyintf(x)); }

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

inline void run_thread() {
  block->kernel();
  block->finished[threadIdx.x] = true;
  block->yield();
}

inline void run_block(char* stacks, size_t stack_size) {
  for (unsigned thread = 0; thread < block->size; ++thread) {
    ucontext_t& context = block->beginnings[thread];
    getcontext(&context);
    context.uc_stack.ss_sp = stacks + thread * stack_size;
    context.uc_stack.ss_size = stack_size;
    makecontext(&context, run_thread, 0);
    block->begun[thread] = block->finished[thread] = false;
  }
  for (unsigned running = block->size; running > 0;) {
    running = 0;
    for (unsigned thread = 0; thread < block->size; ++thread) {
      if (block->finished[thread]) continue;
      block->resume(thread);
      running += !block->finished[thread];
    }
  }
}

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  constexpr size_t stack_size = 1 << 16;
  auto threads = std::make_unique<Block>();
  std::unique_ptr<char[]> stacks(new char[config->blockDim.x * stack_size]);
  block = threads.get();
  block->size = config->blockDim.x;
  block->kernel = [=] { kernel(arguments...); };
  for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) run_block(stacks.get(), stack_size);
  return cudaSuccess;
}
