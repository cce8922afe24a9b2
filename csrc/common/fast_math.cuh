// Arithmetic whose rounding the compiler must not choose, and the special-function unit's exp2.
#pragma once

#include <cmath>

#include "vec.h"

namespace reasonkern {

// 2^x in one instruction: relative error at most 2^-22, results below 2^-126 are 0.
__device__ __forceinline__ float exp2_approx(float x) {
#if defined(__CUDACC__)
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
#endif
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
