// What a block needs to know of a request: the record of its slot and the sets, in shared memory,
// and the drafts before its row, in registers.
#pragma once

#include "warp_record.cuh"

namespace reasonkern {
namespace modulation {

struct SlotShared {
  static constexpr int kSets = 192;  // bounds and entries
  alignas(16) int64_t record[kRowWidth];
  int64_t sets[kSets];
};

// More of them stay where they are.
constexpr int kSharedEntries = SlotShared::kSets - Sets::kEntries;

// The state of one slot on its way to shared memory: the first warp brings it, and all its reads
// are under way before one is waited for. The sets come along where tokens are looked for in them.
class SlotCopy {
 public:
  const int64_t number;  // of the slot

  __device__ SlotCopy(const State& s, const int64_t* slot, bool with_sets)
      : number(*slot), state_(s), places_(0) {
    if (with_sets) places_ = fits() ? Sets::kEntries + int(s.entries) : kMaxSets + 1;
#pragma unroll
    for (int k = 0; k < kSetsEach; ++k) {
      const int i = int(threadIdx.x) + 32 * k;
      sets_[k] = threadIdx.x < 32 && i < places_ ? s.sets.bounds[i] : 0;
    }
  }

  __device__ void ask_record() {
    used_ = number >= 0 && number < state_.slots;
    if (!used_ || threadIdx.x >= 32) return;
    const int64_t* record = state_.record_of(number) + threadIdx.x;
#pragma unroll
    for (int k = 0; k < kRecordEach; ++k) record_[k] = record[32 * k];
  }

  // Whether the slot is controlled. All threads of the block call it; what they wrote to shared
  // memory before is there after it, too.
  __device__ bool take(SlotShared& to) const {
    if (!used_) return false;
    if (threadIdx.x < 32) put(record_, to.record);
    if (threadIdx.x < 32 && places_ > 0) put(sets_, to.sets);
    __syncthreads();
    return (to.record[kParts] & kActive) != 0;
  }

  __device__ Sets sets(const SlotShared& taken) const {
    if (places_ == 0) return state_.sets;
    return {taken.sets, fits() ? taken.sets + Sets::kEntries : state_.sets.entries};
  }

 private:
  static constexpr int kSetsEach = SlotShared::kSets / 32, kRecordEach = kRowWidth / 32;
  static_assert(kRowWidth % 32 == 0 && SlotShared::kSets % 32 == 0, "whole turns of a warp");

  __device__ bool fits() const { return state_.entries <= kSharedEntries; }

  template <int N>
  __device__ static void put(const int64_t (&from)[N], int64_t* to) {
#pragma unroll
    for (int k = 0; k < N; ++k) to[int(threadIdx.x) + 32 * k] = from[k];
  }

  const State& state_;
  bool used_;
  int places_;
  int64_t sets_[kSetsEach], record_[kRecordEach];
};

// Tokens that may lie on the path to a row, the first 32 of them held by a warp, one by each lane.
struct Drafts {
  const int64_t* tokens;
  const int32_t* parents;  // of a tree's nodes; null: all are on the path
  int count;
  int64_t token;
  int parent;

  // Of node `node` of request `request`.
  __device__ Drafts(const RowsParams& p, unsigned request, unsigned node)
      : tokens(p.draft_tokens), parents(p.parents), count(0), token(-1), parent(-1) {
    if (tokens == nullptr) return;
    if (parents != nullptr) {
      tokens += request * p.nodes;
      count = int(node) + 1;
      if (lane_of() < count) parent = parents[lane_of()];
    } else if (p.local_pos != nullptr) {
      const int64_t drafts = p.local_pos[request], most = int64_t(request) + 1;
      count = drafts > 0 && drafts <= most ? int(drafts) : 0;  // a padding row may hold anything
      tokens += most - count;
    }
    if (lane_of() < count) token = tokens[lane_of()];
  }

