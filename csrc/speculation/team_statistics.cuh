// The raw statistics of a row: its k largest logits and its log-sum-exp.
#pragma once

#include "team.cuh"

namespace reasonkern {

// How many of n candidates come before candidate i.
__device__ __forceinline__ int place_of(const float* value, const int* id, int n, int i) {
  int place = 0;
  for (int j = 0; j < n; ++j) place += comes_before(value[j], id[j], value[i], id[i]);
  return place;
}

// The k-th largest of the threads' largest logits: the block has k logits at least from there up.
__device__ inline float block_bound(TeamShared& s, float thread_top, int k) {
  if (threadIdx.x == 0) s.bound = -kInf, s.count = 0;
  s.thread_top[threadIdx.x] = thread_top;
  __syncthreads();
  int place = 0;
  for (int j = 0; j < int(blockDim.x); ++j) {
    place +=
        s.thread_top[j] > thread_top || (s.thread_top[j] == thread_top && j < int(threadIdx.x));
  }
  if (place == k - 1) s.bound = thread_top;
  __syncthreads();
  return s.bound;
}

// This block's k largest logits of its share of the row, of the allowed ones or of all, one pass
// each: where ties overflow the candidates.
template <bool Allowed, class Row>
__device__ void block_top_slowly(Team& team, const Row& row, int k) {
  TeamShared& s = *team.shared();
  Best last{kInf, -1};
  for (int place = 0; place < k; ++place) {
    Best best{-kInf, -1};
    row.template each<1>(team, [&](int v, float (&x)[4]) {
      if (Allowed) row.apply_mask(v, x);
      for (int j = 0; j < 4; ++j) {
        if (comes_before(last.score, last.id, x[j], v + j)) best.offer(x[j], v + j);
      }
    });
    best = warp_reduce(best, TakeBest());
    if (threadIdx.x % 32 == 0)
      s.value[threadIdx.x / 32] = best.score, s.id[threadIdx.x / 32] = best.id;
    __syncthreads();
    last = {-kInf, -1};
    for (int w = 0; w < int(blockDim.x / 32); ++w) last.offer(s.value[w], s.id[w]);
    __syncthreads();
    if (threadIdx.x == 0) s.top_value[place] = last.score, s.top_id[place] = last.id;
  }
}

// The same from candidates at or above the bound.
__device__ inline void block_top_of_candidates(TeamShared& s, int k) {
  for (int i = int(threadIdx.x); i < k; i += int(blockDim.x))
    s.top_value[i] = -kInf, s.top_id[i] = -1;
  __syncthreads();
  for (int i = int(threadIdx.x); i < s.count; i += int(blockDim.x)) {
    const int place = place_of(s.value, s.id, s.count, i);
    if (place < k) s.top_value[place] = s.value[i], s.top_id[place] = s.id[i];
  }
}

// Keeps logits at or above the bound.
__device__ __forceinline__ void add_candidates(TeamShared& s, float bound, int v,
                                               const float (&x)[4]) {
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (x[j] >= bound && x[j] > -kInf) {
      const int slot = atomicAdd(&s.count, 1);
      if (slot < kCandidates) s.value[slot] = x[j], s.id[slot] = v + j;
    }
  }
}

// This block's k largest in order, from the candidates if they are all there.
template <bool Allowed, class Row>
__device__ void block_top(Team& team, const Row& row, int k) {
  __syncthreads();
  if (team.shared()->count > kCandidates) {
    block_top_slowly<Allowed>(team, row, k);
  } else {
    block_top_of_candidates(*team.shared(), k);
  }
}

// The tops of all blocks, in this one; behind a barrier of the team.
__device__ inline int gather_tops(Team& team, int k) {
  TeamShared& s = *team.shared();
  const int count = int(cluster_size()) * k;
  for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
    const TeamShared* from = cluster_map(team.shared(), unsigned(i / k));
    s.value[i] = from->top_value[i % k];
    s.id[i] = from->top_id[i % k];
  }
  __syncthreads();
  return count;
}

// Writes ids, logits and lse of a sound row; `top` is its largest logit.
template <class E>
__device__ void write_statistics(Team& team, const TeamRow<E>& row, float thread_top, float top,
                                 int k, int64_t* ids, float* logits, float* lse) {
  TeamShared& s = *team.shared();
  const float bound = block_bound(s, thread_top, k);
  double sum = 0;
  row.each(team, [&](int v, const float (&x)[4]) {
#pragma unroll
    for (int j = 0; j < 4; ++j) sum += double(noise::exp_of(noise::add(x[j], -top)));
    add_candidates(s, bound, v, x);
  });
  block_top<false>(team, row, k);
  sum = team.reduce(sum, 0.0, Sum());  // its barrier shows every block the others' tops
  if (cluster_rank() == 0) {
    const int count = gather_tops(team, k);
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) {
      const int place = s.id[i] < 0 ? k : place_of(s.value, s.id, count, i);
      if (place < k) ids[place] = s.id[i], logits[place] = s.value[i];
    }
    if (threadIdx.x == 0) *lse = float(double(top) + log(sum));
  }
  cluster_sync();  // the tops were read and may change
}

}  // namespace reasonkern
