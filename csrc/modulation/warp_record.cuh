// A record whose columns a warp holds in registers, and what takes a whole warp to read from it.
// All columns are asked for at once, before anything is decided, and nothing is left out that might
// not be needed: a branch costs more than what stands behind it, and what stands behind two of them
// cannot go on at a time.
#pragma once

#include "../common/reduce.cuh"
#include "control.h"

namespace reasonkern {
namespace modulation {

__device__ inline int lane_of() { return int(threadIdx.x % 32); }

struct Pair {
  int64_t first, second;
};

// What a warp needs of a record: what tokens change it by, or what it asks of a row, too.
enum class Needs { folds, control };

class WarpRecord {
 public:
  Pair point, window;  // the lane's own

  // 16-byte aligned. The ids of the minimum come last: their logits are asked for when all of the
  // record is on its way.
  __device__ WarpRecord(const int64_t* record, Needs needs) : memory_(record) {
    end_ = pair_at(kEnd).first;
    bring<kLater, kLast>();
    bring<kT, kConfidencePushed>();
    if (needs == Needs::control) {
      point = pair_at(kPoint + 2 * lane_of());
      window = pair_at(kWindow + 2 * (lane_of() % kMaxWindows));
      bring<kAddedSets + 2, kBudgetTokens>();
      bring<kAmplitude, kSoftMargin>();
    }
    bring<kBudgetTokens, kAmplitude>();
    bring<kConfidenceSum, kAddedSets + 2>();
    bring<kWait - 1, kFirst>();
  }

  // A column known to the compiler, of those that are here.
  __device__ int64_t operator[](int column) const {
    return columns_[column < kFirst ? column : column - kLater + kFirst];
  }

  // Of an array, whose first elements are here.
  __device__ int64_t entry(int column, int64_t k) const {
    if (k == 0 && column == kEnd) return end_;
    if (k == 0 && column == kWait) return columns_[kWait];
    return memory_[column + k];
  }

 private:
  static constexpr int kFirst = kWait + 1, kLater = kTrackFrom - 1, kLast = kEos + 1;
  static_assert(kPoint % 2 == 0 && kWindow % 2 == 0 && kEnd % 2 == 0 && kRecordWidth % 2 == 0,
                "read by pairs");

  template <int from, int to>
  __device__ void bring() {
    static_assert(from % 2 == 0 && to % 2 == 0, "read by pairs");
#pragma unroll
    for (int k = from; k < to; k += 2) {
      const Pair pair = pair_at(k);
      const int at = k < kFirst ? k : k - kLater + kFirst;
      columns_[at] = pair.first, columns_[at + 1] = pair.second;
    }
  }

  // Volatile, so that it is not put off until it is needed.
  __device__ Pair pair_at(int column) const {
    Pair pair;
#if defined(__CUDACC__)
    asm volatile("ld.volatile.global.v2.u64 {%0, %1}, [%2];"
                 : "=l"(pair.first), "=l"(pair.second)
                 : "l"(__cvta_generic_to_global(memory_ + column)));
#else
    cuda_sim::copy16(&pair, memory_ + column, "pair_at");
#endif
    return pair;
  }

  const int64_t* memory_;
  int64_t columns_[kFirst + kLast - kLater], end_;
};

__device__ inline double number(const WarpRecord& record, int column) {
  return recast<double>(record[column]);
}

__device__ inline int64_t entry(const WarpRecord& record, int column, int64_t k) {
  return record.entry(column, k);
}

__device__ inline bool in_windows(const WarpRecord& record, int64_t t) {
  const bool inside =
      (lane_of() < record[kWindows]) & (t >= record.window.first) & (t < record.window.second);
  return (__any_sync(kFullMask, inside) != 0) | (record[kWindows] == 0);
}

__device__ inline double scheduled(const WarpRecord& record, int64_t t) {
  static_assert(kMaxPoints == 32, "a lane each");
  const int last = int(record[kPoints]) - 1;
  const bool passed = (lane_of() <= last) & (record.point.first <= t);
  const int left = __popc(__ballot_sync(kFullMask, passed)) - 1;
  const bool between = (left >= 0) & (left < last);
  const Pair a = shuffle_from(record.point, left > 0 ? left : 0);
  const Pair b = shuffle_from(record.point, left < 31 ? left + 1 : 31);
  const double from = recast<double>(a.second), to = recast<double>(b.second);
  const double share = quotient(double(t - a.first), Divisor(double(b.first - a.first)));
  return between ? from + product(share, to - from) : from;
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

__device__ inline void add_parts(RowControl& c, const WarpRecord& record, const Progress& p,
                                 int64_t parts) {
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
