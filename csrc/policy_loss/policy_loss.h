// Plain parameter structs: what host code fills after validation and kernels read. No framework
// type.
#pragma once

#include <cstdint>

#include "objective.h"

namespace reasonkern {

enum class LogitsType : int { kFloat32, kBFloat16, kFloat16, kFloat64 };

// Logits (B, T, V) seen as rows; row r is batch r / seq, position r % seq.
struct Rows {
  const void* logits;  // element type given beside the struct
  void* grad;          // same layout as its own strides say; may equal `logits` (in place), or null
  int64_t rows, seq, vocab;
  int64_t stride_b, stride_t;            // of logits, in elements
  int64_t grad_stride_b, grad_stride_t;  // of grad, in elements
  const int64_t* targets;                // (rows)
};

// T below is the accumulator type: double for float64 logits, else float.
template <typename T>
struct Scale {
  T temperature;
  const T* row_temperature;  // (rows) or null; overrides `temperature`
  T softcap;                 // 0: off
};

template <typename T>
struct StatsOut {  // each (rows); any of them may be null only in the fused op
  T *logprob, *entropy, *lse, *collision, *varentropy, *max_prob;
  bool* is_top1;
  T* row_max;  // after the soft-cap, before the temperature; -inf for a row of -inf
};

template <typename T>
struct StatsParams {
  Rows rows;
  Scale<T> scale;
  const bool* mask;  // (rows) or null
  StatsOut<T> out;
};

template <typename T>
struct GradParams {
  Rows rows;
  Scale<T> scale;
  const T *logprob, *entropy, *collision, *max_prob, *row_max;       // saved statistics, (rows)
  const T *grad_logprob, *grad_entropy, *grad_lse, *grad_collision;  // (rows) or null
};

template <typename T>
struct LossParams {
  Rows rows;
  Scale<T> scale;
  const T* old_logprob;  // (rows) or null: on-policy
  const T *advantage, *weight;
  const T* entropy_weight;  // or null: weight
  const T* importance;      // or null: 1
  const T* ref_logprob;     // or null: no KL term
  const T* loss_scale;      // one element or null
  Hyper<T> hyper;           // used when device_hyper is null
  const T* device_hyper;    // (9, hyper_rows), hyper_rows is 1 or rows
  int64_t hyper_rows;
  int kind, kl_kind;
  bool kl_unbiased;
  T *row_loss, *token_loss, *logprob, *entropy;  // (rows)
};

// Params: LossParams, MetricsParams or SequenceParams, whose fields of these names agree.
template <class Params>
RK_HOST_DEVICE auto load_hyper(const Params& p, int64_t row) {
  typedef decltype(p.hyper.low) N;
  if (p.device_hyper == nullptr) return p.hyper;
  const auto* h = p.device_hyper + (p.hyper_rows == 1 ? 0 : row);
  const int64_t n = p.hyper_rows;
  return Hyper<N>{N(h[0]),     N(h[n]),     N(h[2 * n]), N(h[3 * n]), N(h[4 * n]),
                  N(h[5 * n]), N(h[6 * n]), N(h[7 * n]), N(h[8 * n])};
}

template <template <class> class Params, typename T>
RK_HOST_DEVICE RowInputs<T> load_row_inputs(const Params<T>& p, int64_t row) {
  RowInputs<T> in;
  in.advantage = p.advantage[row];
  in.weight = p.weight[row];
  in.entropy_weight = p.entropy_weight ? p.entropy_weight[row] : in.weight;
  in.importance = p.importance ? p.importance[row] : T(1);
  in.has_old = p.old_logprob != nullptr;
  in.has_ref = p.ref_logprob != nullptr;
  in.old_logprob = in.has_old ? p.old_logprob[row] : T(0);
  in.ref_logprob = in.has_ref ? p.ref_logprob[row] : T(0);
  return in;
}

}  // namespace reasonkern
