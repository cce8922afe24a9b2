// The gradient of one row, element by element: what objective.h's GradRow says, with the row's
// constants folded so that an element costs one exp and two multiply-adds.
#pragma once

#include "row_stats.cuh"

namespace reasonkern {

// dL/dx_v = scale * jac_v * ( p * (base + slope * t + curve * p) + [v == y] * at_target ) with the
// offset t (row_scale.cuh) and p = inv_sum * e. For 16-bit logits, whose gradient is rounded to
// 2^-9 or 2^-12, `fold` moves scale and inv_sum into the other coefficients and leaves 1 and 1; in
// float32 that would round away what cancels between them.
template <class A>
struct GradCoefs {
  A m, origin, base, slope, curve, at_target, inv_sum, scale;
  int target;
  bool live;  // false: the whole row is zero
};

template <class T, class A>
__device__ __forceinline__ GradCoefs<A> fold(const GradRow<A>& g, A m, const RowScale<T>& scale,
                                             int64_t target) {
  if constexpr (sizeof(T) == 2) {
    const auto to = settle<A>(m, scale);
    const A factor = g.scale * g.inv_sum * to.factor, slope = g.linear * to.unit;
    return {m,
            origin(m, scale),
            factor * std::fma(-slope, to.shift, g.constant),
            factor * slope,
            factor * g.inv_sum * to.factor * g.quadratic,
            g.scale * g.target,
            A(1),
            A(1),
            int(target),
            true};
  } else {
    const A slope = g.linear / scale.temperature.value;
    return {m, m, g.constant, slope, g.quadratic, g.target, g.inv_sum, g.scale, int(target), true};
  }
}

template <class A>
__device__ __forceinline__ GradCoefs<A> zero_row() {
  return {A(0), A(0), A(0), A(0), A(0), A(0), A(0), A(0), -1, false};
}

template <bool kCurve, class T>
__device__ __forceinline__ acc_t<T> gradient_at(acc_t<T> t, const GradCoefs<acc_t<T>>& c,
                                                const RowScale<T>& scale, acc_t<T> addend) {
  using A = acc_t<T>;
  A p = exponential<false>(t, scale);
  if constexpr (sizeof(T) > 2) p *= c.inv_sum;
  A factor = std::fma(c.slope, t, c.base);
  if constexpr (kCurve) factor = std::fma(c.curve, p, factor);
  const A g = std::fma(p, factor, addend);
  return sizeof(T) > 2 ? c.scale * g : g;
}

// Of one logit, however it is scaled.
template <bool kCurve, bool kFar, class T>
__device__ __forceinline__ T gradient_of(T logit, const GradCoefs<acc_t<T>>& c,
                                         const RowScale<T>& scale, acc_t<T> addend) {
  using A = acc_t<T>;
  A x = to_acc(logit), jacobian = A(1);
  if (scale.softcap.value != A(0)) {
    const A tanh_x = soft_tanh(x, scale.softcap);
    jacobian = std::fma(-tanh_x, tanh_x, A(1));
    x = soft_capped(x, scale.softcap);
  }
  const A t = floored_offset<kFar>(x, c.m, c.origin, scale);
  return from_acc<T>(gradient_at<kCurve>(t, c, scale, addend) * jacobian);
}

// Of a vector without the target. kCurve: whether `curve` can be nonzero. kFloor: whether there may
// be a soft-cap, or offsets so low that a coefficient times them is infinite, unless they are kept
// above the floor.
template <bool kCurve, bool kFloor, class T>
__device__ __forceinline__ Vec<T> gradient_vector(const Vec<T>& v, const GradCoefs<acc_t<T>>& c,
                                                  const Floor<T>& floor, const RowScale<T>& scale) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
  if (kFloor && !floor.usable) {
    const auto one_by_one = [&](auto far) {
      return make_vec<T>(
          [&](int j) { return gradient_of<kCurve, far>(get_lane(v, j), c, scale, A(0)); });
    };
    return is_far<T>(c.origin) ? one_by_one(std::true_type()) : one_by_one(std::false_type());
  }
  A t[N], g[N];
  lane_offsets<kFloor>(t, v, c.origin, floor, scale);
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] = gradient_at<kCurve>(t[j], c, scale, A(0));
  return pack<T>(g);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* p, int n, int thread, int threads) {
  constexpr int N = Vec<T>::size;
  const Vec<T> zero{};
  const bool aligned = is_aligned(p);
  for (int at = thread * N; at < n; at += threads * N) store_vector(p, n, aligned, at, zero);
}

// The target's gradient, which its vector's owner writes last, over what it wrote there as to any
// other element; read first, for the gradient may be written over the logits.
template <class T>
struct TargetElement {
  int at;  // in the slice, -1: another thread's
  T gradient;
};
template <bool kCurve, class T>
__device__ __forceinline__ TargetElement<T> target_element(const T* p, Slice slice,
                                                           const GradCoefs<acc_t<T>>& c,
                                                           const RowScale<T>& scale, int thread,
                                                           int threads) {
  const int at = c.target - slice.begin;
  if (unsigned(at) >= unsigned(slice.n) || at / Vec<T>::size % threads != thread) return {-1, T{}};
  return {at, is_far<T>(c.origin) ? gradient_of<kCurve, true>(p[at], c, scale, c.at_target)
                                  : gradient_of<kCurve, false>(p[at], c, scale, c.at_target)};
}

// Reads p[0, n) from global memory and writes its gradient to grad[0, n), which may be p itself:
// every vector is read and written by one thread.
template <bool kCurve, class T>
__device__ __forceinline__ void write_gradient(T* grad, const T* p, Slice slice,
                                               const GradCoefs<acc_t<T>>& c,
                                               const RowScale<T>& scale, int thread, int threads) {
  constexpr int N = Vec<T>::size, U = 2;
  const int n = slice.n, step = threads * N;
  const bool aligned = is_aligned(p), grad_aligned = is_aligned(grad);
  const Floor<T> floor = floor_below<T>(c.m, scale);
  const auto target = target_element<kCurve>(p, slice, c, scale, thread, threads);
  int at = thread * N;
  if (aligned && grad_aligned && floor.usable) {
    for (; at + (U - 1) * step + N <= n; at += U * step) {
      Vec<T> v[U];
#pragma unroll
      for (int i = 0; i < U; ++i) v[i] = load_global(p + at + i * step);
#pragma unroll
      for (int i = 0; i < U; ++i) {
        store_global(grad + at + i * step, gradient_vector<kCurve, true>(v[i], c, floor, scale));
      }
    }
  }
  for (; at < n; at += step) {
    const Vec<T> v = load_vector<Reuse::last>(p, n, aligned, at);
    store_vector(grad, n, grad_aligned, at, gradient_vector<kCurve, true>(v, c, floor, scale));
  }
  if (target.at >= 0) grad[target.at] = target.gradient;
}

}  // namespace reasonkern
