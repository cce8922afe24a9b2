// The raw statistics of a row: its k largest logits and its log-sum-exp. A block collects its
// candidates for the k largest while it sweeps its slice, and ranks them against each other.
#pragma once

#include "team_draw.cuh"

namespace reasonkern {

// This block's k largest logits of its slice, of the allowed ones or of all, one pass each: where
// ties overflow the candidates.
template <bool Allowed, class Row>
__device__ void rank_slowly(Team& team, const Row& row, int k) {
  Best last{kInf, -1};
  for (int place = 0; place < k; ++place) {
    Best best{-kInf, -1};
    row.each_quad([&](int v, float (&x)[4]) {
      if (Allowed) row.apply_mask(v, x);
      for (int j = 0; j < 4; ++j) {
        if (comes_before(last.score, last.id, x[j], v + j)) best.offer(x[j], v + j);
      }
    });
    last = team.reduce_block(best, TakeBest());
    if (threadIdx.x == 0) put(team.shared()->top, place, last.score, last.id);
  }
}

// This block's k largest of its candidates, of which there are more. Their readers are behind a
// barrier.
template <bool Allowed, class Row>
__device__ void rank_candidates(Team& team, const Row& row, int k) {
  TeamShared& s = *team.shared();
  if (s.count > kCandidates) return rank_slowly<Allowed>(team, row, k);
  for (int i = int(threadIdx.x); i < s.count; i += int(blockDim.x)) {
    const float value = s.candidates[i / 2].value[i % 2];
    const int id = s.candidates[i / 2].id[i % 2];
    int place = 0;
#pragma unroll 1
    for (int j = 0; j < s.count; j += 2) {
      const TopPair other = s.candidates[j / 2];
      const bool second = comes_before(other.value[1], other.id[1], value, id);
      place += comes_before(other.value[0], other.id[0], value, id) + (second & (j + 1 < s.count));
    }
    if (place < k) put(s.top, place, value, id);
  }
}

// This block's candidates for the k largest logits to the first block or to all, in any order where
// they are few. A barrier lies between the sweep that collected them and this.
template <bool Allowed, class Row>
__device__ void send_candidates(Team& team, const Row& row, int k, bool to_all) {
  TeamShared& s = *team.shared();
  if (s.count <= (k + 1) / 2 * 2) return team.send_tops(s.candidates, s.count, k, to_all);
  rank_candidates<Allowed>(team, row, k);
  __syncthreads();
  team.send_tops(s.top, k, k, to_all);
}

// Calls body(place, value, id) for the k largest logits in the lists of `lists` blocks; a list to a
// warp.
template <class Body>
__device__ __forceinline__ void merge_tops(const TopPair (*tops)[kMaxTopK / 2], int k, int lists,
                                           const Body& body) {
  const int pairs = (k + 1) / 2, warps = int(blockDim.x / 32);
  for (int mine = int(threadIdx.x / 32); mine < lists; mine += warps) {
    for (int i = int(threadIdx.x % 32); i < 2 * pairs; i += 32) {
      const float value = tops[mine][i / 2].value[i % 2];
      const int id = tops[mine][i / 2].id[i % 2];
      if (id < 0) continue;
      int place = 0;
#pragma unroll 1
      for (int list = 0; list < lists; ++list) {
#pragma unroll 1
        for (int j = 0; j < pairs; ++j) {
          const TopPair other = tops[list][j];
          if (other.id[0] < 0) break;  // nothing behind it
          place += comes_before(other.value[0], other.id[0], value, id) +
                   comes_before(other.value[1], other.id[1], value, id);
        }
      }
      if (place < k) body(place, value, id);
    }
  }
}

// All logits below it, however many, are worth no more than 2^-22 of the sum of exp.
__device__ __forceinline__ float least_of(float top, int vocab) {
  return top - 0.6931472f * float(22 + 32 - __clz(vocab));
}

// Sees a row's tokens while one is drawn, as they came. exp in base 2: its error of 2^-22 of a
// token, and the 2^-22 of the sum that groups are worth that lie too low, are its largest.
class RawStatistics {
 public:
  static constexpr bool kSeesAll = false;

