// The operators of the family over tensors: params structs filled, outputs made. A backend
// supplies the launches; its file registers `Operators<Backend>`:
//
//   template <class T> static void token_stats(LogitsType, const StatsParams<T>&, int32_t device);
//   ... token_stats_backward(LogitsType, const GradParams<T>&, device)
//   ... policy_loss(LogitsType, const LossParams<T>&, device)
//   ... scale_rows(LogitsType, const Rows&, const T* factors, device)
//   ... policy_metrics(const MetricsParams<T>&, device)
//   ... objective_map(const MapParams<T>&, device)
//   ... sequence_map(const SequenceParams<T>&, device)
//
// T is the accumulator type; kFloat64 comes with double and the other types with float.
#pragma once

#include <tuple>
#include <vector>

#include "metrics.h"
#include "objective_map.h"
#include "row_tensors.h"
#include "sequence_map.h"

namespace reasonkern {

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
      MapParams<T> p{};
      p.logprob = from.read(logprob, "logprob");
      p.entropy = from.read(entropy, "entropy");
      p.loss.rows.rows = logprob.numel();
      read_objective(from, p.loss, old_logprob, advantage, weight, entropy_weight, importance,
                     ref_logprob);
      fill_hyper<T>(p.loss, logprob.numel(), logprob, hyper, values);
      fill_kinds(p.loss, kind, kl_kind, kl_unbiased);
      fill_outputs<T>(p.loss, p, out, finite);
      if (logprob.numel() > 0) Backend::objective_map(p, logprob.get_device_index());
    });
    return {out[0], out[1], out[2], out[3], finite};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sequence_map(
      const Tensor& logprob, const Tensor& entropy, const MaybeTensor& old_logprob,
      const Tensor& advantage, const Tensor& weight, const MaybeTensor& entropy_weight,
      const MaybeTensor& importance, const MaybeTensor& ref_logprob, const MaybeTensor& cu_seqlens,
      const MaybeTensor& hyper, const std::vector<double>& values, int64_t kind, int64_t kl_kind,
      bool kl_unbiased) {
    check_rows(logprob, "logprob");
    std::vector<Tensor> out;
    for (int k = 0; k < 5; ++k) out.push_back(new_rows(logprob, logprob.scalar_type()));
    Tensor finite = new_rows(logprob, ScalarType::Bool);
    dispatch_acc(logits_type(logprob, "logprob"), [&](auto acc) {
      using T = decltype(acc);
      const RowTensors<T> from(logprob);
      SequenceParams<T> p{};
      p.rows = logprob.numel();
      p.sequences = logprob.size(0);
      if (cu_seqlens.has_value()) {
        p.sequences = cu_seqlens->numel() - 1;
        check_tensor(*cu_seqlens, "cu_seqlens", ScalarType::Long, cu_seqlens->sizes(), logprob);
        STD_TORCH_CHECK(p.sequences > 0, "cu_seqlens: expected offsets of a sequence, got none");
        p.offsets = cu_seqlens->const_data_ptr<int64_t>();
      }
      p.logprob = from.read(logprob, "logprob");
      p.entropy = from.read(entropy, "entropy");
      read_objective(from, p, old_logprob, advantage, weight, entropy_weight, importance,
                     ref_logprob);
      fill_hyper<T>(p, p.rows, logprob, hyper, values);
      fill_kinds(p, kind, kl_kind, kl_unbiased);
      fill_outputs<T>(p, p, out, finite);
      p.log_ratio = out[4].mutable_data_ptr<T>();
      if (p.rows > 0) Backend::sequence_map(p, logprob.get_device_index());
    });
    return {out[0], out[1], out[2], out[3], finite, out[4]};
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
      read_objective(from, p, old_logprob, advantage, weight, entropy_weight, importance,
                     ref_logprob);
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
      read_objective(from, p, old_logprob, advantage, weight, entropy_weight, importance,
                     ref_logprob);
      p.loss_scale = from.read_scalar(loss_scale, "loss_scale");
      fill_hyper<T>(p, rows.rows, logits, hyper, values);
      fill_kinds(p, kind, kl_kind, kl_unbiased);
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
