// The kernels of logit control: a block per row. Their time is that of what waits for one another:
// reads, sums and branches. So what does not depend on the slot is asked for beside it, and its
// record, in one go, beside the logits of the sets. Every thread holds the record, folds the drafts
// and decides for itself: it takes as long as if one did, and nothing has to be handed over.
#pragma once

#include "../common/reduce.cuh"
#include "apply.h"
#include "commit.h"
#include "slot.cuh"

namespace reasonkern {
namespace modulation {

constexpr unsigned kMaxRowThreads = 512, kCommitThreads = 32;

struct RowShared {
  SetsCopy::Shared sets;
  double top[kMaxRowThreads / 32];  // of each warp
};

// Threads of a row: a warp, more of them where that shortens the way through sets or logits.
inline unsigned row_threads(int64_t entries, bool dense) {
  unsigned threads = dense ? kMaxRowThreads : 32;
  while (threads < kMaxRowThreads && threads < entries) threads *= 2;
  return threads;
}

template <class E>
struct Line {  // a row of logits
  typedef acc_t<E> Value;
  E* logits;
  int64_t vocab;

  __device__ Value get(int64_t id) const { return to_acc(logits[id]); }
  __device__ void set(int64_t id, Value z) const { logits[id] = from_acc<E>(z); }
};

// The entry of the sets that is the thread's, and its logit: asked for before they are known to
// matter. None where the block has fewer threads than there are entries.
template <class E>
struct Held {
  int64_t entry;  // -1: none
  E logit;

  __device__ static bool all(const State& s) { return s.entries <= blockDim.x; }

  __device__ explicit Held(const State& s) : entry(-1), logit() {
    const int64_t held = all(s) ? s.entries : 0;
    if (threadIdx.x < held) entry = s.sets.entries[threadIdx.x];
  }

  __device__ void ask(const Line<E>& line) {
    if (any() && id() >= line.vocab) entry = -1;
    if (any()) logit = load_now(line.logits + id());
  }

  __device__ bool any() const { return entry != -1; }
  __device__ int64_t id() const { return Sets::id_of(entry); }
  __device__ int64_t member() const { return Sets::member_of(entry); }
};

// Whether something finite is left in the row without the set. Each warp finds out for itself.
template <class E>
__device__ bool survives_ban(const Line<E>& line, const Sets& sets, int64_t ban) {
  constexpr int kEach = 8;
  for (int64_t first = lane_of(); first - lane_of() < line.vocab; first += 32 * kEach) {
    unsigned finite = 0;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int64_t id = first + 32 * k;
      if (id < line.vocab && is_finite(line.get(id))) finite |= 1u << k;
    }
    bool left = false;
    for (int k = 0; k < kEach && !left; ++k) {
      left = (finite >> k & 1) && !holds(sets, ban, first + 32 * k);
    }
    if (__any_sync(kFullMask, left)) return true;
  }
  return false;
}

// What the sets do to a row.
template <class E>
struct SetWriter {
  typedef typename Line<E>::Value Value;
  const Line<E>& line;
  const RowControl& c;
  uint32_t adding;  // sets
  bool moved;       // the thread has written a logit of the minimum

  __device__ SetWriter(const Line<E>& line, const RowControl& c)
      : line(line), c(c), adding(0), moved(false) {
#pragma unroll
    for (int part = 0; part < kAdders; ++part) adding |= bit_of(c.sets[part]);
  }

  __device__ E added(uint32_t member, Value z) const {
    return from_acc<E>(with_added(z, added_to(c, member)));
  }

  // NaN keeps its bits.
  __device__ void write(bool acts, int64_t id, Value z, bool bans, E added) {
    acts &= z == z;
    if (acts) line.logits[id] = bans ? from_acc<E>(-Value(kInfinity)) : added;
    moved |= acts & ((id == c.wait) | (id == c.end));
  }

  // An entry is read and written in the first of its sets that are used.
  __device__ void write_all(const Sets& sets) {
    const uint32_t ban = bit_of(c.ban), used = ban | adding;
    for (uint32_t left = used; left != 0; left &= left - 1) {
      const int set = __ffs(int(left)) - 1;
      for (int64_t k = sets.bounds[set] + threadIdx.x; k < sets.bounds[set + 1]; k += blockDim.x) {
        const uint32_t member = uint32_t(sets.member(k)), acting = member & used;
        const int64_t id = sets.id(k);
        if ((acting & (0 - acting)) != uint32_t(1) << set || id >= line.vocab) continue;
        const Value z = line.get(id);
        write(true, id, z, (member & ban) != 0, added(member, z));
      }
    }
  }
};

// The minimum's two logits, asked for before they are known to be moved.
template <class E>
struct Minimum {
  typedef typename Line<E>::Value Value;
  bool inside;  // both are in the row
  E wait, end;

  __device__ Minimum(const WarpRecord& record, const Line<E>& line) : wait(), end() {
    const int64_t from = record[kThinkEnd], to = record[kWait];
    inside = (from >= 0) & (from < line.vocab) & (to >= 0) & (to < line.vocab);
    if (inside) end = line.logits[from], wait = line.logits[to];
  }

