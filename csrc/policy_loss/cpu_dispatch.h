// The row loops of cpu_rows.h compiled for several instruction sets, and the choice among them.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define RK_INLINE inline __attribute__((always_inline))

namespace reasonkern {
namespace cpu {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

template <class E>
struct AccOf {
  typedef float type;
};
template <>
struct AccOf<double> {
  typedef double type;
};
template <class E>
using Acc = typename AccOf<E>::type;

// Logits per tile: with the tile prefetched after it, in floats, within a first-level cache.
constexpr int64_t kTile = 2048;

template <class T>
struct RowScale {
  T inv_temperature, softcap;  // softcap 0: off
};

// Sums of e = exp(d) over a row, d = (x - top) / T with x soft-capped, or not: s = sum e,
// u = sum e d, q = sum e^2, w = sum e d^2. `top` is the largest raw logit and `top_tile` the start
// of the first tile that has it. NaN and +inf leave s not finite.
struct RowSums {
  double top, s, u, q, w;
  int64_t top_tile;
};

// dL/dx_v = jac_v * e * (constant + linear * d + quadratic * e), jac_v = 1 - tanh^2(x_v / cap).
template <class T>
struct GradCoefs {
  RowScale<T> scale;
  T top, constant, linear, quadratic;
};

template <class E>
struct RowKernels {
  typedef RowSums Sums(const E* x, int64_t vocab, const RowScale<Acc<E>>&);
  typedef void Gradient(const E* x, E* out, int64_t vocab, const GradCoefs<Acc<E>>&);
  Sums* sums[2][2];          // [soft-capped][with q and w]
  Gradient* gradient[2][2];  // [soft-capped][quadratic]
  double (*maximum)(const E* x, int64_t vocab);
  void (*scale)(E* x, int64_t vocab, Acc<E> factor);
};

namespace baseline {
#define RK_SIMD 0
#include "../common/simd.h"
#include "cpu_rows.h"
#undef RK_SIMD
}  // namespace baseline

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
namespace v3 {
#define RK_SIMD 3
#include "../common/simd.h"
#include "cpu_rows.h"
#undef RK_SIMD
}  // namespace v3
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
namespace v4 {
#define RK_SIMD 4
#include "../common/simd.h"
#include "cpu_rows.h"
#undef RK_SIMD
}  // namespace v4
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // __x86_64__

enum class Capability { kBaseline, kV3, kV4 };

inline const char* name_of(Capability c) {
  return c == Capability::kV4 ? "v4" : c == Capability::kV3 ? "v3" : "baseline";
}

inline Capability processor_capability() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                  __builtin_cpu_supports("f16c");
  const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return v4 ? Capability::kV4 : v3 ? Capability::kV3 : Capability::kBaseline;
#else
  return Capability::kBaseline;
#endif
}

// What the processor has, or less when REASONKERN_CPU names it; read once.
inline Capability capability() {
  static const Capability chosen = [] {
    const Capability best = processor_capability();
    const char* wish = std::getenv("REASONKERN_CPU");
    for (Capability c : {Capability::kBaseline, Capability::kV3, Capability::kV4}) {
      if (wish != nullptr && c <= best && std::strcmp(wish, name_of(c)) == 0) return c;
    }
    return best;
  }();
  return chosen;
}

template <class E>
RowKernels<E> pick_kernels() {
#if defined(__x86_64__)
  if (capability() == Capability::kV4) return v4::row_kernels<v4::FloatLanes, E>();
  if (capability() == Capability::kV3) return v3::row_kernels<v3::FloatLanes, E>();
#endif
  return baseline::row_kernels<baseline::FloatLanes, E>();
}

template <>
inline RowKernels<double> pick_kernels<double>() {
  return baseline::row_kernels<baseline::DoubleLanes, double>();
}

template <class E>
const RowKernels<E>& kernels() {
  static const RowKernels<E> table = pick_kernels<E>();
  return table;
}

}  // namespace cpu
}  // namespace reasonkern
