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
    row.template each<1>([&](int v, float (&x)[4]) {
      if (Allowed) row.apply_mask(v, x);
      for (int j = 0; j < 4; ++j) {
        if (comes_before(last.score, last.id, x[j], v + j)) best.offer(x[j], v + j);
      }
    });
    last = team.reduce_block(best, TakeBest());
    if (threadIdx.x == 0) put_top(*team.shared(), place, last.score, last.id);
  }
}

// This block's list, behind the sweep that collected its candidates. Its readers are behind another
// barrier.
template <bool Allowed, class Row>
__device__ void rank_candidates(Team& team, const Row& row, int k) {
  TeamShared& s = *team.shared();
  __syncthreads();
  if (s.count > kCandidates) return rank_slowly<Allowed>(team, row, k);
  for (int i = int(threadIdx.x); i < s.count; i += int(blockDim.x)) {
    int place = 0;
    for (int j = 0; j < s.count; ++j) {
      place += comes_before(s.value[j], s.id[j], s.value[i], s.id[i]);
    }
    if (place < k) put_top(s, place, s.value[i], s.id[i]);
  }
}

// Calls body(place, value, id) for the k largest logits in the lists of `lists` blocks; a list to a
// warp.
template <class Body>
__device__ __forceinline__ void merge_tops(const TeamShared& s, int k, int lists,
                                           const Body& body) {
  const int pairs = (k + 1) / 2, warps = int(blockDim.x / 32);
  for (int mine = int(threadIdx.x / 32); mine < lists; mine += warps) {
    for (int i = int(threadIdx.x % 32); i < 2 * pairs; i += 32) {
      const float value = s.tops[mine][i / 2].value[i % 2];
      const int id = s.tops[mine][i / 2].id[i % 2];
      if (id < 0) continue;
      int place = 0;
      for (int list = 0; list < lists && place < k; ++list) {
        for (int j = 0; j < pairs; ++j) {
          const TopPair other = s.tops[list][j];
          if (!comes_before(other.value[0], other.id[0], value, id)) break;  // lists are in order
          place += 1 + comes_before(other.value[1], other.id[1], value, id);
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
  // `top`: the row's largest logit; k of `groups` groups of its tokens bound the candidates.
  __device__ RawStatistics(Team& team, float top, int k, int vocab, const float* group_top,
                           int groups)
      : shared_(*team.shared()),
        top_(top > -kInf ? top : 0.0f),
        least_(least_of(top_, vocab)),
        bound_(candidate_bound(group_top, groups, k)),
        k_(k) {
    clear_tops(shared_, k);
  }

  __device__ float floor() const { return fminf(least_, bound_); }

  template <class Row, class Group>
  __device__ void raw(const Row& row, const Group& group, float) {
    float sum = 0;
#pragma unroll 1  // as in `draw`
    for (int quad = 0; quad < kGroupQuads; ++quad) {
      const int v = row.quad_of(group.first, quad);
      if (v >= group.last) break;
      float x[4];
      row.read(v, x);
      sum += (weight(x[0]) + weight(x[1])) + (weight(x[2]) + weight(x[3]));
      if (top_of(x) >= bound_) add_candidates(shared_, bound_, v, x);
    }
    sum_ += double(sum);
  }
  template <class Row, class Group>
  __device__ void allowed(const Row&, const Group&) {}
  __device__ void kept(float, float, Cut) {}
  __device__ void swept() { is_swept_ = true; }

  // Whatever was drawn: the sweep, if there was none, and this block's list.
  template <class Row>
  __device__ void finish(Team& team, const Row& row) {
    if (!is_swept_) {
      row.each_group([&](const auto& group) {
        const float top = group.top();
        if (!(top < floor())) raw(row, group, top);
      });
    }
    rank_candidates<false>(team, row, k_);
  }

  // In units of 2^-40; 0 of a row that is not sound.
  __device__ int64_t sum() const { return sum_ <= 0x1p22 ? int64_t(sum_ * 0x1p40) : 0; }

 private:
  __device__ float weight(float x) const {
    return exp2_approx<true>(noise::mul(noise::add(x, -top_), 1.44269504f));
  }

  TeamShared& shared_;
  const float top_, least_, bound_;
  const int k_;
  double sum_ = 0;
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

// By the first block, for a sound row whose lists have come; `found` is of `join`.
__device__ inline void write_statistics(const Team& team, const Found& found, int k, int64_t* ids,
                                        float* logits, float* lse) {
  merge_tops(*team.shared(), k, int(cluster_size()),
             [&](int place, float value, int id) { ids[place] = id, logits[place] = value; });
  if (threadIdx.x == 0) *lse = float(double(found.top.raw) + log_of(found.sum));
}

}  // namespace reasonkern
