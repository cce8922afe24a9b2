// The kernels of logit control: a block per row. What a row needs of its slot is brought into
// shared memory at once, since reading it column by column would be a chain of waits; one thread
// folds the drafts and decides; all threads write the sets.
#pragma once

#include "../common/reduce.cuh"
#include "apply.h"
#include "commit.h"

namespace reasonkern {
namespace modulation {

constexpr unsigned kMaxRowThreads = 512, kCommitThreads = 32;

constexpr int kSharedEntries = 128;  // more of them stay where they are

struct SlotShared {
  int64_t record[kRowWidth], sets[Sets::kEntries + kSharedEntries];
};

struct RowShared {
  SlotShared slot;
  RowControl control;
  bool forced;
  double top[kMaxRowThreads / 32];  // of each warp
};

// Threads of a row: a warp, more of them where that shortens the way through sets or logits.
inline unsigned row_threads(int64_t entries, bool dense) {
  unsigned threads = dense ? kMaxRowThreads : 32;
  while (threads < kMaxRowThreads && threads < entries) threads *= 2;
  return threads;
}

// The state of one slot, number 0, in shared memory, and none for padding. All threads of the block
// call it. The sets come while the slot is waited for, and the record in one go.
__device__ inline State take_slot(const State& s, const int64_t* slot, SlotShared& to) {
  const int64_t own = *slot;
  const int first = int(threadIdx.x), step = int(blockDim.x);
  const bool fits = s.entries <= kSharedEntries;
  const int places = fits ? Sets::kEntries + int(s.entries) : kMaxSets + 1;
#pragma unroll 4
  for (int i = first; i < places; i += step) to.sets[i] = s.sets.bounds[i];
  const Sets sets{to.sets, fits ? to.sets + Sets::kEntries : s.sets.entries};
  if (own < 0 || own >= s.slots) return {to.record, sets, 0, s.entries};
  const int64_t* record = s.record_of(own);
#pragma unroll 9
  for (int i = first; i < kRowWidth; i += step) to.record[i] = record[i];
  __syncthreads();
  return {to.record, sets, 1, s.entries};
}

template <class E>
struct Line {  // a row of logits
  typedef acc_t<E> Value;
  E* logits;
  int64_t vocab;

