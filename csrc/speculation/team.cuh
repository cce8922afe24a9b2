// A team: the blocks of a cluster that work on one request. Reductions over the team give every
// thread the same bits.
#pragma once

#include "../common/reduce.cuh"
#include "row.h"

namespace reasonkern {

constexpr int kTeamThreads = 256;  // of a block, at most
constexpr int kTeamBlocks = 8;     // of a cluster, at most: the largest portable one
constexpr int kMaxWarps = kTeamThreads / 32;
constexpr unsigned kPartBytes = 64;  // the largest value that is reduced
constexpr int kCandidates = 1024;

// Shared memory of a block. Nothing is static: the simulator keeps several blocks alive at once.
struct TeamShared {
  unsigned char parts[2][kMaxWarps][kPartBytes];
  double s[kMaxEntry], r[kMaxEntry];  // rejection state
  int64_t skip[kMaxEntry], mass[kMaxEntry];
  float log_weight[kMaxEntry];
  float thread_top[kTeamThreads];
  int64_t accepted;  // child that passed the coins, or -1
  bool patched;
  float bound;
  int count;
  float value[kCandidates];  // candidates of the top-k statistics
  int id[kCandidates];
  float top_value[kMaxTopK];  // this block's largest, in order
  int top_id[kMaxTopK];
};

class Team {
 public:
  __device__ explicit Team(TeamShared* shared) : shared_(shared), turn_(0) {}

  __device__ TeamShared* shared() const { return shared_; }
  __device__ bool leads() const { return cluster_rank() == 0 && threadIdx.x == 0; }
  __device__ int threads() const { return int(cluster_size() * blockDim.x); }
  __device__ int rank() const { return int(cluster_rank() * blockDim.x + threadIdx.x); }

  // op over the team's values by a fixed tree. Two sets of parts in turn: a set is written again
  // only behind the barrier of the other one, when everybody has read it.
  template <class T, class Op>
  __device__ T reduce(T value, T zero, Op op) {
    static_assert(sizeof(T) <= kPartBytes, "TeamShared::parts");
    auto* parts = shared_->parts[turn_];
    turn_ ^= 1;
    value = warp_reduce(value, op);
    if (threadIdx.x % 32 == 0) std::memcpy(parts[threadIdx.x / 32], &value, sizeof(T));
    cluster_sync();
    const int warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
    T total = zero;
    for (int first = 0; first < warps * int(cluster_size()); first += 32) {
      T part = zero;
      const int i = first + lane;
      if (i < warps * int(cluster_size())) {
        std::memcpy(&part, *cluster_map(parts + i % warps, unsigned(i / warps)), sizeof(T));
      }
      total = op(total, warp_reduce(part, op));
    }
    return total;
  }

 private:
  TeamShared* shared_;
  int turn_;
};

struct Sum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
  __device__ double operator()(double a, double b) const { return a + b; }
};

struct TakeBest {
  __device__ Best operator()(Best a, const Best& b) const {
    a.offer(b.score, b.id);
    return a;
  }
};

// ---- a row, four tokens at a time

template <class E>
struct alignas(sizeof(E) < 4 ? 4 * sizeof(E) : 16) Quad {
  E lane[4];
};

__device__ __forceinline__ float to_float(double x) { return float(x); }
template <class E>
__device__ __forceinline__ float to_float(E x) {
  return to_acc(x);
}

template <class E>
struct TeamRow {
  const E* logits;
  const int32_t* mask;  // of this row, or null
  int vocab;
  bool aligned;

  __device__ TeamRow(const LogitRows& rows, int64_t b, int64_t node)
      : logits(static_cast<const E*>(rows.data) + b * rows.stride_b + node * rows.stride_n),
        mask(rows.mask == nullptr ? nullptr
                                  : rows.mask + b * rows.mask_stride_b + node * rows.mask_stride_n),
        vocab(int(rows.vocab)),
        aligned(reinterpret_cast<std::uintptr_t>(logits) % sizeof(Quad<E>) == 0) {}

  // Logits of the tokens v … v + 3; -inf beyond the vocabulary.
  __device__ void load(int v, float (&x)[4]) const {
    if (aligned && v + 4 <= vocab) {
      const Quad<E> quad = *reinterpret_cast<const Quad<E>*>(logits + v);
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = to_float(quad.lane[k]);
    } else {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[k] = v + k < vocab ? to_float(logits[v + k]) : -kInf;
    }
  }

  __device__ void apply_mask(int v, float (&x)[4]) const {
    if (mask == nullptr || v >= vocab) return;
    const unsigned allowed = unsigned(mask[v / 32]) >> (v % 32);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = allowed >> k & 1 ? x[k] : -kInf;
  }

  __device__ float at(int64_t v) const {
    const bool allowed = mask == nullptr || (unsigned(mask[v / 32]) >> (v % 32) & 1) != 0;
    return allowed ? to_float(logits[v]) : -kInf;
  }

  // body(v, x) for this thread's share of the tokens; several loads are under way at a time.
  template <class Body>
  __device__ void each(const Team& team, const Body& body) const {
    constexpr int kAhead = 4;
    const int step = 4 * team.threads();
    for (int v = 4 * team.rank(); v < vocab; v += kAhead * step) {
      float x[kAhead][4];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) load(v + i * step, x[i]);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (v + i * step < vocab) body(v + i * step, x[i]);
      }
    }
  }
};

}  // namespace reasonkern
