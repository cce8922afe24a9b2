// The reduction of a small struct over a warp with a caller's `op(a, b)`, by a fixed tree in lane
// order: `op` need not be commutative, and every lane gets the same bits.
// T: trivially copyable, a multiple of 4 bytes. Blocks are one-dimensional, of full warps.
#pragma once

#include <type_traits>

#include "cluster.cuh"

namespace reasonkern {

constexpr unsigned kFullMask = 0xffffffffu;

// Of a struct, word by word; in the simulator one rendezvous whatever the size.
template <class T, class Shuffle>
__device__ __forceinline__ T shuffle_words(T value, Shuffle shuffle) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0, "shuffled by words");
#if defined(__CUDACC__)
  unsigned word[sizeof(T) / 4];
  std::memcpy(word, &value, sizeof(T));
#pragma unroll
  for (unsigned& w : word) w = shuffle(w);
  std::memcpy(&value, word, sizeof(T));
  return value;
#else
  return shuffle(value);
#endif
}

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  return shuffle_words(value, [=](auto w) { return __shfl_xor_sync(kFullMask, w, lane_mask); });
}
template <class T>
__device__ __forceinline__ T shuffle_from(T value, int lane) {
  return shuffle_words(value, [=](auto w) { return __shfl_sync(kFullMask, w, lane); });
}

// The lower lane's value is always the first operand: with a fused multiply-add op(a, b) and
// op(b, a) may differ in the last bit, and then the two lanes would disagree.
template <class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  const unsigned lane = threadIdx.x % 32;
  constexpr int kUnroll = sizeof(T) > 32 ? 1 : 5;
#pragma unroll kUnroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const T other = shuffle_xor(value, offset);
    const bool upper = (lane & offset) != 0;
    value = op(upper ? other : value, upper ? value : other);
  }
  return value;
}

// Whether all lanes of the warp say so.
__device__ __forceinline__ bool all_lanes(bool mine) {
#if defined(__CUDACC__)
  return __all_sync(kFullMask, mine);
#else
  return warp_reduce(int(mine), [](int a, int b) { return a & b; }) != 0;
#endif
}

}  // namespace reasonkern
