// What a team finds out about a row: its top, and the filters' cut.
#pragma once

#include "rejection.h"
#include "team_candidates.cuh"
#include "team_logits.cuh"

namespace reasonkern {

// ---- the largest logit, and whether the row is sound

struct RowTop {
  float raw;    // the largest logit, masked tokens included; not -inf only where one is finite
  float value;  // the largest finite allowed logit; -inf without one
  int bad;      // bit 0: NaN or +inf among the allowed, bit 1: among all
};

struct JoinTops {};

// Overload: values that lanes repeat change no maximum.
__device__ __forceinline__ RowTop reduce_lanes(RowTop x, unsigned, JoinTops) {
  x.value = value_of(__reduce_max_sync(kFullMask, key_of(x.value + 0.0f)));  // -0 counts as 0
  x.raw = value_of(__reduce_max_sync(kFullMask, key_of(x.raw)));
  x.bad = int(__any_sync(kFullMask, x.bad & 1)) | (__any_sync(kFullMask, x.bad & 2) ? 2 : 0);
  return x;
}

// Where an allowed logit is NaN or +inf: the largest finite one. The raw row may be sound, for
// control can make a logit +inf.
template <class Row>
__device__ RowTop finite_top(Team& team, const Row& row, RowTop top) {
  top.value = -kInf;
  if ((top.bad & 2) != 0) top.raw = -kInf;
  row.each_quad([&](int v, float (&x)[4]) {
    row.apply_mask(v, x);
    for (int k = 0; k < 4; ++k) {
      if (x[k] < kInf && x[k] > top.value) top.value = x[k];
    }
  });
  return team.reduce_block(top, JoinTops());
}

// The largest allowed logit of a group, NaN if one is.
template <class Row, class Group>
__device__ __forceinline__ float allowed_top(const Row& row, const Group& group, float raw) {
  float top = -kInf;
  bool changed = false;
  group.each([&](int v, float (&x)[4], int) {
    changed |= row.apply_mask(v, x);
    top = max_nan(top, top_of(x));
  });
  return changed ? top : raw;
}

template <class Row>
__device__ ShareTops find_share_tops(const Row& row) {
  if (!row.may_change()) {
    const float raw = row.share_top();
    return {raw, raw};
  }
  ShareTops tops{-kInf, -kInf};
  row.each_group([&](const auto& group) {
    const float raw = group.top();
    tops.raw = max_nan(tops.raw, raw);
    tops.allowed = max_nan(tops.allowed, allowed_top(row, group, raw));
  });
  return tops;
}

// The block's part of a RowTop, for every thread. Starts the block's candidates.
template <class Row>
__device__ RowTop find_block_top(Team& team, Row& row, int groups) {
  const ShareTops tops = row.tops = find_share_tops(row);
  start_candidates(*team.shared(), tops.raw, groups);
  const float value = tops.allowed < kInf ? tops.allowed : -kInf;
  const int bad = int(!(tops.allowed < kInf)) | int(!(tops.raw < kInf)) << 1;
  const RowTop top = team.reduce_block(RowTop{tops.raw, value, bad}, JoinTops());
  return (top.bad & 1) != 0 ? finite_top(team, row, top) : top;
}

// The row's top, for every thread of the team. `meanwhile` is done while the blocks wait for each
// other.
template <class Row, class Work>
__device__ RowTop find_row_top(Team& team, Row& row, const Work& meanwhile) {
  const RowTop mine = find_block_top(team, row, int(quotient(kGroups, team.size())));
  const RowTop top = team.template exchange<true>(mine, meanwhile);
  return reduce_lanes(top, team.size(), JoinTops());
}

// The same where the candidates are the block's.
template <class Row>
__device__ RowTop find_top(Team& team, Row& row) {
  return team.reduce(find_block_top(team, row, kGroups), JoinTops());
}

// The lowest token of this thread's share whose allowed logit is the row's top, which comes first
// where no noise decides.
template <class Row>
__device__ Best find_top_token(const Row& row, const RowTop& top) {
  Best best{-kInf, -1};
  if (row.tops.allowed < top.value) return best;
  row.each_quad([&](int v, float (&x)[4]) {
    row.apply_mask(v, x);
    for (int k = 0; k < 4; ++k) {
      if (x[k] == top.value) best.offer(x[k], v + k);
    }
  });
  return best;
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
__device__ __forceinline__ Weights reduce_lanes(Weights x, unsigned n, AddWeights) {
#pragma unroll
  for (int64_t& w : x.w) w = reduce_lanes(w, n, Sum());
  return x;
}

// Certainly without mass: 27.7 below the top it is rounded to 0.
__device__ __forceinline__ bool has_no_mass(float value, float top) { return value - top < -29.0f; }

// body(v, x) for the quads, of allowed logits, of groups whose largest logit is likely to count.
template <class Row, class Likely, class Body>
__device__ __forceinline__ void each_likely_quad(const Row& row, const Likely& is_likely,
                                                 const Body& body) {
  if (Row::kHasRoom && !is_likely(row.tops.allowed)) return;
  row.each_group([&](const auto& group) {
    const float raw = group.top();
    if (!is_likely(row.may_change() ? allowed_top(row, group, raw) : raw)) return;
#pragma unroll 1  // registers are short
    for (int quad = 0; quad < kGroupQuads; ++quad) {
      const int v = group.quad_of(quad);
      if (v >= group.last) break;
      float x[4];
      row.read(v, x);
      row.apply_mask(v, x);
      body(v, x);
    }
  });
}

// The largest order at or above which the tokens kept by `cut` weigh `limit` or more, three bits at
// a time. by_mass: a token weighs its mass, else 1.
template <class Row>
__device__ Cut search_cut(Team& team, const Row& row, float temperature, float top, Cut cut,
                          bool by_mass, double limit) {
  int64_t low = 0;
  for (int shift = 51; shift >= 0; shift -= 3) {
    Weights sum{};
    each_likely_quad(
        row,
        [&](float raw) {
          const float largest = noise::divide(raw, temperature);
          return (order_of(largest, 0) - low) >> shift >= 1 &&
                 !(by_mass && has_no_mass(largest, top));
        },
        [&](int v, const float (&x)[4]) {
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
  each_likely_quad(
      row, [&](float raw) { return !has_no_mass(noise::divide(raw, temperature), top); },
      [&](int v, const float (&x)[4]) {
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
  if (!r.filters(row.vocab)) return cut;
#pragma unroll 1  // one copy of the search
  for (int pass = 0; pass < 2; ++pass) {
    const bool by_mass = pass == 1;
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

}  // namespace reasonkern
