// The operators of verification over tensors: checks, plain params structs, outputs. A backend
// supplies the launches; its file registers `VerifyOperators<Backend>`:
//
//   static void sample(const SampleParams&, int32_t device);
//   static void verify(const VerifyParams&, int32_t device);
//   static void compact(const CompactParams&, int32_t device);
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <algorithm>
#include <tuple>

#include "../modulation/operators.h"
#include "verify.h"

namespace reasonkern {

inline ElementType element_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float:
      return ElementType::kFloat32;
    case ScalarType::BFloat16:
      return ElementType::kBFloat16;
    case ScalarType::Half:
      return ElementType::kFloat16;
    case ScalarType::Double:
      return ElementType::kFloat64;
    default:
      STD_TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64, got ",
                      logits.scalar_type());
  }
}

// Contiguous inputs beside the logits.
class Inputs {
 public:
  explicit Inputs(const Tensor& logits) : logits_(logits) {}

  template <class T>
  const T* read(const Tensor& t, const char* name, ScalarType dtype,
                IntHeaderOnlyArrayRef sizes) const {
    check_tensor(t, name, dtype, sizes, logits_);
    return static_cast<const T*>(t.const_data_ptr());
  }
  template <class T>
  const T* read(const MaybeTensor& t, const char* name, ScalarType dtype,
                IntHeaderOnlyArrayRef sizes) const {
    return t.has_value() ? read<T>(*t, name, dtype, sizes) : nullptr;
  }
  RequestParams requests(const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                         const Tensor& min_p, const Tensor& seed, const Tensor& position) const {
    const int64_t batch[] = {logits_.size(0)};
    return {read<float>(temperature, "temperature", ScalarType::Float, batch),
            read<int64_t>(top_k, "top_k", ScalarType::Long, batch),
            read<float>(top_p, "top_p", ScalarType::Float, batch),
            read<float>(min_p, "min_p", ScalarType::Float, batch),
            read<int64_t>(seed, "seed", ScalarType::Long, batch),
            read<int64_t>(position, "position", ScalarType::Long, batch)};
  }

 private:
  const Tensor& logits_;
};

// `logits` (B, V) or (B, N, V), the mask alike with ceil(V / 32) words.
inline LogitRows make_logit_rows(const Tensor& logits, const MaybeTensor& mask, int64_t dims) {
  STD_TORCH_CHECK(logits.dim() == dims, "logits: expected ", dims, " dimensions, got shape ",
                  shape_text(logits.sizes()));
  const int64_t vocab = logits.size(dims - 1);
  STD_TORCH_CHECK(vocab > 0 && vocab < int64_t{1} << 22,
                  "logits: expected a vocabulary of 1 to 2^22 - 1, got ", vocab);
  check_last_contiguous(logits, "logits");
  LogitRows rows{};
  rows.data = logits.const_data_ptr();
  rows.type = element_type(logits);
  rows.batch = logits.size(0);
  rows.nodes = dims == 3 ? logits.size(1) : 1;
  rows.vocab = vocab;
  rows.stride_b = logits.stride(0);
  rows.stride_n = dims == 3 ? logits.stride(1) : 0;
  if (mask.has_value()) {
    check_same_device(*mask, "mask", logits);
    check_dtype(*mask, "mask", ScalarType::Int);
    const int64_t words = (vocab + 31) / 32;
    const int64_t sizes[] = {rows.batch, dims == 3 ? rows.nodes : words, words};
    check_shape(*mask, "mask", {sizes, size_t(dims)});
    check_last_contiguous(*mask, "mask");
    rows.mask = mask->const_data_ptr<int32_t>();
    rows.mask_stride_b = mask->stride(0);
    rows.mask_stride_n = dims == 3 ? mask->stride(1) : 0;
  }
  return rows;
}

