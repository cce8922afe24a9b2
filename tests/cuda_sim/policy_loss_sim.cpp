// The kernels of policy_loss in the simulator, started by tests/cuda_sim/backend.py. Pointers come
// as integers in dicts whose keys are the fields of policy_loss.h; a missing key is null.
#include "cuda_sim.h"
#include "fields.h"
#include "policy_loss/kernels.cuh"
#include "policy_loss/metrics.cuh"
#include "policy_loss/objective_map.cuh"
#include "policy_loss/sequence_map.cuh"

namespace py = pybind11;
using namespace reasonkern;
using cuda_sim::Fields;

namespace {

Rows rows_of(const Fields& f) {
  Rows r{};
  f.point(r.logits, "logits");
  f.point(r.grad, "grad");
  f.point(r.targets, "targets");
  r.rows = f.number<std::int64_t>("rows");
  r.seq = f.number<std::int64_t>("seq");
  r.vocab = f.number<std::int64_t>("vocab");
  r.stride_b = f.number<std::int64_t>("stride_b");
  r.stride_t = f.number<std::int64_t>("stride_t");
  r.grad_stride_b = f.number<std::int64_t>("grad_stride_b");
  r.grad_stride_t = f.number<std::int64_t>("grad_stride_t");
  return r;
}

template <class A>
Scale<A> scale_of(const Fields& f) {
  Scale<A> s{f.number<A>("temperature"), nullptr, f.number<A>("softcap")};
  f.point(s.row_temperature, "row_temperature");
  return s;
}

// How to launch: what launch_config.h decides on a GPU, here chosen by the test.
struct Launch {
  int slices, group, groups, blocks;  // groups: slices a whole-row block walks at a time
  bool resident;
  int order;
  std::uint64_t seed;

  explicit Launch(const Fields& f)
      : slices(f.number<int>("slices")),
        group(f.number<int>("group")),
        groups(f.number<int>("groups")),
        blocks(f.number<int>("blocks")),
        resident(f.number<bool>("resident")),
        order(f.number<int>("order")),
        seed(f.number<std::uint64_t>("seed")) {}

  template <class Params, class... More>
  void start(void (*kernel)(Params, More...), unsigned per_row, unsigned block, unsigned cluster,
             std::size_t shared_bytes, const Params& p, More... more) const {
    cuda_sim::launch(kernel, unsigned(blocks) * per_row, block, cluster, shared_bytes,
                     static_cast<cuda_sim::Order>(order), seed, p, more...);
  }
};

template <class E>
void token_stats(const Launch& l, const Fields& f) {
  using A = acc_t<E>;
  StatsParams<A> p{};
  p.rows = rows_of(f);
  p.scale = scale_of<A>(f);
  f.point(p.mask, "mask");
  f.point(p.out.logprob, "logprob");
  f.point(p.out.entropy, "entropy");
  f.point(p.out.lse, "lse");
  f.point(p.out.collision, "collision");
  f.point(p.out.varentropy, "varentropy");
  f.point(p.out.max_prob, "max_prob");
  f.point(p.out.is_top1, "is_top1");
  f.point(p.out.row_max, "row_max");
  const Tiling t = cut(p.rows.vocab, sizeof(E), l.slices, l.group);
  l.start(stats_kernel<E>, 1, l.groups * l.group, 1, sweep_shared_bytes(t), p, t,
          unsigned(l.blocks + 1) / 2);
}

template <class E>
void token_stats_backward(const Launch& l, const Fields& f) {
  using A = acc_t<E>;
  GradParams<A> p{};
  p.rows = rows_of(f);
  p.scale = scale_of<A>(f);
  f.point(p.logprob, "logprob");
  f.point(p.entropy, "entropy");
  f.point(p.collision, "collision");
  f.point(p.max_prob, "max_prob");
  f.point(p.row_max, "row_max");
  f.point(p.grad_logprob, "grad_logprob");
  f.point(p.grad_entropy, "grad_entropy");
  f.point(p.grad_lse, "grad_lse");
  f.point(p.grad_collision, "grad_collision");
  const Tiling t = cut(p.rows.vocab, sizeof(E), l.slices, l.group);
  l.start(grad_kernel<E>, unsigned(l.slices), l.group, 1, 0, p, t);
}

template <class Params>
void fill_objective(Params& p, const Fields& f) {
  f.point(p.old_logprob, "old_logprob");
  f.point(p.advantage, "advantage");
  f.point(p.weight, "weight");
  f.point(p.entropy_weight, "entropy_weight");
  f.point(p.importance, "importance");
  f.point(p.ref_logprob, "ref_logprob");
  f.point(p.device_hyper, "hyper");
  f.point(p.row_loss, "row_loss");
  f.point(p.token_loss, "token_loss");
  const auto v = f.number<std::array<decltype(p.hyper.low), kNumHyper>>("values");
  p.hyper = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]};
  p.hyper_rows = f.number<std::int64_t>("hyper_rows");
  p.kind = f.number<int>("kind");
  p.kl_kind = f.number<int>("kl_kind");
  p.kl_unbiased = f.number<bool>("kl_unbiased");
}

template <class E>
void policy_loss(const Launch& l, const Fields& f) {
  using A = acc_t<E>;
  LossParams<A> p{};
  p.rows = rows_of(f);
  p.scale = scale_of<A>(f);
  fill_objective(p, f);
  f.point(p.loss_scale, "loss_scale");
  f.point(p.logprob, "logprob");
  f.point(p.entropy, "entropy");
  const Tiling t = cut(p.rows.vocab, sizeof(E), l.slices, l.group);
  if (l.resident && p.rows.grad != nullptr) {
    l.start(loss_cluster_kernel<E>, unsigned(l.slices), l.group, l.slices,
            cluster_shared_bytes(t, sizeof(E)), p, t);
  } else {
    l.start(loss_sweep_kernel<E>, 1, l.groups * l.group, 1, sweep_shared_bytes(t), p, t);
  }
}

