// The gradient of one row, element by element: what objective.h's GradRow says, with the row's
// constants folded so that an element costs one exp and two multiply-adds.
#pragma once

#include "row_stats.cuh"

namespace reasonkern {

// dL/dx_v = jac_v * ( e * (base + slope * t + curve * e) + [v == y] * at_target ), t = x - m and
// e = exp(t / T); the temperature, 1/s and the loss scale are in the coefficients.
template <class A>
struct GradCoefs {
  A m, base, slope, curve, at_target;
  int target;
  bool live;  // false: the whole row is zero
};

template <class A>
__device__ __forceinline__ GradCoefs<A> fold(const GradRow<A>& g, A m, A temperature,
                                             int64_t target) {
  const A factor = g.scale * g.inv_sum;
  return {m,
          factor * g.constant,
          factor * g.linear / temperature,
          factor * g.inv_sum * g.quadratic,
          g.scale * g.target,
          int(target),
          true};
}

template <class A>
__device__ __forceinline__ GradCoefs<A> zero_row() {
  return {A(0), A(0), A(0), A(0), A(0), -1, false};
}

// Vector v holds row elements [position, position + N). kCurve: whether `curve` can be nonzero.
template <bool kCurve, class T>
__device__ __forceinline__ Vec<T> gradient_vector(const Vec<T>& v, int position,
                                                  const GradCoefs<acc_t<T>>& c,
                                                  const RowScale<T>& scale) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
  A x[N], g[N];
  unpack(v, x);
  if (scale.softcap != A(0)) soft_cap(x, scale.softcap);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const A t = x[j] - c.m, e = exponential(t, scale);
    A factor = std::fma(c.slope, std::fmax(t, scale.floor), c.base);
    if constexpr (kCurve) factor = std::fma(c.curve, e, factor);
    g[j] = e * factor;
  }
  const unsigned lane = unsigned(c.target - position);
  if (lane < unsigned(N)) {
#pragma unroll
    for (int j = 0; j < N; ++j) g[j] += lane == unsigned(j) ? c.at_target : A(0);
  }
  if (scale.softcap != A(0)) {
    unpack(v, x);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const A tanh_x = std::tanh(x[j] / scale.softcap);
      g[j] *= std::fma(-tanh_x, tanh_x, A(1));
    }
  }
  return pack<T>(g);
}

template <class T>
__device__ __forceinline__ void write_zeros(T* p, int n, int thread, int threads) {
  constexpr int N = Vec<T>::size;
  Vec<T> zero;
#pragma unroll
  for (int j = 0; j < N; ++j) zero.lane[j] = from_acc<T>(acc_t<T>(0));
  const bool aligned = is_aligned(p);
  for (int at = thread * N; at < n; at += threads * N) store_vector(p, n, aligned, at, zero);
}

// Reads p[0, n) from global memory and writes its gradient to grad[0, n), which may be p itself:
// every vector is read and written by one thread. `begin` is the slice's position in the row.
template <bool kCurve, class T>
__device__ __forceinline__ void write_gradient(T* grad, const T* p, int n, int begin,
                                               const GradCoefs<acc_t<T>>& c,
                                               const RowScale<T>& scale, int thread, int threads) {
  constexpr int N = Vec<T>::size;
  const bool aligned = is_aligned(p), grad_aligned = is_aligned(grad);
  const int step = threads * N;
  for (int at = thread * N; at < n; at += kUnroll * step) {
    Vec<T> v[kUnroll];
    load_vectors<Reuse::last>(v, p, n, aligned, at, step);
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int position = at + i * step;
      if (position < n) {
        store_vector(grad, n, grad_aligned, position,
                     gradient_vector<kCurve>(v[i], begin + position, c, scale));
      }
    }
  }
}

}  // namespace reasonkern
