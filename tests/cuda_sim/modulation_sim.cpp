// The kernels of logit control in the simulator, started by tests/cuda_sim/modulation_backend.py.
// Pointers come as integers in dicts whose keys are the fields of modulation.h; a missing key is
// null.
#include "cuda_sim.h"
#include "modulation/kernels.cuh"
#include "state_fields.h"

namespace py = pybind11;
using namespace reasonkern;
using namespace reasonkern::modulation;
using cuda_sim::Fields;
using cuda_sim::state_of;

namespace {

template <class Params>
void start(void (*kernel)(Params), dim3 blocks, unsigned threads, std::size_t shared_bytes,
           const Fields& launch, const Params& p) {
  cuda_sim::launch(kernel, blocks, threads, 1, shared_bytes,
                   static_cast<cuda_sim::Order>(launch.number<int>("order")),
                   launch.number<uint64_t>("seed"), p);
}

void modulate(const std::string& dtype, const py::dict& launch, const py::dict& args) {
  const Fields l{launch}, f{args};
  RowsParams p{};
  p.state = state_of(f);
  f.point(p.logits, "logits");
  p.rows = f.number<int64_t>("rows");
  p.vocab = f.number<int64_t>("vocab");
  p.stride = f.number<int64_t>("stride");
  f.point(p.slot, "slot");
  f.point(p.local_pos, "local_pos");
  f.point(p.draft_tokens, "draft_tokens");
  f.point(p.parents, "parents");
  p.nodes = f.number<int64_t>("nodes");
  f.point(p.temperature, "temperature");
  p.dense = f.number<bool>("dense");
  const unsigned threads = l.number<unsigned>("threads");
  const dim3 grid(unsigned(p.rows / p.nodes), unsigned(p.nodes));
  const auto run = [&](auto kernel) { start(kernel, grid, threads, sizeof(RowShared), l, p); };
  if (dtype == "float32") return run(modulate_kernel<float>);
  if (dtype == "bfloat16") return run(modulate_kernel<bf16>);
  if (dtype == "float16") return run(modulate_kernel<fp16>);
  if (dtype == "float64") return run(modulate_kernel<double>);
  throw std::invalid_argument("dtype: got " + dtype);
}

void commit(const py::dict& launch, const py::dict& args) {
  const Fields l{launch}, f{args};
  CommitParams p{};
  p.state = state_of(f);
  f.point(p.records, "records");
  f.point(p.slot, "slot");
  f.point(p.tokens, "tokens");
  f.point(p.length, "length");
  p.batch = f.number<int64_t>("batch");
  p.steps = f.number<int64_t>("steps");
  f.point(p.entropy, "entropy");
  f.point(p.confidence, "confidence");
  start(commit_kernel, unsigned(p.batch), kCommitThreads, sizeof(CommitShared), l, p);
}

}  // namespace

PYBIND11_MODULE(modulation_sim, m) {
  m.def("modulate", &modulate);
  m.def("commit", &commit);
  m.def("row_threads", &row_threads);
}
