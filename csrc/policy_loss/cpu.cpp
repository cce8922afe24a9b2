// CPU operators of the family: validation, one row at a time, registration. The loops over a row
// are in cpu_rows.h; everything here is O(1) per row and done in double.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "cpu_dispatch.h"
#include "policy_loss.h"

namespace reasonkern {
namespace cpu {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

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
  RowScale<Acc<E>> scale() const { return {1 / temperature, softcap}; }
  double capped(double raw) const {
    return softcap == 0 || std::isinf(raw) ? raw : softcap * std::tanh(raw / softcap);
  }
  // z_v - max z for the raw logit of v.
  double shifted(double raw, double top) const {
    return (capped(raw) - capped(top)) / temperature;
  }
  void clear_grad() const {
    if (grad != nullptr) std::fill(grad, grad + vocab, static_cast<E>(0.0f));
  }
};

struct Statistics {
  double top, logprob, entropy, lse, collision, varentropy, max_prob, row_max;
  int64_t top_tile;
};

template <class E>
Statistics row_statistics(const Row<E>& row, bool full) {
  Statistics bad{kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, kNaN, 0};
  if (!row.valid_target()) return bad;
  const RowSums r = kernels<E>().sums[row.softcap != 0][full](row.x, row.vocab, row.scale());
  if (!std::isfinite(r.top) || !std::isfinite(r.s)) return bad;
  const double log_s = std::log(r.s), mean = r.u / r.s;
  Statistics out;
  out.top = r.top;
  out.top_tile = r.top_tile;
  out.row_max = row.capped(r.top) / row.temperature;
  out.logprob = row.shifted(static_cast<double>(row.x[row.target]), r.top) - log_s;
  out.entropy = log_s - mean;
  out.lse = out.row_max + log_s;
  out.collision = r.q / (r.s * r.s);
  out.varentropy = std::max(r.w / r.s - mean * mean, 0.0);
  out.max_prob = 1 / r.s;
  return out;
}

// Whether the target is the first of the largest logits.
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

// `top` is the raw maximum. The target's element is formed apart, from 1 - p, which p * (-g) + g
// loses when the token was nearly certain.
template <class E>
void write_gradient(const Row<E>& row, double top, const GradRow<double>& g) {
  typedef Acc<E> T;
  const double raw = static_cast<double>(row.x[row.target]);
  const double d = row.shifted(raw, top), p = std::exp(d) * g.inv_sum;
  const double tangent = row.softcap == 0 ? 0 : std::tanh(raw / row.softcap);
  const double rest = p * (g.constant + g.target + g.linear * d + g.quadratic * p);
  const double target =
      g.scale * (1 - tangent * tangent) * (rest - g.target * std::expm1(d + std::log(g.inv_sum)));
  const double a = g.inv_sum * g.scale;
  const GradCoefs<T> coefs{row.scale(), static_cast<T>(top), static_cast<T>(a * g.constant),
                           static_cast<T>(a * g.linear), static_cast<T>(a * g.inv_sum * g.quadratic)};
  kernels<E>().gradient[row.softcap != 0][g.quadratic != 0](row.x, row.grad, row.vocab, coefs);
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
  // The saved maximum is after soft-cap and temperature, rounded; the raw one gives the d of the
  // forward pass exactly.
  const bool raw = row.softcap == 0 && row.temperature == 1;
  const double top = raw ? p.row_max[r] : kernels<E>().maximum(row.x, row.vocab);
  write_gradient<E>(row, top,
                    reasonkern::grad_row<double>(p.row_max[r], p.max_prob[r], p.entropy[r],
                                                 p.collision[r], g, e, c, k, 1.0 / row.temperature));
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
  write_gradient<E>(row, stats.top,
                    reasonkern::grad_row<double>(stats.row_max, stats.max_prob, stats.entropy, 0,
                                                 loss.dlogp, loss.dentropy, 0, 0, scale));
}

// Threads take rows as they get free: inactive rows cost nothing, so equal shares would not be
// equal work. Which thread computes a row does not change its result.
template <class Body>
void for_each_row(const Rows& rows, const Body& body) {
  const int64_t chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.vocab));
  const int64_t chunks = (rows.rows + chunk - 1) / chunk;
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < rows.rows;) {
      const int64_t end = std::min(begin + chunk, rows.rows);
      for (int64_t r = begin; r < end; ++r) body(r);
    }
  });
}

// ---- tensors to params

template <class E>
struct ElementType {
  typedef E type;
};

// Calls body with the element type of `logits`.
template <class Body>
void dispatch(const Tensor& logits, const Body& body) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return body(ElementType<float>());
    case ScalarType::BFloat16:
      return body(ElementType<BFloat16>());
    case ScalarType::Half:
      return body(ElementType<Half>());
    case ScalarType::Double:
      return body(ElementType<double>());
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64, got ",
                      logits.scalar_type());
  }
}

