// What a team finds out about a row: its top, the filters' cut, a draw, the raw statistics.
#pragma once

#include "rejection.h"
#include "team_candidates.cuh"
#include "team_logits.cuh"

namespace reasonkern {

// ---- the largest logit, and whether the row is sound

struct RowTop {
  float raw;    // the largest logit, masked tokens included; not -inf only where one is finite
  float value;  // the largest finite allowed logit, with the lowest id; -inf and -1 without one
  int id;
  int bad;  // bit 0: NaN or +inf among the allowed, bit 1: among all
};

struct JoinTop {
  __device__ RowTop operator()(RowTop a, const RowTop& b) const {
    if (comes_before(b.value, b.id, a.value, a.id)) a.value = b.value, a.id = b.id;
    a.raw = fmaxf(a.raw, b.raw);
    a.bad |= b.bad;
    return a;
  }
};

// Largest logits of this thread's share, NaN if one is.
struct ThreadTops {
  float raw, allowed;
};

// The lowest token of the quad at v whose allowed logit is `value`.
template <class Row>
__device__ int find_in_quad(const Row& row, int v, float value) {
  float x[4];
  row.read(v, x);
  row.apply_mask(v, x);
#pragma unroll
  for (int k = 3; k >= 0; --k) v = x[k] == value ? v / 4 * 4 + k : v;
  return v;
}

// Where a logit is NaN or +inf: the largest finite ones.
template <class Row>
__device__ RowTop finite_top(Team& team, const Row& row, int bad) {
  RowTop top{-kInf, -kInf, -1, bad};
  row.template each<1>([&](int v, float (&x)[4]) {
    row.apply_mask(v, x);
    for (int k = 0; k < 4; ++k) {
      if (x[k] < kInf && x[k] > top.value) top.value = x[k], top.id = v + k;
    }
  });
  return team.reduce_block(top, JoinTop());
}

// The block's part of a RowTop, for every thread. Also starts the block's candidates, with `raw`
// tops, see team_statistics.cuh.
template <class Row>
__device__ RowTop find_block_top(Team& team, const Row& row, ThreadTops& tops) {
  float raw = -kInf, allowed = -kInf, value = -kInf;
  int quad = -1;
  row.each([&](int v, float (&x)[4]) {
    float top = top_of(x);
    raw = max_nan(raw, top);
    if (row.apply_mask(v, x)) top = top_of(x);
    allowed = max_nan(allowed, top);
    if (top > value) value = top, quad = v;
  });
  tops = {raw, allowed};
  RowTop top{raw, -kInf, -1, int(!(allowed < kInf)) | int(!(raw < kInf)) << 1};
  if (quad >= 0 && value < kInf) top.value = value, top.id = find_in_quad(row, quad, value);
  start_candidates(*team.shared(), raw);
  top = team.reduce_block(top, JoinTop());
  return (top.bad & 1) != 0 ? finite_top(team, row, top.bad) : top;
}

// Of the row, for every thread of the team.
template <class Row>
__device__ RowTop find_top(Team& team, const Row& row, ThreadTops& tops) {
  const RowTop top = find_block_top(team, row, tops);
  return reduce_lanes(team.exchange(top), cluster_size(), JoinTop());
}

// ---- filters: the cut is searched for by weight

// Orders tokens as comes_before does, as integers: larger comes first. 54 bits.
__device__ __forceinline__ int64_t order_of(float value, int id) {
  const unsigned bits = noise::word_of(value + 0.0f);  // -0 counts as 0
  const unsigned key = bits >> 31 ? ~bits : bits | 0x80000000u;
  return int64_t(key) << 22 | (0x3fffff - id);
}

__device__ __forceinline__ Cut cut_of(int64_t order) {
  const unsigned key = unsigned(order >> 22);
  const unsigned bits = key >> 31 ? key & 0x7fffffffu : ~key;
  return {noise::float_of(bits), int(0x3fffff - (order & 0x3fffff))};
}

struct Weights {
  int64_t w[7];
};

struct AddWeights {
  __device__ Weights operator()(Weights a, const Weights& b) const {
#pragma unroll
    for (int k = 0; k < 7; ++k) a.w[k] += b.w[k];
    return a;
  }
};

// One by one: less to keep in registers at a time.
__device__ __forceinline__ Weights warp_reduce(Weights x, AddWeights) {
#pragma unroll
  for (int64_t& w : x.w) w = warp_reduce(w, Sum());
  return x;
}
__device__ __forceinline__ Weights reduce_lanes(Weights x, unsigned n, AddWeights) {
#pragma unroll
  for (int64_t& w : x.w) w = reduce_lanes(w, n, Sum());
  return x;
}

// Certainly without mass: 27.7 below the top it is rounded to 0.
__device__ __forceinline__ bool has_no_mass(float value, float top) { return value - top < -29.0f; }

// The largest order at or above which the tokens kept by `cut` weigh `limit` or more, three bits at
// a time. by_mass: a token weighs its mass, else 1.
template <class Row>
__device__ Cut search_cut(Team& team, const Row& row, float temperature, float top, Cut cut,
                          bool by_mass, double limit) {
  int64_t low = 0;
  for (int shift = 51; shift >= 0; shift -= 3) {
    Weights sum{};
    row.template each<1>([&](int v, float (&x)[4]) {
      row.apply_mask(v, x);
      const float largest = noise::divide(top_of(x), temperature);
      if ((order_of(largest, 0) - low) >> shift < 1) return;
      if (by_mass && has_no_mass(largest, top)) return;
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const float value = noise::divide(x[k], temperature);
        if (v + k >= row.vocab || !cut.keeps(value, v + k)) continue;
        const int64_t steps = (order_of(value, v + k) - low) >> shift;
        if (steps < 1) continue;
        const int digit = steps < 7 ? int(steps) : 7;
        const int64_t weight = by_mass ? mass_of(value, top) : 1;
#pragma unroll
        for (int j = 0; j < 7; ++j) sum.w[j] += digit > j ? weight : 0;
      }
    });
    sum = team.reduce(sum, AddWeights());
    int digit = 0;
#pragma unroll
    for (int j = 0; j < 7; ++j) {
      if (!(double(sum.w[j]) < limit)) digit = j + 1;
    }
    low += int64_t(digit) << shift;
  }
  return cut_of(low);
}

