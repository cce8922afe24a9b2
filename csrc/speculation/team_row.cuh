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

// The lowest token of the group at `first` whose allowed logit is `value`, or -1.
template <class Row>
__device__ int find_in_group(const Row& row, int first, float value) {
#pragma unroll 1
  for (int quad = 0; quad < kGroupQuads; ++quad) {
    const int v = row.quad_of(first, quad);
    if (v >= row.slice.last) break;
    float x[4];
    row.read(v, x);
    row.apply_mask(v, x);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (x[k] == value) return v + k;
    }
  }
  return -1;
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

// The block's part of a RowTop, for every thread; the id is only that which the thread found, or
// -1: JoinTop brings them together. Also starts the block's candidates, with `raw` tops, see
// team_statistics.cuh.
template <class Row>
__device__ RowTop find_block_top(Team& team, const Row& row, ThreadTops& tops) {
  float raw = -kInf, allowed = -kInf, value = -kInf;
  int first = -1;
  row.each_group([&](const auto& group) {
    const float group_raw = group.top();
    const float top = row.may_change() ? allowed_top(row, group, group_raw) : group_raw;
    raw = max_nan(raw, group_raw);
    allowed = max_nan(allowed, top);
    if (top > value) value = top, first = group.first;
  });
  tops = {raw, allowed};
  start_candidates(*team.shared(), raw);
  const int bad = int(!(allowed < kInf)) | int(!(raw < kInf)) << 1;
  RowTop top = team.reduce_block(RowTop{raw, value < kInf ? value : -kInf, -1, bad}, JoinTop());
  if ((top.bad & 1) != 0) return finite_top(team, row, top.bad);
  if (value == top.value && first >= 0) top.id = find_in_group(row, first, value);
  return top;
}

// The row's, for every thread of the team; the id as above.
template <class Row>
__device__ RowTop find_row_top(Team& team, const Row& row, ThreadTops& tops) {
  const RowTop mine = find_block_top(team, row, tops);
  RowTop top = reduce_lanes(team.exchange(mine), cluster_size(), JoinTop());
  top.id = top.value == mine.value ? mine.id : -1;
  return top;
}

