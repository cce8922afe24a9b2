// Rows, their slices, and vector access to a slice whatever its alignment.
#pragma once

#include <limits>

#include "../common/reduce.cuh"
#include "../common/vec.h"
#include "launch_config.h"
#include "policy_loss.h"

namespace reasonkern {

template <class A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

// ---- access to a slice: elements p[0, n), vectors counted from p, which may be misaligned

template <class T>
__device__ __forceinline__ bool is_aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 16 == 0;
}

// Elements past the end read as -inf, which no statistic sees.
template <class T>
__device__ __forceinline__ Vec<T> padding() {
  return make_vec<T>([](int) { return from_acc<T>(-kInfinity<acc_t<T>>); });
}
template <class T>
__device__ __forceinline__ Vec<T> load_elements(const T* p, int n, int position) {
  return make_vec<T>([&](int j) {
    return position + j < n ? p[position + j] : from_acc<T>(-kInfinity<acc_t<T>>);
  });
}

// Words of 16-bit elements; p is aligned to a word.
template <class T>
__device__ __forceinline__ std::uint32_t load_word(const T* p) {
#if defined(__CUDACC__)
  return *reinterpret_cast<const std::uint32_t*>(p);
#else
  std::uint32_t w;
  std::memcpy(&w, p, 4);
  return w;
#endif
}
template <class T>
__device__ __forceinline__ void store_word(T* p, std::uint32_t w) {
#if defined(__CUDACC__)
  *reinterpret_cast<std::uint32_t*>(p) = w;
#else
  std::memcpy(p, &w, 4);
#endif
}
template <class T>
__device__ __forceinline__ bool is_word_aligned(const T* p) {
  return reinterpret_cast<std::uintptr_t>(p) % 4 == 0;
}

// A whole vector at any address: by words, and at an odd place the two ends alone.
template <class T>
__device__ __forceinline__ Vec<T> load_words(const T* p) {
  if constexpr (sizeof(T) != 2) {
    return make_vec<T>([&](int j) { return p[j]; });
  } else if (is_word_aligned(p)) {
    return {{load_word(p), load_word(p + 2), load_word(p + 4), load_word(p + 6)}};
  } else {
    const std::uint32_t a = recast<std::uint16_t>(p[0]), b = load_word(p + 1), c = load_word(p + 3),
                        d = load_word(p + 5), e = recast<std::uint16_t>(p[7]);
    return {{a | b << 16, b >> 16 | c << 16, c >> 16 | d << 16, d >> 16 | e << 16}};
  }
}
template <class T>
__device__ __forceinline__ void store_words(T* p, const Vec<T>& v) {
  if constexpr (sizeof(T) != 2) {
#pragma unroll
    for (int j = 0; j < Vec<T>::size; ++j) p[j] = get_lane(v, j);
  } else if (is_word_aligned(p)) {
#pragma unroll
    for (int i = 0; i < 4; ++i) store_word(p + 2 * i, v.word[i]);
  } else {
    p[0] = get_lane(v, 0);
#pragma unroll
    for (int i = 0; i < 3; ++i) {
      store_word(p + 1 + 2 * i, v.word[i] >> 16 | v.word[i + 1] << 16);
    }
    p[7] = get_lane(v, 7);
  }
}

// Vector access where that is possible; a vector past the end costs no loads.
template <Reuse reuse, class T>
__device__ __forceinline__ Vec<T> load_vector(const T* p, int n, bool aligned, int position) {
  if (position >= n) return padding<T>();
  if (position + Vec<T>::size > n) return load_elements(p, n, position);
  return aligned ? load_global<reuse>(p + position) : load_words(p + position);
}

// Vectors at p, p + step, ...: those before `end`, and padding; none lies across it.
template <class T, int U, class Load>
__device__ __forceinline__ void load_whole_vectors(Vec<T> (&v)[U], const T* p, const T* end,
                                                   int step, Load load) {
  if (p + (U - 1) * step < end) {
#pragma unroll
    for (int i = 0; i < U; ++i) v[i] = load(p + i * step);
  } else {
#pragma unroll
    for (int i = 0; i < U; ++i) {
      v[i] = padding<T>();
      if (p + i * step < end) v[i] = load(p + i * step);
    }
  }
}

// An address in global memory that is computed once; the compiler would derive it at every load.
template <class T>
__device__ __forceinline__ const T* pinned(const T* p) {
#if defined(__CUDACC__)
  std::size_t address = __cvta_generic_to_global(p);
  asm("" : "+l"(address));
  p = static_cast<const T*>(__cvta_global_to_generic(address));
#endif
  return p;
}

// n elements of a row from `begin` on, which a warp reads by vectors.
template <class T>
struct Piece {
  const T* row;
  int begin, n;
  bool whole;  // all of its vectors are aligned and whole

  __device__ __forceinline__ Piece(const T* row, int begin, int n)
      : row(row),
        begin(begin),
        n(n),
        whole(all_lanes(is_aligned(row + begin) && n % Vec<T>::size == 0)) {}
};

// The vectors at `position`, `position + step`, ... All loads are issued before the first is looked
// at.
template <Reuse reuse, class T, int U>
__device__ __forceinline__ void load_vectors(Vec<T> (&v)[U], const Piece<T>& piece, int position,
                                             int step) {
  const T* from = pinned(piece.row + (piece.begin + position));
  const int left = piece.n - position;
  if (piece.whole && left > (U - 1) * step) {
#pragma unroll
    for (int i = 0; i < U; ++i) v[i] = load_global<reuse>(from + i * step);
  } else if (piece.whole) {
#pragma unroll
    for (int i = 0; i < U; ++i) {
      v[i] = padding<T>();
      if (left > i * step) v[i] = load_global<reuse>(from + i * step);
    }
  } else {
    const bool aligned = is_aligned(from);
#pragma unroll
    for (int i = 0; i < U; ++i) v[i] = load_vector<reuse>(from, left, aligned, i * step);
  }
}

template <class T>
__device__ __forceinline__ void store_vector(T* p, int n, bool aligned, int position,
                                             const Vec<T>& v) {
  constexpr int N = Vec<T>::size;
  if (position + N <= n) {
    aligned ? store_global(p + position, v) : store_words(p + position, v);
  } else {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      if (position + j < n) p[position + j] = get_lane(v, j);
    }
  }
}

// ---- slices and rows

struct Slice {
  int begin, n;
};

__device__ __forceinline__ Slice slice_of(const Tiling& t, int64_t vocab, int slice) {
  const int len = int(t.slice_len), begin = slice * len, left = int(vocab) - begin;
  return {begin, left < 0 ? 0 : left < len ? left : len};
}

// The part of a slice that one warp of its group takes.
__device__ __forceinline__ Slice share_of(const Slice& slice, const Tiling& t, int warp) {
  const int begin = warp * t.share_len, left = slice.n - begin;
  return {slice.begin + begin, left < 0 ? 0 : left < t.share_len ? left : t.share_len};
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

}  // namespace reasonkern
