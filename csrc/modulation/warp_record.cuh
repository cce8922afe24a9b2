// A record whose columns the lanes of a warp hold in registers, and what takes a whole warp to read
// from it. All columns are read at once, before anything is decided, and nothing is left out that
// might not be asked for: a branch costs more than what stands behind it, and what stands behind
// two of them cannot go on at a time.
#pragma once

#include "../common/reduce.cuh"
#include "control.h"

namespace reasonkern {
namespace modulation {

__device__ inline int lane_of() { return int(threadIdx.x % 32); }

class WarpRecord {
 public:
  __device__ explicit WarpRecord(const int64_t* shared) : memory_(shared) {
#pragma unroll
    for (int k = 0; k < kFirst; ++k) first_[k] = memory_[k];
#pragma unroll
    for (int k = 0; k < kLast - kLater; ++k) later_[k] = memory_[kLater + k];
  }

  // A column known to the compiler.
  __device__ int64_t operator[](int column) const {
    if (column < kFirst) return first_[column];
    return column >= kLater && column < kLast ? later_[column - kLater] : memory_[column];
  }
  __device__ const int64_t* memory() const { return memory_; }

 private:
  static constexpr int kFirst = kWait + 1, kLater = kTrackFrom - 1, kLast = kEos + 1;
  static_assert(kFirst % 2 == 0 && kLater % 2 == 0 && kLast % 2 == 0, "read by pairs");

  const int64_t* memory_;
  int64_t first_[kFirst], later_[kLast - kLater];
};

__device__ inline double number(const WarpRecord& record, int column) {
  return recast<double>(record[column]);
}

__device__ inline int64_t entry(const WarpRecord& record, int column, int64_t k) {
  return record.memory()[column + k];
}

// A lane to a window.
__device__ inline bool in_windows(const WarpRecord& record, int64_t t) {
  const int64_t* own = record.memory() + kWindow + 2 * (lane_of() % kMaxWindows);
  const bool inside = lane_of() < record[kWindows] && t >= own[0] && t < own[1];
  return __any_sync(kFullMask, inside) || record[kWindows] == 0;
}

// A lane to a point.
__device__ inline double scheduled(const WarpRecord& record, int64_t t) {
  static_assert(kMaxPoints == 32, "a lane each");
  const int64_t* points = record.memory() + kPoint;
  const int last = int(record[kPoints]) - 1;
  const bool passed = lane_of() <= last && points[2 * lane_of()] <= t;
  const int left = __popc(__ballot_sync(kFullMask, passed)) - 1;
  const bool between = left >= 0 && left < last;
  const int64_t* a = points + 2 * (left > 0 ? left : 0);
  const int64_t* b = between ? a + 2 : a;
  const double from = number(a, 1), share = quotient(double(t - a[0]), Divisor(double(b[0] - a[0])));
  return between ? from + product(share, number(b, 1) - from) : from;
}

// t mod the period, exactly: |t - n C| is at most about half a period, and what a double holds; so
// it is after a first step for an n that has more bits than a double.
__device__ inline double remainder(double t, bool is_far, const Divisor& period) {
  constexpr double kRounds = 0x1.8p52;  // a sum with it is whole
  if (is_far) t = __fma_rn(-std::rint(product(t, period.reciprocal)), period.value, t);
  const double n = product(t, period.reciprocal) + kRounds - kRounds;
  const double r = __fma_rn(-n, period.value, t);
  return r < 0 ? r + period.value : r;
}

__device__ inline double wave(const WarpRecord& record, int64_t t) {
  const double length = number(record, kPeriod);
  const double unit = length > 0x1p900 ? 0x1p-900 : 1;  // no bit of the result depends on it
  const Divisor period(length * unit);
  const double r = remainder(double(t) * unit, t >= int64_t(1) << 31, period);
  return height(number(record, kAmplitude),
                quotient(4 * moved_on(r, period.value, number(record, kShift)), period));
}

__device__ inline void add_parts(RowControl& c, const WarpRecord& record, const Progress& p) {
  const int64_t parts = record[kParts];
  const bool inside = in_windows(record, p.t);
  const bool asked[kAdders] = {(parts & kCyclic) != 0 && inside,
                               (parts & kTip) != 0 && p.t < p.switched + record[kTipSpan],
                               (parts & kConstant) != 0, (parts & kSchedule) != 0};
  const double added[kAdders] = {wave(record, p.t), -number(record, kAlpha), number(record, kBias),
                                 scheduled(record, p.t)};
#pragma unroll
  for (int k = 0; k < kAdders; ++k) {
    c.added[k] = asked[k] ? added[k] : 0;
    c.sets[k] = c.added[k] != 0 ? record[kAddedSets + k] : -1;
  }
  c.ban = (parts & kBan) != 0 ? record[kBanSet] : -1;
}

}  // namespace modulation
}  // namespace reasonkern
