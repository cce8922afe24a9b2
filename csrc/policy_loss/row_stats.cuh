// Statistics of one row of logits. The moments are taken over the offsets of row_scale.cuh;
// `settle` turns them into the row's results.
//
// Bit rule. A row is cut into slices and a slice into one contiguous share a warp (Tiling); lane l
// takes vectors l, l + 32, ... of the share, kUnroll at a time, whatever the row's address. A warp
// moves its origin together; the warps of a slice merge, then the slices of the row. The order,
// hence every bit of the moments, depends on V and the element type only and is shared by all
// kernels; fma and mul_rn leave the compiler no contraction to choose. A misaligned row is read
// element by element in the same order: slower, equal bits.
#pragma once

#include "../common/reduce.cuh"
#include "row_access.cuh"
#include "row_scale.cuh"

namespace reasonkern {

constexpr int kUnroll = 5;  // vectors a lane takes at a time, as many as registers allow

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

// While nothing finite was seen (m = -inf) the sums are 0, or s is NaN: nothing to rescale.
template <class T, class M>
__device__ __forceinline__ void raise_max(M& a, acc_t<T> m, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (m > a.m && a.m > -kInfinity<A>) {
    const A from = origin(a.m, scale), to = origin(m, scale);
    const A d = max_nan(from - to, scale.floor), top = offset(a.m, from, scale);
    const A e = sizeof(T) == 2 ? std::fma(top, A(kLn2), A(1)) : A(1);
    rescale(a, d, exponential_of_difference(from, to, d, scale), e, top);
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

// The row's target, whose rivals FullMoments looks for.
template <class T>
struct Target {
  T logit;
  int index;
};

// A warp's moments on the way, with what follows from their maximum. It need not be that of all
// elements so far: one above it has an exponential above 1, which does no harm up to a limit, and
// beyond that the maximum rises. Only at the end it rises to `top`.
template <class M, class T>
struct Running {
  M sums;
  acc_t<T> origin;
  acc_t<T> bar;  // tiles below it are but summed: the limit, or what the target's rivals reach
  Top<T> top;    // of the lane
  Target<T> target;
  bool rival;    // whether one was seen
  bool floored;  // whether offsets are kept above the floor
};
template <class M, class T>
__device__ __forceinline__ acc_t<T> limit_of(const Running<M, T>& r, const RowScale<T>& scale) {
  return std::fma(acc_t<T>(2), scale.residual, r.sums.m);  // an exponential of 4
}

// Not kept: few tiles need it.
template <class M, class T>
__device__ __forceinline__ Floor<T> floor_of(const Running<M, T>& r, const RowScale<T>& scale) {
  return floor_below<T>(r.sums.m, scale);
}
template <class M, class T>
__device__ __forceinline__ bool is_plain(const Running<M, T>& r, const RowScale<T>& scale) {
  return r.floored ? floor_of(r, scale).usable : scale.softcap.value == acc_t<T>(0);
}
template <class M, class T>
__device__ __forceinline__ acc_t<T> find_bar(const Running<M, T>& r, const RowScale<T>& scale) {
  if (!is_plain(r, scale)) return -kInfinity<acc_t<T>>;
  const acc_t<T> limit = limit_of(r, scale);
  return kFull<M> && !r.rival ? std::fmin(limit, to_acc(r.target.logit)) : limit;
}
template <class M, class T>
__device__ __forceinline__ void raise_running(Running<M, T>& r, acc_t<T> m,
                                              const RowScale<T>& scale) {
  raise_max(r.sums, m, scale);
  r.origin = origin(m, scale);
  r.bar = find_bar(r, scale);
}

// The vectors of the lane's tile that lie before the end, `left` elements behind the first one's
// start; what pads the others is not to be added.
template <bool kUnit, bool kFloor, class M, class T>
__device__ __forceinline__ void absorb_below(Running<M, T>& r, const Vec<T> (&v)[kUnroll], int left,
                                             int step, const RowScale<T>& scale) {
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if (i * step >= left) break;
    acc_t<T> t[Vec<T>::size];
    lane_offsets<kFloor>(t, v[i], r.origin, floor_of(r, scale), scale);
#pragma unroll
    for (int j = 0; j < Vec<T>::size; ++j) add(r.sums, exponential<kUnit>(t[j], scale), t[j]);
  }
}

// Counts the elements at the maximum and leaves `low` in their place.
template <class T, class M>
__device__ __forceinline__ void take_out_top(M& a, Vec<T> (&v)[kUnroll], T low) {
  using A = acc_t<T>;
  const T top = from_acc<T>(a.m);
  std::uint32_t count = 0;  // of 16-bit lanes: one in each half
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    if constexpr (sizeof(T) == 2) {
#pragma unroll
      for (std::uint32_t& w : v[i].word) {
        const std::uint32_t mask = equal_pair<T>(w, pair_of(top));
        count += mask & 0x10001u;
        w = (w & ~mask) | (pair_of(low) & mask);
      }
    } else {
      v[i] = make_vec<T>([&](int j) {
        const T x = get_lane(v[i], j);
        count += x == top;
        return x == top ? low : x;
      });
    }
  }
  a.n += A((count & 0xffffu) + (count >> 16));
}

// Tiles that are soft-capped, or need a floor where none is usable. Not unrolled, vectors move up
// instead: it must cost the others no registers.
template <class M, class T>
__device__ __forceinline__ void absorb_any(Running<M, T>& r, Vec<T> (&v)[kUnroll],
                                           const RowScale<T>& scale) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
#pragma unroll 1
  for (int i = 0; i < kUnroll; ++i) {
    A x[N];
    unpack(v[0], x);
    if (scale.softcap.value != A(0)) soft_cap(x, scale.softcap);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (x[j] == r.sums.m) {
        x[j] = -kInfinity<A>;
        r.sums.n += A(1);
      }
      const A t = floored_offset(x[j], r.origin, scale);
      add(r.sums, exponential<false>(t, scale), t);
    }
#pragma unroll
    for (int k = 1; k < kUnroll; ++k) v[k - 1] = v[k];
  }
}

