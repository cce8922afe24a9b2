// Temperature and soft-cap of one row, and exp(t / T) at the accuracy that its use needs.
#pragma once

#include <type_traits>

#include "../common/fast_math.cuh"
#include "policy_loss.h"

namespace reasonkern {

// Division by a number that is the same for many dividends: finite ones come out to an ulp or two.
template <class A>
struct Divisor {
  A value, inverse;
};
template <class A>
__device__ __forceinline__ A operator/(A x, const Divisor<A>& d) {
  const A q = mul_rn(x, d.inverse);
  return std::fma(std::fma(-q, d.value, x), d.inverse, q);
}

template <class T>
struct RowScale {
  using A = acc_t<T>;
  Divisor<A> temperature, softcap;  // softcap.value 0: off
  A exp_scale, residual, floor;
};

template <class T>
__device__ __forceinline__ RowScale<T> row_scale(const Scale<acc_t<T>>& s, int64_t row) {
  using A = acc_t<T>;
  const A temperature = s.row_temperature ? s.row_temperature[row] : s.temperature;
  const A lowest = sizeof(A) == 8 ? A(-800) : A(-200);  // exp of it is 0
  return {{temperature, A(1) / temperature},
          {s.softcap, A(1) / s.softcap},
          A(1.4426950408889634) / temperature,
          A(0.6931471805599453) * temperature,
          lowest * temperature};
}

// x - m, not below scale.floor, so that e t is 0 and not 0 * inf at a masked token. Keeps NaN.
template <class T>
__device__ __forceinline__ acc_t<T> shifted(acc_t<T> x, acc_t<T> m, const RowScale<T>& scale) {
  return max_nan(x - m, scale.floor);
}

// A floor for 16-bit logits before they are unpacked, two at a time: so far below m that exp is 0
// (by 170 T at least after rounding, hence the share of |m|), and finite. `usable` is false where
// the type has no such number, and with a soft-cap, which comes after unpacking; then `shifted`
// does it one by one.
template <class T>
struct Floor {
  Vec<T> lanes;
  bool usable;
};
template <class T>
__device__ __forceinline__ Floor<T> floor_below(acc_t<T> m, const RowScale<T>& scale) {
  Floor<T> f;
  if constexpr (sizeof(T) == 2) {
    const float lowest = std::is_same<T, bf16>::value ? -0x1.fep127f : -65504.0f;
    const float below = m + std::fmin(scale.floor, std::fabs(m) * -0x1p-6f);
    f.usable = scale.softcap.value == 0.0f && below > lowest;
    const T x = from_acc<T>(below);
    f.lanes = make_vec<T>([x](int) { return x; });
  } else {
    f.usable = scale.softcap.value == acc_t<T>(0);
  }
  return f;
}

// x - m for every lane of a vector, with the floor's help.
template <class T>
__device__ __forceinline__ void shift_lanes(acc_t<T> (&t)[Vec<T>::size], const Vec<T>& v,
                                            acc_t<T> m, const Floor<T>& floor,
                                            const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) {
    unpack(max_lanes(v, floor.lanes), t);
#pragma unroll
    for (int j = 0; j < Vec<T>::size; ++j) t[j] -= m;
  } else {
    unpack(v, t);
#pragma unroll
    for (int j = 0; j < Vec<T>::size; ++j) t[j] = shifted(t[j], m, scale);
  }
}

// exp(t / T) to a few ulp. What the rounding of y = t log2(e)/T lost, t - y ln(2) T, comes back as
// a first-order term: on a confident row the tail is all there is to the entropy, and |y| 2^-24
// would be its relative error. kUnit: T is 1, which saves an instruction and no bit.
template <bool kUnit, class T>
__device__ __forceinline__ acc_t<T> exponential(acc_t<T> t, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 8) {
    return std::exp(t / scale.temperature);
  } else {
    const float y = mul_rn(t, scale.exp_scale), e = exp2_approx<sizeof(T) == 2>(y);
    const float lost = std::fma(-y, scale.residual, t);
    return std::fma(kUnit ? e : mul_rn(e, scale.temperature.inverse), lost, e);
  }
}

// For gradients: a 16-bit one is rounded to 2^-9 or 2^-12, far more than |y| 2^-24.
template <class T>
__device__ __forceinline__ acc_t<T> quick_exponential(acc_t<T> t, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx<true>(mul_rn(t, scale.exp_scale));
  } else {
    return exponential<false>(t, scale);
  }
}

// exp((a - b) / T), given d, the rounded and clamped a - b. One factor hits a whole partial sum, so
// that the rounding of d, which single elements average out, is put back.
template <class T>
__device__ __forceinline__ acc_t<T> exponential_of_difference(acc_t<T> a, acc_t<T> b, acc_t<T> d,
                                                              const RowScale<T>& scale) {
  const acc_t<T> e = exponential<false>(d, scale);
  const acc_t<T> back = d - a, lost = (a - (d - back)) - (b + back);
  return e == acc_t<T>(0) ? e : std::fma(mul_rn(e, scale.temperature.inverse), lost, e);
}

// tanh(x / cap); an infinite x over a cap is no NaN.
template <class A>
__device__ __forceinline__ A soft_tanh(A x, const Divisor<A>& cap) {
  return std::isinf(x) ? std::copysign(A(1), x) : std::tanh(x / cap);
}
// cap tanh(x / cap). An infinity stays: -inf is a masked token, +inf makes the row nonfinite.
template <class A>
__device__ __forceinline__ A soft_capped(A x, const Divisor<A>& cap) {
  return std::isinf(x) ? x : cap.value * std::tanh(x / cap);
}
template <class A, int N>
__device__ __forceinline__ void soft_cap(A (&x)[N], const Divisor<A>& cap) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = soft_capped(x[j], cap);
}

}  // namespace reasonkern
