// Deterministic reductions of a small struct with a caller's `op(a, b)`: a fixed tree in thread
// order, then block order. `op` need not be commutative, and every thread gets the same bits.
// T: trivially copyable, a multiple of 4 bytes. Blocks are one-dimensional, kWarps full warps.
#pragma once

#include <type_traits>

#include "cluster.cuh"

namespace reasonkern {

constexpr unsigned kFullMask = 0xffffffffu;
constexpr int kMaxCluster = 16;

template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int lane_mask) {
  static_assert(std::is_trivially_copyable<T>::value && sizeof(T) % 4 == 0, "shuffled by words");
#if defined(__CUDACC__)
  unsigned word[sizeof(T) / 4];
  std::memcpy(word, &value, sizeof(T));
#pragma unroll
  for (unsigned& w : word) w = __shfl_xor_sync(kFullMask, w, lane_mask);
  std::memcpy(&value, word, sizeof(T));
  return value;
#else
  return __shfl_xor_sync(kFullMask, value, lane_mask);  // one rendezvous whatever the size
#endif
}

// The lower lane's value is always the first operand: with a fused multiply-add op(a, b) and
// op(b, a) may differ in the last bit, and then the two lanes would disagree.
template <int kWidth = 32, class T, class Op>
__device__ __forceinline__ T warp_reduce(T value, Op op) {
  static_assert(kWidth > 0 && kWidth <= 32 && (kWidth & (kWidth - 1)) == 0, "a power of two");
  const unsigned lane = threadIdx.x % 32;
#pragma unroll
  for (int offset = 1; offset < kWidth; offset *= 2) {
    const T other = shuffle_xor(value, offset);
    const bool upper = (lane & offset) != 0;
    value = op(upper ? other : value, upper ? value : other);
  }
  return value;
}

// `scratch`: kWarps elements of shared memory, free again after the next __syncthreads. Two
// consecutive calls may follow each other without a barrier when they alternate two scratches.
template <int kWarps, class T, class Op>
__device__ __forceinline__ T block_reduce(T value, T* scratch, Op op) {
  static_assert(kWarps > 0 && kWarps <= 32 && (kWarps & (kWarps - 1)) == 0, "a power of two");
  value = warp_reduce(value, op);
  if (kWarps == 1) return value;
  const unsigned lane = threadIdx.x % 32;
  if (lane == 0) scratch[threadIdx.x / 32] = value;
  __syncthreads();
  return warp_reduce<kWarps>(scratch[lane % kWarps], op);
}

// The reduction over all threads of the cluster. `scratch`: kWarps + kMaxCluster elements at the
// same offset in every block. Needs one cluster barrier behind it (all blocks run) and none ahead:
// each block pushes its part to the others and then reads its own memory only. Consecutive calls
// alternate two scratches, as above.
template <int kWarps, class T, class Op>
__device__ __forceinline__ T cluster_reduce(T value, T* scratch, Op op) {
  value = block_reduce<kWarps>(value, scratch, op);
  const unsigned size = cluster_size();
  if (size == 1) return value;
  T* parts = scratch + kWarps;
  if (threadIdx.x < size) *cluster_map(parts + cluster_rank(), threadIdx.x) = value;
  cluster_sync();
  value = parts[0];
  for (unsigned rank = 1; rank < size; ++rank) value = op(value, parts[rank]);
  return value;
}

}  // namespace reasonkern
