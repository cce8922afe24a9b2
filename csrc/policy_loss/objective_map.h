// The objective alone, an O(1) map per row, where the statistics come from another kernel.
#pragma once

#include "policy_loss.h"

namespace reasonkern {

// `loss` holds the inputs, row_loss and token_loss; of its rows only their number is used.
template <typename T>
struct MapParams {
  LossParams<T> loss;
  const T *logprob, *entropy;  // (rows)
  T *dlogp, *dentropy;         // (rows)
  bool* finite;                // (rows)
};

// Inactive rows give zeros and are finite, whatever their inputs hold.
template <typename T>
RK_HOST_DEVICE void map_row(const MapParams<T>& p, int64_t row) {
  const LossParams<T>& q = p.loss;
  const RowInputs<T> in = load_row_inputs(q, row);
  RowLoss<T> out{T(0), T(0), T(0), T(0), true};
  if (in.weight != 0 || in.entropy_weight != 0) {
    out = objective_row(q.kind, q.kl_kind, q.kl_unbiased, p.logprob[row], p.entropy[row], in,
                        load_hyper(q, row));
  }
  q.row_loss[row] = out.row_loss;
  q.token_loss[row] = out.token_loss;
  p.dlogp[row] = out.dlogp;
  p.dentropy[row] = out.dentropy;
  p.finite[row] = out.finite;
}

}  // namespace reasonkern
