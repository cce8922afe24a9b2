// Arithmetic whose rounding the compiler must not choose, and the special-function unit's exp2.
#pragma once

#include <cmath>
#include <type_traits>

#include "host_device.h"
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

// ---- 16-bit lanes, two to a word

// The larger lanes, keeping NaN.
template <class T>
__device__ __forceinline__ std::uint32_t max_pair(std::uint32_t x, std::uint32_t y) {
#if defined(__CUDACC__)
  std::uint32_t z;
  if constexpr (std::is_same<T, bf16>::value) {
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  } else {
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(z) : "r"(x), "r"(y));
  }
  return z;
#else
  const auto larger = [](std::uint32_t a, std::uint32_t b) {
    const float z =
        max_nan(to_acc(recast<T>(std::uint16_t(a))), to_acc(recast<T>(std::uint16_t(b))));
    return std::uint32_t{recast<std::uint16_t>(from_acc<T>(z))};
  };
  return larger(x, y) | larger(x >> 16, y >> 16) << 16;
#endif
}

// All ones in the lanes of x that equal y.
template <class T>
__device__ __forceinline__ std::uint32_t equal_pair(std::uint32_t x, std::uint32_t y) {
#if defined(__CUDACC__)
  if constexpr (std::is_same<T, bf16>::value) {
    return __heq2_mask(recast<__nv_bfloat162>(x), recast<__nv_bfloat162>(y));
  } else {
    return __heq2_mask(recast<__half2>(x), recast<__half2>(y));
  }
#else
  const auto equal = [](std::uint32_t a, std::uint32_t b) {
    return to_acc(recast<T>(std::uint16_t(a))) == to_acc(recast<T>(std::uint16_t(b))) ? 0xffffu : 0;
  };
  return equal(x, y) | equal(x >> 16, y >> 16) << 16;
#endif
}

template <class T>
__device__ __forceinline__ std::uint32_t pair_of(T x) {
  return recast<std::uint16_t>(x) * 0x10001u;
}

// ---- the largest of many lanes, NaN if any lane is

// A value, or the larger lanes of pairs, to be brought together at the end.
template <class T>
using Top = typename std::conditional<sizeof(T) == 2, std::uint32_t, acc_t<T>>::type;

template <class T>
__device__ __forceinline__ Top<T> higher(Top<T> x, Top<T> y) {
  if constexpr (sizeof(T) == 2) {
    return max_pair<T>(x, y);
  } else {
    return max_nan(x, y);
  }
}

template <class T>
__device__ __forceinline__ Top<T> top_of(const Vec<T>& v) {
  if constexpr (sizeof(T) == 2) {
    return higher<T>(higher<T>(v.word[0], v.word[1]), higher<T>(v.word[2], v.word[3]));
  } else {
    T top = get_lane(v, 0);
#pragma unroll
    for (int i = 1; i < Vec<T>::size; ++i) top = max_nan(top, get_lane(v, i));
    return top;
  }
}

template <class T>
__device__ __forceinline__ acc_t<T> top_value(Top<T> x) {
  if constexpr (sizeof(T) == 2) {
    return max_nan(to_acc(recast<T>(std::uint16_t(x))), to_acc(recast<T>(std::uint16_t(x >> 16))));
  } else {
    return x;
  }
}

template <class T>
__device__ __forceinline__ bool top_is(Top<T> x, T value) {  // a NaN may hide it
  if constexpr (sizeof(T) == 2) {
    return equal_pair<T>(x, pair_of(value)) != 0;
  } else {
    return x == value;
  }
}

// A product that is never contracted into a multiply-add, so that kernels which share a formula
// also share its bits.
__device__ __forceinline__ float mul_rn(float x, float y) { return __fmul_rn(x, y); }
__device__ __forceinline__ double mul_rn(double x, double y) { return product(x, y); }

}  // namespace reasonkern
