// What a row of logits is cut and compared by, for host and device: the order of tokens, masses in
// fixed point, the filters' cut, the best token so far.
#pragma once

#include "noise.h"
#include "verify.h"

namespace reasonkern {

constexpr float kInf = __builtin_huge_valf();
constexpr float kTiny = 0x1p-126f;
constexpr float kMaxNoise = 22.1808f;  // above gumbel_of(1), the largest noise

// Tokens are ordered by value descending, then by id ascending; -1 is behind every id.
RK_HOST_DEVICE bool comes_before(float value, int id, float other, int other_id) {
  return (value > other) | ((value == other) & (uint32_t(id) < uint32_t(other_id)));  // no branch
}

// 1/T for bounds of z/T; NaN where it is not finite: no comparison with such a bound holds.
RK_HOST_DEVICE float inverse_temperature(float temperature) {
  const float inverse = 1.0f / temperature;
  return inverse < kInf ? inverse : inverse - inverse;
}

// exp(value - top) in units of 2^-40, rounded down; 0 more than 27.7 below the top.
RK_HOST_DEVICE int64_t mass_of(float value, float top) {
  return int64_t(noise::mul(noise::exp_of(noise::add(value, -top)), 0x1p40f));
}

// The last token that the filters keep, as a value and an id.
struct Cut {
  float value;
  int id;
  RK_HOST_DEVICE bool keeps(float v, int token) const {
    return v > value || (v == value && token <= id);
  }
};

constexpr int kLastId = 0x7fffffff;

// ln of min-p below the top: every token from there up is kept.
RK_HOST_DEVICE Cut min_p_cut(float min_p, float top) {
  if (!(min_p > 0)) return {-kInf, kLastId};
  const float m = min_p < kTiny ? kTiny : min_p > 1 ? 1.0f : min_p;
  return {noise::add(top, -noise::minus_log(m)), kLastId};
}

RK_HOST_DEVICE Cut tighter(Cut a, Cut b) {
  return a.value > b.value || (a.value == b.value && a.id < b.id) ? a : b;
}

RK_HOST_DEVICE bool filters_by_rank(int64_t top_k, int64_t vocab) {
  return top_k > 0 && top_k < vocab;
}

// The largest perturbed value so far; id -1 and -inf before the first.
struct Best {
  float score;
  int id;
  RK_HOST_DEVICE void offer(float s, int token) {
    if (comes_before(s, token, score, id) && s > -kInf) *this = {s, token};
  }
};

// Outcome of a row: the token, -1 where there is none, and whether the row was bad.
struct Outcome {
  int64_t token;
  bool bad;
};

}  // namespace reasonkern
