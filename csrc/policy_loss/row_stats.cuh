// The moments of a row's logits, over the offsets of row_scale.cuh: how parts of a row join, and
// the statistics that they `settle` to. row_sweep.cuh gathers them.
#pragma once

#include "../common/reduce.cuh"
#include "row_access.cuh"
#include "row_scale.cuh"

namespace reasonkern {

// Elements at the maximum are counted, not summed: on a confident row the sum is 1 and a tail, and
// added to 1 the tail's small terms would be lost one by one.
template <class A>
struct Moments {
  A m, n;  // max x; how many elements are at it
  A s, u;  // over the other elements: sum e, sum e t with the offset t and its exponential e
};

template <class A>
struct FullMoments : Moments<A> {
  A q, w;    // sum e^2 over the others, sum e t^2
  A rivals;  // not 0: an element is larger than the target, or as large and before it
};
template <class M>
constexpr bool kFull = false;
template <class A>
constexpr bool kFull<FullMoments<A>> = true;

template <class A>
__device__ __forceinline__ void clear(Moments<A>& a) {
  a.m = -kInfinity<A>;
  a.n = a.s = a.u = A(0);
}
template <class A>
__device__ __forceinline__ void clear(FullMoments<A>& a) {
  clear(static_cast<Moments<A>&>(a));
  a.q = a.w = a.rivals = A(0);
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

// The origin rises by -d: alpha is the exponential of d. The elements at the maximum become as the
// others: n of offset `top` and exponential e.
template <class A>
__device__ __forceinline__ void rescale(Moments<A>& a, A d, A alpha, A e, A top) {
  const A n = mul_rn(a.n, e), sum = a.s + n;
  a.u = mul_rn(alpha, std::fma(d, sum, std::fma(n, top, a.u)));
  a.s = mul_rn(alpha, sum);
  a.n = A(0);
}
template <class A>
__device__ __forceinline__ void rescale(FullMoments<A>& a, A d, A alpha, A e, A top) {
  const A n = mul_rn(a.n, e), u = std::fma(n, top, a.u);
  a.w = mul_rn(alpha, std::fma(d, std::fma(d, a.s + n, A(2) * u), std::fma(n * top, top, a.w)));
  a.q = mul_rn(mul_rn(alpha, alpha), std::fma(n, e, a.q));
  rescale(static_cast<Moments<A>&>(a), d, alpha, e, top);
}

// While nothing finite was seen (m = -inf) the sums are 0, or s is NaN: nothing to rescale. kNear:
// neither maximum is far.
template <bool kNear = false, class T, class M>
__device__ __forceinline__ void raise_max(M& a, acc_t<T> m, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (m > a.m && a.m > -kInfinity<A>) {
    const A from = origin(a.m, scale), to = origin(m, scale),
            top = kNear ? offset(a.m, from, scale) : own_offset(a.m, from, scale);
    const bool far = !kNear && (is_far<T>(from) || is_far<T>(to));
    const A apart =
        far ? mul_rn(a.m - m, scale.exp_scale) + (own_offset(m, to, scale) - top) : from - to;
    const A d = max_nan(apart, scale.floor),
            e = sizeof(T) == 2 ? std::fma(top, A(kLn2), A(1)) : A(1);
    const A alpha =
        far ? exponential<false>(d, scale) : exponential_of_difference(from, to, d, scale);
    rescale(a, d, alpha, e, top);
  }
  a.m = m;
}

// Sums of the same maximum.
template <class A>
__device__ __forceinline__ void join(Moments<A>& a, const Moments<A>& b) {
  a.n += b.n;
  a.s += b.s;
  a.u += b.u;
}
template <class A>
__device__ __forceinline__ void join(FullMoments<A>& a, const FullMoments<A>& b) {
  join(static_cast<Moments<A>&>(a), static_cast<const Moments<A>&>(b));
  a.q += b.q;
  a.w += b.w;
  a.rivals += b.rivals;
}

template <class A>
__device__ __forceinline__ A warp_max(A x, int width = 32) {
#pragma unroll
  for (int offset = 1; offset < 32 && offset < width; offset *= 2)
    x = std::fmax(x, shuffle_xor(x, offset));
  return x;
}

// The sums of `width` lanes, a power of two, which share their maximum, in every one of them:
// `join` commutes.
template <class M>
__device__ __forceinline__ M join_lanes(M a, int width = 32) {
#pragma unroll
  for (int offset = 1; offset < 32 && offset < width; offset *= 2) {
    const M b = shuffle_xor(a, offset);
    join(a, b);
  }
  return a;
}

// The same, stored by lane 0.
template <class A>
__device__ __forceinline__ void store_joined(Moments<A>* to, const Moments<A>& a) {
  const Moments<A> sums = join_lanes(a);
  if (threadIdx.x % 32 == 0) *to = sums;
}
// One sum of two over a pair of lanes: of a in the lane whose bit `offset` is 0, of b in the other.
template <class A>
__device__ __forceinline__ A fold(A a, A b, int offset) {
  const bool upper = threadIdx.x & offset;
  return (upper ? b : a) + shuffle_xor(upper ? a : b, offset);
}
// The same bits by a third of the shuffles: the sums part, and lane k has sum k.
template <class A>
__device__ __forceinline__ void store_joined(FullMoments<A>* to, const FullMoments<A>& a) {
  A w = a.w + shuffle_xor(a.w, 1);
  A x = fold(fold(a.n, a.s, 1), fold(a.u, a.q, 1), 2);
  w += shuffle_xor(w, 2);
  x = fold(x, w, 4);
  x += shuffle_xor(x, 8);
  x += shuffle_xor(x, 16);
  const int lane = threadIdx.x % 32;
  if (lane == 0) to->m = a.m, to->n = x, to->rivals = a.rivals;
  if (lane == 1) to->s = x;
  if (lane == 2) to->u = x;
  if (lane == 3) to->q = x;
  if (lane == 4) to->w = x;
}

// The sums of lanes with maxima of their own: one exponential each, then plain sums. Lanes without
// elements change no bit.
template <class M, class T>
__device__ __forceinline__ M merge_lanes(M a, const RowScale<T>& scale, int width = 32) {
  raise_max(a, warp_max(a.m, width), scale);
  return join_lanes(a, width);
}

// parts[lane] for lanes below `count`, else nothing.
template <class M>
__device__ __forceinline__ M lane_part(const M* parts, int count) {
  M a;
  clear(a);
  const int lane = threadIdx.x % 32;
  if (lane < count) a = parts[lane];
  return a;
}

// The row's moments in every lane of the calling warp, from the partials of all its warps: those of
// a slice merge first, several slices at a time.
template <class M, class T>
__device__ __forceinline__ M merge_row(const M* parts, const Tiling& tiling,
                                       const RowScale<T>& scale) {
  const int warps = tiling.group / 32, at_once = 32 / warps, lane = threadIdx.x % 32;
  M slices;  // slice k in lane k
  clear(slices);
  for (int first = 0; first < tiling.slices; first += at_once) {
    const int left = min(tiling.slices - first, at_once);
    const M a = merge_lanes(lane_part(parts + first * warps, left * warps), scale, warps);
    const M slice = shuffle_from(a, (lane - first) * warps & 31);
    if (lane >= first && lane < first + left) slices = slice;
  }
  return merge_lanes(slices, scale);
}

// ---- results

// `settle` for sums: k is log2(e) / T but for its rounding, which changes the exponential of a t
// far below the maximum as it changes t; the mean t stands for all, for on a row where it matters
// the others lie close together, in the tail.
template <class A, class T>
__device__ __forceinline__ Settle<T, A> settle(const Moments<acc_t<T>>& a,
                                               const RowScale<T>& scale) {
  Settle<T, A> to = settle<A>(a.m, scale);
  if constexpr (sizeof(T) == 2) {
    constexpr float high = float(kLog2e), low = float(kLog2e - high);
    const float k_error = std::fma(scale.exp_scale, scale.temperature.value, -high) - low;
    if (a.s > 0.0f) to.factor *= std::fma(A(-k_error * float(kLn2 * kLn2)), A(a.u) / A(a.s), A(1));
  }
  return to;
}

template <class A>
struct RowStats {
  A logprob, entropy, log_sum, inv_sum;
  bool finite;  // false: NaN or +inf logit, no finite logit, invalid target; all values NaN
};

// x_y: the target's logit after the soft-cap; divisions by T once per row, correctly rounded.
template <class T>
__device__ __forceinline__ RowStats<acc_t<T>> row_stats(const Moments<acc_t<T>>& a, acc_t<T> x_y,
                                                        bool valid, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (!valid || !std::isfinite(a.m) || std::isnan(a.s)) {
    const A nan = std::numeric_limits<A>::quiet_NaN();
    return {nan, nan, nan, nan, false};
  }
  const auto to = settle<A>(a, scale);
  const A s = a.s * to.factor, u = std::fma(-to.shift, a.s, a.u) * to.factor, sum = s + a.n;
  const A mean = sizeof(T) == 2 ? u / sum * to.unit : u / sum / scale.temperature.value;
  const A log_sum = std::log1p(s + (a.n - A(1)));
  return {(x_y - a.m) / scale.temperature.value - log_sum, log_sum - mean, log_sum, A(1) / sum,
          true};
}

}  // namespace reasonkern