// Not new_empty, whose way through the dispatcher costs a step of seven outputs 3 us.
inline Tensor empty_beside(const Tensor& logits, IntHeaderOnlyArrayRef sizes, ScalarType dtype) {
  int64_t strides[3], stride = 1;
  for (size_t d = sizes.size(); d-- > 0; stride *= std::max<int64_t>(sizes[d], 1)) {
    strides[d] = stride;
  }
  const int32_t type = dtype == ScalarType::Long    ? aoti_torch_dtype_int64()
                       : dtype == ScalarType::Float ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::Int   ? aoti_torch_dtype_int32()
                                                    : aoti_torch_dtype_bool();
  int32_t device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(logits.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(int64_t(sizes.size()), sizes.data(), strides,
                                                  type, device, logits.get_device_index(),
                                                  &handle));
  return Tensor(handle);
}

using VerifyOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline VerifyOutputs allocate_outputs(VerifyParams& p, const Tensor& logits) {
  const int64_t shape[] = {p.rows.batch, p.depth + 1, p.topk};
  const IntHeaderOnlyArrayRef row{shape, 1}, rows{shape, 2}, entries{shape, 3};
  VerifyOutputs out{empty_beside(logits, rows, ScalarType::Long),
                    empty_beside(logits, row, ScalarType::Long),
                    empty_beside(logits, rows, ScalarType::Long),
                    empty_beside(logits, entries, ScalarType::Long),
                    empty_beside(logits, entries, ScalarType::Float),
                    empty_beside(logits, rows, ScalarType::Float),
                    empty_beside(logits, row, ScalarType::Int)};
  p.out_tokens = std::get<0>(out).mutable_data_ptr<int64_t>();
  p.length = std::get<1>(out).mutable_data_ptr<int64_t>();
  p.path = std::get<2>(out).mutable_data_ptr<int64_t>();
  p.topk_ids = std::get<3>(out).mutable_data_ptr<int64_t>();
  p.topk_logits = std::get<4>(out).mutable_data_ptr<float>();
  p.lse = std::get<5>(out).mutable_data_ptr<float>();
  p.status = std::get<6>(out).mutable_data_ptr<int32_t>();
  return out;
}

// Statistics of a row each, beside the logits; the trigger is bool.
using StatisticsOutputs = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

inline StatisticsOutputs allocate_statistics(StatisticsParams& s, const Tensor& logits,
                                             IntHeaderOnlyArrayRef sizes) {
  const auto numbers = [&](float*& to) {
    Tensor t = empty_beside(logits, sizes, ScalarType::Float);
    to = t.mutable_data_ptr<float>();
    return t;
  };
  Tensor logprob = numbers(s.logprob), entropy = numbers(s.entropy), raw = numbers(s.entropy_raw);
  Tensor confidence = numbers(s.confidence), max_prob = numbers(s.max_prob);
  Tensor trigger = empty_beside(logits, sizes, ScalarType::Bool);
  s.trigger = trigger.mutable_data_ptr<bool>();
  return {logprob, entropy, raw, confidence, max_prob, trigger};
}

inline void read_law(VerifyParams& p, const Inputs& in, const MaybeTensor& q_ids,
                     const MaybeTensor& q_logprob) {
  STD_TORCH_CHECK(q_ids.has_value() == q_logprob.has_value(),
                  "q_ids, q_logprob: expected both or neither");
  if (!q_ids.has_value()) return;
  STD_TORCH_CHECK(q_ids->dim() == 3, "q_ids: expected shape (B, N, K), got ",
                  shape_text(q_ids->sizes()));
  const int64_t shape[] = {p.rows.batch, p.rows.nodes, q_ids->size(2)};
  STD_TORCH_CHECK(shape[2] > 0 && shape[2] <= kMaxEntry, "q_ids: expected 1 to ", kMaxEntry,
                  " tokens, got ", shape[2]);
  p.q_ids = in.read<int64_t>(q_ids, "q_ids", ScalarType::Long, {shape, 3});
  p.q_logprob = in.read<float>(q_logprob, "q_logprob", ScalarType::Float, {shape, 3});
  p.entry = int(shape[2]);
}

