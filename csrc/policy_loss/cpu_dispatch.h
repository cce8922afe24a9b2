// The row loops of cpu_rows.h compiled for several instruction sets, and the choice among them.
#pragma once

#include <cstdint>

#include "../common/cpu_capability.h"

namespace reasonkern {
namespace cpu {

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

// Logits per tile: long enough to hide what starting and ending a tile costs, short enough that the
// tile and the one prefetched after it fit beside a row of gradients in a second-level cache.
constexpr int64_t kTile = 8192;

template <class T>
struct RowScale {
  T temperature, softcap;  // softcap 0: off
};

// What d = z - max z takes beyond a subtraction; each mode can do what the one before it can.
enum class Mode : int { kPlain, kScaled, kCapped };

template <class T>
Mode mode_of(const RowScale<T>& scale) {
  if (scale.softcap != 0) return Mode::kCapped;
  return scale.temperature == 1 ? Mode::kPlain : Mode::kScaled;
}

// Sums of e = exp(d) over a row, d = (x - top) / T with x soft-capped, or not: s = sum e,
// u = sum e d, q = sum e^2, w = sum e d^2. `top` is the largest raw logit, `capped_top` the same
// after the soft-cap and `top_tile` the start of the first tile that has it. NaN and +inf leave s
// not finite.
struct RowSums {
  double top, s, u, q, w, capped_top;
  int64_t top_tile;
};

// dL/dx_v = jac_v * e * (constant + linear * d + quadratic * e), jac_v = 1 - tanh^2(x_v / cap);
// `top` is after the soft-cap.
template <class T>
struct GradCoefs {
  RowScale<T> scale;
  T top, constant, linear, quadratic;
};

template <class E>
struct RowKernels {
  typedef RowSums Sums(const E* x, int64_t vocab, const RowScale<Acc<E>>&);
  typedef void Gradient(const E* x, E* out, int64_t vocab, const GradCoefs<Acc<E>>&);
  Sums* sums[3][2];                                     // [mode][with q and w]
  Gradient* gradient[3][2];                             // [mode][quadratic]
  Acc<E> (*capped)(Acc<E> x, const RowScale<Acc<E>>&);  // as the loops cap it, to the bit
  void (*scale)(E* x, int64_t vocab, Acc<E> factor);
};

#define RK_KERNELS "../policy_loss/cpu_rows.h"
#include "../common/each_capability.h"

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