template <class Row>
__device__ int64_t kept_mass(Team& team, const Row& row, float temperature, float top, Cut cut) {
  int64_t sum = 0;
  row.template each<1>([&](int v, float (&x)[4]) {
    row.apply_mask(v, x);
    if (has_no_mass(noise::divide(top_of(x), temperature), top)) return;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = noise::divide(x[k], temperature);
      if (cut.keeps(value, v + k)) sum += mass_of(value, top);
    }
  });
  return team.reduce(sum, Sum());
}

template <class Row>
__device__ Cut filter_cut(Team& team, const Row& row, const Request& r, float top) {
  Cut cut{-kInf, kLastId};
#pragma unroll 1  // one copy of the search
  for (const bool by_mass : {false, true}) {
    if (by_mass ? r.top_p >= 1 : !filters_by_rank(r.top_k, row.vocab)) continue;
    double limit = double(r.top_k);
    if (by_mass) {
      limit = double(r.top_p) * double(kept_mass(team, row, r.temperature, top, cut));
      if (!(limit >= 1)) limit = 1;  // below one unit, or NaN: the first token alone
    }
    cut = search_cut(team, row, r.temperature, top, cut, by_mass, limit);
  }
  return tighter(cut, min_p_cut(r.min_p, top));
}

// ---- a draw

struct Nothing {
  __device__ void raw(int, const float (&)[4]) {}
  __device__ void allowed(int, const float (&)[4]) {}
  __device__ void kept(float, float, Cut) {}
  __device__ void swept() {}
};

struct Draw {
  float temperature, top;
  Cut cut;
  uint64_t seed, position;
  uint32_t stream;
  int skip_count;  // tokens of TeamShared::skip, which have log-weights of their own
};

// An upper bound of the noise of a word: -ln u, whose logarithm is bounded by the float's own bits.
__device__ __forceinline__ float noise_bound(uint32_t word) {
  return fmaf(float(int32_t(noise::word_of(noise::from_word(word)))), -8.26295832e-8f, 110.2105f);
}

__device__ __forceinline__ void offer(const Team& team, const Draw& d, float logit, uint32_t word,
                                      int token, Best& best) {
  const float value = noise::divide(logit, d.temperature);
  if (!d.cut.keeps(value, token)) return;
  for (int i = 0; i < d.skip_count; ++i) {
    if (team.shared()->skip[i] == token) return;
  }
  best.offer(noise::add(value, noise::gumbel_of(word)), token);
}

