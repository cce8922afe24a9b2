// The moments of a row, tile by tile.
//
// Bit rule. A row is cut into slices and a slice into one contiguous share a warp (Tiling); lane l
// takes vectors l, l + 32, ... of the share, kUnroll at a time, whatever the row's address. A warp
// moves its origin together; the warps of a slice merge, then the slices of the row. The order,
// hence every bit of the moments, depends on V and the element type only and is shared by all
// kernels; fma and mul_rn leave the compiler no contraction to choose. A misaligned row is read
// element by element in the same order: slower, equal bits.
#pragma once

#include "row_stats.cuh"

namespace reasonkern {

constexpr int kUnroll = 5;  // vectors a lane takes at a time, as many as registers allow

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
  bool rival;  // whether one was seen
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

// A share is swept freely first: without soft-cap, and as if it held neither -inf nor a maximum
// whose offsets may be infinite or are spoilt by rounding. Where it does the sum u becomes NaN, and
// the share is swept again, guarded. The free sweep asks for none of this, tile after tile.
enum class Sweep { free, guarded };

template <Sweep sweep, class M, class T>
__device__ __forceinline__ acc_t<T> find_bar(const Running<M, T>& r, const RowScale<T>& scale) {
  if (sweep == Sweep::guarded && !floor_of(r, scale).usable) return -kInfinity<acc_t<T>>;
  const acc_t<T> limit = limit_of(r, scale);
  return kFull<M> && !r.rival ? std::fmin(limit, to_acc(r.target.logit)) : limit;
}
template <Sweep sweep, class M, class T>
__device__ __forceinline__ void raise_running(Running<M, T>& r, acc_t<T> m,
                                              const RowScale<T>& scale) {
  raise_max<sweep == Sweep::free>(r.sums, m, scale);
  r.origin = origin(m, scale);
  r.bar = find_bar<sweep>(r, scale);
  if (sweep == Sweep::free && needs_floor(r.origin, scale)) {
    r.sums.u = std::numeric_limits<acc_t<T>>::quiet_NaN();
  }
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

// Tiles that are soft-capped, far, or need a floor where none is usable. Not unrolled, vectors move
// up instead: it must cost the others no registers.
template <bool kFar, class M, class T>
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
      const A t = floored_offset<kFar>(x[j], r.sums.m, r.origin, scale);
      add(r.sums, exponential<false>(t, scale), t);
    }
#pragma unroll
    for (int k = 1; k < kUnroll; ++k) v[k - 1] = v[k];
  }
}

// Raises the warp's maximum to the tile's where that is beyond the limit and takes out the elements
// at it; false: the tile was dealt with here.
template <Sweep sweep, class M, class T>
__device__ __forceinline__ bool lay_below(Running<M, T>& r, Vec<T> (&v)[kUnroll], Top<T> tile_top,
                                          acc_t<T> highest, const RowScale<T>& scale) {
  using A = acc_t<T>;
  if (sweep == Sweep::guarded && scale.softcap.value != A(0)) {
    highest = soft_capped(highest, scale.softcap);
  }
  const A warp_highest = warp_max(highest);
  const bool raised = warp_highest > limit_of(r, scale);
  if (raised) raise_running<sweep>(r, warp_highest, scale);
  if constexpr (sweep == Sweep::guarded) {
    if (!(r.sums.m > -kInfinity<A>)) {
      if (highest != highest) r.sums.s = highest;  // no sum moves, but warp_max passed over the NaN
      return false;
    }
    if (!floor_of(r, scale).usable) {
      is_far<T>(r.origin) ? absorb_any<true>(r, v, scale) : absorb_any<false>(r, v, scale);
      return false;
    }
  }
  const T top = from_acc<T>(r.sums.m);
  // Where a NaN hides a maximum beside it the sums become NaN anyway.
  if (!raised || !top_is<T>(tile_top, top)) return true;
  take_out_top(r.sums, v, floor_of(r, scale).value);
  return true;
}

// Looks for the first rival of the target; one is enough.
template <Sweep sweep, class M, class T>
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
  r.bar = find_bar<sweep>(r, scale);
}

// Adds kUnroll vectors per lane, which it may use up, those `left` elements and more behind the
// first of which are padding; vector i starts at position index + i * step, from where the target's
// index counts too. Called by whole warps, whose lanes share the maximum.
template <Sweep sweep, class M, class T>
__device__ __forceinline__ void absorb(Running<M, T>& r, Vec<T> (&v)[kUnroll], int left,
                                       const RowScale<T>& scale, int index, int step) {
  Top<T> top = top_of(v[0]);
#pragma unroll
  for (int i = 1; i < kUnroll; ++i) top = higher<T>(top, top_of(v[i]));
  r.top = higher<T>(r.top, top);
  const acc_t<T> highest = top_value<T>(top);  // NaN if any element is
  if (!all_lanes(highest < r.bar)) {
    if constexpr (kFull<M>) note_rival<sweep>(r, v, highest, index, step, scale);
    if (!lay_below<sweep>(r, v, top, highest, scale)) return;
  }
  if constexpr (sweep == Sweep::guarded) {
    absorb_below<false, true>(r, v, left, step, scale);
  } else if (sizeof(T) == 2 || scale.temperature.value == acc_t<T>(1)) {
    absorb_below<true, false>(r, v, left, step, scale);
  } else {
    absorb_below<false, false>(r, v, left, step, scale);
  }
}

template <Sweep sweep, class M, class T, class Load>
__device__ __forceinline__ void sweep_share(Running<M, T>& r, Slice share, const RowScale<T>& scale,
                                            Load load) {
  constexpr int N = Vec<T>::size, step = 32 * N;
  const int lane = threadIdx.x % 32;
  clear(r.sums);  // the first tile raises the rest, and the target's logit may come until then
  r.origin = r.bar = r.sums.m;
  r.top = top_of(padding<T>());
#pragma unroll 1
  for (int at = 0; at < share.n; at += kUnroll * step) {
    Vec<T> v[kUnroll];
    const int from = at + lane * N;
    load(v, from, step);
    absorb<sweep>(r, v, share.n - from, scale, from, step);
  }
}

// The moments of the lanes of the calling warp's share of a slice, of one maximum, and whether the
// free sweep was enough. load(v, at, step) fills v with the vectors at positions at, at + step, ...
// of the share.
template <class M, class T, class Load>
__device__ __forceinline__ M share_moments(Slice share, const RowScale<T>& scale,
                                           const Target<T>& target, bool& free, Load load) {
  Running<M, T> r;
  r.target = {target.logit, target.index - share.begin};
  r.rival = false;
  free = scale.softcap.value == acc_t<T>(0);
  if (free) {
    sweep_share<Sweep::free>(r, share, scale, load);
    free = all_lanes(r.sums.u == r.sums.u);
  }
  if (!free) sweep_share<Sweep::guarded>(r, share, scale, load);
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
    bool free;
    const M a = share_moments<M>(
        share, scale, target, free,
        [&](Vec<T>(&v)[kUnroll], int at, int step) { load_vectors<reuse>(v, piece, at, step); });
    store_joined(parts + i, a);
  }
}

}  // namespace reasonkern
