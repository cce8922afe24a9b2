// Statistics of one row of logits. The moments are taken in raw units t = x - m (no temperature),
// and the temperature is applied to the row's results: one multiplication per element less.
//
// Bit rule. A row is cut into slices (Tiling); thread i of a slice's group takes the elements of
// vectors i, i + group, ... counted from the start of the row, kUnroll vectors at a time, whatever
// the row's address. Threads merge by warp, warps in slice order. The order, hence every bit of
// m, s and u, depends on V and the element type only and is shared by all kernels; fma and mul_rn
// leave the compiler no contraction to choose. A misaligned row is read element by element in the
// same order: slower, equal bits.
#pragma once

#include <limits>

#include "../common/fast_math.cuh"
#include "../common/reduce.cuh"
#include "launch_config.h"
#include "policy_loss.h"

namespace reasonkern {

constexpr int kUnroll = 4;  // 16-byte loads in flight per thread

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// ---- temperature and soft-cap of one row

template <class T>
struct RowScale {
  using A = acc_t<T>;
  A temperature, inv_temperature, exp_scale, residual, floor, softcap;
};

template <class T>
__device__ __forceinline__ RowScale<T> row_scale(const Scale<acc_t<T>>& s, int64_t row) {
  using A = acc_t<T>;
  const A temperature = s.row_temperature ? s.row_temperature[row] : s.temperature;
  const A lowest = sizeof(A) == 8 ? A(-800) : A(-200);  // exp of it is 0
  return {temperature,
          A(1) / temperature,
          A(1.4426950408889634) / temperature,
          A(0.6931471805599453) * temperature,
          lowest * temperature,
          s.softcap};
}

// x - m, not below scale.floor, so that e t is 0 and not 0 * inf at a masked token. Keeps NaN.
template <class T>
__device__ __forceinline__ acc_t<T> shifted(acc_t<T> x, acc_t<T> m, const RowScale<T>& scale) {
  return max_nan(x - m, scale.floor);
}

// t / T to an ulp or two, for the exponent of the library's exp.
template <class T>
__device__ __forceinline__ acc_t<T> divided(acc_t<T> t, const RowScale<T>& scale) {
  const acc_t<T> d = mul_rn(t, scale.inv_temperature);
  return std::fma(std::fma(-d, scale.temperature, t), scale.inv_temperature, d);
}

// exp(t / T) for 16-bit gradients: y = t log2(e)/T is off by |y| 2^-23, 3e-6 at p = e^-20, far
// below the 2^-9 or 2^-12 of the result's rounding. Wider logits take the library's exp.
template <class T>
__device__ __forceinline__ acc_t<T> quick_exponential(acc_t<T> t, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) {
    return exp2_approx(t * scale.exp_scale);
  } else {
    return std::exp(divided(t, scale));
  }
}

// exp(t / T) for statistics, to a few ulp: on a confident row the entropy is the tail alone, and
// |y| 2^-23 would be its relative error. What the rounding of y lost, t - y ln(2) T, comes back as
// a first-order term.
template <class T>
__device__ __forceinline__ acc_t<T> exponential(acc_t<T> t, const RowScale<T>& scale) {
  if constexpr (sizeof(T) == 2) {
    const float y = mul_rn(t, scale.exp_scale), e = exp2_approx(y);
    return std::fma(mul_rn(e, scale.inv_temperature), std::fma(-y, scale.residual, t), e);
  } else {
    return std::exp(divided(t, scale));
  }
}

// exp((a - b) / T), given d, the rounded and clamped a - b. One factor hits a whole partial sum, so
// that the rounding of d, which single elements average out, is put back.
template <class T>
__device__ __forceinline__ acc_t<T> exponential_of_difference(acc_t<T> a, acc_t<T> b, acc_t<T> d,
                                                              const RowScale<T>& scale) {
  const acc_t<T> e = exponential(d, scale);
  const acc_t<T> back = d - a, lost = (a - (d - back)) - (b + back);
  return e == acc_t<T>(0) ? e : std::fma(mul_rn(e, scale.inv_temperature), lost, e);
}

// cap tanh(x / cap). An infinity stays: -inf is a masked token, +inf makes the row nonfinite.
template <class A>
__device__ __forceinline__ A soft_capped(A x, A cap) {
  return std::isinf(x) ? x : cap * std::tanh(x / cap);
}
template <class A, int N>
__device__ __forceinline__ void soft_cap(A (&x)[N], A cap) {
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = soft_capped(x[j], cap);
}

// ---- moments

template <class A>
struct Moments {
  A m, s, u;  // max x, sum e, sum e t with t = x - m and e = exp(t / T)
};

template <class A>
struct FullMoments : Moments<A> {
  A q, w;      // sum e^2, sum e t^2
  int argmax;  // the smallest index of the maximum
};

