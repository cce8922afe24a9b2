// What a block needs to know beside the record of its slot: the sets, in shared memory, and the
// drafts before its row, in registers.
#pragma once

#include "warp_record.cuh"

namespace reasonkern {
namespace modulation {

// Volatile: not put off until it is needed.
template <class E>
__device__ E load_now(const E* p) {
  typedef std::conditional_t<sizeof(E) == 2, uint16_t,
                             std::conditional_t<sizeof(E) == 4, uint32_t, uint64_t>>
      Bits;
  return recast<E>(Bits(*reinterpret_cast<const volatile Bits*>(p)));
}

// Sets on their way to shared memory, where tokens are looked for in them; the first warp brings
// them. Entries that are too many stay where they are.
class SetsCopy {
 public:
  static constexpr int kPlaces = 192;  // bounds and entries
  struct Shared {
    int64_t places[kPlaces];
  };

  __device__ SetsCopy(const State& s, bool wanted) : from_(s.sets), places_(0) {
    if (!wanted) return;
    fits_ = s.entries <= kPlaces - Sets::kEntries;
    places_ = fits_ ? Sets::kEntries + int(s.entries) : kMaxSets + 1;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = int(threadIdx.x) + 32 * k;
      if (i < places_ && threadIdx.x < 32) own_[k] = from_.bounds[i];
    }
  }

  // All threads of the block call it.
  __device__ Sets take(Shared& to) const {
    if (places_ == 0) return from_;
#pragma unroll
    for (int k = 0; k < kEach; ++k) {
      const int i = int(threadIdx.x) + 32 * k;
      if (i < places_ && threadIdx.x < 32) to.places[i] = own_[k];
    }
    __syncthreads();
    return {to.places, fits_ ? to.places + Sets::kEntries : from_.entries};
  }

 private:
  static constexpr int kEach = kPlaces / 32;

  const Sets from_;
  int places_;
  bool fits_;
  int64_t own_[kEach];
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

// Whether a token is more than a count to a request that is in neither phrase; `ahead`: it is among
// the next so many.
__device__ inline bool is_mark(const WarpRecord& record, const Progress& p, int64_t token,
                               int ahead) {
  const int64_t parts = record[kParts];
  const bool waits = ((parts & kMinThink) != 0) & must_think(record, p);
  const bool tracks =
      ((parts & kBudget) != 0) & (p.phrase != kDone) & (p.spent + ahead > record[kTrackFrom]);
  const bool thinks = (token == record[kThinkEnd]) | (waits & (token == record[kWait])) |
                      (tracks & (token == entry(record, kEnd, 0)));
  return ((p.phase == kThinking) & thinks) |
         ((p.phase == kBefore) & (token == record[kThinkStart]));
}

// Progress after so many tokens that are none.
__device__ inline void count_tokens(Progress& p, unsigned lanes, unsigned switched) {
  if ((switched & lanes) != 0) p.switched = p.t + __popc(lanes & up_to_last(switched & lanes));
  p.t += __popc(lanes);
  if (p.phase == kThinking) p.spent += __popc(lanes);
}

// Advances progress by the tokens that the lanes of `path` hold, in order, up to the first -1;
// returns whether there was one. Mostly no token of a warp is one that a request waits for, and
// then their number is all that counts. step(k, token, switches) folds the one of lane k where it
// is, and each of them inside a phrase or where `each` is asked for.
template <class Step>
__device__ bool fold_lanes(const Sets& sets, const WarpRecord& record, Progress& p, int64_t own,
                           unsigned path, bool each, Step step) {
  const unsigned ends = __ballot_sync(kFullMask, own < 0) & path;
  if (ends != 0) path &= (ends & (0 - ends)) - 1;
  const unsigned switched = __ballot_sync(kFullMask, lane_switches(sets, record, own));
  while (path != 0) {
    const bool all = each | (p.wait > 0) | (p.phrase > 0);
    const bool mark = all | ((own >= 0) & is_mark(record, p, own, __popc(path)));
    const unsigned marks = __ballot_sync(kFullMask, mark) & path, next = marks & (0 - marks);
    const unsigned before = path & (next - 1);  // all where there is none
    count_tokens(p, before, switched);
    path &= ~before & ~next;
    if (next == 0) break;
    const int k = __ffs(int(next)) - 1;
    step(k, shuffle_from(own, k), switched >> k & 1);
  }
  return ends != 0;
}

// Committed progress advanced by the drafts, up to the first -1. Parents come before children.
__device__ inline Progress fold_drafts(const Drafts& d, const Sets& sets,
                                       const WarpRecord& record) {
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
