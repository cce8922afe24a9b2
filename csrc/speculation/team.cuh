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
  alignas(16) unsigned char parts[2][kMaxWarps][kPartBytes];
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
    if (threadIdx.x % 32 == 0) std::memcpy(aligned(parts[threadIdx.x / 32]), &value, sizeof(T));
    cluster_sync();
    const int warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
    T total = zero;
    for (int first = 0; first < warps * int(cluster_size()); first += 32) {
      T part = zero;
      const int i = first + lane;
      if (i < warps * int(cluster_size())) {
        const void* from = *cluster_map(parts + i % warps, unsigned(i / warps));
        std::memcpy(&part, aligned(from), sizeof(T));
      }
      total = op(total, warp_reduce(part, op));
    }
    return total;
  }

 private:
  // Of a part, which is then copied by words.
  template <class Void>
  __device__ static Void* aligned(Void* part) {
    return static_cast<Void*>(__builtin_assume_aligned(part, 16));
  }

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

// A row's logits as floats.
template <class E>
struct Elements {
  const E* data;
  bool aligned;

  __device__ Elements(const LogitRows& rows, int64_t offset)
      : data(static_cast<const E*>(rows.data) + offset),
        aligned(reinterpret_cast<std::uintptr_t>(data) % sizeof(Quad<E>) == 0) {}

  __device__ float at(int64_t v) const { return to_float(data[v]); }

  // x[i]: logits from v + i * step on, -inf beyond the vocabulary. All loads come before a use.
  template <int kAhead>
  __device__ void load(int v, int step, int vocab, float (&x)[kAhead][4]) const {
    Quad<E> quad[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i, v += step) {
      if (aligned && v + 4 <= vocab) {
        quad[i] = *reinterpret_cast<const Quad<E>*>(data + v);
      } else {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          quad[i].lane[k] = v + k < vocab ? data[v + k] : from_acc<E>(-kInf);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) x[i][k] = to_float(quad[i].lane[k]);
    }
  }
};

// Any element type, told apart where logits are loaded: one kernel instead of four.
struct AnyElement;

template <>
struct Elements<AnyElement> {
  const LogitRows& rows;
  int64_t offset;

  __device__ Elements(const LogitRows& rows, int64_t offset) : rows(rows), offset(offset) {}

  template <class Body>
  __device__ void visit(const Body& body) const {
    switch (rows.type) {
      case ElementType::kFloat32:
        return body(Elements<float>(rows, offset));
      case ElementType::kBFloat16:
        return body(Elements<bf16>(rows, offset));
      case ElementType::kFloat16:
        return body(Elements<fp16>(rows, offset));
      case ElementType::kFloat64:
        return body(Elements<double>(rows, offset));
    }
  }

  RK_DEVICE_CALL float at(int64_t v) const {
    float x = 0;
    visit([&](const auto& elements) { x = elements.at(v); });
    return x;
  }

  template <int kAhead>
  __device__ void load(int v, int step, int vocab, float (&x)[kAhead][4]) const {
    visit([&](const auto& elements) { elements.load(v, step, vocab, x); });
  }
};

template <class E>
struct TeamRow {
  Elements<E> logits;
  const int32_t* mask;  // of this row, or null
  int vocab;

  __device__ TeamRow(const LogitRows& rows, int64_t b, int64_t node)
      : logits(rows, b * rows.stride_b + node * rows.stride_n),
        mask(rows.mask == nullptr ? nullptr
                                  : rows.mask + b * rows.mask_stride_b + node * rows.mask_stride_n),
        vocab(int(rows.vocab)) {}

  __device__ void apply_mask(int v, float (&x)[4]) const {
    if (mask == nullptr || v >= vocab) return;
    const unsigned allowed = unsigned(mask[v / 32]) >> (v % 32);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = allowed >> k & 1 ? x[k] : -kInf;
  }

  __device__ float at(int64_t v) const {
    const bool allowed = mask == nullptr || (unsigned(mask[v / 32]) >> (v % 32) & 1) != 0;
    return allowed ? logits.at(v) : -kInf;
  }

  // body(v, x) for this thread's share of the tokens; kAhead loads are under way at a time.
  template <int kAhead = 4, class Body>
  __device__ void each(const Team& team, const Body& body) const {
    const Elements<E> from = logits;
    const int step = 4 * team.threads();
    for (int v = 4 * team.rank(); v < vocab; v += kAhead * step) {
      float x[kAhead][4];
      from.load(v, step, vocab, x);
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (v + i * step < vocab) body(v + i * step, x[i]);
      }
    }
  }
};

}  // namespace reasonkern