  // `top`: the row's largest logit; k of `groups` groups of its tokens bound the candidates.
  __device__ RawStatistics(Team& team, float top, int k, int vocab, const float* group_top,
                           int groups)
      : shared_(*team.shared()),
        top_(top > -kInf ? top : 0.0f),
        least_(least_of(top_, vocab)),
        bound_(candidate_bound(group_top, groups, k)),
        k_(k) {}

  __device__ float floor() const { return fminf(least_, bound_); }

  // Integers are added, whose sum has no order. No row that is sound has more than 1 a token. How
  // many of the groups below `floor` come here depends on how fast the draw's bar rises.
  template <class Row, class Group>
  __device__ void raw(const Row& row, const Group& group, float top) {
    if (top < floor()) return;
    float sum = 0;
    group.each([&](int, const float (&x)[4], int) {
      sum += (weight(x[0]) + weight(x[1])) + (weight(x[2]) + weight(x[3]));
    });
    sum_ += sum <= float(kGroupTokens) ? int64_t(sum * 0x1p40f) : 0;
    if (top < bound_) return;
#pragma unroll 1  // rarely entered: one copy
    for (int quad = 0; quad < group.kQuads && group.quad_of(quad) < group.last; ++quad) {
      float x[4];
      row.read(group.quad_of(quad), x);
      if (!(top_of(x) < bound_)) add_candidates(shared_, bound_, group.quad_of(quad), x);
    }
  }
  template <class Row, class Group>
  __device__ void allowed(const Row&, const Group&) {}
  __device__ void kept(float, float, Cut) {}
  __device__ void swept() { is_swept_ = true; }

  // Whatever was drawn: the sweep, if there was none.
  template <class Row>
  __device__ void finish(const Row& row) {
    if (is_swept_) return;
    const auto see = [&](const auto& group) { raw(row, group, group.top()); };
    if (list_likely(shared_, row, floor()) && Row::kHasRoom) {
      each_listed_chunk(shared_, row, see);
    } else {
      row.each_group(see);
    }
  }

  // Behind a barrier.
  template <class Row>
  __device__ void send(Team& team, const Row& row) const {
    send_candidates<false>(team, row, k_, false);
  }

  __device__ int64_t sum() const { return sum_; }  // in units of 2^-40

 private:
  __device__ float weight(float x) const {
    return exp2_approx<true>(noise::mul(noise::add(x, -top_), 1.44269504f));
  }

  TeamShared& shared_;
  const float top_, least_, bound_;
  const int k_;
  int64_t sum_ = 0;
  bool is_swept_ = false;
};

__device__ __forceinline__ bool is_sound(const RowTop& top) {
  return (top.bad & 2) == 0 && top.raw > -kInf;
}

// ln of a sum in units of 2^-40, within 2^-23. A double's logarithm takes longer than all its sums.
__device__ __forceinline__ double log_of(int64_t sum) {
  const float x = float(sum);
  const int n = noise::binade(x);
  const float f = noise::add(noise::mantissa(x, n), -1.0f);
  return double(n - 40) * 0.693147180559945309 + double(noise::log_series(f));
}

__device__ __forceinline__ float lse_of(float top, int64_t sum) {
  return float(double(top) + log_of(sum));
}

// What `write_statistics` needs of a row that has emitted a token, by the first block.
__device__ __forceinline__ void leave_statistics(TeamShared& s, const Found& found, bool emits) {
  if (threadIdx.x != 0) return;
  s.last_top = emits && is_sound(found.top) ? found.top.raw : -kInf;
  s.last_sum = found.sum;
}

// By the first block, a barrier behind: the lists are merged while the next row's tops are on their
// way between the blocks, which would wait for it else.
__device__ inline void write_statistics(Team& team, int k, int64_t* ids, float* logits,
                                        float* lse) {
  const TopPair(*tops)[kMaxTopK / 2] = team.receive_tops();
  const TeamShared& s = *team.shared();
  if (!(s.last_top > -kInf)) return;
  merge_tops(tops, k, int(team.size()),
             [&](int place, float value, int id) { ids[place] = id, logits[place] = value; });
  if (threadIdx.x == 0) *lse = lse_of(s.last_top, s.last_sum);
}

}  // namespace reasonkern