  // Of the 32 from `first` on, those on the path, which is walked from below. The root's token is
  // no draft.
  __device__ unsigned path(int first) const {
    if (parents == nullptr) return count - first < 32 ? (1u << (count - first)) - 1 : kFullMask;
    unsigned bits = 0;
    int i = count - 1;
    for (; i >= 32; i = parents[i]) bits |= i >= first && i < first + 32 ? 1u << (i - first) : 0;
    if (first > 0) return bits;
    for (; i > 0; i = shuffle_from(parent, i)) bits |= 1u << i;
    return bits;
  }
};

// The lanes up to the last of some, which are not none.
__device__ inline unsigned up_to_last(unsigned lanes) {
  for (int width = 1; width < 32; width *= 2) lanes |= lanes >> width;
  return lanes;
}

// As `switches`, for a lane's own token, which may be none. All lanes halve the set alike.
__device__ inline bool lane_switches(const Sets& sets, const WarpRecord& record, int64_t token) {
  if ((record[kParts] & kTip) == 0) return false;
  const int64_t set = record[kAddedSets + 1];
  const int64_t* entry = sets.entries + sets.bounds[set];
  int count = int(sets.bounds[set + 1] - sets.bounds[set]);
  if (count == 0) return false;
  RK_ROLLED while (count > 1) {
    const int half = count / 2;
    if (Sets::id_of(entry[half]) <= token) entry += half;
    count -= half;
  }
  return Sets::id_of(*entry) == token;
}

// Whether the token is more than a count to a request outside a phrase.
__device__ inline bool is_mark(const WarpRecord& record, const Progress& p, int64_t token) {
  if (p.phase == kBefore) return token == record[kThinkStart];
  if (p.phase != kThinking) return false;
  return token == record[kThinkEnd] ||
         ((record[kParts] & kMinThink) && must_think(record, p) && token == record[kWait]);
}

// Advances progress by the tokens that the lanes of `path` hold, in order, up to the first -1;
// returns whether there was one. Mostly no token of a warp is one that a request waits for, and
// then their number is all that counts. Else, and where `each` is asked for, step(k, token,
// switches) folds the one of lane k.
template <class Step>
__device__ bool fold_lanes(const Sets& sets, const WarpRecord& record, Progress& p, int64_t own,
                           unsigned path, bool each, Step step) {
  const unsigned ends = __ballot_sync(kFullMask, own < 0) & path;
  if (ends != 0) path &= (ends & (0 - ends)) - 1;
  const unsigned switched = __ballot_sync(kFullMask, lane_switches(sets, record, own)) & path;
  const bool marks = own >= 0 && is_mark(record, p, own);
  const int count = __popc(path);
  const bool tracks =
      (record[kParts] & kBudget) && p.phrase != kDone && p.spent + count > record[kTrackFrom];
  if (!each && !tracks && p.wait == 0 && (__ballot_sync(kFullMask, marks) & path) == 0) {
    if (switched != 0) p.switched = p.t + __popc(path & up_to_last(switched));
    p.t += count;
    if (p.phase == kThinking) p.spent += count;
    return ends != 0;
  }
  for (; path != 0; path &= path - 1) {
    const int k = __ffs(int(path)) - 1;
    step(k, shuffle_from(own, k), switched >> k & 1);
  }
  return ends != 0;
}

// Committed progress advanced by the drafts, up to the first -1. Parents come before children.
__device__ inline Progress fold_drafts(const Drafts& d, const Sets& sets, const WarpRecord& record) {
  Progress p = load_progress(record);
  bool ended = false;
  for (int first = 0; first < d.count && !ended; first += 32) {
    int64_t own = d.token;
    if (first > 0) own = first + lane_of() < d.count ? d.tokens[first + lane_of()] : -1;
    ended =
        fold_lanes(sets, record, p, own, d.path(first), false,
                   [&](int, int64_t token, bool switches) { fold(record, p, token, switches); });
  }
  return p;
}

}  // namespace modulation
}  // namespace reasonkern
