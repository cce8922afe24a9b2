// A block per sequence: two sums by a fixed tree, then its rows. The result depends on the number
// of threads only.
#pragma once

#include "../common/reduce.cuh"
#include "sequence_map.h"

namespace reasonkern {

constexpr unsigned kSequenceBlock = 512;

// One partial per warp. The block is of full warps.
constexpr std::size_t sequence_shared_bytes(unsigned block) {
  return block / 32 * sizeof(SequenceSums);
}

// The sum over the block's threads, for all of them.
template <class S>
__device__ __forceinline__ S block_sum(S mine) {
  auto* parts = dynamic_shared<S>();
  mine = warp_reduce(mine, [](S a, S b) { return a + b; });
  __syncthreads();  // all have read the sum before
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = mine;
  __syncthreads();
  S total = parts[0];
  for (unsigned k = 1; k < blockDim.x / 32; ++k) total = total + parts[k];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kSequenceBlock, 1) sequence_kernel(SequenceParams<T> p) {
  for (int64_t sequence = blockIdx.x; sequence < p.sequences; sequence += gridDim.x) {
    const SequenceRange range = sequence_range(p, sequence);
    const int64_t first = range.begin + threadIdx.x;
    SequenceSums sums{};
    for (int64_t r = first; r < range.end; r += blockDim.x) sums = sums + sequence_sums(p, r);
    sums = block_sum(sums);
    const double log_ratio = sequence_log_ratio(p.kind, sums);
    double slope = 0;
    for (int64_t r = first; r < range.end; r += blockDim.x)
      slope += sequence_slope(p, r, log_ratio);
    slope = block_sum(slope) / (sums.length < 1 ? 1 : sums.length);
    for (int64_t r = first; r < range.end; r += blockDim.x) {
      map_sequence_row(p, r, log_ratio, slope);
    }
  }
}

}  // namespace reasonkern
