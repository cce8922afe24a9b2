// The element types of rows, bf16, fp16, fp32 and fp64, and the type they are accumulated in.
// Compiles under nvcc and, with the simulator of tests/cuda_sim, under a host compiler.
#pragma once

#include <cstring>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#else
#include "cuda_sim.h"
#endif

namespace reasonkern {

using bf16 = __nv_bfloat16;
using fp16 = __half;

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using acc_t = typename AccOf<T>::type;

__device__ __forceinline__ float to_acc(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(fp16 x) { return __half2float(x); }
__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }

// Round to nearest, ties to even.
template <class T>
__device__ __forceinline__ T from_acc(acc_t<T> x) {
  return x;
}
template <>
__device__ __forceinline__ bf16 from_acc<bf16>(float x) {
  return __float2bfloat16_rn(x);
}
template <>
__device__ __forceinline__ fp16 from_acc<fp16>(float x) {
  return __float2half_rn(x);
}

template <class To, class From>
__device__ __forceinline__ To recast(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

}  // namespace reasonkern
