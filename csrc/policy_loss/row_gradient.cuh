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

// Vector v holds row elements [position, position + N). kCurve: whether `curve` can be nonzero.
template <bool kCurve, class T>
__device__ __forceinline__ Vec<T> gradient_vector(const Vec<T>& v, int position,
                                                  const GradCoefs<acc_t<T>>& c,
                                                  const Floor<T>& floor, const RowScale<T>& scale) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
  A t[N], g[N];
  if (floor.usable) {
    lane_offsets(t, v, c.origin, floor, scale);
  } else {
    unpack(v, t);
    if (scale.softcap.value != A(0)) soft_cap(t, scale.softcap);
#pragma unroll
    for (int j = 0; j < N; ++j) t[j] = floored_offset(t[j], c.origin, scale);
  }
  const auto element = [&](int j, A addend) {
    A p = exponential<false>(t[j], scale);
    if constexpr (sizeof(T) > 2) p *= c.inv_sum;
    A factor = std::fma(c.slope, t[j], c.base);
    if constexpr (kCurve) factor = std::fma(c.curve, p, factor);
    const A g = std::fma(p, factor, addend);
    return sizeof(T) > 2 ? c.scale * g : g;
  };
#pragma unroll
  for (int j = 0; j < N; ++j) g[j] = element(j, A(0));
  const unsigned lane = unsigned(c.target - position);
  if (lane < unsigned(N)) {  // one vector of the row
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (lane == unsigned(j)) g[j] = element(j, c.at_target);
    }
  }
  if (scale.softcap.value != A(0)) {
    unpack(v, t);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A tanh_x = soft_tanh(t[j], scale.softcap);
      g[j] *= std::fma(-tanh_x, tanh_x, A(1));
    }
  }
  return pack<T>(g);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* p, int n, int thread, int threads) {
  constexpr int N = Vec<T>::size;
  const Vec<T> zero{};
  const bool aligned = is_aligned(p);
  for (int at = thread * N; at < n; at += threads * N) store_vector(p, n, aligned, at, zero);
}

// Reads p[0, n) from global memory and writes its gradient to grad[0, n), which may be p itself:
// every vector is read and written by one thread. `begin` is the slice's position in the row.
template <bool kCurve, class T>
__device__ __forceinline__ void write_gradient(T* grad, const T* p, int n, int begin,
                                               const GradCoefs<acc_t<T>>& c,
                                               const RowScale<T>& scale, int thread, int threads) {
  constexpr int N = Vec<T>::size, U = 2;
  const bool aligned = is_aligned(p), grad_aligned = is_aligned(grad);
  const Floor<T> floor = floor_below<T>(c.m, scale);
  const int step = threads * N;
  for (int at = thread * N; at < n; at += U * step) {
    Vec<T> v[U];
    load_vectors<Reuse::last>(v, p, n, aligned, at, step);
#pragma unroll
    for (int i = 0; i < U; ++i) {
      const int position = at + i * step;
      if (position < n) {
        store_vector(grad, n, grad_aligned, position,
                     gradient_vector<kCurve>(v[i], begin + position, c, floor, scale));
      }
    }
  }
}

}  // namespace reasonkern
