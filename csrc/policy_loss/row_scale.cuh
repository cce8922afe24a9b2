// Temperature and soft-cap of one row, and the exponentials of its logits.
//
// exp((x - m) / T) is taken of an offset t. For 16-bit logits, t = x k - r with k = log2(e) / T and
// r = m k rounded: one fma, whose rounding, |t| 2^-24, is nothing beside that of the logits, and
// then one exp2. For others t = x - m, and what the rounding of t k lost comes back as a
// first-order term.
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

constexpr double kLn2 = 0.69314718055994530942, kLog2e = 1.44269504088896340736;

template <class T>
struct RowScale {
  using A = acc_t<T>;
  Divisor<A> temperature, softcap;  // softcap.value 0: off
  A exp_scale, residual, floor;     // floor: exp of this offset is 0
};

template <class T>
__device__ __forceinline__ RowScale<T> row_scale(const Scale<acc_t<T>>& s, int64_t row) {
  using A = acc_t<T>;
  const A temperature = s.row_temperature ? s.row_temperature[row] : s.temperature;
  const A lowest = sizeof(A) == 8 ? A(-800) : A(-200);
  return {{temperature, A(1) / temperature},
          {s.softcap, s.softcap != A(0) ? A(1) / s.softcap : A(0)},
          A(kLog2e) / temperature,
          A(kLn2) * temperature,
          sizeof(T) == 2 ? lowest : lowest * temperature};
}

// What an element's offset is taken from.
template <class T>
__device__ __forceinline__ acc_t<T> origin(acc_t<T> m, const RowScale<T>& scale) {
  return sizeof(T) == 2 ? mul_rn(m, scale.exp_scale) : m;
}
template <class T>
__device__ __forceinline__ acc_t<T> offset(acc_t<T> x, acc_t<T> origin, const RowScale<T>& scale) {
  return sizeof(T) == 2 ? std::fma(x, scale.exp_scale, -origin) : x - origin;
}
// Whether an origin r is so large that its rounding, 2^-7 and up, spoils the offsets of what is
// equal to m. It may be infinite. The largest 16-bit logit below such an m has an exponential of 0.
template <class T>
__device__ __forceinline__ bool is_far(acc_t<T> origin) {
  return sizeof(T) == 2 && std::fabs(origin) >= acc_t<T>(0x1p18);
}
// Whether offsets from an origin, or of it, may be infinite.
template <class T>
__device__ __forceinline__ bool needs_floor(acc_t<T> origin, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) return is_far<T>(origin);
  return !(std::fabs(origin) < acc_t<T>(0x1p100) * scale.residual);
}
// The offset of m itself: what its origin was rounded by.
template <class T>
__device__ __forceinline__ acc_t<T> own_offset(acc_t<T> m, acc_t<T> origin,
                                               const RowScale<T>& scale) {
  return is_far<T>(origin) ? acc_t<T>(0) : offset(m, origin, scale);
}
// Not below scale.floor, so that e t is 0 and not 0 * inf at a masked token. Keeps NaN.
template <bool kFar, class T>
__device__ __forceinline__ acc_t<T> floored_offset(acc_t<T> x, acc_t<T> m, acc_t<T> origin,
                                                   const RowScale<T>& scale) {
  const acc_t<T> t = kFar ? mul_rn(x - m, scale.exp_scale) : offset(x, origin, scale);
  return max_nan(t, scale.floor);
}

// From offsets to (x - m) / T: (t - shift) * unit, and e * factor. The shift is the offset of m
// itself, far below 1 where any other element's exponential is not 0.
template <class T, class A>
struct Settle {
  A shift, factor, unit;
};
template <class A, class T>
__device__ __forceinline__ Settle<T, A> settle(acc_t<T> m, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) {
    const A shift = own_offset(m, origin(m, scale), scale), x = shift * A(kLn2);
    return {shift, std::fma(x, std::fma(x, A(0.5), A(-1)), A(1)), A(kLn2)};
  } else {
    return {A(0), A(1), A(1) / scale.temperature.value};
  }
}

// A logit so far below m that exp is 0 (by 170 T at least after rounding, hence the share of |m|);
// 16-bit logits are kept above it before they are unpacked, two at a time. `usable` is false where
// the type has no such finite number or m is far, and with a soft-cap, which comes after unpacking;
// then `floored_offset` does it one by one.
template <class T>
struct Floor {
  T value;
  bool usable;
};
template <class T>
__device__ __forceinline__ Floor<T> floor_below(acc_t<T> m, const RowScale<T>& scale) {
  using A = acc_t<T>;
  const A lowest_offset = sizeof(T) == 2 ? scale.floor * scale.temperature.value : scale.floor;
  const A below = m + std::fmin(lowest_offset, std::fabs(m) * A(-0x1p-6));
  const float lowest = std::is_same<T, bf16>::value ? -0x1.fep127f : -65504.0f;
  const bool fits = sizeof(T) > 2 || (below > A(lowest) && !is_far<T>(origin(m, scale)));
  return {from_acc<T>(below), scale.softcap.value == A(0) && fits};
}

// The offsets of a vector's lanes from what is not far, not below a floor or as they come.
template <bool kFloor, class T>
__device__ __forceinline__ void lane_offsets(acc_t<T> (&t)[Vec<T>::size], Vec<T> v, acc_t<T> origin,
                                             const Floor<T>& floor, const RowScale<T>& scale) {
  if constexpr (kFloor && sizeof(T) == 2) {
#pragma unroll
    for (std::uint32_t& pair : v.word) pair = max_pair<T>(pair, pair_of(floor.value));
  }
  unpack(v, t);
#pragma unroll
  for (int j = 0; j < Vec<T>::size; ++j) {
    t[j] = kFloor && sizeof(T) > 2 ? floored_offset<false>(t[j], origin, origin, scale)
                                   : offset(t[j], origin, scale);
  }
}

// To a few ulp of exp at the offset t. On a confident row the tail is all there is to the entropy:
// in float32 |t k| 2^-24 would be its relative error. kUnit: T is 1, which saves an instruction and
// no bit.
template <bool kUnit, class T>
__device__ __forceinline__ acc_t<T> exponential(acc_t<T> t, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 8) {
    return std::exp(t / scale.temperature);
  } else if constexpr (sizeof(T) == 2) {
    return exp2_approx<true>(t);
  } else {
    const float y = mul_rn(t, scale.exp_scale), e = exp2_approx<false>(y);
    const float lost = std::fma(-y, scale.residual, t);
    return std::fma(kUnit ? e : mul_rn(e, scale.temperature.inverse), lost, e);
  }
}

// exp at the difference of two origins, given d, the rounded and floored a - b. One factor hits a
// whole partial sum, so that the rounding of d, which single elements average out, is put back.
template <class T>
__device__ __forceinline__ acc_t<T> exponential_of_difference(acc_t<T> a, acc_t<T> b, acc_t<T> d,
                                                              const RowScale<T>& scale) {
  using A = acc_t<T>;
  const A e = exponential<false>(d, scale);
  const A back = d - a, lost = (a - (d - back)) - (b + back);
  const A slope = mul_rn(e, sizeof(T) == 2 ? A(kLn2) : scale.temperature.inverse);
  return e == A(0) ? e : std::fma(slope, lost, e);
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