template <class E>
void objective_map(const Launch& l, const Fields& f) {
  MapParams<acc_t<E>> p{};
  fill_objective(p.loss, f);
  p.loss.rows.rows = f.number<std::int64_t>("rows");
  f.point(p.logprob, "logprob");
  f.point(p.entropy, "entropy");
  f.point(p.dlogp, "dlogp");
  f.point(p.dentropy, "dentropy");
  f.point(p.finite, "finite");
  l.start(map_kernel<acc_t<E>>, 1, l.group, 1, 0, p);
}

template <class E>
void scale_rows(const Launch& l, const Fields& f) {
  const Rows rows = rows_of(f);
  const acc_t<E>* factors;
  f.point(factors, "factors");
  const Tiling t = cut(rows.vocab, sizeof(E), l.slices, l.group);
  l.start(scale_kernel<E>, unsigned(l.slices), l.group, 1, 0, rows, factors, t);
}

template <class E>
void sequence_map(const Launch& l, const Fields& f) {
  SequenceParams<acc_t<E>> p{};
  p.rows = f.number<std::int64_t>("rows");
  p.sequences = f.number<std::int64_t>("sequences");
  f.point(p.offsets, "cu_seqlens");
  fill_objective(p, f);
  f.point(p.logprob, "logprob");
  f.point(p.entropy, "entropy");
  f.point(p.dlogp, "dlogp");
  f.point(p.dentropy, "dentropy");
  f.point(p.log_ratio, "log_ratio");
  f.point(p.finite, "finite");
  l.start(sequence_kernel<acc_t<E>>, 1, l.group, 1, sequence_shared_bytes(l.group), p);
}

template <class E>
void policy_metrics(const Launch& l, const Fields& f) {
  MetricsParams<acc_t<E>> p{};
  p.rows = f.number<std::int64_t>("rows");
  f.point(p.logprob, "logprob");
  f.point(p.entropy, "entropy");
  f.point(p.old_logprob, "old_logprob");
  f.point(p.advantage, "advantage");
  f.point(p.weight, "weight");
  f.point(p.entropy_weight, "entropy_weight");
  f.point(p.importance, "importance");
  f.point(p.ref_logprob, "ref_logprob");
  f.point(p.log_ratio, "log_ratio");
  f.point(p.finite, "finite");
  f.point(p.device_hyper, "hyper");
  const auto v = f.number<std::array<double, kNumHyper>>("values");
  p.hyper = {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8]};
  p.hyper_rows = f.number<std::int64_t>("hyper_rows");
  p.kind = f.number<int>("kind");
  p.clips = f.number<bool>("clips");
  p.needs_ref = f.number<bool>("needs_ref");
  f.point(p.out, "out");
  l.start(metrics_kernel<acc_t<E>>, 1, l.group, 1, metrics_shared_bytes(l.group), p);
}

template <class E>
void run_typed(const std::string& op, const Launch& l, const Fields& f) {
  if (op == "token_stats") return token_stats<E>(l, f);
  if (op == "token_stats_backward") return token_stats_backward<E>(l, f);
  if (op == "policy_loss") return policy_loss<E>(l, f);
  if (op == "scale_rows") return scale_rows<E>(l, f);
  if (op == "objective_map") return objective_map<E>(l, f);
  if (op == "sequence_map") return sequence_map<E>(l, f);
  if (op == "policy_metrics") return policy_metrics<E>(l, f);
  throw std::invalid_argument("op: got " + op);
}

void run(const std::string& op, const std::string& dtype, const py::dict& launch,
         const py::dict& args) {
  const Launch l{Fields{launch}};
  const Fields f{args};
  if (dtype == "float32") return run_typed<float>(op, l, f);
  if (dtype == "bfloat16") return run_typed<bf16>(op, l, f);
  if (dtype == "float16") return run_typed<fp16>(op, l, f);
  if (dtype == "float64") return run_typed<double>(op, l, f);
  throw std::invalid_argument("dtype: got " + dtype);
}

py::dict describe(const LaunchConfig& c) {
  py::dict d;
  d["slices"] = c.tiling.slices;
  d["slice_len"] = c.tiling.slice_len;
  d["resident"] = c.resident;
  d["cluster"] = c.cluster;
  d["block"] = c.block;
  d["shared_bytes"] = c.shared_bytes;
  return d;
}

}  // namespace

PYBIND11_MODULE(policy_loss_sim, m) {
  m.def("run", &run);
  m.def("stats_config", [](std::int64_t rows, std::int64_t vocab, std::int64_t element_bytes) {
    return describe(stats_config(rows, vocab, element_bytes, {90, 132, 0}));
  });
  m.def("stats_turns", [](std::int64_t rows, std::int64_t vocab, std::int64_t element_bytes) {
    const Device gpu{90, 132, 0};
    const Turns t = stats_turns(rows, stats_config(rows, vocab, element_bytes, gpu), gpu);
    return std::pair<unsigned, unsigned>(t.blocks, t.again);
  });
  m.def("rowwise_config", [](std::int64_t rows, std::int64_t vocab, std::int64_t element_bytes) {
    return describe(rowwise_config(rows, vocab, element_bytes, {90, 132, 0}));
  });
  m.def("loss_config", [](std::int64_t vocab, std::int64_t element_bytes, bool needs_grad, int arch,
                          std::size_t shared_per_block) {
    return describe(loss_config(vocab, element_bytes, needs_grad, {arch, 132, shared_per_block}));
  });
}
