// CPU operators of the family: checks, rows to threads, registration.
#include <algorithm>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "gae.h"
#include "select.h"

namespace reasonkern {
namespace cpu {
namespace {

// Calls body(T()) with the element type.
template <class Body>
void dispatch(const Tensor& x, const char* name, const Body& body) {
  if (x.scalar_type() == ScalarType::Double) return body(double());
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, name, ": expected float32 or float64, got ",
                  x.scalar_type());
  body(float());
}

void check_rows(const Tensor& x, const char* name, int64_t dim) {
  STD_TORCH_CHECK(x.dim() == dim, name, ": expected ", dim, " dimensions, got shape ",
                  shape_text(x.sizes()));
  check_last_contiguous(x, name);
}

template <class T>
void run_gae(const GaeParams<T>& p) {
  if (p.length == 0) return;
  const int64_t grain = std::max<int64_t>(1, 16384 / p.length);
  torch::stable::parallel_for(0, p.rows, grain, [&p](int64_t begin, int64_t end) {
    std::vector<T> scratch(p.mask == nullptr ? 0 : kWindow + p.length);
    for (int64_t row = begin; row < end; ++row) gae_row(p, row, scratch.data());
  });
}

std::tuple<Tensor, Tensor> gae(const Tensor& reward, const Tensor& value, const MaybeTensor& mask,
                               const MaybeTensor& row_lam, const MaybeTensor& row_lam_value,
                               const MaybeTensor& bootstrap_value, const MaybeTensor& truncated,
                               double gamma, double lam, double lam_value, bool bootstrap_last) {
  check_rows(reward, "reward", 2);
  check_rows(value, "value", 2);
  const ScalarType dtype = reward.scalar_type();
  check_dtype(value, "value", dtype);
  check_shape(value, "value", reward.sizes());
  const IntHeaderOnlyArrayRef shape = reward.sizes(), rows{shape.data(), 1};
  Tensor advantage = torch::stable::new_empty(reward, shape, dtype);
  Tensor returns = torch::stable::new_empty(reward, shape, dtype);
  dispatch(reward, "reward", [&](auto element) {
    using T = decltype(element);
    GaeParams<T> p{};
    p.reward = reward.const_data_ptr<T>();
    p.value = value.const_data_ptr<T>();
    p.rows = shape[0];
    p.length = shape[1];
    p.reward_stride = reward.stride(0);
    p.value_stride = value.stride(0);
    p.mask = maybe_data<bool>(mask, "mask", ScalarType::Bool, shape, reward);
    p.row_lam = maybe_data<T>(row_lam, "row_lam", dtype, rows, reward);
    p.row_lam_value = maybe_data<T>(row_lam_value, "row_lam_value", dtype, rows, reward);
    p.bootstrap_value = maybe_data<T>(bootstrap_value, "bootstrap_value", dtype, rows, reward);
    p.truncated = maybe_data<bool>(truncated, "truncated", ScalarType::Bool, rows, reward);
    p.gamma = gamma, p.lam = lam, p.lam_value = lam_value;
    p.bootstrap_last = bootstrap_last;
    p.advantage = advantage.mutable_data_ptr<T>();
    p.returns = returns.mutable_data_ptr<T>();
    run_gae(p);
  });
  return {advantage, returns};
}

template <class T>
void run_select(const SelectParams<T>& p) {
  Selection<T> selection(p);
  const int64_t grain = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, p.width));
  const auto each_row = [&](const auto& body) {
    torch::stable::parallel_for(0, p.groups * p.count, grain, [&body](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) body(i);
    });
  };
  if (p.picks > 0) each_row([&](int64_t i) { selection.start(i); });
  for (int64_t j = 0; j < p.picks; ++j) {
    for (int64_t group = 0; group < p.groups; ++group) selection.pick(group, j);
    if (j + 1 < p.picks) each_row([&](int64_t i) { selection.update(i, j); });
  }
}

Tensor elliptical_select(const Tensor& features, int64_t k, double lam) {
  check_rows(features, "features", 3);
  STD_TORCH_CHECK(k >= 0 && k <= features.size(1), "k: expected 0 to ", features.size(1), ", got ",
                  k);
  STD_TORCH_CHECK(lam > 0, "lam: expected a positive number, got ", lam);
  Tensor out = torch::stable::new_empty(features, {features.size(0), k}, ScalarType::Long);
  dispatch(features, "features", [&](auto element) {
    using T = decltype(element);
    SelectParams<T> p{};
    p.features = features.const_data_ptr<T>();
    p.groups = features.size(0);
    p.count = features.size(1);
    p.width = features.size(2);
    p.group_stride = features.stride(0);
    p.row_stride = features.stride(1);
    p.picks = k;
    p.lam = lam;
    p.out = out.mutable_data_ptr<int64_t>();
    run_select(p);
  });
  return out;
}

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  m.impl("gae", TORCH_BOX(&reasonkern::cpu::gae));
  m.impl("elliptical_select", TORCH_BOX(&reasonkern::cpu::elliptical_select));
}