template <class A>
__device__ __forceinline__ void clear(Moments<A>& a) {
  a.m = -kInfinity<A>;
  a.s = a.u = A(0);
}
template <class A>
__device__ __forceinline__ void clear(FullMoments<A>& a) {
  clear(static_cast<Moments<A>&>(a));
  a.q = a.w = A(0);
  a.argmax = std::numeric_limits<int>::max();
}

template <class A>
__device__ __forceinline__ void add(Moments<A>& a, A e, A t) {
  a.s += e;
  a.u = std::fma(e, t, a.u);
}
template <class A>
__device__ __forceinline__ void add(FullMoments<A>& a, A e, A t) {
  add(static_cast<Moments<A>&>(a), e, t);
  a.q = std::fma(e, e, a.q);
  a.w = std::fma(mul_rn(e, t), t, a.w);
}

// The maximum rises by -d: alpha = exp(d / T).
template <class A>
__device__ __forceinline__ void rescale(Moments<A>& a, A d, A alpha) {
  a.u = mul_rn(alpha, std::fma(d, a.s, a.u));
  a.s = mul_rn(alpha, a.s);
}
template <class A>
__device__ __forceinline__ void rescale(FullMoments<A>& a, A d, A alpha) {
  a.w = mul_rn(alpha, std::fma(d, std::fma(d, a.s, A(2) * a.u), a.w));
  a.q = mul_rn(mul_rn(alpha, alpha), a.q);
  rescale(static_cast<Moments<A>&>(a), d, alpha);
}

template <class A>
__device__ __forceinline__ void join(Moments<A>& a, const Moments<A>& b) {
  a.s += b.s;
  a.u += b.u;
}
template <class A>
__device__ __forceinline__ void join(FullMoments<A>& a, const FullMoments<A>& b) {
  join(static_cast<Moments<A>&>(a), static_cast<const Moments<A>&>(b));
  a.q += b.q;
  a.w += b.w;
}

// While nothing finite was seen (m = -inf) the sums are 0, or s is NaN: nothing to rescale.
template <class T, class M>
__device__ __forceinline__ void raise_max(M& a, acc_t<T> m, const RowScale<T>& scale) {
  if (m > a.m && a.m > -kInfinity<acc_t<T>>) {
    const acc_t<T> d = shifted(a.m, m, scale);
    rescale(a, d, exponential_of_difference(a.m, m, d, scale));
  }
  a.m = m;
}

template <class A>
__device__ __forceinline__ void join_argmax(Moments<A>&, const Moments<A>&) {}
template <class A>
__device__ __forceinline__ void join_argmax(FullMoments<A>& a, const FullMoments<A>& b) {
  if (b.m > a.m || (b.m == a.m && b.argmax < a.argmax)) a.argmax = b.argmax;
}

template <class T, class M>
__device__ __forceinline__ M merge(M a, M b, const RowScale<T>& scale) {
  join_argmax(a, b);
  const acc_t<T> m = std::fmax(a.m, b.m);
  raise_max(a, m, scale);
  raise_max(b, m, scale);
  join(a, b);
  return a;
}

// ---- one thread's elements

template <class A, int N>
__device__ __forceinline__ void note_argmax(Moments<A>&, const A (&)[kUnroll][N], int, int) {}
template <class A, int N>
__device__ __forceinline__ void note_argmax(FullMoments<A>& a, const A (&x)[kUnroll][N], int index,
                                            int step) {
#pragma unroll
  for (int i = kUnroll - 1; i >= 0; --i) {
#pragma unroll
    for (int j = N - 1; j >= 0; --j) {
      if (x[i][j] == a.m) a.argmax = index + i * step + j;
    }
  }
}

// Adds kUnroll vectors; vector i starts at row position index + i * step.
template <class T, class M>
__device__ __forceinline__ void absorb(M& a, const Vec<T> (&v)[kUnroll], const RowScale<T>& scale,
                                       int index, int step) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
  A x[kUnroll][N];
  A top = -kInfinity<A>;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    unpack(v[i], x[i]);
    if (scale.softcap != A(0)) soft_cap(x[i], scale.softcap);
#pragma unroll
    for (int j = 0; j < N; ++j) top = std::fmax(top, x[i][j]);
  }
  if (top > a.m) {
    raise_max(a, top, scale);
    note_argmax(a, x, index, step);
  }
  const bool nothing_finite = a.m == -kInfinity<A>;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (nothing_finite) {
        if (x[i][j] != x[i][j]) a.s = x[i][j];  // fmax passed over the NaN
      } else {
        const A t = shifted(x[i][j], a.m, scale);
        add(a, exponential(t, scale), t);
      }
    }
  }
}

// ---- access to a slice: elements p[0, n), vectors counted from p, which may be misaligned

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// Elements past the end read as -inf, which no statistic sees.
template <class T>
__device__ __forceinline__ Vec<T> load_elements(const T* p, int n, int position) {
  Vec<T> v;
#pragma unroll
  for (int j = 0; j < Vec<T>::size; ++j) {
    v.lane[j] = position + j < n ? p[position + j] : from_acc<T>(-kInfinity<acc_t<T>>);
  }
  return v;
}