// x[k] without an index at run time, which would move x to memory.
template <class T>
__device__ __forceinline__ T lane_of(const T (&x)[4], int k) {
  const T low = k & 1 ? x[1] : x[0], high = k & 1 ? x[3] : x[2];
  return k & 2 ? high : low;
}

// The largest value plus noise of this thread's share. Tokens whose bound is below a value already
// seen are passed over: nothing that could win is. `likely` is the token of the largest logit, of
// the row or of the slice. `also` sees every token, as it came and as it is drawn from.
template <class Row, class Also>
__device__ Best draw(Team& team, const Row& row, const Draw& d, float top_logit, int likely,
                     Also& also) {
  Best best{-kInf, -1};
  offer(team, d, top_logit, noise_word(d.seed, d.position, d.stream, uint32_t(likely)), likely,
        best);
  for (int i = 0; i < d.skip_count; ++i) {
    const int64_t token = team.shared()->skip[i];
    if (token < 0 || token >= row.vocab) continue;
    const float g = gumbel_noise(d.seed, d.position, uint32_t(token), d.stream);
    best.offer(noise::add(team.shared()->log_weight[i], g), int(token));
  }
  const float inverse = inverse_temperature(d.temperature);
  row.template each<2>([&](int v, float (&x)[4]) {
    // What rounding can add to a perturbed value, to its bounds, and to z times 1/T.
    const float bar = best.score - 2e-3f - 1e-6f * fabsf(best.score);
    also.raw(v, x);
    row.apply_mask(v, x);
    also.allowed(v, x);
    if (top_of(x) * inverse + kMaxNoise < bar) return;
    const PhiloxWords words = noise_block(d.seed, d.position, d.stream, uint32_t(v / 4));
    unsigned likely_lanes = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!(fmaf(x[k], inverse, noise_bound(words.w[k])) < bar)) likely_lanes |= 1u << k;
    }
#pragma unroll 1  // rarely entered: one copy
    for (; likely_lanes != 0; likely_lanes &= likely_lanes - 1) {
      const int k = __ffs(int(likely_lanes)) - 1;
      offer(team, d, lane_of(x, k), lane_of(words.w, k), v + k, best);
    }
  });
  also.swept();
  return best;
}

// A row is bad when z/T of its top, or a logit, is not finite.
__device__ __forceinline__ bool is_bad(const RowTop& top, float temperature) {
  const float value = temperature == 0 ? top.value : noise::divide(top.value, temperature);
  return (top.bad & 1) != 0 || !(fabsf(value) < kInf);
}

// A draw from the filtered row with the target's noise.
template <class Row>
__device__ Draw target_draw(Team& team, const Row& row, const Request& r, const RowTop& top,
                            uint64_t position) {
  const float value = noise::divide(top.value, r.temperature);
  return {r.temperature, value, filter_cut(team, row, r, value), r.seed, position, kTarget, 0};
}

// ---- what the blocks of a team tell each other of a row, once

struct Found {
  RowTop top;
  Best best;
  double sum;  // of exp(x - sum_top) over the raw logits: one block's
  float sum_top;
};

struct BestSum {
  Best best;
  double sum;
  __device__ BestSum operator()(const BestSum& a, const BestSum& b) const {
    return {TakeBest()(a.best, b.best), a.sum + b.sum};
  }
};

// `top` is the block's or the row's; the sum stays that of the block whose lane it is.
__device__ inline Found join(Team& team, const RowTop& top, const Best& best, double sum,
                             float sum_top) {
  const BestSum block = team.reduce_block(BestSum{best, sum}, BestSum());
  Found found = team.exchange(Found{top, block.best, block.sum, sum_top});
  found.top = reduce_lanes(found.top, cluster_size(), JoinTop());
  found.best = reduce_lanes(found.best, cluster_size(), TakeBest());
  return found;
}

// accepted: the child that passed the coins, or -1.
__device__ __forceinline__ Outcome outcome_of(const RowTop& top, const Best& best,
                                              float temperature, int accepted = -1) {
  if (is_bad(top, temperature)) return {top.id, true};
  if (accepted >= 0) return {accepted, false};
  return {temperature == 0 ? top.id : best.id, false};
}

}  // namespace reasonkern
