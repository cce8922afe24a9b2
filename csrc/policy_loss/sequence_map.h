// The objectives of whole sequences, GSPO, GMPO and VESPO, on given statistics: two sums over a
// sequence, then a map of its rows. Sums and ratios are in double. `sequence_rows` in
// reasonkern/policy_loss/sequence.py states the same in torch.
#pragma once

#include "policy_loss.h"

namespace reasonkern {

enum SequenceKind : int { kGspo, kGmpo, kVespo };

template <typename T>
struct SequenceParams {
  int64_t rows, sequences;
  const int64_t* offsets;  // (sequences + 1) in [0, rows], or null: sequences of equal length
  const T *logprob, *entropy;
  const T* old_logprob;  // (rows) or null: on-policy
  const T *advantage, *weight;
  const T* entropy_weight;  // or null: weight
  const T* importance;      // or null: 1
  const T* ref_logprob;     // or null: no KL term
  Hyper<double> hyper;      // used when device_hyper is null
  const T* device_hyper;    // (9, hyper_rows), hyper_rows is 1 or rows
  int64_t hyper_rows;
  int kind, kl_kind;
  bool kl_unbiased;
  T *row_loss, *token_loss, *dlogp, *dentropy, *log_ratio;  // (rows)
  bool* finite;                                             // (rows)
};

struct SequenceRange {
  int64_t begin, end;
};

// Offsets that only a GPU's caller can get wrong stay inside the rows.
template <typename T>
RK_HOST_DEVICE SequenceRange sequence_range(const SequenceParams<T>& p, int64_t sequence) {
  if (p.offsets == nullptr) {
    const int64_t length = p.rows / p.sequences;
    return {sequence * length, (sequence + 1) * length};
  }
  const auto at = [&p](int64_t k) { return clamp<int64_t>(p.offsets[k], 0, p.rows); };
  return {sequence == 0 ? 0 : at(sequence),
          sequence + 1 == p.sequences ? p.rows : at(sequence + 1)};
}

// A row; one whose statistics are not finite takes no part.
template <typename T>
struct SequenceRow {
  RowInputs<T> in;
  T logp, entropy;
  double log_ratio;     // 0 where the row is not active
  bool finite, active;  // active: in the sums
  bool moved;           // false: one-sided clipping (GMPO) replaced log_ratio by a bound
};

template <typename T>
RK_HOST_DEVICE SequenceRow<T> load_sequence_row(const SequenceParams<T>& p, int64_t row,
                                                const Hyper<double>& h) {
  SequenceRow<T> r;
  r.in = load_row_inputs(p, row);
  r.finite = std::isfinite(p.logprob[row]) && std::isfinite(p.entropy[row]);
  r.logp = r.finite ? p.logprob[row] : T(0);
  r.entropy = r.finite ? p.entropy[row] : T(0);
  if (!r.finite) r.in.weight = r.in.entropy_weight = T(0);
  if (!r.in.has_old) r.in.old_logprob = r.logp;
  r.active = r.moved = r.in.weight != 0;
  r.log_ratio = r.active ? double(r.logp - r.in.old_logprob) : 0.0;
  if (p.kind == kGmpo && r.active) {
    const double bound = std::log(r.in.advantage > 0 ? h.ratio_max : h.ratio_min);
    const bool beyond = r.in.advantage > 0 ? r.log_ratio > bound : r.log_ratio < bound;
    r.moved = !beyond && r.log_ratio == r.log_ratio;
    if (beyond) r.log_ratio = bound;
  }
  return r;
}

struct SequenceSums {
  double log_ratio, length;
};

template <typename T>
RK_HOST_DEVICE SequenceSums sequence_sums(const SequenceParams<T>& p, int64_t row) {
  const SequenceRow<T> r = load_sequence_row(p, row, load_hyper(p, row));
  return {r.log_ratio, r.active ? 1.0 : 0.0};
}

RK_HOST_DEVICE SequenceSums operator+(SequenceSums a, SequenceSums b) {
  return {a.log_ratio + b.log_ratio, a.length + b.length};
}

// What the ratio of a sequence is the exponential of: the mean, for VESPO the limited sum.
RK_HOST_DEVICE double sequence_log_ratio(int kind, SequenceSums s) {
  constexpr double kLogWMin = -18.420680743952367, kLogWMax = 20.0;  // ln 1e-8
  if (kind == kVespo) return clamp(s.log_ratio, kLogWMin, kLogWMax);
  return s.log_ratio / (s.length < 1 ? 1 : s.length);
}

// The loss of a row's sequence, and what the row's derivative by its log-ratio is made of.
RK_HOST_DEVICE Term<double> sequence_loss(int kind, double log_ratio, double a,
                                          const Hyper<double>& h) {
  const Ratio<double> r = kind == kGspo ? clamped_exp(log_ratio, h.log_ratio_clamp)
                                        : Ratio<double>{std::exp(log_ratio), 1.0};
  // A = 0 gives 0 whatever the ratio, as long as there is one.
  if (a == 0) return {std::isnan(r.value) ? r.value : 0.0, 0.0};
  if (kind == kGspo) return clip_term(r, a, h);
  return {-r.value * a, -r.value * a};
}

// A row's share of the sum that the derivatives of its sequence have in common.
template <typename T>
RK_HOST_DEVICE double sequence_slope(const SequenceParams<T>& p, int64_t row, double log_ratio) {
  const Hyper<double> h = load_hyper(p, row);
  const SequenceRow<T> r = load_sequence_row(p, row, h);
  if (!r.active || p.kind == kVespo) return 0;
  return r.in.weight * r.in.importance * sequence_loss(p.kind, log_ratio, r.in.advantage, h).dlogp;
}

// VESPO's -phi(w) A logp; fields of the numbers: k, lambda for A >= 0, then for A < 0.
template <typename T>
RK_HOST_DEVICE Term<T> vespo_term(const SequenceRow<T>& r, double log_w, T weight,
                                  const Hyper<double>& h) {
  const double a = r.in.advantage;
  const double k = a < 0 ? h.dual_clip : h.ratio_min, lambda = a < 0 ? h.ratio_cap : h.ratio_max;
  const double factor = a * std::exp(lambda + k * log_w - lambda * std::exp(log_w));
  return {T(-factor * r.logp), T(-weight * factor)};
}

// `slope`: the sum of sequence_slope over the sequence, by its length.
template <typename T>
RK_HOST_DEVICE void map_sequence_row(const SequenceParams<T>& p, int64_t row, double log_ratio,
                                     double slope) {
  const Hyper<double> h = load_hyper(p, row);
  const SequenceRow<T> r = load_sequence_row(p, row, h);
  const RowInputs<T>& in = r.in;
  Term<T> l;
  if (p.kind == kVespo) {
    l = vespo_term(r, log_ratio, in.weight * in.importance, h);
  } else {
    const double value = sequence_loss(p.kind, log_ratio, in.advantage, h).value;
    l = {T(value), r.moved ? T(slope) : T(0)};
  }
  l.value *= in.importance;
  if (p.kl_kind != kNoKl && in.has_ref) {
    const Term<T> k = kl_term(p.kl_kind, p.kl_unbiased, r.logp, in.ref_logprob, in.old_logprob,
                              T(h.log_ratio_clamp));
    l = {l.value + T(h.kl_coef) * k.value, l.dlogp + in.weight * T(h.kl_coef) * k.dlogp};
  }
  RowLoss<T> out{T(0), T(0), T(0), T(0), true};
  if (in.weight != 0 || in.entropy_weight != 0) {
    out = combine(l, r.logp, r.entropy, in.weight, in.entropy_weight, T(h.entropy_coef));
  }
  p.row_loss[row] = out.row_loss;
  p.token_loss[row] = out.token_loss;
  p.dlogp[row] = out.dlogp;
  p.dentropy[row] = out.dentropy;
  p.log_ratio[row] = T(log_ratio);
  p.finite[row] = out.finite && r.finite;
}

}  // namespace reasonkern
