// Enough of CUDA's language and runtime to run the kernels of csrc/ on a CPU: a thread for each thread of a block,
// one block after the other. Warp shuffles and barriers meet at one barrier of the whole block.
#pragma once

#include <math.h>

#include <barrier>
#include <cstdint>
#include <cstring>
#include <thread>
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

inline thread_local dim3 threadIdx, blockIdx;
inline std::barrier<>* block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance) {
  static T values[1024];
  values[threadIdx.x] = value;
  __syncthreads();
  unsigned lane = threadIdx.x % 32 + distance;
  if (lane < 32) value = values[threadIdx.x + distance];
  __syncthreads();
  return value;
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

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  cudaStream_t stream;
};
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments... arguments) {
  std::barrier barrier(config->blockDim.x);
  block_barrier = &barrier;
  auto run = [=](unsigned thread) {
    threadIdx.x = thread;
    for (blockIdx.x = 0; blockIdx.x < config->gridDim.x; ++blockIdx.x) {
      kernel(arguments...);
      __syncthreads();
    }
  };
  std::vector<std::thread> threads;
  for (unsigned thread = 0; thread < config->blockDim.x; ++thread) threads.emplace_back(run, thread);
  for (auto& thread : threads) thread.join();
  return cudaSuccess;
}