inline VerifyParams make_verify(const Tensor& logits, const Tensor& tokens, const Tensor& valid,
                                const MaybeTensor& q_ids, const MaybeTensor& q_logprob,
                                const Tensor& child_ptr, const Tensor& child_index,
                                const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                const Tensor& min_p, const Tensor& seed, const Tensor& position,
                                const MaybeTensor& eos, const MaybeTensor& max_length,
                                const MaybeTensor& node_mask, const MaybeTensor& num_nodes,
                                int64_t depth, int64_t max_children, int64_t topk) {
  VerifyParams p{};
  p.rows = make_logit_rows(logits, node_mask, 3);
  const int64_t nodes = p.rows.nodes, links[] = {nodes + 1, nodes - 1};
  STD_TORCH_CHECK(nodes > 0, "logits: expected one row per node, got none");
  STD_TORCH_CHECK(nodes <= kMaxNodes, "logits: expected rows of at most ", kMaxNodes,
                  " nodes, got ", nodes);
  STD_TORCH_CHECK(depth >= 0 && depth < nodes, "depth: expected 0 to nodes - 1, got ", depth);
  STD_TORCH_CHECK(topk > 0 && topk <= kMaxTopK, "topk: expected 1 to ", kMaxTopK, ", got ", topk);
  STD_TORCH_CHECK(max_children >= 0 && max_children < nodes,
                  "max_children: expected 0 to nodes - 1, got ", max_children);
  const Inputs in(logits);
  const IntHeaderOnlyArrayRef batch{logits.sizes().data(), 1}, grid{logits.sizes().data(), 2};
  p.requests = in.requests(temperature, top_k, top_p, min_p, seed, position);
  p.tokens = in.read<int64_t>(tokens, "tokens", ScalarType::Long, grid);
  p.valid = in.read<bool>(valid, "valid", ScalarType::Bool, grid);
  p.child_ptr = in.read<int32_t>(child_ptr, "child_ptr", ScalarType::Int, {links, 1});
  p.child_index = in.read<int32_t>(child_index, "child_index", ScalarType::Int, {links + 1, 1});
  p.max_length = in.read<int64_t>(max_length, "max_length", ScalarType::Long, batch);
  p.num_nodes = in.read<int64_t>(num_nodes, "num_nodes", ScalarType::Long, batch);
  p.depth = int(depth);
  p.topk = int(topk);
  if (eos.has_value()) {
    p.eos = in.read<int64_t>(eos, "eos", ScalarType::Long, {eos->sizes().data(), 1});
    p.eos_count = int(eos->numel());
  }
  read_law(p, in, q_ids, q_logprob);
  return p;
}

inline Tensor make_sample(SampleParams& p, const Tensor& logits, const MaybeTensor& mask,
                          const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                          const Tensor& min_p, const Tensor& seed, const Tensor& position) {
  p.rows = make_logit_rows(logits, mask, 2);
  p.requests = Inputs(logits).requests(temperature, top_k, top_p, min_p, seed, position);
  Tensor token = empty_beside(logits, {&p.rows.batch, 1}, ScalarType::Long);
  p.token = token.mutable_data_ptr<int64_t>();
  return token;
}

// `state`: the tensors of layout.Storage, in its order; none: no control.
inline void read_control(ControlParams& c, const Tensor& logits, const MaybeTensor& slot,
                         const std::vector<Tensor>& state) {
  STD_TORCH_CHECK(state.size() == (slot.has_value() ? 2 : 0),
                  "state: expected two tensors with a slot and none without, got ", state.size());
  if (!slot.has_value()) return;
  c.state = modulation::describe_state(logits, state[0], state[1]);
  const int64_t batch[] = {logits.size(0)};
  c.slot = Inputs(logits).read<int64_t>(*slot, "slot", ScalarType::Long, batch);
}

// The operators that begin with the arguments of `make_verify`.
template <class Backend, class MakeVerify>
struct Verification;

template <class Backend, class... Args>
struct Verification<Backend, VerifyParams(const Tensor&, Args...)> {
  static VerifyOutputs verify_tree(const Tensor& logits, Args... args) {
    VerifyParams p = make_verify(logits, args...);
    VerifyOutputs out = allocate_outputs(p, logits);
    if (p.rows.batch > 0) Backend::verify(p, logits.get_device_index());
    return out;
  }

  static auto verify_controlled(const Tensor& logits, Args... args, const MaybeTensor& slot,
                                const std::vector<Tensor>& state, bool stats) {
    VerifyParams p = make_verify(logits, args...);
    read_control(p.control, logits, slot, state);
    VerifyOutputs out = allocate_outputs(p, logits);
    const int64_t rows[] = {p.rows.batch, stats ? p.depth + 1 : 0};
    StatisticsOutputs statistics = allocate_statistics(p.statistics, logits, {rows, 2});
    if (!stats) p.statistics = {};
    if (p.rows.batch > 0) Backend::verify(p, logits.get_device_index());
    return std::tuple_cat(out, statistics);
  }
};