// Raises the warp's maximum to the tile's where that is beyond the limit and takes out the elements
// at it; false: the tile was dealt with here.
template <class M, class T>
__device__ __forceinline__ bool lay_below(Running<M, T>& r, Vec<T> (&v)[kUnroll], Top<T> tile_top,
                                          acc_t<T> highest, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (scale.softcap.value != A(0)) highest = soft_capped(highest, scale.softcap);
  const A warp_highest = warp_max(highest);
  const bool raised = warp_highest > limit_of(r, scale);
  if (raised) raise_running(r, warp_highest, scale);
  if (!(r.sums.m > -kInfinity<A>)) {
    if (highest != highest) r.sums.s = highest;  // no sum moves, but warp_max passed over the NaN
    if (!r.floored) r.sums.u = std::numeric_limits<A>::quiet_NaN();
    return false;
  }
  if (!is_plain(r, scale)) {
    absorb_any(r, v, scale);
    return false;
  }
  const T top = from_acc<T>(r.sums.m);
  // Where a NaN hides a maximum beside it the sums become NaN anyway.
  if (!raised || !top_is<T>(tile_top, top)) return true;
  take_out_top(r.sums, v, floor_of(r, scale).value);
  return true;
}

// Looks for the first rival of the target; one is enough.
template <class M, class T>
__device__ __forceinline__ void note_rival(Running<M, T>& r, const Vec<T> (&v)[kUnroll],
                                           acc_t<T> highest, int index, int step,
                                           const RowScale<T>& scale) {
  if (r.rival) return;
  const acc_t<T> logit = to_acc(r.target.logit);
  bool rival = highest > logit;
  if (highest == logit && index < r.target.index) {
    int first = 0;
#pragma unroll
    for (int i = kUnroll - 1; i >= 0; --i) {
#pragma unroll
      for (int j = Vec<T>::size - 1; j >= 0; --j) {
        if (to_acc(get_lane(v[i], j)) == logit) first = i * step + j;
      }
    }
    rival = index + first < r.target.index;
  }
  if (all_lanes(!rival)) return;
  r.rival = true;
  r.bar = find_bar(r, scale);
}

