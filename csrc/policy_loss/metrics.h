// What the clipping did, as sums over rows that merge: one row's share, and the merge of two sets
// of rows, in float64 for CPU and CUDA. `metric_rows` in reasonkern/policy_loss/metrics.py states
// the same in torch.
#pragma once

#include <cstdint>

#include "policy_loss.h"

namespace reasonkern {

// Counts, then sums: the order of SUMS in metrics.py.
enum MetricCount : int {
  kRowsActive,
  kRowsSkipped,
  kRowsNonfinite,
  kRowsPos,
  kRowsNeg,
  kClipPosLow,
  kClipPosHigh,
  kClipNegLow,
  kClipNegHigh,
  kDualOrCap,
  kRowsDropped,
  kNumCounts
};
enum MetricSum : int {
  kKlOld,  // k1, k2, k3
  kKlRef = kKlOld + 3,
  kEntropy = kKlRef + 3,
  kEntropyPos,
  kEntropyNeg,
  kContributionPos,
  kContributionNeg,
  kNumSums
};
constexpr int kNumMetrics = int(kNumCounts) + int(kNumSums) + 2 + 3 * 4;

// T is the accumulator type of the logits. Pointers are (rows); those that may be null say so.
template <typename T>
struct MetricsParams {
  int64_t rows;
  const T *logprob, *entropy;
  const T* old_logprob;  // or null: on-policy
  const T *advantage, *weight;
  const T* entropy_weight;  // or null: weight
  const T* importance;      // or null; of the policy term: a nonfinite one leaves its row out
  const T* ref_logprob;     // or null
  const T* log_ratio;       // or null: logprob - old_logprob
  const bool* finite;       // or null; false: the row was left out of the loss
  Hyper<double> hyper;      // used when device_hyper is null
  const T* device_hyper;    // (9, hyper_rows), hyper_rows is 1 or rows
  int64_t hyper_rows;
  int kind;        // kDppoTv, kDppoKl: the tokens that they drop count as clipped
  bool clips;      // false: no row is outside a bound
  bool needs_ref;  // a nonfinite ref_logprob leaves its row out
  double* out;     // (kNumMetrics): sums, minimum and maximum of the ratio, three rows of moments
};

// Sums, and centred moments of the pairs (r, r), (logp, A) and (logp, A of unclipped rows).
struct Metrics {
  int counts[kNumCounts];
  double sums[kNumSums];
  double ratio_min, ratio_max;
  double ratio, logp, advantage, unclipped;            // means
  double ratio_ratio, logp_advantage, logp_unclipped;  // sums of products of deviations
};

RK_HOST_DEVICE Metrics no_metrics() {
  Metrics m{};
  m.ratio_min = std::numeric_limits<double>::infinity();
  m.ratio_max = -m.ratio_min;
  return m;
}

// Chan, Golub & LeVeque 1979: sets of rows, the first one before the second.
RK_HOST_DEVICE void merge(Metrics& a, const Metrics& b) {
  const double n_a = a.counts[kRowsActive], n_b = b.counts[kRowsActive], n = n_a + n_b;
  const double share = n_b / (n < 1 ? 1 : n), both = n_a * share;
  const double ratio = b.ratio - a.ratio, logp = b.logp - a.logp;
  const double advantage = b.advantage - a.advantage, unclipped = b.unclipped - a.unclipped;
  a.ratio_ratio += b.ratio_ratio + ratio * ratio * both;
  a.logp_advantage += b.logp_advantage + logp * advantage * both;
  a.logp_unclipped += b.logp_unclipped + logp * unclipped * both;
  a.ratio += ratio * share;
  a.logp += logp * share;
  a.advantage += advantage * share;
  a.unclipped += unclipped * share;
  a.ratio_min = b.ratio_min < a.ratio_min ? b.ratio_min : a.ratio_min;
  a.ratio_max = b.ratio_max > a.ratio_max ? b.ratio_max : a.ratio_max;
  for (int k = 0; k < kNumCounts; ++k) a.counts[k] += b.counts[k];
  for (int k = 0; k < kNumSums; ++k) a.sums[k] += b.sums[k];
}

// k1, k2, k3 of d = ln(other / policy).
RK_HOST_DEVICE void set_estimators(double* sums, double d, double log_ratio_clamp) {
  sums[0] = -d;
  sums[1] = 0.5 * d * d;
  sums[2] = std::expm1(clamp(d, -log_ratio_clamp, log_ratio_clamp)) - d;
}

// The share of a row that counts: weight != 0 and finite.
template <typename T>
RK_HOST_DEVICE void set_row(Metrics& m, const MetricsParams<T>& p, int64_t row, double r,
                            const Hyper<double>& h) {
  const double logp = p.logprob[row], a = p.advantage[row], entropy = p.entropy[row];
  const bool pos = a > 0, neg = a < 0;
  bool low = r<h.ratio_min, high = r> h.ratio_max;
  if (p.kind == kDppoTv || p.kind == kDppoKl) {
    const double old = p.old_logprob != nullptr ? double(p.old_logprob[row]) : logp;
    const bool dropped = !dppo_keeps(p.kind, logp, old, a, h);
    high = dropped && pos;  // the side that each sign is limited on
    low = dropped && !pos;
  }
  low = low && p.clips;
  high = high && p.clips;
  const bool clipped = (pos && high) || (neg && low);
  m.counts[kRowsActive] = 1;
  m.counts[kRowsPos] = pos;
  m.counts[kRowsNeg] = neg;
  m.counts[kClipPosLow] = pos && low;
  m.counts[kClipPosHigh] = pos && high;
  m.counts[kClipNegLow] = neg && low;
  m.counts[kClipNegHigh] = neg && high;
  m.counts[kDualOrCap] = r > h.ratio_cap || (neg && r > h.dual_clip);
  m.counts[kRowsDropped] = p.importance != nullptr && p.importance[row] == T(0);
  if (p.old_logprob != nullptr) {
    set_estimators(m.sums + kKlOld, p.old_logprob[row] - logp, h.log_ratio_clamp);
  }
  if (p.ref_logprob != nullptr) {
    set_estimators(m.sums + kKlRef, p.ref_logprob[row] - logp, h.log_ratio_clamp);
  }
  m.sums[kEntropy] = entropy;
  m.sums[kEntropyPos] = pos ? entropy : 0;
  m.sums[kEntropyNeg] = neg ? entropy : 0;
  const bool bounded = neg ? r < h.ratio_min : r > h.ratio_max;
  const double contribution = (bounded ? (neg ? h.ratio_min : h.ratio_max) : r) * a;
  m.sums[kContributionPos] = contribution > 0 ? contribution : 0;
  m.sums[kContributionNeg] = contribution < 0 ? -contribution : 0;
  m.ratio_min = m.ratio_max = m.ratio = r;
  m.logp = logp;
  m.advantage = a;
  m.unclipped = clipped ? 0 : a;
}

template <typename T>
RK_HOST_DEVICE Metrics row_metrics(const MetricsParams<T>& p, int64_t row) {
  Metrics m = no_metrics();
  const bool active = p.weight[row] != 0;
  const bool read = active || (p.entropy_weight != nullptr && p.entropy_weight[row] != 0);
  m.counts[kRowsSkipped] = !active;
  if (!read) return m;
  // The difference in T, as the objective takes it.
  T log_ratio = T(0);
  if (p.log_ratio != nullptr) {
    log_ratio = p.log_ratio[row];
  } else if (p.old_logprob != nullptr) {
    log_ratio = p.logprob[row] - p.old_logprob[row];
  }
  const Hyper<double> h = load_hyper(p, row);
  const double r = clamped_exp<double>(log_ratio, h.log_ratio_clamp).value;
  const bool finite =
      (p.finite == nullptr || p.finite[row]) && std::isfinite(p.logprob[row]) &&
      std::isfinite(p.entropy[row]) && std::isfinite(r) && std::isfinite(p.advantage[row]) &&
      (p.importance == nullptr || std::isfinite(p.importance[row])) &&
      (!p.needs_ref || p.ref_logprob == nullptr || std::isfinite(p.ref_logprob[row]));
  m.counts[kRowsNonfinite] = !finite;
  if (active && finite) set_row(m, p, row, r, h);
  return m;
}

RK_HOST_DEVICE double* write_moments(double* out, double n, double x, double y, double xy) {
  out[0] = n;
  out[1] = x;
  out[2] = y;
  out[3] = xy;
  return out + 4;
}

RK_HOST_DEVICE void write_metrics(double* out, const Metrics& m) {
  for (int k = 0; k < kNumCounts; ++k) *out++ = m.counts[k];
  for (int k = 0; k < kNumSums; ++k) *out++ = m.sums[k];
  *out++ = m.ratio_min;
  *out++ = m.ratio_max;
  const double n = m.counts[kRowsActive];
  out = write_moments(out, n, m.ratio, m.ratio, m.ratio_ratio);
  out = write_moments(out, n, m.logp, m.advantage, m.logp_advantage);
  write_moments(out, n, m.logp, m.unclipped, m.logp_unclipped);
}

}  // namespace reasonkern