  // `written`: the sets have written one of them.
  __device__ void move(const Line<E>& line, const RowControl& c, bool written,
                       const Divisor& heat) {
    if (!inside | (c.end < 0)) return;
    if (written) end = line.logits[c.end], wait = line.logits[c.wait];
    const E both = from_acc<E>(merged(to_acc(wait), to_acc(end), heat));
    if ((threadIdx.x != 0) | !can_wait(to_acc(wait))) return;
    line.logits[c.wait] = both;
    line.set(c.end, -Value(kInfinity));
  }
};

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
  wait_for_kernels_before();
  RowShared& s = *dynamic_shared<RowShared>();
  const unsigned request = blockIdx.x, node = blockIdx.y;
  const int64_t row = request * p.nodes + node, slot = p.slot[request];
  Held<E> held(p.state);
  const float temperature = p.temperature == nullptr ? 1.0f : p.temperature[row];
  const SetsCopy copy(p.state, p.draft_tokens != nullptr);
  const Drafts drafts(p, request, node);
  const Line<E> line{static_cast<E*>(p.logits) + row * p.stride, p.vocab};
  held.ask(line);
  const bool used = slot >= 0 && slot < p.state.slots;
  const WarpRecord record(p.state.record_of(used ? slot : 0), Needs::control);
  if (!used) return;
  const Divisor heat(temperature);
  Minimum<E> minimum(record, line);
  const Sets sets = copy.take(s.sets);
  const Progress at = fold_drafts(drafts, sets, record);
  RowControl c = control_by_id(record, at);  // a free slot has no parts
  SetWriter<E> writer(line, c);
  const uint32_t member = held.any() ? uint32_t(held.member()) : 0;
  const auto z = to_acc(held.logit);
  const E added = writer.added(member, z);
  const int64_t force = forced_id(record, at);
  if (force >= 0 && force < p.vocab && can_force(line.get(force))) {
    __syncthreads();
    if (threadIdx.x == 0) line.set(force, typename Line<E>::Value(kForced));
    return;
  }
  // Mostly a logit that is held answers whether a ban leaves something. All have been read here.
  const bool lasts = held.any() & ((member & bit_of(c.ban)) == 0) & is_finite(z);
  if (!__syncthreads_or(lasts) && c.ban >= 0) {
    if (!survives_ban(line, sets, c.ban)) c.ban = -1;
    __syncthreads();
  }
  // An id of several sets is held, and written alike, by several threads.
  const bool bans = (member & bit_of(c.ban)) != 0;
  writer.write(bans | ((member & writer.adding) != 0), held.id(), z, bans, added);
  if (!Held<E>::all(p.state)) writer.write_all(sets);
  minimum.move(line, c, __syncthreads_or(writer.moved), heat);
  if (!p.dense) return;
  add_soft(c, record, at);
  if (c.soft < 0 || c.soft >= p.vocab) return;
  __syncthreads();
  const auto top = largest(line, s.top);
  if (threadIdx.x == 0) line.set(c.soft, raised(line.get(c.soft), top, c.weight, c.margin));
}

// ---- commits

// The columns that pushes read and write, for requests that ask for them.
struct CommitShared {
  SetsCopy::Shared sets;
  int64_t record[kWindow];
};

// A warp per row of tokens.
__global__ void __launch_bounds__(kCommitThreads, 1) commit_kernel(CommitParams p) {
  wait_for_kernels_before();
  CommitShared& s = *dynamic_shared<CommitShared>();
  const unsigned b = blockIdx.x;
  const int64_t slot = p.slot[b], length = p.length[b], steps = p.steps;
  const int64_t first = b * steps, count = length < steps ? length : steps;
  int64_t own = lane_of() < steps ? p.tokens[first + lane_of()] : -1;
  const SetsCopy copy(p.state, true);
  if (slot < 0 || slot >= p.state.slots) return;
  int64_t* memory = p.records + slot * kRecordWidth;
  const WarpRecord record(memory, Needs::folds);
  const Sets sets = copy.take(s.sets);
  const bool watched = (record[kParts] & (kDeepConf | kTrigger)) != 0;
  for (int k = lane_of(); watched && k < kWindow; k += 32) s.record[k] = memory[k];
  __syncwarp();
  Written to = written_of(memory);
  to.progress = s.record;
  Progress at = load_progress(record);
  bool ended = false;
  for (int64_t j = 0; j < count && !ended; j += 32) {
    if (j > 0) own = j + lane_of() < steps ? p.tokens[first + j + lane_of()] : -1;
    const unsigned here = count - j < 32 ? (1u << (count - j)) - 1 : kFullMask;
    ended = fold_lanes(sets, record, at, own, here, watched, [&](int k, int64_t token, bool sw) {
      const bool says = watched && token != forced_id(record, at);
      fold(record, at, token, sw);
      if (!says) return;
      if (threadIdx.x == 0) push_statistics(p, s.record, to, first + j + k);
      __syncwarp();
      at.stopped = s.record[kStopped];
      __syncwarp();
    });
  }
  if ((record[kParts] & kActive) == 0) return;
  if (threadIdx.x == 0) store_progress(memory, at);
  if (watched && lane_of() >= kStopped && lane_of() < kProgressWidth) {
    memory[lane_of()] = s.record[lane_of()];
  }
}

}  // namespace modulation
}  // namespace reasonkern