  __device__ Value get(int64_t id) const { return to_acc(logits[id]); }
  __device__ void set(int64_t id, Value z) const { logits[id] = from_acc<E>(z); }
};

// Whether something finite is left without the set; a warp asks, mostly once.
template <class E>
__device__ bool survives_ban(const Line<E>& line, const Sets& sets, int64_t ban) {
  constexpr int kEach = 8;
  for (int64_t first = threadIdx.x; first - threadIdx.x < line.vocab; first += 32 * kEach) {
    bool left = false;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t id = first + 32 * k;
      left |= id < line.vocab && is_finite(line.get(id)) && !holds(sets, ban, id);
    }
    if (__any_sync(kFullMask, left)) return true;
  }
  return false;
}

// By the first warp: the row's control, a ban that does not apply taken out, and the force applied.
template <class E>
__device__ void decide(const RowsParams& one, const Line<E>& line, RowShared& s) {
  if (threadIdx.x == 0) {
    const unsigned row = blockIdx.x, nodes = unsigned(one.nodes);
    const Progress progress = one.parents == nullptr ? fold_chain(one, 0, row)
                                                     : fold_tree(one, 0, row / nodes, row % nodes);
    s.control = control_of(one.state.records, progress);
    const int64_t id = s.control.force;
    s.forced = id >= 0 && id < line.vocab && can_force(line.get(id));
    if (s.forced) line.set(id, typename Line<E>::Value(kForced));
  }
  __syncwarp();
  const int64_t ban = s.control.ban;
  if (s.forced || ban < 0) return;
  if (!survives_ban(line, one.state.sets, ban) && threadIdx.x == 0) s.control.ban = -1;
}

// Every entry is written by one thread, in the first of its sets. NaN keeps its bits.
template <class E>
__device__ void write_sets(const Line<E>& line, const RowControl& c, const Sets& sets) {
  typedef typename Line<E>::Value T;
  if (c.ban >= 0) {
    const int64_t last = sets.bounds[c.ban + 1];
    for (int64_t k = sets.bounds[c.ban] + threadIdx.x; k < last; k += blockDim.x) {
      const int64_t id = sets.id(k);
      if (id < line.vocab && line.get(id) == line.get(id)) line.set(id, T(-kInfinity));
    }
  }
  const int64_t bans = c.ban >= 0 ? int64_t(1) << c.ban : 0;
#pragma unroll
  for (int part = 0; part < kAdders; ++part) {
    if (c.sets[part] < 0) continue;
    const int64_t done = bans | sets_before(c, part);
    const int64_t last = sets.bounds[c.sets[part] + 1];
    for (int64_t k = sets.bounds[c.sets[part]] + threadIdx.x; k < last; k += blockDim.x) {
      const int64_t id = sets.id(k), member = sets.member(k);
      if (id >= line.vocab || (member & done)) continue;
      const T z = line.get(id);
      if (z == z) line.set(id, with_added(z, added_to(c, member)));
    }
  }
}

// The largest finite logit, for the first thread.
template <class E>
__device__ typename Line<E>::Value largest(const Line<E>& line, double* tops) {
  typedef typename Line<E>::Value T;
  T top = -T(kInfinity);
#pragma unroll 8
  for (int64_t id = threadIdx.x; id < line.vocab; id += blockDim.x) {
    const T z = line.get(id);
    top = z > top && z < T(kInfinity) ? z : top;
  }
  top = warp_reduce(top, [](T a, T b) { return a > b ? a : b; });
  if (threadIdx.x % 32 == 0) tops[threadIdx.x / 32] = top;
  __syncthreads();
  for (unsigned w = 0; threadIdx.x == 0 && w < blockDim.x / 32; ++w) {
    top = T(tops[w]) > top ? T(tops[w]) : top;
  }
  return top;
}

template <class E>
__global__ void __launch_bounds__(kMaxRowThreads, 1) modulate_kernel(RowsParams p) {
  RowShared& s = *dynamic_shared<RowShared>();
  const unsigned row = blockIdx.x;
  const unsigned request = p.parents == nullptr ? row : row / unsigned(p.nodes);
  RowsParams one = p;
  one.state = take_slot(p.state, p.slot + request, s.slot);
  if (!one.state.controls(0)) return;
  const Line<E> line{static_cast<E*>(p.logits) + int64_t(row) * p.stride, p.vocab};
  if (threadIdx.x < 32) decide(one, line, s);
  __syncthreads();
  if (s.forced) return;
  const RowControl& c = s.control;
  write_sets(line, c, one.state.sets);
  __syncthreads();
  if (threadIdx.x == 0) {
    move_to_wait(line, c, p.vocab, p.temperature == nullptr ? 1.0f : p.temperature[row]);
  }
  if (!p.dense || c.soft < 0 || c.soft >= p.vocab) return;
  __syncthreads();
  const auto top = largest(line, s.top);
  if (threadIdx.x == 0) line.set(c.soft, raised(line.get(c.soft), top, c.weight, c.margin));
}

// A warp per row of tokens; one thread folds them.
__global__ void __launch_bounds__(kCommitThreads, 1) commit_kernel(CommitParams p) {
  SlotShared& s = *dynamic_shared<SlotShared>();
  const unsigned b = blockIdx.x;
  CommitParams one = p;
  one.state = take_slot(p.state, p.slot + b, s);
  if (!one.state.controls(0)) return;
  int64_t* record = p.records + p.slot[b] * kRecordWidth;
  Written to = written_of(record);
  to.progress = s.record;
  if (threadIdx.x == 0) commit_row(one, b, s.record, to);
  __syncthreads();
  if (threadIdx.x < kProgressWidth) record[threadIdx.x] = s.record[threadIdx.x];
}

}  // namespace modulation
}  // namespace reasonkern
