// The kernels of verification in the simulator, started by tests/cuda_sim/verify_backend.py.
// Pointers come as integers in dicts whose keys are the fields of verify.h; a missing key is null.
#include "cuda_sim.h"
#include "speculation/controlled_kernels.cuh"
#include "speculation/verify_abreast.cuh"
#include "speculation/verify_launch.h"
#include "state_fields.h"

namespace py = pybind11;
using namespace reasonkern;
using cuda_sim::Fields;

namespace {

LogitRows rows_of(const Fields& f) {
  LogitRows r{};
  f.point(r.data, "logits");
  r.type = static_cast<ElementType>(f.number<int>("type"));
  f.point(r.mask, "mask");
  r.batch = f.number<int64_t>("batch");
  r.nodes = f.number<int64_t>("nodes");
  r.vocab = f.number<int64_t>("vocab");
  r.stride_b = f.number<int64_t>("stride_b");
  r.stride_n = f.number<int64_t>("stride_n");
  r.mask_stride_b = f.number<int64_t>("mask_stride_b");
  r.mask_stride_n = f.number<int64_t>("mask_stride_n");
  return r;
}

RequestParams requests_of(const Fields& f) {
  RequestParams r{};
  f.point(r.temperature, "temperature");
  f.point(r.top_k, "top_k");
  f.point(r.top_p, "top_p");
  f.point(r.min_p, "min_p");
  f.point(r.seed, "seed");
  f.point(r.position, "position");
  return r;
}

ControlParams control_of(const Fields& f) {
  ControlParams c{};
  f.point(c.slot, "slot");
  if (c.slot == nullptr) return c;
  c.state = cuda_sim::state_of(f);
  return c;
}

StatisticsParams statistics_of(const Fields& f) {
  StatisticsParams s{};
  f.point(s.logprob, "logprob");
  f.point(s.entropy, "entropy");
  f.point(s.entropy_raw, "entropy_raw");
  f.point(s.confidence, "row_confidence");
  f.point(s.max_prob, "max_prob");
  f.point(s.trigger, "trigger");
  return s;
}

struct Launch {
  unsigned teams, blocks, threads;  // blocks: of a cluster
  bool abreast;                     // verification by equality draws a row in each of them
  int stages, order;
  uint64_t seed;

  explicit Launch(const Fields& f)
      : teams(f.number<unsigned>("teams")),
        blocks(f.number<unsigned>("blocks")),
        threads(f.number<unsigned>("threads")),
        abreast(f.number<int>("abreast") != 0),
        stages(f.number<int>("stages")),
        order(f.number<int>("order")),
        seed(f.number<uint64_t>("seed")) {}

  template <class Params>
  void start(void (*kernel)(Params), std::size_t shared_bytes, const Params& p) const {
    cuda_sim::launch(kernel, teams * blocks, threads, blocks, shared_bytes,
                     static_cast<cuda_sim::Order>(order), seed, p);
  }

  // As on a GPU: a block has room for its slice of a row, or reads it where it is.
  template <class Shared, class Params>
  void start_teams(void (*kernel)(Params), Params p) const {
    p.rows.slice = int(slice_tokens(p.rows.vocab, blocks)), p.rows.stages = stages;
    const int bytes = stages * p.rows.slice * element_bytes(p.rows.type);
    start(kernel, stage_offset<Shared>() + std::size_t(bytes), p);
  }

