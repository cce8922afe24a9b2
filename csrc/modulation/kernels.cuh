// The kernels of logit control: a block per row. Their time is that of reads that wait for one
// another. So what does not depend on the slot is asked for beside it, and its record, in one go,
// beside the logits of the sets. Every thread folds the drafts and decides for itself: it takes as
// long as if one did, and nothing has to be handed over.
#pragma once

#include "../common/reduce.cuh"
#include "apply.h"
#include "commit.h"
#include "slot.cuh"

namespace reasonkern {
namespace modulation {

constexpr unsigned kMaxRowThreads = 512, kCommitThreads = 32;

struct RowShared {
  SlotShared slot;
  bool moved;                       // the sets have written a logit of the minimum
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
    if (all(s) && threadIdx.x < s.entries) entry = s.sets.entries[threadIdx.x];
  }

  __device__ void ask(const Line<E>& line) {
    if (any() && id() >= line.vocab) entry = -1;
    if (any()) logit = line.logits[id()];
  }

  __device__ bool any() const { return entry != -1; }
  __device__ int64_t id() const { return Sets::id_of(entry); }
  __device__ int64_t member() const { return Sets::member_of(entry); }
};

// Whether something finite is left without the set. Each warp finds out for itself: by what it
// holds, then by all of the row.
template <class E>
__device__ bool survives_ban(const Line<E>& line, const Held<E>& held, const Sets& sets,
                             int64_t ban) {
  const bool other = held.any() && (held.member() >> ban & 1) == 0;
  if (__any_sync(kFullMask, other && is_finite(to_acc(held.logit)))) return true;
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
  bool& moved;
  uint32_t used;

  __device__ SetWriter(const Line<E>& line, const RowControl& c, bool& moved)
      : line(line), c(c), moved(moved), used(bit_of(c.ban)) {
#pragma unroll
    for (int part = 0; part < kAdders; ++part) used |= bit_of(c.sets[part]);
  }

  // NaN keeps its bits.
  __device__ void write(int64_t id, int64_t member, Value z) const {
    if (z != z) return;
    const bool bans = (uint32_t(member) & bit_of(c.ban)) != 0;
    const Value after = bans ? Value(-kInfinity) : with_added(z, added_to(c, member));
    line.logits[id] = from_acc<E>(after);
    if (id == c.wait || id == c.end) moved = true;
  }

  // An id of several sets is held, and written alike, by several threads: all have read it before.
  __device__ void write_held(const Held<E>& held) const {
    if (held.any() && (uint32_t(held.member()) & used) != 0) {
      write(held.id(), held.member(), to_acc(held.logit));
    }
  }

  // An entry is read and written in the first of its sets that are used.
  __device__ void write_all(const Sets& sets) const {
    for (uint32_t left = used; left != 0; left &= left - 1) {
      const int set = __ffs(int(left)) - 1;
      for (int64_t k = sets.bounds[set] + threadIdx.x; k < sets.bounds[set + 1]; k += blockDim.x) {
        const uint32_t acting = uint32_t(sets.member(k)) & used;
        const int64_t id = sets.id(k);
        if ((acting & (0 - acting)) != uint32_t(1) << set || id >= line.vocab) continue;
        write(id, sets.member(k), line.get(id));
      }
    }
  }
};

// The minimum's two logits, asked for before they are known to be moved.
template <class E>
struct Minimum {
  E wait, end;

  __device__ Minimum(const WarpRecord& record, const Line<E>& line) : wait(), end() {
    const int64_t from = record[kThinkEnd], to = record[kWait];
    const bool asks = from >= 0 && from < line.vocab && to >= 0 && to < line.vocab;
    if (asks) ask(line, from, to);
  }

  __device__ void move(const Line<E>& line, const RowControl& c, bool moved, const Divisor& heat) {
    typedef typename Line<E>::Value Value;
    if (c.end < 0 || c.end >= line.vocab || c.wait >= line.vocab) return;
    if (moved) ask(line, c.end, c.wait);
    if (threadIdx.x != 0 || !can_wait(to_acc(wait))) return;
    line.set(c.wait, merged(to_acc(wait), to_acc(end), heat));
    line.set(c.end, -Value(kInfinity));
  }

