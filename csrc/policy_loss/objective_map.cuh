// A thread per row.
#pragma once

#include "../common/cluster.cuh"
#include "objective_map.h"

namespace reasonkern {

constexpr unsigned kMapBlock = 128;

template <class T>
__global__ void __launch_bounds__(kMapBlock, 1) map_kernel(MapParams<T> p) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t row = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; row < p.loss.rows.rows;
       row += step) {
    map_row(p, row);
  }
}

}  // namespace reasonkern
