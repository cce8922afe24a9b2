// CUDA operators of the table. Merging is two launches; between them, where the items are many, is
// a sort, which reasonkern/speculation/table_sorted.py does.
#include "../common/stream.h"
#include "table_draft.cuh"
#include "table_few.cuh"
#include "table_operators.h"

namespace reasonkern {
namespace {

constexpr int kKeyThreads = 128, kMergeThreads = 128;

unsigned blocks(int64_t work, int64_t per_block) {
  const int64_t wanted = (work + per_block - 1) / per_block;
  return unsigned(wanted < 1 ? 1 : wanted > 65535 ? 65535 : wanted);
}

// Windows and tree of a request lie in shared memory. A block of sm_90 or sm_100 has room for the
// largest tree, of others not.
void check_room(const DraftParams& p, unsigned bytes, int32_t device) {
  constexpr unsigned kEverywhere = 48 * 1024;
  if (bytes <= kEverywhere) return;  // as most, without asking
  const int room = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  STD_TORCH_CHECK(bytes <= unsigned(room), "parents: expected a tree whose draft fits into ", room,
                  " bytes, the shared memory of a block on this GPU, got ", p.nodes,
                  " nodes, which take ", bytes);
}

struct CudaTable {
  static void draft(const DraftParams& p, int32_t device) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(p.table.slots) % SetReader::kVector == 0,
                    "slots: expected an address that is a multiple of 16");
    const LaunchScope scope(device);
    with_draft_kernel(p, [&](auto kernel, unsigned shared) {
      check_room(p, shared, device);
      launch(kernel, dim3(blocks(p.batch, 1)), dim3(kDraftThreads), 1, shared, scope.stream, p);
    });
  }
};

void launch_keys(const MergeParams& m, cudaStream_t stream) {
  const int64_t rows = kKeyThreads / kRowLanes;
  launch<true>(table_keys_kernel, dim3(blocks(m.update.rows, rows)), dim3(kKeyThreads), 1, 0,
               stream, m);
}

// In a round of a block each warp has an item, and the longest block decides: hence so many warps
// that one block in thousands has more items. Each block goes through all bins: hence few blocks.
void launch_few(const MergeParams& m, cudaStream_t stream) {
  constexpr int kBlocks = 128, kLeastWarps = 8, kMostWarps = 32;
  const int64_t share = 1 + (m.items - 1) / kBlocks;  // of no items, too
  const int64_t warps = share <= kLeastWarps / 4 ? kLeastWarps : share <= 6 ? 16 : kMostWarps;
  const unsigned threads = unsigned(32 * warps);
  launch<true>(table_few_kernel, dim3(blocks(m.items, share)), dim3(threads), 1,
               few_shared_bytes(m.items, threads), stream, m);
}

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
  launch_keys(m, launch_scope.stream);
  return {items, values};
}

void table_merge_few_(Tensor context, Tensor keys, Tensor slots, Tensor extra, Tensor counts,
                      Tensor ages, Tensor clock, Tensor epochs, Tensor counters,
                      std::vector<int64_t> orders, int64_t max_count, int64_t vocab_size,
                      Tensor ids, Tensor logits, MaybeTensor lse, MaybeTensor scope, bool strict) {
  const Table table = describe_table(context, keys, slots, extra, counts, epochs, counters, orders);
  MergeParams m{};
  m.update = describe_update(table, context, ages, clock, max_count, vocab_size, ids, logits, lse,
                             scope, strict);
  m.items = context.size(0) * table.num_orders;
  STD_TORCH_CHECK(m.items <= kFewItems, "context: expected few rows, got ", context.size(0));
  const auto room = [&](int64_t size, ScalarType dtype) {
    return torch::stable::new_empty(context, {size}, dtype);
  };
  const int64_t candidates = m.items * m.update.width;
  const Tensor items = room(m.items, ScalarType::Long);
  const Tensor values = room(ids.numel(), ScalarType::Int);
  const Tensor bins = room((m.items + kBinsAtOnce - 1) / kBinsAtOnce * kBinsAtOnce / 2,
                           ScalarType::Int);  // of half the width
  const Tensor sum_ids = room(2 * candidates, ScalarType::Int);
  const Tensor sums = room(2 * candidates, ScalarType::Long);
  m.keys = data<uint64_t>(items);
  m.values = data<int32_t>(values);
  m.bins = reinterpret_cast<uint16_t*>(data<int32_t>(bins));
  m.sum_ids = data<int32_t>(sum_ids);
  m.sums = data<int64_t>(sums);
  const LaunchScope launch_scope(context.get_device_index());
  launch_keys(m, launch_scope.stream);
  launch_few(m, launch_scope.stream);
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
  launch(table_merge_kernel, dim3(blocks(m.items, kMergeThreads / 32)), dim3(kMergeThreads), 1,
         merge_shared_bytes(kMergeThreads), launch_scope.stream, m);
}

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using reasonkern::CudaTable;
  m.impl("table_draft", TORCH_BOX(&reasonkern::TableOperators<CudaTable>::table_draft));
  m.impl("table_keys", TORCH_BOX(&reasonkern::table_keys));
  m.impl("table_merge_few_", TORCH_BOX(&reasonkern::table_merge_few_));
  m.impl("table_merge_", TORCH_BOX(&reasonkern::table_merge_));
}
