// From tensors to the plain params structs: element types, checked pointers, the objective's
// numbers.
#pragma once

#include <vector>

#include "../common/checks.h"
#include "policy_loss.h"

namespace reasonkern {

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
  check_last_contiguous(logits, name);
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

// What an objective maps: fields of the same names in LossParams and MetricsParams.
template <class T, class Params>
void read_objective(const RowTensors<T>& from, Params& p, const MaybeTensor& old_logprob,
                    const Tensor& advantage, const Tensor& weight,
                    const MaybeTensor& entropy_weight, const MaybeTensor& importance,
                    const MaybeTensor& ref_logprob) {
  p.old_logprob = from.read(old_logprob, "old_logprob");
  p.advantage = from.read(advantage, "advantage");
  p.weight = from.read(weight, "weight");
  p.entropy_weight = from.read(entropy_weight, "entropy_weight");
  p.importance = from.read(importance, "importance");
  p.ref_logprob = from.read(ref_logprob, "ref_logprob");
}

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

// Fields of the same names in LossParams and SequenceParams.
template <class Params>
void fill_kinds(Params& p, int64_t kind, int64_t kl_kind, bool kl_unbiased) {
  p.kind = static_cast<int>(kind);
  p.kl_kind = static_cast<int>(kl_kind);
  p.kl_unbiased = kl_unbiased;
}

// Where a map writes; `loss` is the part of it that LossParams has, too.
template <class T, class Loss, class Map>
void fill_outputs(Loss& loss, Map& map, const std::vector<Tensor>& out, const Tensor& finite) {
  loss.row_loss = out[0].mutable_data_ptr<T>();
  loss.token_loss = out[1].mutable_data_ptr<T>();
  map.dlogp = out[2].mutable_data_ptr<T>();
  map.dentropy = out[3].mutable_data_ptr<T>();
  map.finite = finite.mutable_data_ptr<bool>();
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

}  // namespace reasonkern
