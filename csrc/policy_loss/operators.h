// The operators of the family over tensors: checks, plain params structs, outputs. A backend
// supplies the launches; its file registers `Operators<Backend>`:
//
//   template <class T> static void token_stats(LogitsType, const StatsParams<T>&, int32_t device);
//   ... token_stats_backward(LogitsType, const GradParams<T>&, device)
//   ... policy_loss(LogitsType, const LossParams<T>&, device)
//   ... scale_rows(LogitsType, const Rows&, const T* factors, device)
//   ... policy_metrics(const MetricsParams<T>&, device)
//   ... objective_map(const MapParams<T>&, device)
//
// T is the accumulator type; kFloat64 comes with double and the other types with float.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "metrics.h"
#include "objective_map.h"
#include "policy_loss.h"

namespace reasonkern {

using MaybeTensor = std::optional<Tensor>;

inline LogitsType logits_type(const Tensor& logits, const char* name) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return LogitsType::kFloat32;
    case ScalarType::BFloat16:
      return LogitsType::kBFloat16;
    case ScalarType::Half:
      return LogitsType::kFloat16;
    case ScalarType::Double:
      return LogitsType::kFloat64;
    default:
      STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64, got ",
                      logits.scalar_type());
  }
}

// Calls body(T()) with the accumulator type of the logits.
template <class Body>
void dispatch_acc(LogitsType type, const Body& body) {
  if (type == LogitsType::kFloat64) return body(double());
  body(float());
}

template <class E>
struct Element {
  typedef E type;
};

// Calls body with the element type of the logits: T is their accumulator type, the other two are
// the backend's 16-bit types.
template <class T, class Bf16, class Fp16, class Body>
void dispatch_element(LogitsType type, const Body& body) {
  if constexpr (sizeof(T) == 8) {
    body(Element<double>());
  } else if (type == LogitsType::kFloat32) {
    body(Element<float>());
  } else if (type == LogitsType::kBFloat16) {
    body(Element<Bf16>());
  } else {
    body(Element<Fp16>());
  }
}

inline ScalarType acc_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline void check_logits(const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 3, name, ": expected shape (B, T, V), got ",
                  shape_text(logits.sizes()));
  STD_TORCH_CHECK(logits.size(2) <= 1 || logits.stride(2) == 1, name,
                  ": expected a contiguous last dimension, got strides ",
                  shape_text(logits.strides()));
}

// `grad` is null, the logits themselves, or a new tensor.
inline Rows make_rows(const Tensor& logits, const Tensor& targets, const Tensor* grad) {
  check_logits(logits, "logits");
  check_tensor(targets, "targets", ScalarType::Long, {logits.sizes().data(), 2}, logits);
  Rows rows{};
  rows.logits = logits.const_data_ptr();
  rows.rows = logits.size(0) * logits.size(1);
  rows.seq = logits.size(1);
  rows.vocab = logits.size(2);
  rows.stride_b = logits.stride(0);
  rows.stride_t = logits.stride(1);
  rows.targets = targets.const_data_ptr<int64_t>();
  if (grad != nullptr) {
    check_rows_apart(*grad, "logits");
    rows.grad = grad->mutable_data_ptr();
    rows.grad_stride_b = grad->stride(0);
    rows.grad_stride_t = grad->stride(1);
  }
  return rows;
}

// Row tensors of one call: (B, T), contiguous, of the accumulator's type, beside the logits.
template <class T>
class RowTensors {
 public:
  explicit RowTensors(const Tensor& logits) : logits_(logits), dtype_(acc_dtype(logits)) {}

