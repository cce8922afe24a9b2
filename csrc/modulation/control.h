// From a request's progress to what is done to its row of logits, for host and device.
//
// Order: a force that can be applied is all that happens. Else additions and bans by id, then the
// minimum of thinking, then the soft budget, which needs the row's largest logit.
#pragma once

#include <cmath>

#include "fold.h"

namespace reasonkern {
namespace modulation {

constexpr double kForced = 3e4;  // what a forced logit is set to: above 2e4, finite in float16
constexpr int kAdders = 4;       // cyclic, TIP, constant, schedule

struct RowControl {
  int64_t force;          // id, or -1
  double added[kAdders];  // 0: nothing
  int32_t sets[kAdders];  // the set it is added to, -1 where nothing is
  int32_t ban;            // set, or -1
  int64_t end, wait;      // the mass of `end` goes to `wait`; -1: no
  int64_t soft;           // id raised towards the largest logit, or -1
  double weight, margin;
};

// 0 at t = 0, +A at a quarter of the period C, -A at three quarters. The remainder of t is exact.
RK_HOST_DEVICE double wave(double amplitude, double period, double shift, int64_t t) {
  const double r = std::fmod(double(t), period);
  const double u = std::fmod(r + product(shift, period) + product(0.75, period), period);
  return product(amplitude, std::fabs(4 * u / period - 2)) - amplitude;
}

RK_HOST_DEVICE bool in_windows(const int64_t* spec, int64_t t) {
  const int64_t n = spec[kWindows];
  bool inside = n == 0;
  for (int64_t k = 0; k < n; ++k) {
    inside |= t >= spec[kWindow + 2 * k] && t < spec[kWindow + 2 * k + 1];
  }
  return inside;
}

// Linear between the points, constant outside them.
RK_HOST_DEVICE double scheduled(const int64_t* spec, const double* numbers, int64_t t) {
  const int64_t *times = spec + kPointT, last = spec[kPoints] - 1;
  const double* values = numbers + kPointValue;
  if (t <= times[0]) return values[0];
  if (t >= times[last]) return values[last];
  int64_t k = 0;
  while (t >= times[k + 1]) ++k;
  const double share = double(t - times[k]) / double(times[k + 1] - times[k]);
  return values[k] + product(share, values[k + 1] - values[k]);
}

RK_HOST_DEVICE int64_t forced_id(const int64_t* spec, const Progress& p) {
  const int64_t parts = spec[kParts];
  if ((parts & kDeepConf) && p.stopped && spec[kEos] >= 0) return spec[kEos];
  const bool spent = (parts & kBudget) && p.spent >= spec[kBudgetTokens];
  if (spent && p.phrase != kDone && (p.phase == kThinking || p.phrase > 0)) {
    return spec[kEnd + p.phrase];
  }
  return (parts & kMinThink) && p.wait > 0 ? spec[kWait + p.wait] : -1;
}

RK_HOST_DEVICE void add_parts(RowControl& c, const int64_t* spec, const double* numbers,
                              const Progress& p) {
  const int64_t parts = spec[kParts];
  if ((parts & kCyclic) && in_windows(spec, p.t)) {
    c.added[0] = wave(numbers[kAmplitude], numbers[kPeriod], numbers[kShift], p.t);
  }
  if ((parts & kTip) && p.t < p.switched + spec[kTipSpan]) c.added[1] = -numbers[kAlpha];
  if (parts & kConstant) c.added[2] = numbers[kBias];
  if (parts & kSchedule) c.added[3] = scheduled(spec, numbers, p.t);
  for (int k = 0; k < kAdders; ++k) {
    if (c.added[k] != 0) c.sets[k] = int32_t(spec[kAddedSets + k]);
  }
  if (parts & kBan) c.ban = int32_t(spec[kBanSet]);
}

RK_HOST_DEVICE RowControl control_of(const int64_t* spec, const double* numbers,
                                     const Progress& p) {
  RowControl c{forced_id(spec, p), {0, 0, 0, 0}, {-1, -1, -1, -1}, -1, -1, -1, -1, 0, 0};
  if (p.phase != kThinking) return c;
  const int64_t parts = spec[kParts];
  add_parts(c, spec, numbers, p);
  if ((parts & kMinThink) && must_think(spec, p)) {
    c.end = spec[kThinkEnd];
    c.wait = spec[kWait];
  }
  const bool ramps = p.spent >= spec[kTrackFrom] && p.spent < spec[kBudgetTokens];
  if ((parts & kSoft) && p.phrase != kDone && ramps) {
    c.soft = spec[kEnd + p.phrase];
    c.weight =
        (double(p.spent) - numbers[kSoftFrom]) / (double(spec[kBudgetTokens]) - numbers[kSoftFrom]);
    c.margin = numbers[kSoftMargin];
  }
  return c;
}

// ---- one logit. T is float for logits of at most 32 bits and double for float64.

constexpr double kInfinity = __builtin_huge_val();

// NaN and -inf are not forced.
template <class T>
RK_HOST_DEVICE bool can_force(T z) {
  return z > T(-kInfinity);
}

// What the row adds to an entry of its sets, in double, whichever of its sets the entry is met in.
RK_HOST_DEVICE double added_to(const RowControl& c, int64_t member) {
  double sum = 0;
  for (int k = 0; k < kAdders; ++k) {
    if (c.sets[k] >= 0 && (member >> c.sets[k] & 1)) sum += c.added[k];
  }
  return sum;
}

// Bits of the sets of the parts before part k: an entry of part k's set that is in one of them has
// had its turn.
RK_HOST_DEVICE int64_t sets_before(const RowControl& c, int k) {
  int64_t bits = 0;
  for (int j = 0; j < k; ++j) {
    if (c.sets[j] >= 0) bits |= int64_t(1) << c.sets[j];
  }
  return bits;
}

// Adding 0 leaves the bits alone, the sign of 0 included.
template <class T>
RK_HOST_DEVICE T with_added(T z, double added) {
  return added == 0 ? z : z + T(added);
}

template <class T>
RK_HOST_DEVICE T banned(T z) {
  return z != z ? z : T(-kInfinity);
}

template <class T>
RK_HOST_DEVICE bool is_finite(T z) {
  return z - z == 0;
}

// The minimum applies where `wait` is allowed: else the end of thinking stays what it is.
template <class T>
RK_HOST_DEVICE bool can_wait(T wait) {
  return wait != T(-kInfinity);
}

// T log(e^(a/T) + e^(b/T)), the larger one at T = 0.
template <class T>
RK_HOST_DEVICE T merged(T wait, T end, float temperature) {
  const double a = wait, b = end, t = temperature;
  if (a != a || b != b) return T(a + b);
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (t == 0 || low == -kInfinity || high == kInfinity) return T(high);
  return T(high + product(t, std::log1p(std::exp((low - high) / t))));
}

// `top`: the row's largest finite logit after everything else, -inf where there is none.
template <class T>
RK_HOST_DEVICE T raised(T z, T top, double weight, double margin) {
  const double gap = double(top) - margin - double(z);
  return is_finite(z) && gap > 0 ? T(double(z) + product(weight, gap)) : z;
}

}  // namespace modulation
}  // namespace reasonkern
