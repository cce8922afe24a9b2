// Statistics of one row of logits. The moments are taken in raw units t = x - m (no temperature);
// the temperature enters exp(t / T) and then only the row's results.
//
// Bit rule. A row is cut into slices (Tiling); thread i of the block takes the elements of vectors
// i, i + blockDim, ... counted from the start of the slice, kUnroll vectors at a time, whatever the
// row's address, relative to the maximum of the slice; warps merge in slice order. The order, hence
// every bit of the moments, depends on V and the element type only and is shared by all kernels;
// fma and mul_rn leave the compiler no contraction to choose. A misaligned row is read element by
// element in the same order: slower, equal bits.
#pragma once

#include "../common/reduce.cuh"
#include "row_access.cuh"
#include "row_scale.cuh"

namespace reasonkern {

constexpr int kUnroll = 4;  // vectors a thread takes at a time

// Elements at the maximum are counted, not summed: on a confident row the sum is 1 and a tail, and
// added to 1 the tail's small terms would be lost one by one.
template <class A>
struct Moments {
  A m, n;  // max x; how many elements are at it
  A s, u;  // over the other elements: sum e, sum e t with t = x - m and e = exp(t / T)
};

template <class A>
struct FullMoments : Moments<A> {
  A q, w;      // sum e^2 over the others, sum e t^2
  int argmax;  // the smallest index of the maximum
};

constexpr int kNoIndex = std::numeric_limits<int>::max();

template <class A>
__device__ __forceinline__ void clear(Moments<A>& a) {
  a.m = -kInfinity<A>;
  a.n = a.s = a.u = A(0);
}
template <class A>
__device__ __forceinline__ void clear(FullMoments<A>& a) {
  clear(static_cast<Moments<A>&>(a));
  a.q = a.w = A(0);
  a.argmax = kNoIndex;
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

template <class A>
__device__ __forceinline__ void count_top(Moments<A>& a, int) {
  a.n += A(1);
}
template <class A>
__device__ __forceinline__ void count_top(FullMoments<A>& a, int index) {
  a.n += A(1);
  if (index < a.argmax) a.argmax = index;
}

// The maximum rises by -d: alpha = exp(d / T).
template <class A>
__device__ __forceinline__ void rescale(Moments<A>& a, A d, A alpha) {
  const A sum = a.s + a.n;
  a.u = mul_rn(alpha, std::fma(d, sum, a.u));
  a.s = mul_rn(alpha, sum);
  a.n = A(0);
}
template <class A>
__device__ __forceinline__ void rescale(FullMoments<A>& a, A d, A alpha) {
  a.w = mul_rn(alpha, std::fma(d, std::fma(d, a.s + a.n, A(2) * a.u), a.w));
  a.q = mul_rn(mul_rn(alpha, alpha), a.q + a.n);
  a.argmax = kNoIndex;
  rescale(static_cast<Moments<A>&>(a), d, alpha);
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
  if (b.argmax < a.argmax) a.argmax = b.argmax;
}

template <class T, class M>
__device__ __forceinline__ M merge(M a, M b, const RowScale<T>& scale) {
  const acc_t<T> m = std::fmax(a.m, b.m);
  raise_max(a, m, scale);
  raise_max(b, m, scale);
  join(a, b);
  return a;
}

template <class A>
__device__ __forceinline__ A warp_max(A x) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) x = std::fmax(x, shuffle_xor(x, offset));
  return x;
}

// A tile whose elements all lie below the maximum, as most do.
template <bool kUnit, class T, class M>
__device__ __forceinline__ void absorb_below(M& a, const Vec<T> (&v)[kUnroll],
                                             const Floor<T>& floor, const RowScale<T>& scale) {
  using A = acc_t<T>;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i) {
    A t[Vec<T>::size];
    shift_lanes(t, v[i], a.m, floor, scale);
#pragma unroll
    for (int j = 0; j < Vec<T>::size; ++j) add(a, exponential<kUnit>(t[j], scale), t[j]);
  }
}

// Any other tile: with elements at the maximum, soft-capped, or where no floor is usable. Not
// unrolled, vectors move up instead: it is taken a few times a row and must cost no registers.
template <class T, class M>
__device__ __forceinline__ void absorb_any(M& a, Vec<T> (&v)[kUnroll], const RowScale<T>& scale,
                                           int index, int step) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
#pragma unroll 1
  for (int i = 0; i < kUnroll; ++i, index += step) {
    A x[N];
    unpack(v[0], x);
    if (scale.softcap.value != A(0)) soft_cap(x, scale.softcap);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (x[j] == a.m) {
        x[j] = -kInfinity<A>;
        count_top(a, index + j);
      }
      const A t = shifted(x[j], a.m, scale);
      add(a, exponential<false>(t, scale), t);
    }
#pragma unroll
    for (int k = 1; k < kUnroll; ++k) v[k - 1] = v[k];
  }
}