ScalarType acc_dtype(const Tensor& logits) {
  return logits.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

void check_logits(const Tensor& logits, const char* name) {
  STD_TORCH_CHECK(logits.dim() == 3, name, ": expected shape (B, T, V), got ",
                  shape_text(logits.sizes()));
  STD_TORCH_CHECK(logits.size(2) <= 1 || logits.stride(2) == 1, name,
                  ": expected a contiguous last dimension, got strides ",
                  shape_text(logits.strides()));
}

// `grad` is null, the logits themselves, or a new tensor.
Rows make_rows(const Tensor& logits, const Tensor& targets, const Tensor* grad) {
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

// Row tensors of one call: (B, T), of the accumulator's type, beside the logits.
template <class T>
class RowTensors {
 public:
  explicit RowTensors(const Tensor& logits) : logits_(logits), dtype_(acc_dtype(logits)) {}

  const T* read(const Tensor& t, const char* name) const {
    check_tensor(t, name, dtype_, shape(), logits_);
    return t.const_data_ptr<T>();
  }
  const T* read(const std::optional<Tensor>& t, const char* name) const {
    return t.has_value() ? read(*t, name) : nullptr;
  }
  Scale<T> scale(const std::optional<Tensor>& row_temperature, double temperature,
                 double softcap) const {
    STD_TORCH_CHECK(temperature > 0, "temperature: expected a positive number, got ", temperature);
    STD_TORCH_CHECK(softcap >= 0, "softcap: expected a positive number or 0, got ", softcap);
    return {static_cast<T>(temperature), read(row_temperature, "row_temperature"),
            static_cast<T>(softcap)};
  }
  IntHeaderOnlyArrayRef shape() const { return {logits_.sizes().data(), 2}; }

 private:
  const Tensor& logits_;
  ScalarType dtype_;
};

Tensor new_rows(const Tensor& logits, ScalarType dtype) {
  return torch::stable::new_empty(logits, {logits.sizes().data(), 2}, dtype);
}

Tensor new_like(const Tensor& logits) {
  return torch::stable::new_empty(logits, logits.sizes(), logits.scalar_type());
}

// ---- operators

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> token_stats(
    const Tensor& logits, const Tensor& targets, const std::optional<Tensor>& mask,
    const std::optional<Tensor>& row_temperature, double temperature, double softcap) {
  const Rows rows = make_rows(logits, targets, nullptr);
  std::vector<Tensor> out;
  for (int k = 0; k < 7; ++k) out.push_back(new_rows(logits, acc_dtype(logits)));
  Tensor is_top1 = new_rows(logits, ScalarType::Bool);
  dispatch(logits, [&](auto element) {
    typedef typename decltype(element)::type E;
    typedef Acc<E> T;
    const RowTensors<T> row_tensors(logits);
    StatsParams<T> p{};
    p.rows = rows;
    p.scale = row_tensors.scale(row_temperature, temperature, softcap);
    if (mask.has_value()) {
      check_tensor(*mask, "mask", ScalarType::Bool, row_tensors.shape(), logits);
      p.mask = mask->const_data_ptr<bool>();
    }
    const auto to = [&](int k) { return out[k].mutable_data_ptr<T>(); };
    p.out = {to(0), to(1), to(2), to(3), to(4), to(5), is_top1.mutable_data_ptr<bool>(), to(6)};
    for_each_row(rows, [&p](int64_t r) { stats_row<E>(p, r); });
  });
  return {out[0], out[1], out[2], out[3], out[4], out[5], is_top1, out[6]};
}

void stats_backward(const Tensor& logits, const Tensor& grad, const Tensor& targets,
                    const std::optional<Tensor>& row_temperature, double temperature,
                    double softcap, const Tensor& logprob, const Tensor& entropy,
                    const Tensor& collision, const Tensor& max_prob, const Tensor& row_max,
                    const std::optional<Tensor>& grad_logprob,
                    const std::optional<Tensor>& grad_entropy,
                    const std::optional<Tensor>& grad_lse,
                    const std::optional<Tensor>& grad_collision) {
  const Rows rows = make_rows(logits, targets, &grad);
  dispatch(logits, [&](auto element) {
    typedef typename decltype(element)::type E;
    typedef Acc<E> T;
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
    for_each_row(rows, [&p](int64_t r) { grad_row<E>(p, r); });
  });
}

typedef std::tuple<Tensor, Tensor, Tensor, Tensor> LossTensors;

// The objective's numbers: nine floats, or nine rows of a tensor that hold one value or one a row.
template <class T>
void fill_hyper(LossParams<T>& p, const Tensor& logits, const std::optional<Tensor>& hyper,
                const std::vector<double>& values) {
  STD_TORCH_CHECK(values.size() == kNumHyper, "values: expected ", kNumHyper, " numbers, got ",
                  values.size());
  const auto v = [&values](int k) { return static_cast<T>(values[k]); };
  p.hyper = {v(0), v(1), v(2), v(3), v(4), v(5), v(6), v(7), v(8)};
  if (!hyper.has_value()) return;
  STD_TORCH_CHECK(hyper->dim() == 2 && hyper->size(0) == kNumHyper &&
                      (hyper->size(1) == 1 || hyper->size(1) == p.rows.rows),
                  "hyper: expected shape (", kNumHyper, ", 1) or (", kNumHyper, ", ", p.rows.rows,
                  "), got ", shape_text(hyper->sizes()));
  check_tensor(*hyper, "hyper", acc_dtype(logits), hyper->sizes(), logits);
  p.device_hyper = hyper->const_data_ptr<T>();
  p.hyper_rows = hyper->size(1);
}

LossTensors loss(const Tensor& logits, const Tensor* grad, const Tensor& targets,
                 const std::optional<Tensor>& old_logprob, const Tensor& advantage,
                 const Tensor& weight, const std::optional<Tensor>& entropy_weight,
                 const std::optional<Tensor>& importance, const std::optional<Tensor>& ref_logprob,
                 const std::optional<Tensor>& row_temperature,
                 const std::optional<Tensor>& loss_scale, const std::optional<Tensor>& hyper,
                 const std::vector<double>& values, double temperature, double softcap,
                 int64_t kind, int64_t kl_kind, bool kl_unbiased) {
  const Rows rows = make_rows(logits, targets, grad);
  LossTensors out{new_rows(logits, acc_dtype(logits)), new_rows(logits, acc_dtype(logits)),
                  new_rows(logits, acc_dtype(logits)), new_rows(logits, acc_dtype(logits))};
  dispatch(logits, [&](auto element) {
    typedef typename decltype(element)::type E;
    typedef Acc<E> T;
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
    if (loss_scale.has_value()) {
      check_tensor(*loss_scale, "loss_scale", acc_dtype(logits), loss_scale->sizes(), logits);
      STD_TORCH_CHECK(loss_scale->numel() == 1, "loss_scale: expected one element, got shape ",
                      shape_text(loss_scale->sizes()));
      p.loss_scale = loss_scale->const_data_ptr<T>();
    }
    fill_hyper(p, logits, hyper, values);
    p.kind = static_cast<int>(kind);
    p.kl_kind = static_cast<int>(kl_kind);
    p.kl_unbiased = kl_unbiased;
    p.row_loss = std::get<0>(out).mutable_data_ptr<T>();
    p.token_loss = std::get<1>(out).mutable_data_ptr<T>();
    p.logprob = std::get<2>(out).mutable_data_ptr<T>();
    p.entropy = std::get<3>(out).mutable_data_ptr<T>();
    for_each_row(rows, [&p](int64_t r) { loss_row<E>(p, r); });
  });
  return out;
}

void scale_rows(const Tensor& x, const Tensor& scale) {
  check_logits(x, "x");
  check_rows_apart(x, "x");
  dispatch(x, [&](auto element) {
    typedef typename decltype(element)::type E;
    const Acc<E>* factors = RowTensors<Acc<E>>(x).read(scale, "scale");
    Rows rows{};
    rows.rows = x.size(0) * x.size(1);
    rows.vocab = x.size(2);
    const int64_t seq = x.size(1), stride_b = x.stride(0), stride_t = x.stride(1);
    E* const base = static_cast<E*>(x.mutable_data_ptr());
    for_each_row(rows, [=](int64_t r) {
      E* const row = base + r / seq * stride_b + r % seq * stride_t;
      if (factors[r] != 1) kernels<E>().scale(row, rows.vocab, factors[r]);
    });
  });
}

// An operator and its in-place twin from one function that is told where the gradient goes.
template <auto Run>
struct BackwardForms;
template <class... Args, void (*Run)(const Tensor&, const Tensor&, Args...)>
struct BackwardForms<Run> {
  static Tensor functional(const Tensor& logits, Args... args) {
    Tensor grad = new_like(logits);
    Run(logits, grad, args...);
    return grad;
  }
  static void inplace(const Tensor& logits, Args... args) { Run(logits, logits, args...); }
};

template <auto Run>
struct LossForms;
template <class... Args, LossTensors (*Run)(const Tensor&, const Tensor*, Args...)>
struct LossForms<Run> {
  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> functional(const Tensor& logits,
                                                                       Args... args,
                                                                       bool needs_grad) {
    if (needs_grad) {
      Tensor grad = new_like(logits);
      return std::tuple_cat(Run(logits, &grad, args...), std::make_tuple(grad));
    }
    Tensor none = torch::stable::new_empty(logits, {0}, logits.scalar_type());
    return std::tuple_cat(Run(logits, nullptr, args...), std::make_tuple(none));
  }
  static LossTensors inplace(const Tensor& logits, Args... args) {
    return Run(logits, &logits, args...);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

// The instruction set in use: v4, v3 or baseline.
extern "C" __attribute__((visibility("default"))) const char* reasonkern_cpu_capability() {
  return reasonkern::cpu::name_of(reasonkern::cpu::capability());
}

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  using namespace reasonkern::cpu;
  m.impl("token_stats", TORCH_BOX(&token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&BackwardForms<&stats_backward>::functional));
  m.impl("token_stats_backward_", TORCH_BOX(&BackwardForms<&stats_backward>::inplace));
  m.impl("policy_loss", TORCH_BOX(&LossForms<&loss>::functional));
  m.impl("policy_loss_", TORCH_BOX(&LossForms<&loss>::inplace));
  m.impl("scale_rows_", TORCH_BOX(&scale_rows));
}