// Adds kUnroll vectors per lane, which it may use up, those `left` elements and more behind the
// first of which are padding; vector i starts at position index + i * step, from where the target's
// index counts too. Called by whole warps, whose lanes share the maximum.
template <class M, class T>
__device__ __forceinline__ void absorb(Running<M, T>& r, Vec<T> (&v)[kUnroll], int left,
                                       const RowScale<T>& scale, int index, int step) {
  Top<T> top = top_of(v[0]);
#pragma unroll
  for (int i = 1; i < kUnroll; ++i) top = higher<T>(top, top_of(v[i]));
  r.top = higher<T>(r.top, top);
  const acc_t<T> highest = top_value<T>(top);  // NaN if any element is
  if (!all_lanes(highest < r.bar)) {
    if constexpr (kFull<M>) note_rival(r, v, highest, index, step, scale);
    if (!lay_below(r, v, top, highest, scale)) return;
  }
  if (r.floored) {
    absorb_below<false, true>(r, v, left, step, scale);
  } else if (sizeof(T) == 2 || scale.temperature.value == acc_t<T>(1)) {
    absorb_below<true, false>(r, v, left, step, scale);
  } else {
    absorb_below<false, false>(r, v, left, step, scale);
  }
}

// The moments of the lanes of the calling warp's share of a slice, of one maximum. load(v, at,
// step) fills v with the vectors at positions at, at + step, ... of the share. Offsets are taken
// without a floor first; where that makes a NaN, of 0 * -inf, the share is read again. `floored`
// says so.
template <class M, class T, class Load>
__device__ __forceinline__ M share_moments(Slice share, const RowScale<T>& scale,
                                           const Target<T>& target, bool& floored, Load load) {
  constexpr int N = Vec<T>::size, step = 32 * N;
  const int lane = threadIdx.x % 32;
  Running<M, T> r;
  r.target = {target.logit, target.index - share.begin};
  r.rival = false;
#pragma unroll 1
  for (r.floored = false;; r.floored = true) {
    clear(r.sums);  // the first tile raises the rest, and the target's logit may come until then
    r.origin = r.bar = r.sums.m;
    r.top = top_of(padding<T>());
#pragma unroll 1
    for (int at = 0; at < share.n; at += kUnroll * step) {
      Vec<T> v[kUnroll];
      const int from = at + lane * N;
      load(v, from, step);
      absorb(r, v, share.n - from, scale, from, step);
    }
    if (r.floored || all_lanes(r.sums.u == r.sums.u)) break;
  }
  floored = r.floored;
  if constexpr (kFull<M>) r.sums.rivals = r.rival ? acc_t<T>(1) : acc_t<T>(0);
  __syncwarp();  // or each shuffle asks who is there
  acc_t<T> top = top_value<T>(r.top);
  if (scale.softcap.value != acc_t<T>(0)) top = soft_capped(top, scale.softcap);
  top = warp_max(top);
  if (top > r.sums.m) raise_max(r.sums, top, scale);
  return r.sums;
}

// Warp partials of the slices of a row, one block; groups of threads take the slices in turn.
template <Reuse reuse, class M, class T>
__device__ __forceinline__ void sweep_moments(M* parts, const T* row, int64_t vocab,
                                              const Tiling& tiling, const RowScale<T>& scale,
                                              const Target<T>& target) {
  const int warps = tiling.group / 32, shift = 31 - __clz(warps);
  for (int i = threadIdx.x / 32; i < tiling.slices << shift; i += blockDim.x / 32) {
    const Slice share = share_of(slice_of(tiling, vocab, i >> shift), tiling, i & (warps - 1));
    const Piece<T> piece(row, share.begin, share.n);
    bool floored;
    const M a = share_moments<M>(
        share, scale, target, floored,
        [&](Vec<T>(&v)[kUnroll], int at, int step) { load_vectors<reuse>(v, piece, at, step); });
    store_joined(parts + i, a);
  }
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
