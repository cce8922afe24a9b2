// CUDA operators of the table. Merging is two launches with a sort between them, which
// reasonkern/speculation/table_sorted.py does.
#include "../common/stream.h"
#include "table.cuh"
#include "table_operators.h"

namespace reasonkern {
namespace {

constexpr int kDraftThreads = 256, kKeyThreads = 128, kMergeThreads = 128;

unsigned blocks(int64_t work, int64_t per_block) {
  const int64_t wanted = (work + per_block - 1) / per_block;
  return unsigned(wanted < 1 ? 1 : wanted > 65535 ? 65535 : wanted);
}

struct CudaTable {
  static void draft(const DraftParams& p, int32_t device) {
    const LaunchScope scope(device);
    launch(table_draft_kernel, dim3(blocks(p.batch, 1)), dim3(kDraftThreads), 1,
           draft_shared_bytes(p.nodes), scope.stream, p);
  }
};

std::tuple<Tensor, Tensor> table_keys(Tensor context, Tensor keys, Tensor slots, Tensor extra,
                                      Tensor counts, Tensor ages, Tensor clock, Tensor epochs,
                                      Tensor counters, std::vector<int64_t> orders,
                                      int64_t max_count, int64_t vocab_size, Tensor ids,
                                      Tensor logits, MaybeTensor lse, MaybeTensor scope,
                                      bool strict) {
  const Table table = describe_table(context, keys, slots, extra, counts, epochs, counters, orders);
  MergeParams m{};
  m.update = describe_update(table, context, ages, clock, max_count, vocab_size, ids, logits, lse,
                             scope, strict);
  const Tensor items =
      torch::stable::new_empty(context, {context.size(0) * table.num_orders}, ScalarType::Long);
  const Tensor values = torch::stable::new_empty(context, ids.sizes(), ScalarType::Int);
  m.keys = data<uint64_t>(items);
  m.values = data<int32_t>(values);
  const LaunchScope launch_scope(context.get_device_index());
  launch(table_keys_kernel, dim3(blocks(m.update.rows, kKeyThreads)), dim3(kKeyThreads), 1, 0,
         launch_scope.stream, m);
  return {items, values};
}

void table_merge_(Tensor context, Tensor keys, Tensor slots, Tensor extra, Tensor counts,
                  Tensor ages, Tensor clock, Tensor epochs, Tensor counters,
                  std::vector<int64_t> orders, int64_t max_count, int64_t vocab_size, Tensor ids,
                  Tensor logits, MaybeTensor lse, MaybeTensor scope, bool strict, Tensor items,
                  Tensor pairs, Tensor totals) {
  const Table table = describe_table(context, keys, slots, extra, counts, epochs, counters, orders);
  MergeParams m{};
  m.update = describe_update(table, context, ages, clock, max_count, vocab_size, ids, logits, lse,
                             scope, strict);
  m.items = context.size(0) * table.num_orders;
  const int64_t candidates = m.items * m.update.width;
  check_tensor(items, "items", ScalarType::Long, {m.items}, context);
  check_tensor(pairs, "pairs", ScalarType::Long, {candidates}, context);
  check_tensor(totals, "totals", ScalarType::Long, {candidates}, context);
  m.keys = data<uint64_t>(items);
  m.pairs = data<int64_t>(pairs);
  m.totals = data<int64_t>(totals);
  if (m.items == 0) return;
  const LaunchScope launch_scope(context.get_device_index());
  launch(table_merge_kernel, dim3(blocks(m.items, kMergeThreads / 32)), dim3(kMergeThreads), 1, 0,
         launch_scope.stream, m);
}

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using reasonkern::CudaTable;
  m.impl("table_draft", TORCH_BOX(&reasonkern::TableOperators<CudaTable>::table_draft));
  m.impl("table_keys", TORCH_BOX(&reasonkern::table_keys));
  m.impl("table_merge_", TORCH_BOX(&reasonkern::table_merge_));
}
