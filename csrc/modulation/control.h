// From a request's progress to what is done to its row of logits, for host and device.
//
// Order: a force that can be applied is all that happens. Else additions and bans by id, then the
// minimum of thinking, then the soft budget, which needs the row's largest logit.
#pragma once

#include <cmath>

#include "../common/division.h"
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

// The wave is 0 at t = 0, +A at a quarter of the period C, -A at three quarters. Remainders are
// exact: r, that of t, and that of a sum below 3 C (the shift is a fraction), which takes no
// division.
RK_HOST_DEVICE double moved_on(double r, double period, double shift) {
  const double x = r + product(shift, period) + product(0.75, period);
  return x >= 2 * period ? x - 2 * period : x >= period ? x - period : x;
}

RK_HOST_DEVICE double height(double amplitude, double quarters) {
  return product(amplitude, std::fabs(quarters - 2)) - amplitude;
}

RK_HOST_DEVICE double wave(const int64_t* record, int64_t t) {
  const double period = number(record, kPeriod), r = std::fmod(double(t), period);
  return height(number(record, kAmplitude),
                4 * moved_on(r, period, number(record, kShift)) / period);
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

// The id that is due by force, or -1. (Conditions without branches, which would wait for one
// another.)
template <class Record>
RK_HOST_DEVICE int64_t forced_id(const Record& record, const Progress& p) {
  const int64_t parts = record[kParts];
  const bool stops = ((parts & kDeepConf) != 0) & (p.stopped != 0) & (record[kEos] >= 0);
  const bool spent = ((parts & kBudget) != 0) & (p.spent >= record[kBudgetTokens]) &
                     (p.phrase != kDone) & ((p.phase == kThinking) | (p.phrase > 0));
  const bool waits = ((parts & kMinThink) != 0) & (p.wait > 0);
  if (!(stops | spent | waits)) return -1;
  if (stops) return record[kEos];
  return spent ? entry(record, kEnd, p.phrase) : entry(record, kWait, p.wait);
}

// `parts`: those that act, none outside of thinking.
RK_HOST_DEVICE void add_parts(RowControl& c, const int64_t* record, const Progress& p,
                              int64_t parts) {
  if ((parts & kCyclic) && in_windows(record, p.t)) c.added[0] = wave(record, p.t);
  if ((parts & kTip) && p.t < p.switched + record[kTipSpan]) c.added[1] = -number(record, kAlpha);
  if (parts & kConstant) c.added[2] = number(record, kBias);
  if (parts & kSchedule) c.added[3] = scheduled(record, p.t);
  for (int k = 0; k < kAdders; ++k) {
    if (c.added[k] != 0) c.sets[k] = record[kAddedSets + k];
  }
  if (parts & kBan) c.ban = record[kBanSet];
}

// What is done by id, bar a force.
template <class Record>
RK_HOST_DEVICE RowControl control_by_id(const Record& record, const Progress& p) {
  RowControl c{-1, {0, 0, 0, 0}, {-1, -1, -1, -1}, -1, -1, -1, -1, 0, 0};
  const int64_t parts = p.phase == kThinking ? record[kParts] : 0;
  add_parts(c, record, p, parts);
  const bool minimum = ((parts & kMinThink) != 0) & must_think(record, p);
  c.end = minimum ? record[kThinkEnd] : -1;
  c.wait = minimum ? record[kWait] : -1;
  return c;
}

template <class Record>
RK_HOST_DEVICE void add_soft(RowControl& c, const Record& record, const Progress& p) {
  const bool ramps = p.spent >= record[kTrackFrom] && p.spent < record[kBudgetTokens];
  if (!(record[kParts] & kSoft) || p.phase != kThinking || p.phrase == kDone || !ramps) return;
  c.soft = entry(record, kEnd, p.phrase);
  c.weight = (double(p.spent) - number(record, kSoftFrom)) /
             (double(record[kBudgetTokens]) - number(record, kSoftFrom));
  c.margin = number(record, kSoftMargin);
}

template <class Record>
RK_HOST_DEVICE RowControl control_of(const Record& record, const Progress& p) {
  RowControl c = control_by_id(record, p);
  add_soft(c, record, p);
  c.force = forced_id(record, p);
  return c;
}

// ---- one logit. T is float for logits of at most 32 bits and double for float64.

constexpr double kInfinity = __builtin_huge_val();

// NaN and -inf are not forced.
template <class T>
RK_HOST_DEVICE bool can_force(T z) {
  return z > T(-kInfinity);
}

// A set's bit among those of an entry's sets; 0 for -1.
RK_HOST_DEVICE uint32_t bit_of(int64_t set) { return set < 0 ? 0 : uint32_t(1) << set; }

// What the row adds to an entry of its sets, in double, whichever of its sets the entry is met in.
RK_HOST_DEVICE double added_to(const RowControl& c, int64_t member) {
  double sum = 0;
  for (int k = 0; k < kAdders; ++k) {
    sum += (uint32_t(member) & bit_of(c.sets[k])) != 0 ? c.added[k] : 0;
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

// The sum of c[k] x^k, by pairs, pairs of pairs, … (Estrin): as few sums as may wait for one
// another.
template <int N>
RK_HOST_DEVICE double polynomial(const double (&c)[N], double x) {
  if constexpr (N == 1) {
    return c[0];
  } else {
    double pairs[(N + 1) / 2];
    for (int k = 0; k < N / 2; ++k) pairs[k] = product(c[2 * k + 1], x) + c[2 * k];
    if constexpr (N % 2 == 1) pairs[N / 2] = c[N - 1];
    return polynomial(pairs, x * x);
  }
}

// 2^n, n from -1022 on.
RK_HOST_DEVICE double power_of_two(int64_t n) {
  const int64_t bits = (n + 1023) << 52;
  return number(&bits, 0);
}

// log(1 + e^x) for x <= 0, to a few units of the last place: the same bits on host and device,
// without the tables and branches of the C library's functions, which are dear where nothing is in
// cache, and without a division. The polynomials pass through e^r, |r| <= ln 2 / 2, and through
// log(1 + e) / e, 0 <= e <= 1, at as many Chebyshev points, to 2e-17 and 4e-17 of them.
RK_HOST_DEVICE double log1p_exp(double x) {
  constexpr double kExp[] = {1.,
                             1.,
                             0x1.0000000000011p-1,
                             0x1.555555555555ap-3,
                             0x1.555555554f0cfp-5,
                             0x1.111111110f225p-7,
                             0x1.6c16c187fbe02p-10,
                             0x1.a01a01b14378fp-13,
                             0x1.a01991ac8730ap-16,
                             0x1.71ddf5749d126p-19,
                             0x1.28b4057f44145p-22,
                             0x1.af631d0059becp-26};
  constexpr double kLog1p[] = {1.,
                               -0x1.fffffffffffe2p-2,
                               0x1.555555555426cp-2,
                               -0x1.ffffffff675f0p-3,
                               0x1.999999851ab6dp-3,
                               -0x1.555553a360d3bp-3,
                               0x1.2492310403ad0p-3,
                               -0x1.fffe16d429dd8p-4,
                               0x1.c70e13a2c5d8ep-4,
                               -0x1.99470de1e7dfcp-4,
                               0x1.72ea81f4306bfp-4,
                               -0x1.502a5940104acp-4,
                               0x1.2c324b8581570p-4,
                               -0x1.01965f46f9127p-4,
                               0x1.9a3bf844ccce4p-5,
                               -0x1.2310e9937c018p-5,
                               0x1.606fc4b32e031p-6,
                               -0x1.5bd286de89760p-7,
                               0x1.0946fb1ce4ee5p-8,
                               -0x1.22d14be88b9f2p-10,
                               0x1.956569bb68299p-13,
                               -0x1.0cc64e91b8745p-16};
  constexpr double kLn2 = 0x1.62e42fefa3800p-1, kLn2Rest = 0x1.ef35793c76730p-45;
  constexpr double kRounds = 0x1.8p52;  // a sum with it is whole; its lowest bits are the number's
  const double bounded =
      x > -746 ? x : -746;  // e^-746 is 0; what is not above is below, or NaN for it
  const double sum = product(bounded, 0x1.71547652b82fep0) + kRounds, n = sum - kRounds;
  const double r = bounded - product(n, kLn2) - product(n, kLn2Rest);
  const int32_t power = int32_t(bits_of(sum)), half = power / 2;
  const double e = polynomial(kExp, r) * power_of_two(half) * power_of_two(power - half);
  return product(e, polynomial(kLog1p, e));
}

// T log(e^(a/T) + e^(b/T)), the larger one at T = 0. (The divisor's part is known before the
// logits.)
template <class T>
RK_HOST_DEVICE T merged(T wait, T end, const Divisor& t) {
  const double a = wait, b = end, high = a > b ? a : b, low = a > b ? b : a;
  const double sum = high + product(t.value, log1p_exp(quotient(low - high, t)));
  const double plain = (a != a) | (b != b) ? a + b : high;
  const bool is_plain = !(plain < kInfinity) | (low == -kInfinity) | (t.value == 0);
  return T(is_plain ? plain : sum);
}

// `top`: the row's largest finite logit after everything else, -inf where there is none.
template <class T>
RK_HOST_DEVICE T raised(T z, T top, double weight, double margin) {
  const double gap = double(top) - margin - double(z);
  return is_finite(z) && gap > 0 ? T(double(z) + product(weight, gap)) : z;
}

}  // namespace modulation
}  // namespace reasonkern