  template <class E>
  void start_abreast(VerifyParams p) const {
    p.rows = whole_rows(p.rows);
    start(verify_abreast_kernel<E, kTeamThreads>, abreast_bytes<E>(p.rows, threads), p);
  }
};

template <class E>
void sample(const Launch& l, const Fields& f) {
  SampleParams p{rows_of(f), requests_of(f), nullptr, control_of(f), statistics_of(f)};
  f.point(p.token, "token");
  if (p.statistics.entropy != nullptr) {
    return l.start_teams<ControlShared>(sample_controlled_kernel, p);
  }
  l.start_teams<TeamShared>(sample_kernel<E>, p);
}

template <class E>
void verify(const Launch& l, const Fields& f) {
  VerifyParams p{};
  p.rows = rows_of(f);
  p.requests = requests_of(f);
  f.point(p.tokens, "tokens");
  f.point(p.valid, "valid");
  f.point(p.q_ids, "q_ids");
  f.point(p.q_logprob, "q_logprob");
  p.entry = f.number<int>("entry");
  f.point(p.child_ptr, "child_ptr");
  f.point(p.child_index, "child_index");
  f.point(p.eos, "eos");
  p.eos_count = f.number<int>("eos_count");
  f.point(p.max_length, "max_length");
  f.point(p.num_nodes, "num_nodes");
  p.depth = f.number<int>("depth");
  p.topk = f.number<int>("topk");
  f.point(p.out_tokens, "out_tokens");
  f.point(p.length, "length");
  f.point(p.path, "path");
  f.point(p.topk_ids, "topk_ids");
  f.point(p.topk_logits, "topk_logits");
  f.point(p.lse, "lse");
  f.point(p.status, "status");
  p.control = control_of(f);
  p.statistics = statistics_of(f);
  if (p.statistics.entropy != nullptr || p.control.slot != nullptr) {
    return l.start_teams<ControlShared>(verify_controlled_kernel, p);
  }
  if constexpr (knows_type<E>()) {
    if (l.abreast && p.q_ids == nullptr && can_be_alone<E>(p.rows, l.threads))
      return l.start_abreast<E>(p);
  }
  if (l.abreast) throw std::runtime_error("rows abreast: not of this kind");
  l.start_teams<TeamShared>(verify_kernel<E>, p);
}

template <class Word>
void compact(const Launch& l, const Fields& f) {
  CompactParams p{};
  f.point(p.cache, "cache");
  p.element_bytes = f.number<int>("element_bytes");
  p.batch = f.number<int64_t>("batch");
  p.heads = f.number<int64_t>("heads");
  p.head_dim = f.number<int64_t>("head_dim");
  p.steps = f.number<int64_t>("steps");
  p.stride_block = f.number<int64_t>("stride_block");
  p.stride_slot = f.number<int64_t>("stride_slot");
  p.stride_head = f.number<int64_t>("stride_head");
  f.point(p.lengths, "lengths");
  f.point(p.path, "path");
  f.point(p.accepted, "accepted");
  f.point(p.start, "start");
  f.point(p.block_table, "block_table");
  p.max_blocks = f.number<int64_t>("max_blocks");
  p.block_size = f.number<int64_t>("block_size");
  l.start(compact_kernel<Word>, 0, p);
}

template <class E>
void run_rows(const std::string& op, const Launch& l, const Fields& f) {
  if (op == "sample") return sample<E>(l, f);
  if (op == "verify") return verify<E>(l, f);
  throw std::invalid_argument("op: got " + op);
}

void run(const std::string& op, const py::dict& launch, const py::dict& args) {
  const Launch l{Fields{launch}};
  const Fields f{args};
  switch (rows_of(f).type) {
    case ElementType::kFloat32:
      return run_rows<float>(op, l, f);
    case ElementType::kBFloat16:
      return run_rows<bf16>(op, l, f);
    default:
      return run_rows<AnyElement>(op, l, f);
  }
}

void run_compact(int word, const py::dict& launch, const py::dict& args) {
  const Launch l{Fields{launch}};
  const Fields f{args};
  if (word == 8) return compact<uint64_t>(l, f);
  if (word == 4) return compact<uint32_t>(l, f);
  if (word == 2) return compact<uint16_t>(l, f);
  if (word == 1) return compact<uint8_t>(l, f);
  throw std::invalid_argument("word: got another width");
}

}  // namespace

PYBIND11_MODULE(verify_sim, m) {
  m.def("run", &run);
  m.def("compact", &run_compact);
  m.def("team_shape", [](int64_t batch, int64_t vocab, int bytes, std::size_t scratch, int inside,
                         int units, int arch, std::size_t shared, bool walk) {
    const TeamShape shape = team_shape(batch, vocab, bytes, scratch, inside, {arch, units, shared},
                                       walk ? Reads::walk : Reads::row);
    return std::make_tuple(shape.blocks, shape.stages, shape.shared);
  });
  m.def("abreast_shape", [](int64_t batch, int depth, int units) {
    const AbreastShape shape = abreast_shape(batch, depth, {90, units, 0});
    return std::make_tuple(shape.rows, shape.threads);
  });
  // Shared memory of the wide blocks of rows abreast; 0: a launch draws none.
  m.def("abreast_bytes", [](int64_t nodes, int64_t vocab, int arch, std::size_t shared) {
    VerifyParams p{};
    p.rows.nodes = nodes, p.rows.vocab = p.rows.stride_n = p.rows.stride_b = vocab;
    return draws_abreast<bf16>(p, {arch, 132, shared}) ? abreast_bytes<bf16>(p.rows, kWideThreads)
                                                       : 0;
  });
  m.def("word_bytes", &word_bytes);
}
