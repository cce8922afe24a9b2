// The O(1) work on one row around the loops of cpu_rows.h, done in double: which rows are computed,
// their statistics, the objective and the coefficients of their gradient.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu_dispatch.h"
#include "policy_loss.h"

namespace reasonkern {
namespace cpu {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
constexpr double kLowest = -746.0;  // exp of it is 0; -inf would make 0 * d a NaN

// One row of logits and of the gradient, and how its logits are read.
template <class E>
struct Row {
  const E* x;
  E* grad;  // null: no gradient wanted
  int64_t vocab, target;
  Acc<E> temperature, softcap;

  Row(const Rows& rows, const Scale<Acc<E>>& scale, int64_t r)
      : vocab(rows.vocab), target(rows.targets[r]), softcap(scale.softcap) {
    const int64_t b = r / rows.seq, t = r % rows.seq;
    x = static_cast<const E*>(rows.logits) + b * rows.stride_b + t * rows.stride_t;
    grad = static_cast<E*>(rows.grad);
    if (grad != nullptr) grad += b * rows.grad_stride_b + t * rows.grad_stride_t;
    temperature = scale.row_temperature ? scale.row_temperature[r] : scale.temperature;
  }

  bool valid_target() const { return target >= 0 && target < vocab; }
  RowScale<Acc<E>> scale() const { return {temperature, softcap}; }
  int mode() const { return static_cast<int>(mode_of(scale())); }
  double capped(double raw) const {
    return softcap == 0 || std::isinf(raw) ? raw : softcap * std::tanh(raw / softcap);
  }
  // z_v - max z for the raw logit of v.
  double shifted(double raw, double top) const { return (capped(raw) - capped(top)) / temperature; }
  void clear_grad() const {
    if (grad != nullptr) std::fill(grad, grad + vocab, static_cast<E>(0.0f));
  }
};

// All NaN for a row with a bad logit or target, but for the row_max of a row of -inf.
struct Statistics {
  double top, logprob, entropy, lse, collision, varentropy, max_prob, row_max;
  int64_t top_tile;
};

template <class E>
Statistics row_statistics(const Row<E>& row, bool full) {
  Statistics bad{kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, 0};
  if (!row.valid_target()) return bad;
  const RowSums r = kernels<E>().sums[row.mode()][full](row.x, row.vocab, row.scale());
  if (r.s == 0) bad.row_max = r.top;  // -inf: no logit is finite, none is NaN
  if (!std::isfinite(r.top) || !std::isfinite(r.s)) return bad;
  const double log_s = std::log(r.s), mean = r.u / r.s;
  Statistics out;
  out.top = r.top;
  out.top_tile = r.top_tile;
  out.row_max = r.capped_top;
  out.logprob = row.shifted(static_cast<double>(row.x[row.target]), r.top) - log_s;
  out.entropy = log_s - mean;
  out.lse = row.capped(r.top) / row.temperature + log_s;
  out.collision = r.q / (r.s * r.s);
  out.varentropy = std::max(r.w / r.s - mean * mean, 0.0);
  out.max_prob = 1 / r.s;
  return out;
}

// Whether the target is the first of the largest logits. Soft-cap and temperature keep their order.
template <class E>
bool is_first_maximum(const Row<E>& row, const Statistics& stats) {
  if (!row.valid_target() || !(static_cast<double>(row.x[row.target]) == stats.top)) return false;
  if (row.target >= stats.top_tile + kTile) return false;
  bool earlier = false;
  for (int64_t v = stats.top_tile; v < row.target; ++v) {
    earlier |= row.x[v] == row.x[row.target];
  }
  return !earlier;
}

// The target's element is formed apart, from 1 - p, which p * (-g) + g loses when the token was
// nearly certain.
template <class E>
void write_gradient(const Row<E>& row, const GradRow<double>& g) {
  typedef Acc<E> T;
  const double raw = static_cast<double>(row.x[row.target]);
  const double x_y = row.softcap == 0 ? raw : kernels<E>().capped(static_cast<T>(raw), row.scale());
  const double d = std::max((x_y - g.row_max) / row.temperature, kLowest);
  const double p = std::exp(d) * g.inv_sum;
  const double tangent = row.softcap == 0 ? 0 : std::tanh(raw / row.softcap);
  const double rest = p * (g.constant + g.target + g.linear * d + g.quadratic * p);
  const double target =
      g.scale * (1 - tangent * tangent) * (rest - g.target * std::expm1(d + std::log(g.inv_sum)));
  const double a = g.inv_sum * g.scale;
  const GradCoefs<T> coefs{row.scale(), static_cast<T>(g.row_max), static_cast<T>(a * g.constant),
                           static_cast<T>(a * g.linear),
                           static_cast<T>(a * g.inv_sum * g.quadratic)};
  kernels<E>().gradient[row.mode()][g.quadratic != 0](row.x, row.grad, row.vocab, coefs);
  row.grad[row.target] = static_cast<E>(static_cast<T>(target));
}

template <class E>
void stats_row(const StatsParams<Acc<E>>& p, int64_t r) {
  typedef Acc<E> T;
  const Row<E> row(p.rows, p.scale, r);
  const bool active = p.mask == nullptr || p.mask[r];
  const Statistics stats = active ? row_statistics(row, true) : Statistics{};
  p.out.logprob[r] = static_cast<T>(stats.logprob);
  p.out.entropy[r] = static_cast<T>(stats.entropy);
  p.out.lse[r] = static_cast<T>(stats.lse);
  p.out.collision[r] = static_cast<T>(stats.collision);
  p.out.varentropy[r] = static_cast<T>(stats.varentropy);
  p.out.max_prob[r] = static_cast<T>(stats.max_prob);
  p.out.row_max[r] = static_cast<T>(stats.row_max);
  p.out.is_top1[r] = active && is_first_maximum(row, stats);
}

template <class E>
void grad_row(const GradParams<Acc<E>>& p, int64_t r) {
  typedef Acc<E> T;
  const Row<E> row(p.rows, p.scale, r);
  const auto at = [r](const T* grads) { return grads ? static_cast<double>(grads[r]) : 0.0; };
  const double g = at(p.grad_logprob), e = at(p.grad_entropy), c = at(p.grad_collision),
               k = at(p.grad_lse);
  const bool live = p.max_prob[r] > 0 && std::isfinite(p.max_prob[r]) &&
                    std::isfinite(p.logprob[r]) && row.valid_target();
  if (!live || (g == 0 && e == 0 && c == 0 && k == 0)) return row.clear_grad();
  write_gradient<E>(
      row, reasonkern::grad_row<double>(p.row_max[r], p.max_prob[r], p.entropy[r], p.collision[r],
                                        g, e, c, k, 1.0 / row.temperature));
}

template <class E>
void loss_row(const LossParams<Acc<E>>& p, int64_t r) {
  typedef Acc<E> T;
  const Row<E> row(p.rows, p.scale, r);
  const RowInputs<T> in = load_row_inputs(p, r);
  if (in.weight == 0 && in.entropy_weight == 0) {
    p.row_loss[r] = p.token_loss[r] = p.logprob[r] = p.entropy[r] = 0;
    return row.clear_grad();
  }
  const Statistics stats = row_statistics(row, false);
  p.logprob[r] = static_cast<T>(stats.logprob);
  p.entropy[r] = static_cast<T>(stats.entropy);
  const RowLoss<T> loss = objective_row<T>(p.kind, p.kl_kind, p.kl_unbiased, p.logprob[r],
                                           p.entropy[r], in, load_hyper(p, r));
  p.row_loss[r] = loss.row_loss;
  p.token_loss[r] = loss.token_loss;
  if (row.grad == nullptr) return;
  if (loss.dlogp == 0 && loss.dentropy == 0) return row.clear_grad();  // or not finite
  const double scale = (p.loss_scale ? *p.loss_scale : T(1)) / static_cast<double>(row.temperature);
  write_gradient<E>(row, reasonkern::grad_row<double>(stats.row_max, stats.max_prob, stats.entropy,
                                                      0, loss.dlogp, loss.dentropy, 0, 0, scale));
}

}  // namespace cpu
}  // namespace reasonkern