template <class Backend>
struct VerifyOperators : Verification<Backend, decltype(make_verify)> {
  static Tensor sample(const Tensor& logits, const MaybeTensor& mask, const Tensor& temperature,
                       const Tensor& top_k, const Tensor& top_p, const Tensor& min_p,
                       const Tensor& seed, const Tensor& position) {
    SampleParams p{};
    Tensor token = make_sample(p, logits, mask, temperature, top_k, top_p, min_p, seed, position);
    if (p.rows.batch > 0) Backend::sample(p, logits.get_device_index());
    return token;
  }

  static auto sample_controlled(const Tensor& logits, const MaybeTensor& mask,
                                const Tensor& temperature, const Tensor& top_k, const Tensor& top_p,
                                const Tensor& min_p, const Tensor& seed, const Tensor& position,
                                const MaybeTensor& slot, const std::vector<Tensor>& state) {
    SampleParams p{};
    Tensor token = make_sample(p, logits, mask, temperature, top_k, top_p, min_p, seed, position);
    read_control(p.control, logits, slot, state);
    StatisticsOutputs statistics = allocate_statistics(p.statistics, logits, {&p.rows.batch, 1});
    if (p.rows.batch > 0) Backend::sample(p, logits.get_device_index());
    return std::tuple_cat(std::make_tuple(token), statistics);
  }

  static void compact_kv_(const Tensor& key, const Tensor& value, const Tensor& lengths,
                          const Tensor& path, const Tensor& accepted, const Tensor& start,
                          const MaybeTensor& block_table) {
    for (const Tensor* cache : {&key, &value}) {
      const CompactParams p = make_compact(*cache, lengths, path, accepted, start, block_table);
      if (p.batch > 0 && cache->numel() > 0) Backend::compact(p, key.get_device_index());
    }
  }

 private:
  static CompactParams make_compact(const Tensor& cache, const Tensor& lengths, const Tensor& path,
                                    const Tensor& accepted, const Tensor& start,
                                    const MaybeTensor& block_table) {
    STD_TORCH_CHECK(cache.dim() == 4 && path.dim() == 2 && lengths.dim() == 1,
                    "key, path, lengths: expected 4, 2 and 1 dimensions");
    check_rows_apart(cache, "cache");
    const Inputs in(cache);
    CompactParams p{};
    p.batch = lengths.size(0);
    p.steps = path.size(1);
    const int64_t shape[] = {p.batch, p.steps};
    p.cache = cache.mutable_data_ptr();
    p.element_bytes = int(cache.element_size());
    p.lengths = in.read<int64_t>(lengths, "lengths", ScalarType::Long, {shape, 1});
    p.accepted = in.read<int64_t>(accepted, "accepted", ScalarType::Long, {shape, 1});
    p.start = in.read<int64_t>(start, "start", ScalarType::Long, {shape, 1});
    p.path = in.read<int64_t>(path, "path", ScalarType::Long, {shape, 2});
    const int slot = block_table.has_value() ? 1 : 2, head = block_table.has_value() ? 2 : 1;
    p.stride_block = cache.stride(0);
    p.stride_slot = cache.stride(slot);
    p.stride_head = cache.stride(head);
    p.block_size = cache.size(slot);
    p.heads = cache.size(head);
    p.head_dim = cache.size(3);
    check_last_contiguous(cache, "cache");
    if (block_table.has_value()) {
      STD_TORCH_CHECK(block_table->dim() == 2, "block_table: expected shape (B, max_blocks)");
      p.max_blocks = block_table->size(1);
      const int64_t table[] = {p.batch, p.max_blocks};
      p.block_table = in.read<int64_t>(block_table, "block_table", ScalarType::Long, {table, 2});
    } else {
      STD_TORCH_CHECK(cache.size(0) == p.batch, "cache: expected one block per request");
    }
    return p;
  }
};

}  // namespace reasonkern
