// 16-byte tiles of bf16, fp16, fp32 and fp64 rows: load, convert to the accumulation type, store.
// Compiles under nvcc and, with the simulator of tests/cuda_sim, under a host compiler, where every
// vector access checks its alignment.
#pragma once

#include <cstdint>
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

template <class T>
struct alignas(16) Vec {
  static constexpr int size = 16 / sizeof(T);
  T lane[size];
};

template <class T>
__device__ __forceinline__ void unpack(const Vec<T>& v, acc_t<T> (&out)[Vec<T>::size]) {
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) out[i] = to_acc(v.lane[i]);
}

template <class T>
__device__ __forceinline__ Vec<T> pack(const acc_t<T> (&in)[Vec<T>::size]) {
  Vec<T> v;
#pragma unroll
  for (int i = 0; i < Vec<T>::size; ++i) v.lane[i] = from_acc<T>(in[i]);
  return v;
}

enum class Reuse { again, last };

// A coherent load, not ld.global.nc: the gradient may be written over the row just read.
// Reuse::again leaves the line to L2 for a second sweep, Reuse::last marks it for eviction.
template <Reuse reuse = Reuse::last, class T>
__device__ __forceinline__ Vec<T> load_global(const T* p) {
  Vec<T> v;
#if defined(__CUDACC__)
  uint4 w;
  if constexpr (reuse == Reuse::again) {
    asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(__cvta_generic_to_global(p)));
  } else {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
                 : "l"(__cvta_generic_to_global(p)));
  }
  std::memcpy(&v, &w, 16);
#else
  cuda_sim::copy16(&v, p, "load_global");
#endif
  return v;
}

template <class T>
__device__ __forceinline__ void store_global(T* p, const Vec<T>& v) {
#if defined(__CUDACC__)
  uint4 w;
  std::memcpy(&w, &v, 16);
  __stcs(reinterpret_cast<uint4*>(p), w);
#else
  cuda_sim::copy16(p, &v, "store_global");
#endif
}

template <class T>
__device__ __forceinline__ Vec<T> load_shared(const T* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const Vec<T>*>(p);
#else
  Vec<T> v;
  cuda_sim::copy16(&v, p, "load_shared");
  return v;
#endif
}

template <class T>
__device__ __forceinline__ void store_shared(T* p, const Vec<T>& v) {
#if defined(__CUDACC__)
  *reinterpret_cast<Vec<T>*>(p) = v;
#else
  cuda_sim::copy16(p, &v, "store_shared");
#endif
}

}  // namespace reasonkern