// All loads are issued before the first is looked at: past the end the address is clamped and the
// vector replaced afterwards.
template <Reuse reuse, class T>
__device__ __forceinline__ void load_vectors(Vec<T> (&v)[kUnroll], const T* p, int n, bool aligned,
                                             int position, int step) {
  constexpr int N = Vec<T>::size;
  if (aligned && n >= N) {
    const int last = n / N * N - N;
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = position + i * step;
      v[i] = load_global<reuse>(p + (at < last ? at : last));
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int at = position + i * step;
      if (at > last) v[i] = load_elements(p, n, at);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) v[i] = load_elements(p, n, position + i * step);
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, int n, bool aligned, int position,
                                             const Vec<T>& v) {
  constexpr int N = Vec<T>::size;
  if (aligned && position + N <= n) {
    store_global(p + position, v);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (position + j < n) p[position + j] = v.lane[j];
    }
  }
}

// ---- slices and rows

struct Slice {
  int begin, n;
};

__device__ __forceinline__ Slice slice_of(const Tiling& t, int64_t vocab, int slice) {
  const int64_t begin = slice * t.slice_len, left = vocab - begin;
  return {int(begin), int(left < 0 ? 0 : left < t.slice_len ? left : t.slice_len)};
}

// Row r = (r / seq, r % seq) of a strided (B, T, V) tensor.
template <class T>
__device__ __forceinline__ T* row_pointer(T* base, int64_t stride_b, int64_t stride_t, int64_t seq,
                                          int64_t row) {
  if (stride_b == seq * stride_t) return base + row * stride_t;
  return base + row / seq * stride_b + row % seq * stride_t;
}

template <class T>
__device__ __forceinline__ const T* logits_row(const Rows& r, int64_t row) {
  return row_pointer(static_cast<const T*>(r.logits), r.stride_b, r.stride_t, r.seq, row);
}
template <class T>
__device__ __forceinline__ T* grad_row_pointer(const Rows& r, int64_t row) {
  return row_pointer(static_cast<T*>(r.grad), r.grad_stride_b, r.grad_stride_t, r.seq, row);
}

template <class T, class M>
__device__ __forceinline__ M warp_merge(M a, const RowScale<T>& scale) {
  return warp_reduce(a, [&](const M& x, const M& y) { return merge(x, y, scale); });
}

// Warp partials of the slices of a row, one block; groups of threads take the slices in turn.
template <Reuse reuse, class M, class T>
__device__ __forceinline__ void sweep_moments(M* parts, const T* row, int64_t vocab,
                                              const Tiling& tiling, const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size;
  const int group = tiling.group, thread = threadIdx.x % group, step = group * N;
  const bool aligned = is_aligned(row);
  for (int k = threadIdx.x / group; k < tiling.slices; k += blockDim.x / group) {
    const Slice slice = slice_of(tiling, vocab, k);
    const T* p = row + slice.begin;
    M a;
    clear(a);
    for (int at = thread * N; at < slice.n; at += kUnroll * step) {
      Vec<T> v[kUnroll];
      load_vectors<reuse>(v, p, slice.n, aligned, at, step);
      absorb(a, v, scale, slice.begin + at, step);
    }
    a = warp_merge(a, scale);
    if (threadIdx.x % 32 == 0) parts[(k * group + thread) / 32] = a;
  }
}

// The row's moments in every lane of the calling warp; part(i) is warp partial i in slice order.
template <class M, class T, class Part>
__device__ __forceinline__ M merge_parts(int count, const RowScale<T>& scale, Part part) {
  M a;
  clear(a);
  for (int i = threadIdx.x % 32; i < count; i += 32) a = merge(a, part(i), scale);
  return warp_merge(a, scale);
}

// ---- results

template <class A>
struct RowStats {
  A logprob, entropy, log_sum, mean, inv_sum;  // mean = u/s, in units of z
  bool finite;  // false: NaN or +inf logit, no finite logit, invalid target; all values NaN
};

// x_y: the target's logit after the soft-cap; divisions by T once per row, correctly rounded.
template <class T>
__device__ __forceinline__ RowStats<acc_t<T>> row_stats(const Moments<acc_t<T>>& a, acc_t<T> x_y,
                                                        bool valid, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (!valid || !std::isfinite(a.m) || a.s != a.s) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    return {nan, nan, nan, nan, nan, false};
  }
  const A log_sum = std::log(a.s), mean = a.u / a.s / scale.temperature;
  return {
      (x_y - a.m) / scale.temperature - log_sum, log_sum - mean, log_sum, mean, A(1) / a.s, true};
}

}  // namespace reasonkern