  const T* read(const Tensor& t, const char* name) const {
    check_tensor(t, name, dtype_, shape(), logits_);
    return t.const_data_ptr<T>();
  }
  const T* read(const MaybeTensor& t, const char* name) const {
    return t.has_value() ? read(*t, name) : nullptr;
  }
  const bool* read_mask(const MaybeTensor& t, const char* name) const {
    if (!t.has_value()) return nullptr;
    check_tensor(*t, name, ScalarType::Bool, shape(), logits_);
    return t->const_data_ptr<bool>();
  }
  const T* read_scalar(const MaybeTensor& t, const char* name) const {
    if (!t.has_value()) return nullptr;
    check_tensor(*t, name, dtype_, t->sizes(), logits_);
    STD_TORCH_CHECK(t->numel() == 1, name, ": expected one element, got shape ",
                    shape_text(t->sizes()));
    return t->const_data_ptr<T>();
  }
  Scale<T> scale(const MaybeTensor& row_temperature, double temperature, double softcap) const {
    STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
    STD_TORCH_CHECK(softcap >= 0, "softcap: expected a positive number or 0, got ", softcap);
    return {static_cast<T>(temperature), read(row_temperature, "row_temperature"),
            static_cast<T>(softcap)};
  }

 private:
  IntHeaderOnlyArrayRef shape() const { return {logits_.sizes().data(), 2}; }

  const Tensor& logits_;
  ScalarType dtype_;
};

// The objective's numbers: nine floats, or nine rows of a tensor that hold one value or one a row.
template <class T, class Params>
void fill_hyper(Params& p, int64_t rows, const Tensor& beside, const MaybeTensor& hyper,
                const std::vector<double>& values) {
  STD_TORCH_CHECK(values.size() == kNumHyper, "values: expected ", kNumHyper, " numbers, got ",
                  values.size());
  typedef decltype(p.hyper.low) Number;
  const auto v = [&values](int k) { return static_cast<Number>(values[k]); };
  p.hyper = {v(0), v(1), v(2), v(3), v(4), v(5), v(6), v(7), v(8)};
  if (!hyper.has_value()) return;
  STD_TORCH_CHECK(hyper->dim() == 2 && hyper->size(0) == kNumHyper &&
                      (hyper->size(1) == 1 || hyper->size(1) == rows),
                  "hyper: expected shape (", kNumHyper, ", 1) or (", kNumHyper, ", ", rows,
                  "), got ", shape_text(hyper->sizes()));
  check_tensor(*hyper, "hyper", acc_dtype(beside), hyper->sizes(), beside);
  p.device_hyper = hyper->const_data_ptr<T>();
  p.hyper_rows = hyper->size(1);
}

inline void check_rows(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 2, name, ": expected shape (B, T), got ", shape_text(t.sizes()));
}

inline Tensor new_rows(const Tensor& logits, ScalarType dtype) {
  return torch::stable::new_empty(logits, {logits.sizes().data(), 2}, dtype);
}
inline Tensor new_like(const Tensor& logits) {
  return torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
}

using LossTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