// The lanes' sums, which share their maximum. Sums commute to the bit, so both lanes of a pair may
// add in their own order.
template <class M>
__device__ __forceinline__ M warp_join(M a) {
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) join(a, shuffle_xor(a, offset));
  return a;
}

// The largest x of the block; NaN is passed over. `maxima` has room for a number per warp and is
// not written again before another barrier.
template <class A>
__device__ __forceinline__ A block_max(A x, A* maxima) {
  x = warp_max(x);
  if (threadIdx.x % 32 == 0) maxima[threadIdx.x / 32] = x;
  __syncthreads();
  for (unsigned i = 0; i < blockDim.x / 32; ++i) x = std::fmax(x, maxima[i]);
  return x;
}

template <class T>
__device__ __forceinline__ Vec<T> highest_vector(const Vec<T> (&v)[kUnroll]) {
  Vec<T> top = v[0];
#pragma unroll
  for (int i = 1; i < kUnroll; ++i) top = max_lanes(top, v[i]);
  return top;
}

template <class T>
__device__ __forceinline__ int count_tiles(Slice slice) {
  const int tile = kUnroll * blockDim.x * Vec<T>::size;
  return (slice.n + tile - 1) / tile;
}

// A slice's moments, the sums of each warp apart; every thread of the block calls it. Two passes
// over load(v, tile, pass), this thread's kUnroll vectors of a tile: the first finds the maximum,
// so that the second sums with no rescaling. after(tile) runs when a tile will not be read again.
template <class M, class T, class Load, class After>
__device__ __forceinline__ M slice_moments(acc_t<T>* maxima, Slice slice, const RowScale<T>& scale,
                                           Load load, After after) {
  using A = acc_t<T>;
  const int step = blockDim.x * Vec<T>::size, tiles = count_tiles<T>(slice);
  Vec<T> top = load_elements<T>(nullptr, 0, 0), v[kUnroll];
  for (int tile = 0; tile < tiles; ++tile) {
    load(v, tile, 0);
    top = max_lanes(top, highest_vector(v));
  }
  A own = highest_lane(top);  // NaN if any element is
  if (scale.softcap.value != A(0)) own = soft_capped(own, scale.softcap);
  M a;
  clear(a);
  a.m = block_max(own, maxima);
  const Floor<T> floor = floor_below<T>(a.m, scale);
  const bool has_top = !all_lanes(own < a.m);
  for (int tile = 0; tile < tiles; ++tile) {
    load(v, tile, 1);
    if (!floor.usable || (has_top && !all_lanes(highest_lane(highest_vector(v)) < a.m))) {
      const int at = (tile * kUnroll * blockDim.x + threadIdx.x) * Vec<T>::size;
      if (a.m > -kInfinity<A>) absorb_any(a, v, scale, slice.begin + at, step);
    } else if (scale.temperature.value == A(1)) {
      absorb_below<true>(a, v, floor, scale);
    } else {
      absorb_below<false>(a, v, floor, scale);
    }
    after(tile);
  }
  if (own != own) a.s = own;  // also where nothing is finite and nothing was summed
  return warp_join(a);
}

// Warp partials of the slices of a row by one block that reads each slice twice, the second time
// from L2 as a rule. `maxima`: two numbers per warp.
template <Reuse reuse, class M, class T>
__device__ __forceinline__ void sweep_moments(M* parts, acc_t<T>* maxima, const T* row,
                                              int64_t vocab, const Tiling& tiling,
                                              const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size;
  const int warps = blockDim.x / 32, step = blockDim.x * N;
  const bool aligned = is_aligned(row);
  for (int k = 0; k < tiling.slices; ++k) {
    const Slice slice = slice_of(tiling, vocab, k);
    const auto load = [&](Vec<T>(&v)[kUnroll], int tile, int pass) {
      const int at = (tile * kUnroll * blockDim.x + threadIdx.x) * N;
      if (pass == 0) {
        load_vectors<Reuse::again>(v, row + slice.begin, slice.n, aligned, at, step);
      } else {
        load_vectors<reuse>(v, row + slice.begin, slice.n, aligned, at, step);
      }
    };
    const M a = slice_moments<M, T>(maxima + k % 2 * warps, slice, scale, load, [](int) {});
    if (threadIdx.x % 32 == 0) parts[k * warps + threadIdx.x / 32] = a;
  }
}

// The row's moments in every lane of the calling warp; part(i) is warp partial i in slice order.
template <class M, class T, class Part>
__device__ __forceinline__ M merge_parts(int count, const RowScale<T>& scale, Part part) {
  M a;
  clear(a);
  for (int i = threadIdx.x % 32; i < count; i += 32) a = merge(a, part(i), scale);
  return warp_reduce(a, [&](M x, M y) { return merge(x, y, scale); });
}

// ---- results

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
  const A sum = a.s + a.n, mean = a.u / sum / scale.temperature.value;
  const A log_sum = std::log1p(a.s + (a.n - A(1)));
  return {(x_y - a.m) / scale.temperature.value - log_sum, log_sum - mean, log_sum, A(1) / sum,
          true};
}

}  // namespace reasonkern