// The row's, with its id.
template <class Row>
__device__ RowTop find_top(Team& team, const Row& row, ThreadTops& tops) {
  return team.reduce(find_block_top(team, row, tops), JoinTop());
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

// Who sees a row's tokens while one is drawn: groups whose largest logit is not below `floor`, as
// they came and as they are drawn from.
struct Nothing {
  __device__ float floor() const { return kInf; }
  template <class Row, class Group>
  __device__ void raw(const Row&, const Group&, float) {}
  template <class Row, class Group>
  __device__ void allowed(const Row&, const Group&) {}
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

constexpr float kMinNoise = -2.8116f;  // below that of the largest uniform number

// Perturbed values below the bar cannot be the best, whose value is at least `score`: what rounding
// adds to a value, to its bounds and to z times 1/T is less than the distance.
__device__ __forceinline__ float bar_of(float score) {
  return score - 2e-3f - 1e-6f * fabsf(score);
}

// Logits below it stay below the bar. (A tiny temperature rounds.)
__device__ __forceinline__ float floor_of(float bar, float temperature) {
  return temperature < 0x1p-100f ? -kInf : (bar - kMaxNoise) * temperature;
}

// Words above it bring a value no further up than by `step`: -ln u bounds the noise.
__device__ __forceinline__ uint32_t word_limit(float step) {
  if (!(step > 0)) return 0xffffffffu;
  const float words = exp2_approx<true>(32.0f - 1.44269504f * step);
  return uint32_t(fminf(words, 0x1.fffffep31f)) + 1;
}

// Not above the noise of a word: ln(1 - u) - ln u.
__device__ __forceinline__ float least_noise(uint32_t word) {
  return __logf(float(~word)) - __logf(float(word | 1));
}

// How far a draw has come: the best value of the thread, and what the block's is not below.
struct Bar {
  unsigned key;
  float bar, floor;

  __device__ void raise(unsigned other, float temperature) {
    if (other <= key) return;
    key = other, bar = bar_of(value_of(key)), floor = floor_of(bar, temperature);
  }
};

// Raises the block's bar by what the first quads are worth at least: a flat row's later tokens are
// then passed over, who would be the best so far one after the other. By whole warps.
template <class Row>
__device__ void look_ahead(Team& team, const Row& row, const Draw& d, float inverse, Bar& bar) {
  const int v = row.slice.first + 4 * int(threadIdx.x);
  unsigned key = 0;
  if (v < row.slice.last) {
    float x[4], least = -kInf;
    row.read(v, x);
    row.apply_mask(v, x);
    const PhiloxWords words = noise_block(d.seed, d.position, d.stream, uint32_t(v / 4));
#pragma unroll
    for (int k = 0; k < 4; ++k) least = fmaxf(least, fmaf(x[k], inverse, least_noise(words.w[k])));
    key = key_of(least);
  }
  key = __reduce_max_sync(kFullMask, key);
  if (key > bar.key && threadIdx.x % 32 == 0) atomicMax(&team.shared()->best, key);
  bar.raise(key, d.temperature);
}

// Offers the tokens of a quad.
template <class Row>
__device__ __forceinline__ void offer_quad(const Team& team, const Row& row, const Draw& d, int v,
                                           float inverse, float bar, Best& best) {
  float x[4];
  row.read(v, x);
  row.apply_mask(v, x);
  const PhiloxWords words = noise_block(d.seed, d.position, d.stream, uint32_t(v / 4));
  unsigned likely = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if (!(fmaf(x[k], inverse, noise_bound(words.w[k])) < bar)) likely |= 1u << k;
  }
#pragma unroll 1  // rarely entered: one copy
  for (; likely != 0; likely &= likely - 1) {
    const int k = __ffs(int(likely)) - 1;
    offer(team, d, lane_of(x, k), lane_of(words.w, k), v + k, best);
  }
}

// The largest value plus noise of this thread's share, if it may be the block's. Tokens are passed
// over whose bound is below a value that the block has seen: nothing that could win is. `top`: the
// row's largest logit. `also` sees every token, as it came and as it is drawn from.
template <class Row, class Also>
__device__ Best draw(Team& team, const Row& row, const Draw& d, float top, Also& also) {
  TeamShared& s = *team.shared();
  Best best{-kInf, -1};
  for (int i = 0; i < d.skip_count; ++i) {
    const int64_t token = s.skip[i];
    if (token < 0 || token >= row.vocab) continue;
    const float g = gumbel_noise(d.seed, d.position, uint32_t(token), d.stream);
    best.offer(noise::add(s.log_weight[i], g), int(token));
  }
  const float inverse = inverse_temperature(d.temperature);
  Bar bar{0, -kInf, -kInf};
  if (d.skip_count > 0) {  // the top may be among them
    bar.raise(key_of(best.score), d.temperature);
  } else {
    bar.raise(key_of(noise::divide(top, d.temperature) + kMinNoise), d.temperature);
    if (!(d.cut.value > -kInf)) look_ahead(team, row, d, inverse, bar);
  }
  row.each_group([&](const auto& group) {
    const float group_top = group.top();
    if (group_top < fminf(bar.floor, also.floor())) return;
    also.raw(row, group, group_top);
    also.allowed(row, group);
    const float top = row.may_change() ? allowed_top(row, group, group_top) : group_top;
    bar.raise(*const_cast<volatile unsigned*>(&s.best), d.temperature);
    if (top < bar.floor) return;
    const uint32_t limit = word_limit(bar.bar - top * inverse);
    unsigned likely = 0;
#pragma unroll
    for (int quad = 0; quad < kGroupQuads; ++quad) {
      const uint32_t block = uint32_t(row.quad_of(group.first, quad) / 4);
      const PhiloxWords words = noise_block(d.seed, d.position, d.stream, block);
      const uint32_t least = min(min(words.w[0], words.w[1]), min(words.w[2], words.w[3]));
      if (least <= limit) likely |= 1u << quad;
    }
#pragma unroll 1
    for (; likely != 0; likely &= likely - 1) {
      const int v = row.quad_of(group.first, __ffs(int(likely)) - 1);
      if (v < group.last) offer_quad(team, row, d, v, inverse, bar.bar, best);
    }
    if (key_of(best.score) > bar.key) atomicMax(&s.best, key_of(best.score));
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
  double sum;  // of exp(x - top) over the raw logits
};

struct Share {
  Best best;
  double sum;
  int id, unused;  // of the top
  __device__ Share operator()(const Share& a, const Share& b) const {
    return {TakeBest()(a.best, b.best), a.sum + b.sum,
            uint32_t(a.id) < uint32_t(b.id) ? a.id : b.id, 0};
  }
};

// `top` is the row's, whose id is this thread's, or -1.
__device__ inline Found join(Team& team, RowTop top, const Best& best, double sum) {
  const Share share = team.reduce(Share{best, sum, top.id, 0}, Share());
  top.id = share.id;
  return {top, share.best, share.sum};
}

// accepted: the child that passed the coins, or -1.
__device__ __forceinline__ Outcome outcome_of(const RowTop& top, const Best& best,
                                              float temperature, int accepted = -1) {
  if (is_bad(top, temperature)) return {top.id, true};
  if (accepted >= 0) return {accepted, false};
  return {temperature == 0 ? top.id : best.id, false};
}

}  // namespace reasonkern
