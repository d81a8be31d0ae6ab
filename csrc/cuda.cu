// The sum of squares on a GPU, and the parts of the C interface that both arithmetics share.
#include "registers.cuh"

#define FO_API extern "C" __attribute__((visibility("default")))

namespace {

using namespace fo;

template <class Where>
FO_INLINE double squares(const Slot& slot, const Where& where) {
  Words<Where::COUNT> words;
  F values[Where::COUNT];
  move<FETCH>(slot, where, words);
  decode(slot.codec, words, values);
  double sum = 0;
#pragma unroll
  for (int e = 0; e < Where::COUNT; ++e) {
    double g = values[e];
    sum += g * g;
  }
  return sum;
}

// The sum over a block, valid in its first thread; additions always in the same order.
__device__ double sum_of_block(double sum) {
  __shared__ double of_warp[THREADS / 32];
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_down_sync(~0u, sum, distance);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0;
  for (double part : of_warp) sum += part;
  return sum;
}

__global__ void __launch_bounds__(THREADS)
    square_sum_kernel(const __grid_constant__ Gradients gradients, const int2* tiles, double* sums) {
  const Table& table = gradients.table;
  int2 tile = tiles[blockIdx.x];
  int64_t tensor = tile.x, n = table.at(NUMEL, tensor);
  int64_t start = tile.y * static_cast<int64_t>(TILE), end = start + TILE < n ? start + TILE : n;
  Slot slot{gradients.codec, {table.plane(gradients.column, tensor)}, nullptr}, of_tile = slot;
  of_tile.planes[0] += start * (slot.codec == id_fp32 ? 4 : 2);
  double sum = 0;
  if (!gradients.layouts && table.at(ALIGNED, tensor)) {
    Groups groups{threadIdx.x * 4, 4 * THREADS};
    for (; start + ROUND <= end; start += ROUND, groups.first += ROUND) sum += squares(of_tile, groups);
  }
#pragma unroll 1
  for (int64_t i = start + threadIdx.x; i < end; i += THREADS) {
    Single single{i};
    if (gradients.layouts) {
      Layout layout{gradients.layouts + table.at(LAYOUT, tensor) * LAYOUT_LENGTH};
      single.offset = offset(layout, layout.grad_strides(), i);
    }
    sum += squares(slot, single);
  }
  sum = sum_of_block(sum);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

}  // namespace

FO_API int fused_optim_cuda_abi() { return ABI; }

// Names in the order of their ids, then a null.
FO_API const char* const* fused_optim_cuda_rules() { return rule_names; }
FO_API const char* const* fused_optim_cuda_codecs() { return codec_names; }

// Elements in a tile of the tables of tiles.
FO_API int fused_optim_cuda_tile() { return TILE; }

// Writes the sum of squares of every tile to `sums`; returns 0, CUDA's error, or minus one of ours.
FO_API int fused_optim_cuda_square_sum(int codec, int column, const int64_t* table, int64_t n,
                                       const int32_t* tiles, int n_tiles, const int64_t* layouts,
                                       double* sums, int device, void* stream) {
  if (codec < 0 || codec >= PLAIN_COUNT) return -UNKNOWN_CODEC;
  Gradients gradients{codec, column, {table, n}, layouts};
  return launch_tiles(square_sum_kernel, n_tiles, device, stream, gradients,
                      reinterpret_cast<const int2*>(tiles), sums);
}
