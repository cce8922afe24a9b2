// Candidates for the k largest logits of a row, or of a block's slice: those at or above a bound
// that k of them reach.
#pragma once

#include "team.cuh"

namespace reasonkern {

struct Larger {
  __device__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

__device__ __forceinline__ void put(TopPair* list, int place, float value, int id) {
  list[place / 2].value[place % 2] = value;
  list[place / 2].id[place % 2] = id;
}

// The largest logits of `groups` groups of threads, a power of two, and a new draw; whoever uses
// them is behind a barrier.
__device__ inline void start_candidates(TeamShared& s, float thread_top, int groups = kGroups) {
  const unsigned width = max(1, int(quotient(blockDim.x, unsigned(groups))));
  if (width == 32) {
    thread_top = value_of(__reduce_max_sync(kFullMask, key_of(thread_top)));
  } else {
    thread_top = reduce_lanes(thread_top, width, Larger());
  }
  if ((threadIdx.x & (width - 1)) == 0) s.my_groups[quotient(threadIdx.x, width)] = thread_top;
  if (threadIdx.x == 0) s.likely_count = 0, s.best = 0;
}

// Of a block.
__device__ __forceinline__ int block_groups() { return min(int(blockDim.x), kGroups); }

// Keys that differ by their lowest bits.
__device__ __forceinline__ unsigned key_of_group(float top, int group) {
  return (key_of(top) & ~unsigned(kGroups - 1)) | unsigned(group);
}

// At most the k-th largest of the groups' tops, by every warp; -inf if there are fewer. The smaller
// one of the k/2-th largest of each half: two chains side by side of half the length, for one or
// two candidates more.
__device__ inline float candidate_bound(const float* group_top, int groups, int k) {
  const int lane = int(threadIdx.x % 32), half = groups / 2;
  unsigned low = lane < half ? key_of_group(group_top[lane], lane) : 0;
  unsigned high = lane < half ? key_of_group(group_top[lane + half], lane) : 0;
  unsigned low_key = 0, high_key = 0;
#pragma unroll 1
  for (int i = 0; i < k; i += 2) {
    low_key = __reduce_max_sync(kFullMask, low);
    high_key = __reduce_max_sync(kFullMask, high);
    low = low == low_key ? 0 : low;
    high = high == high_key ? 0 : high;
  }
  const unsigned key = min(low_key, high_key) & ~unsigned(kGroups - 1);
  if (key <= 0x007fffffu) return -kInf;  // the key of -inf, or none
  return value_of(key);
}

// x[k] without an index at run time, which would move x to memory.
template <class T>
__device__ __forceinline__ T lane_of(const T (&x)[4], int k) {
  const T low = k & 1 ? x[1] : x[0], high = k & 1 ? x[3] : x[2];
  return k & 2 ? high : low;
}

// Keeps logits at or above the bound.
__device__ __forceinline__ void add_candidates(TeamShared& s, float bound, int v,
                                               const float (&x)[4]) {
  unsigned hits = 0;
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (x[j] >= bound && x[j] > -kInf) hits |= 1u << j;
  }
#pragma unroll 1  // rarely entered: one copy
  for (; hits != 0; hits &= hits - 1) {
    const int j = __ffs(int(hits)) - 1, slot = atomicAdd(&s.count, 1);
    if (slot < kCandidates) put(s.candidates, slot, lane_of(x, j), v + j);
  }
}

}  // namespace reasonkern
