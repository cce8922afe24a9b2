// What a team finds out about a row: its top, the filters' cut, a draw, the raw statistics.
#pragma once

#include "rejection.h"
#include "team.cuh"

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

// Largest logits of this thread's share.
struct ThreadTops {
  float raw, value;
};

template <class Row>
__device__ RowTop find_top(Team& team, const Row& row, ThreadTops& tops) {
  const RowTop zero{-kInf, -kInf, -1, 0};
  RowTop top = zero;
  row.each(team, [&](int v, float (&x)[4]) {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!(x[k] < kInf)) {
        top.bad |= 2;
      } else {
        top.raw = fmaxf(top.raw, x[k]);
      }
    }
    row.apply_mask(v, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (!(x[k] < kInf)) {
        top.bad |= 1;
      } else if (x[k] > top.value) {
        top.value = x[k], top.id = v + k;
      }
    }
  });
  tops = {top.raw, top.value};
  return team.reduce(top, zero, JoinTop());
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

// The largest order at or above which the tokens kept by `cut` weigh `limit` or more, three bits at
// a time. by_mass: a token weighs its mass, else 1.
template <class Row>
__device__ Cut search_cut(Team& team, const Row& row, float temperature, float top, Cut cut,
                          bool by_mass, double limit) {
  int64_t low = 0;
  for (int shift = 51; shift >= 0; shift -= 3) {
    Weights sum{};
    row.each(team, [&](int v, float (&x)[4]) {
      row.apply_mask(v, x);
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
    sum = team.reduce(sum, Weights{}, AddWeights());
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
  row.each(team, [&](int v, float (&x)[4]) {
    row.apply_mask(v, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const float value = noise::divide(x[k], temperature);
      if (cut.keeps(value, v + k)) sum += mass_of(value, top);
    }
  });
  return team.reduce(sum, int64_t{0}, Sum());
}

template <class Row>
__device__ Cut filter_cut(Team& team, const Row& row, const RequestParams& r, int64_t b,
                          float top) {
  const float temperature = r.temperature[b], top_p = r.top_p[b];
  Cut cut{-kInf, kLastId};
#pragma unroll 1  // one copy of the search
  for (const bool by_mass : {false, true}) {
    if (by_mass ? top_p >= 1 : !filters_by_rank(r.top_k[b], row.vocab)) continue;
    double limit = double(r.top_k[b]);
    if (by_mass) {
      limit = double(top_p) * double(kept_mass(team, row, temperature, top, cut));
      if (!(limit >= 1)) limit = 1;  // below one unit, or NaN: the first token alone
    }
    cut = search_cut(team, row, temperature, top, cut, by_mass, limit);
  }
  return tighter(cut, min_p_cut(r.min_p[b], top));
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

// The largest value plus noise. Tokens whose bound is below a value already seen are passed over:
// nothing that could win is. `likely` is the token of the largest logit. `also` sees every token,
// as it came and as it is drawn from.
template <class Row, class Also>
__device__ int draw(Team& team, const Row& row, const Draw& d, float top_logit, int likely,
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
  const float inverse = 1.0f / d.temperature;
  row.each(team, [&](int v, float (&x)[4]) {
    // What rounding can add to a perturbed value, to its bounds, and to z times 1/T.
    const float bar = best.score - 2e-3f - 1e-6f * fabsf(best.score);
    also.raw(v, x);
    row.apply_mask(v, x);
    also.allowed(v, x);
    const float largest = fmaxf(fmaxf(x[0], x[1]), fmaxf(x[2], x[3]));
    if (largest * inverse + kMaxNoise < bar) return;
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
  return team.reduce(best, Best{-kInf, -1}, TakeBest()).id;
}

}  // namespace reasonkern
