// Arithmetic whose rounding the compiler must not choose, and the special-function unit's exp2.
#pragma once

#include <cmath>

#include "vec.h"

namespace reasonkern {

// 2^x with a relative error of at most 2^-22. Flushed: one instruction, results below 2^-126 are 0;
// not flushed: four instructions, and denormal results are kept.
template <bool kFlush>
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
#if defined(__CUDACC__)
  if constexpr (kFlush) {
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  } else {
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  }
#else
  y = std::exp2(x);
  if (kFlush && y < 0x1p-126f) y = 0.0f;
#endif
  return y;
}

// max(x, y) that keeps a NaN, unlike fmax.
__device__ __forceinline__ float max_nan(float x, float y) {
#if defined(__CUDACC__)
  float z;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(z) : "f"(x), "f"(y));
  return z;
#else
  return x < y || y != y ? y : x;
#endif
}
__device__ __forceinline__ double max_nan(double x, double y) { return x < y || y != y ? y : x; }

// The larger of two pairs of 16-bit lanes, keeping NaN.
#if defined(__CUDACC__)
template <class T>
__device__ __forceinline__ std::uint32_t max_pair(std::uint32_t x, std::uint32_t y) {
  std::uint32_t z;
  if constexpr (std::is_same<T, bf16>::value) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  }
  return z;
}
#endif

// Lane by lane, keeping NaN.
template <class T>
__device__ __forceinline__ Vec<T> max_lanes(const Vec<T>& x, const Vec<T>& y) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) {
    Vec<T> z;
#pragma unroll
    for (int i = 0; i < 4; ++i) z.word[i] = max_pair<T>(x.word[i], y.word[i]);
    return z;
  } else
#endif
    return make_vec<T>([&](int i) {
      return from_acc<T>(max_nan(to_acc(get_lane(x, i)), to_acc(get_lane(y, i))));
    });
}

// The largest lane, NaN if any lane is.
template <class T>
__device__ __forceinline__ acc_t<T> highest_lane(Vec<T> v) {
#if defined(__CUDACC__)
  if constexpr (sizeof(T) == 2) {
    v.word[0] = max_pair<T>(max_pair<T>(v.word[0], v.word[1]), max_pair<T>(v.word[2], v.word[3]));
    return max_nan(to_acc(get_lane(v, 0)), to_acc(get_lane(v, 1)));
  } else
#endif
  {
    acc_t<T> top = to_acc(get_lane(v, 0));
#pragma unroll
    for (int i = 1; i < Vec<T>::size; ++i) top = max_nan(top, to_acc(get_lane(v, i)));
    return top;
  }
}

// A product that is never contracted into a multiply-add, so that kernels which share a formula
// also share its bits.
__device__ __forceinline__ float mul_rn(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double mul_rn(double x, double y) {
#if defined(__CUDACC__)
  return __dmul_rn(x, y);
#else
  return x * y;
#endif
}

}  // namespace reasonkern
