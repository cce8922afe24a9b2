// The operators over tensors: checks, plain params structs. A backend supplies the launches; its
// file registers `Operators<Backend>`:
//
//   static void modulate(ScalarType, const RowsParams&, int32_t device);
//   static void commit(const CommitParams&, int32_t device);
#pragma once

#include "../common/checks.h"
#include "modulation.h"

namespace reasonkern {
namespace modulation {

inline State describe_state(const Tensor& reference, const Tensor& records, const Tensor& sets) {
  STD_TORCH_CHECK(records.dim() == 2 && records.size(0) > 0, "records: expected slots");
  STD_TORCH_CHECK(sets.dim() == 1 && sets.size(0) >= Sets::kEntries, "sets: expected bounds");
  const int64_t slots = records.size(0), places = sets.size(0);
  check_tensor(records, "records", ScalarType::Long, {slots, kRecordWidth}, reference);
  check_tensor(sets, "sets", ScalarType::Long, {places}, reference);
  const int64_t* bounds = data<int64_t>(sets);
  return {
      data<int64_t>(records), {bounds, bounds + Sets::kEntries}, slots, places - Sets::kEntries};
}

inline void describe_logits(RowsParams& p, const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits: expected shape (R, V), got ",
                  shape_text(logits.sizes()));
  check_last_contiguous(logits, "logits");
  check_rows_apart(logits, "logits");
  p.logits = logits.data_ptr();
  p.rows = logits.size(0);
  p.vocab = logits.size(1);
  p.stride = logits.stride(0);
}

inline void describe_rows(RowsParams& p, const Tensor& logits, const Tensor& slot,
                          const MaybeTensor& local_pos, const MaybeTensor& draft_tokens,
                          const MaybeTensor& parents) {
  p.nodes = 1;
  if (parents.has_value()) {
    p.nodes = parents->numel();
    STD_TORCH_CHECK(p.nodes > 0 && p.nodes <= kMaxNodes && p.rows % p.nodes == 0,
                    "parents: expected 1 to ", kMaxNodes, " nodes that divide the ", p.rows,
                    " rows, got ", p.nodes);
    STD_TORCH_CHECK(!local_pos.has_value() && draft_tokens.has_value(),
                    "parents: expected draft_tokens and no local_pos beside it");
    p.parents = maybe_data<int32_t>(parents, "parents", ScalarType::Int, {p.nodes}, logits);
  }
  const int64_t batch = p.rows / p.nodes, grid[] = {batch, p.nodes};
  STD_TORCH_CHECK(!local_pos.has_value() || draft_tokens.has_value(),
                  "local_pos: expected draft_tokens beside it");
  check_tensor(slot, "slot", ScalarType::Long, {batch}, logits);
  p.slot = data<int64_t>(slot);
  p.local_pos = maybe_data<int64_t>(local_pos, "local_pos", ScalarType::Long, {p.rows}, logits);
  p.draft_tokens = maybe_data<int64_t>(draft_tokens, "draft_tokens", ScalarType::Long,
                                       {grid, parents.has_value() ? 2u : 1u}, logits);
}

template <class Backend>
struct Operators {
  static void modulate_logits_(const Tensor& logits, const Tensor& slot,
                               const MaybeTensor& local_pos, const MaybeTensor& draft_tokens,
                               const MaybeTensor& parents, const MaybeTensor& temperature,
                               const Tensor& records, const Tensor& sets, bool dense) {
    RowsParams p{};
    p.state = describe_state(logits, records, sets);
    describe_logits(p, logits);
    describe_rows(p, logits, slot, local_pos, draft_tokens, parents);
    p.temperature =
        maybe_data<float>(temperature, "temperature", ScalarType::Float, {p.rows}, logits);
    p.dense = dense;
    if (p.rows > 0) Backend::modulate(logits.scalar_type(), p, logits.get_device_index());
  }

  static void commit_(const Tensor& slot, const Tensor& tokens, const Tensor& length,
                      const MaybeTensor& entropy, const MaybeTensor& confidence,
                      const Tensor& records, const Tensor& sets) {
    CommitParams p{};
    p.state = describe_state(slot, records, sets);
    STD_TORCH_CHECK(tokens.dim() == 2, "tokens: expected shape (B, D + 1), got ",
                    shape_text(tokens.sizes()));
    p.batch = tokens.size(0);
    p.steps = tokens.size(1);
    const int64_t shape[] = {p.batch, p.steps};
    check_tensor(slot, "slot", ScalarType::Long, {p.batch}, slot);
    check_tensor(tokens, "tokens", ScalarType::Long, {shape, 2}, slot);
    check_tensor(length, "length", ScalarType::Long, {p.batch}, slot);
    p.records = data<int64_t>(records);
    p.slot = data<int64_t>(slot);
    p.tokens = data<int64_t>(tokens);
    p.length = data<int64_t>(length);
    p.entropy = maybe_data<float>(entropy, "entropy", ScalarType::Float, {shape, 2}, slot);
    p.confidence = maybe_data<float>(confidence, "confidence", ScalarType::Float, {shape, 2}, slot);
    if (p.batch > 0) Backend::commit(p, slot.get_device_index());
  }
};

}  // namespace modulation
}  // namespace reasonkern
