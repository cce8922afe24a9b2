// The kernels of the n-gram table in the simulator, started by tests/cuda_sim/table_backend.py.
// Pointers come as integers in dicts whose keys are the fields of table.h; a missing key is null.
#include "cuda_sim.h"
#include "fields.h"
#include "speculation/table_draft.cuh"
#include "speculation/table_few.cuh"

namespace py = pybind11;
using namespace reasonkern;
using cuda_sim::Fields;

namespace {

Table table_of(const Fields& f) {
  Table t{};
  f.point(t.keys, "keys");
  f.point(t.slots, "slots");
  f.point(t.high, "high");
  f.point(t.sums, "sums");
  f.point(t.counts, "counts");
  f.point(t.ages, "ages");
  f.point(t.clock, "clock");
  f.point(t.epochs, "epochs");
  f.point(t.counters, "counters");
  t.sets = f.number<std::int64_t>("sets");
  t.topk = f.number<int>("topk");
  t.scopes = f.number<int>("scopes");
  const auto orders = f.number<std::vector<int>>("orders");
  t.num_orders = int(orders.size());
  t.window = orders[0];
  std::copy(orders.begin(), orders.end(), t.orders);
  return t;
}

MergeParams merge_of(const Fields& f) {
  MergeParams m{};
  UpdateParams& p = m.update;
  p.table = table_of(f);
  f.point(p.context, "context");
  p.context_stride = f.number<std::int64_t>("context_stride");
  f.point(p.ids, "ids");
  f.point(p.logits, "logits");
  f.point(p.lse, "lse");
  f.point(p.scope, "scope");
  p.rows = f.number<std::int64_t>("rows");
  p.vocab = f.number<std::int64_t>("vocab");
  p.width = f.number<int>("width");
  p.max_count = f.number<int>("max_count");
  f.point(m.keys, "items");
  f.point(m.values, "values");
  f.point(m.bins, "bins");
  f.point(m.pairs, "pairs");
  f.point(m.totals, "totals");
  f.point(m.sum_ids, "sum_ids");
  f.point(m.sums, "token_sums");
  m.items = p.rows * p.table.num_orders;
  return m;
}

DraftParams draft_of(const Fields& f) {
  DraftParams p{};
  p.table = table_of(f);
  f.point(p.context, "context");
  p.context_stride = f.number<std::int64_t>("context_stride");
  f.point(p.parents, "parents");
  f.point(p.depths, "depths");
  f.point(p.child_ptr, "child_ptr");
  f.point(p.child_index, "child_index");
  f.point(p.level_ptr, "level_ptr");
  f.point(p.level_nodes, "level_nodes");
  f.point(p.scope, "scope");
  f.point(p.temperature, "temperature");
  f.point(p.seed, "seed");
  f.point(p.position, "position");
  f.point(p.tokens, "tokens");
  f.point(p.valid, "valid");
  f.point(p.q_ids, "q_ids");
  f.point(p.q_logprob, "q_logprob");
  p.batch = f.number<int>("batch");
  p.nodes = f.number<int>("nodes");
  p.inner_nodes = f.number<int>("inner_nodes");
  p.levels = f.number<int>("levels");
  p.kind = f.number<int>("kind");
  return p;
}

void run(const std::string& op, const py::dict& launch, const py::dict& args) {
  const Fields l{launch}, f{args};
  const auto start = [&](auto kernel, std::size_t shared, const auto& params) {
    cuda_sim::launch(kernel, l.number<unsigned>("blocks"), l.number<unsigned>("threads"), 1, shared,
                     static_cast<cuda_sim::Order>(l.number<int>("order")),
                     l.number<std::uint64_t>("seed"), params);
  };
  if (op == "draft") {
    const DraftParams p = draft_of(f);
    return with_draft_kernel(p, [&](auto kernel, unsigned shared) { start(kernel, shared, p); });
  }
  if (op == "few") {
    const MergeParams m = merge_of(f);
    return start(table_few_kernel, few_shared_bytes(m.items, l.number<unsigned>("threads")), m);
  }
  if (op == "keys") return start(table_keys_kernel, 0, merge_of(f));
  if (op == "merge") {
    return start(table_merge_kernel, merge_shared_bytes(l.number<unsigned>("threads")),
                 merge_of(f));
  }
  throw std::invalid_argument("op: got " + op);
}

}  // namespace

PYBIND11_MODULE(table_sim, m) {
  m.def("run", &run);
  m.def("draft_bytes", [](int nodes, int window, int orders, int topk) {
    DraftParams p{};
    p.nodes = nodes, p.table.window = window, p.table.num_orders = orders, p.table.topk = topk;
    unsigned bytes = 0;
    with_draft_kernel(p, [&](auto, unsigned shared) { bytes = shared; });
    return bytes;
  });
  m.def("few_bytes", &few_shared_bytes);
  m.attr("few_items") = int(kFewItems);
}
