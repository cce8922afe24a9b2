// The operators of the table over tensors: checks, params structs, outputs. A backend supplies
//   static void draft(const DraftParams&, int32_t device);
// and its update from `describe_update`: CUDA has operators of its own.
#pragma once

#include <tuple>
#include <vector>

#include "../common/checks.h"
#include "table.h"

namespace reasonkern {

inline void check_context(const Tensor& context, int64_t window) {
  check_dtype(context, "context", ScalarType::Long);
  STD_TORCH_CHECK(context.dim() == 2 && context.size(1) == window,
                  "context: expected shape (rows, ", window, "), got ",
                  shape_text(context.sizes()));
  check_last_contiguous(context, "context");
}

inline void set_orders(Table& table, const std::vector<int64_t>& orders) {
  STD_TORCH_CHECK(!orders.empty() && orders.size() <= kMaxOrders, "orders: expected 1 to ",
                  int(kMaxOrders), " of them, got ", orders.size());
  for (size_t k = 0; k < orders.size(); ++k) {
    const int64_t above = k == 0 ? kMaxWindow + 1 : orders[k - 1];
    STD_TORCH_CHECK(orders[k] >= 1 && orders[k] < above,
                    "orders: expected descending numbers in [1, ", int(kMaxWindow), "]");
    table.orders[k] = int32_t(orders[k]);
  }
  table.num_orders = int32_t(orders.size());
  table.window = int32_t(orders[0]);
}

inline void set_storage(Table& table, const Tensor& slots, const Tensor& extra) {
  if (extra.scalar_type() == ScalarType::Long) {
    check_tensor(extra, "extra", ScalarType::Long, slots.sizes(), slots);
    table.sums = data<int64_t>(extra);
  } else if (extra.numel() != 0) {
    check_tensor(extra, "extra", ScalarType::Byte, slots.sizes(), slots);
    table.high = data<uint8_t>(extra);
  }
}

inline Table describe_table(const Tensor& context, const Tensor& keys, const Tensor& slots,
                            const Tensor& extra, const Tensor& counts, const Tensor& epochs,
                            const Tensor& counters, const std::vector<int64_t>& orders) {
  STD_TORCH_CHECK(keys.dim() == 2 && slots.dim() == 2 && keys.size(0) > 0, "keys: expected sets");
  const int64_t sets = keys.size(0), entries = sets * kWays, topk = slots.size(1);
  STD_TORCH_CHECK(topk >= 1 && topk <= kMaxTopk && sets < (int64_t(1) << 31),
                  "slots: expected 1 to ", int(kMaxTopk), " columns, got ", topk);
  check_tensor(keys, "keys", ScalarType::Long, {sets, kWays}, context);
  check_tensor(slots, "slots", ScalarType::Int, {entries, topk}, context);
  check_tensor(counts, "counts", ScalarType::Short, {entries}, context);
  check_tensor(epochs, "epochs", ScalarType::Int, {epochs.numel()}, context);
  check_tensor(counters, "counters", ScalarType::Long, {kCounters}, context);
  Table table{};
  set_orders(table, orders);
  check_context(context, table.window);
  set_storage(table, slots, extra);
  table.keys = data<uint64_t>(keys);
  table.slots = data<int32_t>(slots);
  table.counts = data<int16_t>(counts);
  table.epochs = data<int32_t>(epochs);
  table.counters = data<int64_t>(counters);
  table.sets = sets;
  table.topk = int32_t(topk);
  table.scopes = int32_t(epochs.numel());
  return table;
}

inline const int64_t* scope_data(const MaybeTensor& scope, int64_t rows, const Tensor& context) {
  return maybe_data<int64_t>(scope, "scope", ScalarType::Long, {rows}, context);
}

inline const int32_t* tree_data(const Tensor& t, const char* name, int64_t size,
                                const Tensor& context) {
  check_tensor(t, name, ScalarType::Int, {size}, context);
  return data<int32_t>(t);
}

template <class Backend>
struct TableOperators {
  using Drafted = std::tuple<Tensor, Tensor, Tensor, Tensor>;

