// The metrics of a batch by one block: a thread per row in turn, then a tree over the threads in
// their order, so the result depends on the block size only. About 1 % of what the logits cost.
#pragma once

#include "../common/cluster.cuh"
#include "metrics.h"

namespace reasonkern {

constexpr unsigned kMetricsBlock = 512;

// Half of the threads hand their sums to the other half.
constexpr std::size_t metrics_shared_bytes(unsigned block) { return block / 2 * sizeof(Metrics); }
// The block is a power of two.
template <class T>
__global__ void __launch_bounds__(kMetricsBlock) metrics_kernel(MetricsParams<T> p) {
  Metrics* parts = dynamic_shared<Metrics>();
  Metrics mine = no_metrics();
  for (int64_t row = threadIdx.x; row < p.rows; row += blockDim.x) {
    merge(mine, row_metrics(p, row));
  }
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x >= half && threadIdx.x < 2 * half) parts[threadIdx.x - half] = mine;
    __syncthreads();
    if (threadIdx.x < half) merge(mine, parts[threadIdx.x]);
    __syncthreads();
  }
  if (threadIdx.x == 0) write_metrics(p.out, mine);
}

}  // namespace reasonkern
