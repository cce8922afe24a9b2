// The objective between the two halves of a row of policy_loss, by one thread.
#pragma once

#include "row_gradient.cuh"

namespace reasonkern {

// What a row brings besides its logits.
template <class A>
struct RowTask {
  RowInputs<A> in;
  int64_t target;
};

// Filled by thread 0 while the row's loads are under way.
template <class A>
struct RowScratch {
  GradCoefs<A> grad;
  RowTask<A> task;
  A x_y;  // the target's logit, before the soft-cap
};
static_assert(sizeof(RowScratch<double>) <= 384, "sweep_shared_bytes");

template <class A>
__device__ __forceinline__ RowTask<A> load_task(const LossParams<A>& p, int64_t row) {
  return {load_row_inputs(p, row), p.rows.targets[row]};
}

// 0 for an invalid target.
template <class T>
__device__ __forceinline__ acc_t<T> target_logit(const T* row, int64_t target, int64_t vocab) {
  return target >= 0 && target < vocab ? to_acc(row[target]) : acc_t<T>(0);
}

template <class A>
__device__ __forceinline__ bool is_active(const LossParams<A>& p, int64_t row) {
  return p.weight[row] != A(0) || (p.entropy_weight != nullptr && p.entropy_weight[row] != A(0));
}

template <class A>
__device__ __forceinline__ void write_inactive_loss(const LossParams<A>& p, int64_t row) {
  p.row_loss[row] = p.token_loss[row] = p.logprob[row] = p.entropy[row] = A(0);
}

// Leaves the gradient's coefficients in s.grad; `writes`: this block writes the row's outputs.
template <class T>
__device__ __forceinline__ void decide_row(RowScratch<acc_t<T>>& s, const LossParams<acc_t<T>>& p,
                                           int64_t row, const Moments<acc_t<T>>& total,
                                           const RowScale<T>& scale, bool writes) {
  using A = acc_t<T>;
  const int64_t y = s.task.target;
  const A x_y = scale.softcap.value != A(0) ? soft_capped(s.x_y, scale.softcap) : s.x_y;
  const RowStats<A> stats = row_stats(total, x_y, y >= 0 && y < p.rows.vocab, scale);
  const RowLoss<A> loss = objective_row(p.kind, p.kl_kind, p.kl_unbiased, stats.logprob,
                                        stats.entropy, s.task.in, load_hyper(p, row));
  if (writes) {
    p.row_loss[row] = loss.row_loss;
    p.token_loss[row] = loss.token_loss;
    p.logprob[row] = stats.logprob;
    p.entropy[row] = stats.entropy;
  }
  if (!loss.finite) {
    s.grad = zero_row<A>();
    return;
  }
  const A loss_scale = p.loss_scale != nullptr ? *p.loss_scale : A(1);
  const GradRow<A> g = grad_row(total.m, stats.inv_sum, stats.entropy, A(0), loss.dlogp,
                                loss.dentropy, A(0), A(0), loss_scale / scale.temperature.value);
  s.grad = fold(g, total.m, scale, y);
}

}  // namespace reasonkern