  static Drafted table_draft(Tensor context, Tensor keys, Tensor slots, Tensor extra, Tensor counts,
                             Tensor epochs, Tensor counters, std::vector<int64_t> orders,
                             Tensor parents, Tensor ranks, Tensor depths, Tensor child_ptr,
                             Tensor child_index, Tensor level_ptr, Tensor level_nodes,
                             MaybeTensor scope, Tensor temperature, Tensor seed, Tensor position,
                             int64_t kind, int64_t vocab_size, bool strict) {
    DraftParams p{};
    p.table = describe_table(context, keys, slots, extra, counts, epochs, counters, orders);
    const int64_t batch = context.size(0), nodes = parents.numel();
    STD_TORCH_CHECK(nodes >= 1 && level_ptr.numel() >= 1, "parents: expected at least a root");
    STD_TORCH_CHECK(level_nodes.numel() <= nodes, "level_nodes: expected at most ", nodes,
                    " nodes, got ", level_nodes.numel());
    p.parents = tree_data(parents, "parents", nodes, context);
    p.depths = tree_data(depths, "depths", nodes, context);
    tree_data(ranks, "ranks", nodes, context);
    p.child_ptr = tree_data(child_ptr, "child_ptr", nodes + 1, context);
    p.child_index = tree_data(child_index, "child_index", nodes - 1, context);
    p.level_ptr = tree_data(level_ptr, "level_ptr", level_ptr.numel(), context);
    p.level_nodes = tree_data(level_nodes, "level_nodes", level_nodes.numel(), context);
    check_tensor(temperature, "temperature", ScalarType::Float, {batch}, context);
    check_tensor(seed, "seed", ScalarType::Long, {batch}, context);
    check_tensor(position, "position", ScalarType::Long, {batch}, context);
    p.scope = scope_data(scope, batch, context);
    p.context = data<int64_t>(context);
    p.context_stride = context.stride(0);
    p.temperature = data<float>(temperature);
    p.seed = data<int64_t>(seed);
    p.position = data<int64_t>(position);
    p.batch = int32_t(batch);
    p.nodes = int32_t(nodes);
    p.inner_nodes = int32_t(level_nodes.numel());
    p.levels = int32_t(level_ptr.numel() - 1);
    p.kind = int32_t(kind);
    p.vocab = vocab_size;
    p.strict = strict;
    const Drafted out = outputs(context, {batch, nodes}, p.table.topk, kind);
    p.tokens = data<int64_t>(std::get<0>(out));
    p.valid = data<bool>(std::get<1>(out));
    p.q_ids = data<int64_t>(std::get<2>(out));
    p.q_logprob = data<float>(std::get<3>(out));
    if (batch > 0) Backend::draft(p, context.get_device_index());
    return out;
  }

  static Drafted outputs(const Tensor& like, std::vector<int64_t> shape, int64_t topk,
                         int64_t kind) {
    const Tensor tokens = torch::stable::new_empty(like, shape, ScalarType::Long);
    const Tensor valid = torch::stable::new_empty(like, shape, ScalarType::Bool);
    if (kind == kRejection) {
      shape.push_back(topk);
    } else {
      shape = {0};
    }
    return {tokens, valid, torch::stable::new_empty(like, shape, ScalarType::Long),
            torch::stable::new_empty(like, shape, ScalarType::Float)};
  }
};

inline UpdateParams describe_update(const Table& table, const Tensor& context, const Tensor& ages,
                                    const Tensor& clock, int64_t max_count, int64_t vocab,
                                    const Tensor& ids, const Tensor& logits, const MaybeTensor& lse,
                                    const MaybeTensor& scope, bool strict) {
  UpdateParams p{};
  p.table = table;
  const int64_t rows = context.size(0);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.size(1) >= 1 && ids.size(1) <= table.topk,
                  "ids: expected 1 to ", table.topk, " columns, got ", shape_text(ids.sizes()));
  check_tensor(ages, "ages", ScalarType::Int, {table.sets * kWays}, context);
  check_tensor(clock, "clock", ScalarType::Long, {}, context);
  check_tensor(ids, "ids", ScalarType::Long, {rows, ids.size(1)}, context);
  check_tensor(logits, "logits", ScalarType::Float, {rows, ids.size(1)}, context);
  if (lse.has_value()) check_tensor(*lse, "lse", ScalarType::Float, {rows}, context);
  STD_TORCH_CHECK(max_count >= 1 && max_count <= INT16_MAX, "max_count: got ", max_count);
  p.table.ages = data<int32_t>(ages);
  p.table.clock = data<int64_t>(clock);
  p.context = data<int64_t>(context);
  p.context_stride = context.stride(0);
  p.ids = data<int64_t>(ids);
  p.logits = data<float>(logits);
  p.lse = lse.has_value() ? data<float>(*lse) : nullptr;
  p.scope = scope_data(scope, rows, context);
  p.rows = rows;
  p.vocab = vocab;
  p.width = int32_t(ids.size(1));
  p.max_count = int32_t(max_count);
  p.strict = strict;
  return p;
}

}  // namespace reasonkern
