// The objective: an O(1) map per row from (logp, H) to the loss and its two derivatives.
// Written once for CPU and CUDA; reasonkern/policy_loss/reference_objective.py states the same
// formulas in torch.
#pragma once

#include <cmath>
#include <limits>

#include "../common/host_device.h"

namespace reasonkern {

enum ObjectiveKind : int { kClip, kGppo, kCispo, kSapo, kDppoTv, kDppoKl, kDro };
enum KlKind : int { kNoKl, kK1, kK2, kK3 };

// Field order is the order of HYPER in policy_loss/objective_fields.py.
template <typename T>
struct Hyper {
  T ratio_min, ratio_max, dual_clip, ratio_cap, low, high, kl_coef, entropy_coef, log_ratio_clamp;
};
constexpr int kNumHyper = 9;

template <typename T>
struct RowInputs {
  T advantage, weight, entropy_weight, importance;
  T old_logprob, ref_logprob;  // read only when the flag beside it is set
  bool has_old, has_ref;
};

template <typename T>
struct RowLoss {
  T row_loss, token_loss;
  T dlogp, dentropy;  // derivatives of row_loss
  bool finite;        // false: the row is counted as nonfinite and contributes nothing
};

// A loss value and its derivative with respect to logp.
template <typename T>
struct Term {
  T value, dlogp;
};

// exp(log_ratio) with the log-ratio clamped; `slope` is 1 inside the clamp and 0 outside, so the
// derivative of `value` with respect to logp is `slope * value`.
template <typename T>
struct Ratio {
  T value, slope;
};

template <typename T>
RK_HOST_DEVICE T clamp(T x, T lo, T hi) {
  return x < lo ? lo : (x > hi ? hi : x);
}

template <typename T>
RK_HOST_DEVICE Ratio<T> clamped_exp(T log_ratio, T limit) {
  const bool inside = log_ratio >= -limit && log_ratio <= limit;
  return {std::exp(clamp(log_ratio, -limit, limit)), inside ? T(1) : T(0)};
}

// Negative advantages: the loss stops growing, and its gradient is 0, beyond r = dual_clip.
template <typename T>
RK_HOST_DEVICE Term<T> dual_clipped(Term<T> term, Ratio<T> r, T a, const Hyper<T>& h) {
  const T bound = -h.dual_clip * a;
  if (a < 0 && r.value > h.dual_clip && bound < term.value) return {bound, T(0)};
  return term;
}

// -min(rA, clip(r)A), two-sided cap on the unclipped branch, dual clip on negative advantages.
template <typename T>
RK_HOST_DEVICE Term<T> clip_term(Ratio<T> r, T a, const Hyper<T>& h) {
  const T unclipped = -(r.value < h.ratio_cap ? r.value : h.ratio_cap) * a;
  const T clipped = -clamp(r.value, h.ratio_min, h.ratio_max) * a;
  Term<T> out{clipped, T(0)};
  if (unclipped >= clipped) {  // a tie is unclipped
    out = {unclipped, r.value > h.ratio_cap ? T(0) : -r.slope * r.value * a};
  }
  return dual_clipped(out, r, a, h);
}

// Clip-higher whose clipped side keeps the bounded gradient beta * bound * A.
template <typename T>
RK_HOST_DEVICE Term<T> gppo_term(Ratio<T> r, T a, const Hyper<T>& h) {
  Term<T> out{-r.value * a, -r.slope * r.value * a};
  if (a < 0 && r.value < h.ratio_min) {
    out = {-h.low * h.ratio_min * a, -h.low * h.ratio_min * a};
  } else if (a > 0 && r.value > h.ratio_max) {
    out = {-h.high * h.ratio_max * a, -h.high * h.ratio_max * a};
  }
  return dual_clipped(out, r, a, h);
}

template <typename T>
RK_HOST_DEVICE Term<T> sapo_term(Ratio<T> r, T a, const Hyper<T>& h) {
  const T tau = a > 0 ? h.low : h.high;
  const T gate = T(1) / (T(1) + std::exp(-tau * (r.value - T(1))));
  return {-a * (T(4) / tau) * gate, -a * T(4) * gate * (T(1) - gate) * r.value * r.slope};
}

// Divergence between the Bernoulli laws "this token or not" of the old and the new policy.
template <typename T>
RK_HOST_DEVICE T bernoulli_kl(T old_logprob, T logp) {
  const T old_p = std::exp(old_logprob);
  const T old_rest = -std::expm1(old_logprob);
  T kl = old_p * (old_logprob - logp);
  if (old_rest > 0) kl += old_rest * (std::log(old_rest) - std::log(-std::expm1(logp)));
  return kl;
}

template <typename T>
RK_HOST_DEVICE bool dppo_keeps(int kind, T logp, T old_logprob, T a, const Hyper<T>& h) {
  const T moved = std::exp(logp) - std::exp(old_logprob);
  if (kind == kDppoTv) return a > 0 ? moved <= h.high : moved >= -h.low;
  const T kl = bernoulli_kl(old_logprob, logp);
  return a > 0 ? (kl <= h.high || moved <= 0) : (kl <= h.low || moved >= 0);
}

template <typename T>
RK_HOST_DEVICE Term<T> token_term(int kind, T logp, T old_logprob, T a, const Hyper<T>& h) {
  const Ratio<T> r = clamped_exp(logp - old_logprob, h.log_ratio_clamp);
  switch (kind) {
    case kClip:
      return clip_term(r, a, h);
    case kGppo:
      return gppo_term(r, a, h);
    case kCispo: {
      const T factor = clamp(r.value, h.ratio_min, h.ratio_max) * a;
      return {-factor * logp, -factor};
    }
    case kSapo:
      return sapo_term(r, a, h);
    case kDro: {
      const T d = logp - old_logprob;
      return {-(logp * a - T(0.5) * h.low * d * d), -(a - h.low * d)};
    }
    default: {  // kDppoTv, kDppoKl
      const T factor = (r.value < h.ratio_max ? r.value : h.ratio_max) * a;
      if (!dppo_keeps(kind, logp, old_logprob, a, h)) return {T(0), T(0)};
      return {-factor * logp, -factor};
    }
  }
}

// k1, k2, k3 of d = ref - logp; `unbiased` multiplies by the ratio and differentiates through it.
template <typename T>
RK_HOST_DEVICE Term<T> kl_term(int kl_kind, bool unbiased, T logp, T ref_logprob, T old_logprob,
                               T log_ratio_clamp) {
  const T d = ref_logprob - logp;
  Term<T> k{-d, T(1)};
  if (kl_kind == kK2) k = {T(0.5) * d * d, -d};
  if (kl_kind == kK3) {
    // Not exp(d) - 1 - d, which loses all digits while the policies are close.
    const bool inside = d >= -log_ratio_clamp && d <= log_ratio_clamp;
    const T grown = std::expm1(clamp(d, -log_ratio_clamp, log_ratio_clamp));
    k = {grown - d, inside ? -grown : T(1)};
  }
  if (!unbiased) return k;
  const Ratio<T> r = clamped_exp(logp - old_logprob, log_ratio_clamp);
  return {r.value * k.value, r.value * (r.slope * k.value + k.dlogp)};
}

// `weighted` has the loss and the derivative of weight * loss; zeros for a row that is not finite.
template <typename T>
RK_HOST_DEVICE RowLoss<T> combine(Term<T> weighted, T logp, T entropy, T weight, T entropy_weight,
                                  T entropy_coef) {
  RowLoss<T> out;
  out.token_loss = weighted.value;
  out.dlogp = weighted.dlogp;
  out.dentropy = -entropy_coef * entropy_weight;
  out.row_loss = weight * weighted.value + out.dentropy * entropy;
  out.finite = std::isfinite(logp) && std::isfinite(out.row_loss) &&
               std::isfinite(out.token_loss) && std::isfinite(out.dlogp) &&
               std::isfinite(out.dentropy);
  if (!out.finite) out.row_loss = out.token_loss = out.dlogp = out.dentropy = T(0);
  return out;
}

template <typename T>
RK_HOST_DEVICE RowLoss<T> objective_row(int kind, int kl_kind, bool kl_unbiased, T logp, T entropy,
                                        const RowInputs<T>& in, const Hyper<T>& h) {
  // On-policy rows have r = 1 with gradient: the old log-probability is logp itself, detached.
  const T old_logprob = in.has_old ? in.old_logprob : logp;
  // A = 0 gives 0 whatever the ratio, as long as there is one; DRO's quadratic term has no A.
  const T none = std::isnan(old_logprob) ? old_logprob : T(0);
  Term<T> l{none, none};
  if (in.advantage != 0 || kind == kDro) {
    l = token_term(kind, logp, old_logprob, in.advantage, h);
  }
  // Also where A = 0: an importance that is not finite leaves its row out.
  l = {in.importance * l.value, in.importance * l.dlogp};
  if (kl_kind != kNoKl && in.has_ref) {
    const Term<T> k =
        kl_term(kl_kind, kl_unbiased, logp, in.ref_logprob, old_logprob, h.log_ratio_clamp);
    l = {l.value + h.kl_coef * k.value, l.dlogp + h.kl_coef * k.dlogp};
  }
  return combine({l.value, in.weight * l.dlogp}, logp, entropy, in.weight, in.entropy_weight,
                 h.entropy_coef);
}

// Coefficients of one gradient row, with d = z_v - m and p = exp(d) * inv_sum:
//   dL/dx_v = scale * jac_v * ( p * (constant + linear * d + quadratic * p) + [v == y] * target )
// where scale = loss_scale / T and jac_v = 1 - tanh^2(x_v / cap) under a soft-cap. row_max is T m,
// the largest logit after the soft-cap.
template <typename T>
struct GradRow {
  T row_max, inv_sum, constant, linear, quadratic, target, scale;
};

// g, e, c, k: derivatives of the loss with respect to logp, entropy, collision and lse.
template <typename T>
RK_HOST_DEVICE GradRow<T> grad_row(T row_max, T inv_sum, T entropy, T collision, T g, T e, T c, T k,
                                   T scale) {
  const T mean_shifted = -std::log(inv_sum) - entropy;  // u/s
  GradRow<T> out;
  out.row_max = row_max;
  out.inv_sum = inv_sum;
  out.constant = -g + e * mean_shifted - T(2) * c * collision + k;
  out.linear = -e;
  out.quadratic = T(2) * c;
  out.target = g;
  out.scale = scale;
  return out;
}

}  // namespace reasonkern
