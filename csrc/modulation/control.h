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
  int64_t sets[kAdders];  // the set it is added to, -1 where nothing is
  int64_t ban;            // set, or -1
  int64_t end, wait;      // the mass of `end` goes to `wait`; -1: no
  int64_t soft;           // id raised towards the largest logit, or -1
  double weight, margin;
};

// 0 at t = 0, +A at a quarter of the period C, -A at three quarters. Remainders are exact: that of
// t, and that of a sum below 3 C (the shift is a fraction), which takes no division.
RK_HOST_DEVICE double wave(double amplitude, double period, double shift, int64_t t) {
  const double r = std::fmod(double(t), period);
  const double x = r + product(shift, period) + product(0.75, period);
  const double u = x >= 2 * period ? x - 2 * period : x >= period ? x - period : x;
  return product(amplitude, std::fabs(4 * u / period - 2)) - amplitude;
}

RK_HOST_DEVICE bool in_windows(const int64_t* record, int64_t t) {
  const int64_t n = record[kWindows];
  bool inside = n == 0;
  RK_ROLLED for (int64_t k = 0; k < n; ++k) {
    inside |= t >= record[kWindow + 2 * k] && t < record[kWindow + 2 * k + 1];
  }
  return inside;
}

// Linear between the points, constant outside them.
RK_HOST_DEVICE double scheduled(const int64_t* record, int64_t t) {
  const int64_t* points = record + kPoint;
  const int64_t last = record[kPoints] - 1;
  if (t <= points[0]) return number(points, 1);
  if (t >= points[2 * last]) return number(points, int(2 * last + 1));
  RK_ROLLED while (t >= points[2]) points += 2;
  const double share = double(t - points[0]) / double(points[2] - points[0]);
  return number(points, 1) + product(share, number(points, 3) - number(points, 1));
}

RK_HOST_DEVICE int64_t forced_id(const int64_t* record, const Progress& p) {
  const int64_t parts = record[kParts];
  if ((parts & kDeepConf) && p.stopped && record[kEos] >= 0) return record[kEos];
  const bool spent = (parts & kBudget) && p.spent >= record[kBudgetTokens];
  if (spent && p.phrase != kDone && (p.phase == kThinking || p.phrase > 0)) {
    return record[kEnd + p.phrase];
  }
  return (parts & kMinThink) && p.wait > 0 ? record[kWait + p.wait] : -1;
}

RK_HOST_DEVICE void add_parts(RowControl& c, const int64_t* record, const Progress& p) {
  const int64_t parts = record[kParts];
  if ((parts & kCyclic) && in_windows(record, p.t)) {
    c.added[0] =
        wave(number(record, kAmplitude), number(record, kPeriod), number(record, kShift), p.t);
  }
  if ((parts & kTip) && p.t < p.switched + record[kTipSpan]) c.added[1] = -number(record, kAlpha);
  if (parts & kConstant) c.added[2] = number(record, kBias);
  if (parts & kSchedule) c.added[3] = scheduled(record, p.t);
  for (int k = 0; k < kAdders; ++k) {
    if (c.added[k] != 0) c.sets[k] = record[kAddedSets + k];
  }
  if (parts & kBan) c.ban = record[kBanSet];
}

RK_HOST_DEVICE RowControl control_of(const int64_t* record, const Progress& p) {
  RowControl c{forced_id(record, p), {0, 0, 0, 0}, {-1, -1, -1, -1}, -1, -1, -1, -1, 0, 0};
  if (p.phase != kThinking) return c;
  const int64_t parts = record[kParts];
  add_parts(c, record, p);
  if ((parts & kMinThink) && must_think(record, p)) {
    c.end = record[kThinkEnd];
    c.wait = record[kWait];
  }
  const bool ramps = p.spent >= record[kTrackFrom] && p.spent < record[kBudgetTokens];
  if ((parts & kSoft) && p.phrase != kDone && ramps) {
    c.soft = record[kEnd + p.phrase];
    c.weight = (double(p.spent) - number(record, kSoftFrom)) /
               (double(record[kBudgetTokens]) - number(record, kSoftFrom));
    c.margin = number(record, kSoftMargin);
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

// The sum of c[k] x^k, by even and odd k: half the wait of a sum in order.
template <int N>
RK_HOST_DEVICE double polynomial(const double (&c)[N], double x) {
  static_assert(N % 2 == 0, "pairs of coefficients");
  const double square = x * x;
  double even = c[N - 2], odd = c[N - 1];
  for (int k = N - 4; k >= 0; k -= 2) {
    even = product(even, square) + c[k];
    odd = product(odd, square) + c[k + 1];
  }
  return product(odd, x) + even;
}

// 2^n, n from -1022 on.
RK_HOST_DEVICE double power_of_two(int64_t n) {
  const int64_t bits = (n + 1023) << 52;
  return number(&bits, 0);
}

// log(1 + e^x) for x <= 0, to a few units of the last place: the same bits on host and device,
// without the tables and branches of the C library's functions, which are dear where nothing is in
// cache.
RK_HOST_DEVICE double log1p_exp(double x) {
  constexpr double kExp[] = {1.,
                             1.,
                             1. / 2,
                             1. / 6,
                             1. / 24,
                             1. / 120,
                             1. / 720,
                             1. / 5040,
                             1. / 40320,
                             1. / 362880,
                             1. / 3628800,
                             1. / 39916800,
                             1. / 479001600,
                             1. / 6227020800};
  constexpr double kArtanh[] = {1.,      1. / 3,  1. / 5,  1. / 7,  1. / 9,  1. / 11,
                                1. / 13, 1. / 15, 1. / 17, 1. / 19, 1. / 21, 1. / 23,
                                1. / 25, 1. / 27, 1. / 29, 1. / 31, 1. / 33, 1. / 35};
  constexpr double kLn2 = 0x1.62e42fefa3800p-1, kLn2Rest = 0x1.ef35793c76730p-45;
  const double bounded = x > -746 ? x : -746;  // e^-746 is 0
  const int64_t n = int64_t(product(bounded, 0x1.71547652b82fep0) - 0.5);
  const double r = bounded - product(double(n), kLn2) - product(double(n), kLn2Rest);
  const int64_t half = n / 2;
  const double e = polynomial(kExp, r) * power_of_two(half) * power_of_two(n - half);
  const double u = e / (2 + e);  // log(1 + e) = 2 artanh(u)
  return 2 * u * polynomial(kArtanh, u * u);
}

// T log(e^(a/T) + e^(b/T)), the larger one at T = 0.
template <class T>
RK_HOST_DEVICE T merged(T wait, T end, float temperature) {
  const double a = wait, b = end, t = temperature;
  if (a != a || b != b) return T(a + b);
  const double high = a > b ? a : b, low = a > b ? b : a;
  if (t == 0 || low == -kInfinity || high == kInfinity) return T(high);
  return T(high + product(t, log1p_exp((low - high) / t)));
}

// `top`: the row's largest finite logit after everything else, -inf where there is none.
template <class T>
RK_HOST_DEVICE T raised(T z, T top, double weight, double margin) {
  const double gap = double(top) - margin - double(z);
  return is_finite(z) && gap > 0 ? T(double(z) + product(weight, gap)) : z;
}

}  // namespace modulation
}  // namespace reasonkern