template <class Backend>
class Operators {
 public:
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_stats(
      const Tensor& logits, const Tensor& targets, const MaybeTensor& mask,
      const MaybeTensor& row_temperature, double temperature, double softcap) {
    const Rows rows = make_rows(logits, targets, nullptr);
    const LogitsType type = logits_type(logits, "logits");
    std::vector<Tensor> out;
    for (int k = 0; k < 7; ++k) out.push_back(new_rows(logits, acc_dtype(logits)));
    Tensor is_top1 = new_rows(logits, ScalarType::Bool);
    dispatch_acc(type, [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logits);
      const auto to = [&](int k) { return out[k].mutable_data_ptr<T>(); };
      StatsParams<T> p{};
      p.rows = rows;
      p.scale = from.scale(row_temperature, temperature, softcap);
      p.mask = from.read_mask(mask, "mask");
      p.out = {to(0), to(1), to(2), to(3), to(4), to(5), is_top1.mutable_data_ptr<bool>(), to(6)};
      if (rows.rows > 0) Backend::token_stats(type, p, logits.get_device_index());
    });
    return {out[0], out[1], out[2], out[3], out[4], out[5], is_top1, out[6]};
  }

  static Tensor token_stats_backward(const Tensor& logits, const Tensor& targets,
                                     const MaybeTensor& row_temperature, double temperature,
                                     double softcap, const Tensor& logprob, const Tensor& entropy,
                                     const Tensor& collision, const Tensor& max_prob,
                                     const Tensor& row_max, const MaybeTensor& grad_logprob,
                                     const MaybeTensor& grad_entropy, const MaybeTensor& grad_lse,
                                     const MaybeTensor& grad_collision) {
    Tensor grad = new_like(logits);
    backward_into(grad, logits, targets, row_temperature, temperature, softcap, logprob, entropy,
                  collision, max_prob, row_max, grad_logprob, grad_entropy, grad_lse,
                  grad_collision);
    return grad;
  }

  static void token_stats_backward_(const Tensor& logits, const Tensor& targets,
                                    const MaybeTensor& row_temperature, double temperature,
                                    double softcap, const Tensor& logprob, const Tensor& entropy,
                                    const Tensor& collision, const Tensor& max_prob,
                                    const Tensor& row_max, const MaybeTensor& grad_logprob,
                                    const MaybeTensor& grad_entropy, const MaybeTensor& grad_lse,
                                    const MaybeTensor& grad_collision) {
    backward_into(logits, logits, targets, row_temperature, temperature, softcap, logprob, entropy,
                  collision, max_prob, row_max, grad_logprob, grad_entropy, grad_lse,
                  grad_collision);
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> policy_loss(
      const Tensor& logits, const Tensor& targets, const MaybeTensor& old_logprob,
      const Tensor& advantage, const Tensor& weight, const MaybeTensor& entropy_weight,
      const MaybeTensor& importance, const MaybeTensor& ref_logprob,
      const MaybeTensor& row_temperature, const MaybeTensor& loss_scale, const MaybeTensor& hyper,
      const std::vector<double>& values, double temperature, double softcap, int64_t kind,
      int64_t kl_kind, bool kl_unbiased, bool needs_grad) {
    Tensor grad =
        needs_grad ? new_like(logits) : torch::stable::new_empty(logits, {0}, logits.scalar_type());
    return std::tuple_cat(
        loss_into(needs_grad ? &grad : nullptr, logits, targets, old_logprob, advantage, weight,
                  entropy_weight, importance, ref_logprob, row_temperature, loss_scale, hyper,
                  values, temperature, softcap, kind, kl_kind, kl_unbiased),
        std::make_tuple(grad));
  }

  static LossTensors policy_loss_(const Tensor& logits, const Tensor& targets,
                                  const MaybeTensor& old_logprob, const Tensor& advantage,
                                  const Tensor& weight, const MaybeTensor& entropy_weight,
                                  const MaybeTensor& importance, const MaybeTensor& ref_logprob,
                                  const MaybeTensor& row_temperature, const MaybeTensor& loss_scale,
                                  const MaybeTensor& hyper, const std::vector<double>& values,
                                  double temperature, double softcap, int64_t kind, int64_t kl_kind,
                                  bool kl_unbiased) {
    return loss_into(&logits, logits, targets, old_logprob, advantage, weight, entropy_weight,
                     importance, ref_logprob, row_temperature, loss_scale, hyper, values,
                     temperature, softcap, kind, kl_kind, kl_unbiased);
  }

  static void scale_rows_(const Tensor& x, const Tensor& scale) {
    check_logits(x, "x");
    check_rows_apart(x, "x");
    const LogitsType type = logits_type(x, "x");
    Rows rows{};
    rows.logits = rows.grad = x.mutable_data_ptr();
    rows.rows = x.size(0) * x.size(1);
    rows.seq = x.size(1);
    rows.vocab = x.size(2);
    rows.stride_b = rows.grad_stride_b = x.stride(0);
    rows.stride_t = rows.grad_stride_t = x.stride(1);
    dispatch_acc(type, [&](auto acc) {
      using T = decltype(acc);
      const T* factors = RowTensors<T>(x).read(scale, "scale");
      if (rows.rows > 0) Backend::scale_rows(type, rows, factors, x.get_device_index());
    });
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> objective_map(
      const Tensor& logprob, const Tensor& entropy, const MaybeTensor& old_logprob,
      const Tensor& advantage, const Tensor& weight, const MaybeTensor& entropy_weight,
      const MaybeTensor& importance, const MaybeTensor& ref_logprob, const MaybeTensor& hyper,
      const std::vector<double>& values, int64_t kind, int64_t kl_kind, bool kl_unbiased) {
    check_rows(logprob, "logprob");
    std::vector<Tensor> out;
    for (int k = 0; k < 4; ++k) out.push_back(new_rows(logprob, logprob.scalar_type()));
    Tensor finite = new_rows(logprob, ScalarType::Bool);
    dispatch_acc(logits_type(logprob, "logprob"), [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logprob);
      const auto to = [&](int k) { return out[k].mutable_data_ptr<T>(); };
      MapParams<T> p{};
      p.logprob = from.read(logprob, "logprob");
      p.entropy = from.read(entropy, "entropy");
      p.loss.rows.rows = logprob.numel();
      p.loss.old_logprob = from.read(old_logprob, "old_logprob");
      p.loss.advantage = from.read(advantage, "advantage");
      p.loss.weight = from.read(weight, "weight");
      p.loss.entropy_weight = from.read(entropy_weight, "entropy_weight");
      p.loss.importance = from.read(importance, "importance");
      p.loss.ref_logprob = from.read(ref_logprob, "ref_logprob");
      fill_hyper<T>(p.loss, logprob.numel(), logprob, hyper, values);
      p.loss.kind = static_cast<int>(kind);
      p.loss.kl_kind = static_cast<int>(kl_kind);
      p.loss.kl_unbiased = kl_unbiased;
      p.loss.row_loss = to(0);
      p.loss.token_loss = to(1);
      p.dlogp = to(2);
      p.dentropy = to(3);
      p.finite = finite.mutable_data_ptr<bool>();
      if (logprob.numel() > 0) Backend::objective_map(p, logprob.get_device_index());
    });
    return {out[0], out[1], out[2], out[3], finite};
  }

  static Tensor policy_metrics(const Tensor& logprob, const Tensor& entropy,
                               const MaybeTensor& old_logprob, const Tensor& advantage,
                               const Tensor& weight, const MaybeTensor& entropy_weight,
                               const MaybeTensor& importance, const MaybeTensor& ref_logprob,
                               const MaybeTensor& log_ratio, const MaybeTensor& finite,
                               const MaybeTensor& hyper, const std::vector<double>& values,
                               int64_t kind, bool clips, bool needs_ref) {
    check_rows(logprob, "logprob");
    Tensor out = torch::stable::new_empty(logprob, {kNumMetrics}, ScalarType::Double);
    dispatch_acc(logits_type(logprob, "logprob"), [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logprob);
      MetricsParams<T> p{};
      p.rows = logprob.numel();
      p.logprob = from.read(logprob, "logprob");
      p.entropy = from.read(entropy, "entropy");
      p.old_logprob = from.read(old_logprob, "old_logprob");
      p.advantage = from.read(advantage, "advantage");
      p.weight = from.read(weight, "weight");
      p.entropy_weight = from.read(entropy_weight, "entropy_weight");
      p.importance = from.read(importance, "importance");
      p.ref_logprob = from.read(ref_logprob, "ref_logprob");
      p.log_ratio = from.read(log_ratio, "log_ratio");
      p.finite = from.read_mask(finite, "finite");
      fill_hyper<T>(p, p.rows, logprob, hyper, values);
      p.kind = static_cast<int>(kind);
      p.clips = clips;
      p.needs_ref = needs_ref;
      p.out = out.mutable_data_ptr<double>();
      Backend::policy_metrics(p, logprob.get_device_index());  // no rows have metrics too
    });
    return out;
  }

 private:
  static void backward_into(const Tensor& grad, const Tensor& logits, const Tensor& targets,
                            const MaybeTensor& row_temperature, double temperature, double softcap,
                            const Tensor& logprob, const Tensor& entropy, const Tensor& collision,
                            const Tensor& max_prob, const Tensor& row_max,
                            const MaybeTensor& grad_logprob, const MaybeTensor& grad_entropy,
                            const MaybeTensor& grad_lse, const MaybeTensor& grad_collision) {
    const Rows rows = make_rows(logits, targets, &grad);
    const LogitsType type = logits_type(logits, "logits");
    dispatch_acc(type, [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logits);
      GradParams<T> p{};
      p.rows = rows;
      p.scale = from.scale(row_temperature, temperature, softcap);
      p.logprob = from.read(logprob, "logprob");
      p.entropy = from.read(entropy, "entropy");
      p.collision = from.read(collision, "collision");
      p.max_prob = from.read(max_prob, "max_prob");
      p.row_max = from.read(row_max, "row_max");
      p.grad_logprob = from.read(grad_logprob, "grad_logprob");
      p.grad_entropy = from.read(grad_entropy, "grad_entropy");
      p.grad_lse = from.read(grad_lse, "grad_lse");
      p.grad_collision = from.read(grad_collision, "grad_collision");
      if (rows.rows > 0) Backend::token_stats_backward(type, p, logits.get_device_index());
    });
  }

  static LossTensors loss_into(const Tensor* grad, const Tensor& logits, const Tensor& targets,
                               const MaybeTensor& old_logprob, const Tensor& advantage,
                               const Tensor& weight, const MaybeTensor& entropy_weight,
                               const MaybeTensor& importance, const MaybeTensor& ref_logprob,
                               const MaybeTensor& row_temperature, const MaybeTensor& loss_scale,
                               const MaybeTensor& hyper, const std::vector<double>& values,
                               double temperature, double softcap, int64_t kind, int64_t kl_kind,
                               bool kl_unbiased) {
    const Rows rows = make_rows(logits, targets, grad);
    const LogitsType type = logits_type(logits, "logits");
    const ScalarType dtype = acc_dtype(logits);
    LossTensors out{new_rows(logits, dtype), new_rows(logits, dtype), new_rows(logits, dtype),
                    new_rows(logits, dtype)};
    dispatch_acc(type, [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logits);
      LossParams<T> p{};
      p.rows = rows;
      p.scale = from.scale(row_temperature, temperature, softcap);
      p.old_logprob = from.read(old_logprob, "old_logprob");
      p.advantage = from.read(advantage, "advantage");
      p.weight = from.read(weight, "weight");
      p.entropy_weight = from.read(entropy_weight, "entropy_weight");
      p.importance = from.read(importance, "importance");
      p.ref_logprob = from.read(ref_logprob, "ref_logprob");
      p.loss_scale = from.read_scalar(loss_scale, "loss_scale");
      fill_hyper<T>(p, rows.rows, logits, hyper, values);
      p.kind = static_cast<int>(kind);
      p.kl_kind = static_cast<int>(kl_kind);
      p.kl_unbiased = kl_unbiased;
      p.row_loss = std::get<0>(out).template mutable_data_ptr<T>();
      p.token_loss = std::get<1>(out).template mutable_data_ptr<T>();
      p.logprob = std::get<2>(out).template mutable_data_ptr<T>();
      p.entropy = std::get<3>(out).template mutable_data_ptr<T>();
      if (rows.rows > 0) Backend::policy_loss(type, p, logits.get_device_index());
    });
    return out;
  }
};

}  // namespace reasonkern
