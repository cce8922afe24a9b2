// The metrics of a batch by one cluster: a thread per row in turn, then a tree over each block's
// threads in their order and the blocks in theirs, so the result depends on the numbers of both
// only.
#pragma once

#include "../common/mailbox.cuh"
#include "metrics.h"

namespace reasonkern {

constexpr unsigned kMetricsBlock = 256, kMetricsCluster = 8;  // of sm_90, else 1

// Half of the threads hand their sums to the other half, then every block to the first one.
struct MetricsScratch {
  Mailbox arrived;
  alignas(16) Metrics blocks[kMetricsCluster], threads[1];
};
constexpr std::size_t metrics_shared_bytes(unsigned block) {
  return sizeof(MetricsScratch) + block / 2 * sizeof(Metrics);
}

// The block is a power of two.
template <class T>
__global__ void __launch_bounds__(kMetricsBlock) metrics_kernel(MetricsParams<T> p) {
  auto& s = *dynamic_shared<MetricsScratch>();
  const unsigned size = cluster_size(), rank = cluster_rank();
  if (size > 1) {
    if (threadIdx.x == 0) open_mailbox(&s.arrived);
    cluster_sync();
  }
  Metrics mine = no_metrics();
  for (int64_t row = rank * blockDim.x + threadIdx.x; row < p.rows; row += size * blockDim.x) {
    merge(mine, row_metrics(p, row));
  }
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (threadIdx.x >= half && threadIdx.x < 2 * half) s.threads[threadIdx.x - half] = mine;
    __syncthreads();
    if (threadIdx.x < half) merge(mine, s.threads[threadIdx.x]);
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  if (size > 1) {
    if (rank == 0) expect_bytes(&s.arrived, size * sizeof(mine));
    send(s.blocks + rank, &s.arrived, 0, mine);
    if (rank != 0) return;
    wait_for_turn<Sender::peers>(&s.arrived, 0);
    mine = s.blocks[0];
    for (unsigned k = 1; k < size; ++k) merge(mine, s.blocks[k]);
  }
  write_metrics(p.out, mine);
}

}  // namespace reasonkern