 private:
  __device__ void ask(const Line<E>& line, int64_t from, int64_t to) {
    end = line.logits[from], wait = line.logits[to];
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
  const int64_t row = request * p.nodes + node;
  SlotCopy copy(p.state, p.slot + request, p.draft_tokens != nullptr);
  Held<E> held(p.state);
  const Drafts drafts(p, request, node);
  const float temperature = p.temperature == nullptr ? 1.0f : p.temperature[row];
  copy.ask_record();
  const Line<E> line{static_cast<E*>(p.logits) + row * p.stride, p.vocab};
  held.ask(line);
  if (threadIdx.x == 0) s.moved = false;
  const Divisor heat(temperature);
  if (!copy.take(s.slot)) return;
  const WarpRecord record(s.slot.record);
  Minimum<E> minimum(record, line);
  const Sets sets = copy.sets(s.slot);
  RowControl c = control_of(record, fold_drafts(drafts, sets, record));
  if (c.force >= 0 && c.force < p.vocab && can_force(line.get(c.force))) {
    __syncthreads();
    if (threadIdx.x == 0) line.set(c.force, typename Line<E>::Value(kForced));
    return;
  }
  if (c.ban >= 0) {
    if (!survives_ban(line, held, sets, c.ban)) c.ban = -1;
    __syncthreads();
  }
  const SetWriter<E> writer(line, c, s.moved);
  writer.write_held(held);
  if (!Held<E>::all(p.state)) writer.write_all(sets);
  __syncthreads();
  minimum.move(line, c, s.moved, heat);
  if (!p.dense || c.soft < 0 || c.soft >= p.vocab) return;
  __syncthreads();
  const auto top = largest(line, s.top);
  if (threadIdx.x == 0) line.set(c.soft, raised(line.get(c.soft), top, c.weight, c.margin));
}

// ---- commits

// A warp per row of tokens.
__global__ void __launch_bounds__(kCommitThreads, 1) commit_kernel(CommitParams p) {
  wait_for_kernels_before();
  SlotShared& s = *dynamic_shared<SlotShared>();
  const unsigned b = blockIdx.x;
  SlotCopy copy(p.state, p.slot + b, true);
  const int64_t length = p.length[b], steps = p.steps;
  const int64_t first = b * steps, count = length < steps ? length : steps;
  int64_t own = lane_of() < steps ? p.tokens[first + lane_of()] : -1;
  copy.ask_record();
  if (!copy.take(s)) return;
  const Sets sets = copy.sets(s);
  const WarpRecord asked(s.record);
  int64_t* record = p.records + copy.number * kRecordWidth;
  Written to = written_of(record);
  to.progress = s.record;
  Progress at = load_progress(asked);
  const bool watched = (asked[kParts] & (kDeepConf | kTrigger)) != 0;
  bool ended = false;
  for (int64_t j = 0; j < count && !ended; j += 32) {
    if (j > 0) own = j + lane_of() < steps ? p.tokens[first + j + lane_of()] : -1;
    const unsigned here = count - j < 32 ? (1u << (count - j)) - 1 : kFullMask;
    ended = fold_lanes(sets, asked, at, own, here, watched, [&](int k, int64_t token, bool sw) {
      const bool says = watched && token != forced_id(asked, at);
      fold(asked, at, token, sw);
      if (!says) return;
      if (threadIdx.x == 0) push_statistics(p, s.record, to, first + j + k);
      __syncwarp();
      at.stopped = s.record[kStopped];
      __syncwarp();
    });
  }
  __syncthreads();  // all have read what is replaced
  if (threadIdx.x == 0) store_progress(s.record, at);
  __syncthreads();
  if (threadIdx.x < kProgressWidth) record[threadIdx.x] = s.record[threadIdx.x];
}

}  // namespace modulation
}  // namespace reasonkern
