// CPU operators of the table: requests and runs of sets to threads, registration.
#include "cpu_table_draft.h"
#include "cpu_table_update.h"
#include "cpu_tree.h"
#include "table_operators.h"

namespace reasonkern {
namespace cpu {
namespace {

struct CpuTable {
  static void draft(const DraftParams& p, int32_t) {
    check_tree(p);
    for (int32_t r = 0; r < p.batch && p.strict; ++r) {
      STD_TORCH_CHECK(is_known(p, r), "table_draft: context or scope of row ", r);
    }
    const int64_t groups = (p.batch + kTogether - 1) / kTogether;
    torch::stable::parallel_for(0, groups, 1, [&p](int64_t begin, int64_t end) {
      int64_t seen[kCounters] = {};
      for (int64_t g = begin; g < end; ++g) {
        const int32_t first = int32_t(g) * kTogether;
        draft_requests(p, first, std::min(first + kTogether, p.batch), seen);
      }
      for (int k = 0; k < kCounters; ++k) {
        if (seen[k] != 0) __atomic_fetch_add(p.table.counters + k, seen[k], __ATOMIC_RELAXED);
      }
    });
  }

  static void update(const UpdateParams& p) {
    const Table& t = p.table;
    const Rows rows = read_rows(p);
    ++*t.clock;
    const std::vector<Item>& items = rows.items;
    t.counters[kRows] += rows.merged;
    t.counters[kRejected] += rows.rejected;
    // A thread's share begins where a set does.
    const auto share = [&](int64_t i) {
      while (i > 0 && i < int64_t(items.size()) &&
             set_of(items[i].key, t.sets) == set_of(items[i - 1].key, t.sets)) {
        ++i;
      }
      return items.data() + i;
    };
    torch::stable::parallel_for(0, int64_t(items.size()), 64, [&](int64_t begin, int64_t end) {
      const int64_t evictions = merge_items(p, rows, share(begin), share(end));
      __atomic_fetch_add(t.counters + kEvictions, evictions, __ATOMIC_RELAXED);
    });
  }

 private:
  static void check_tree(const DraftParams& p) {
    const int32_t last = p.nodes - 1;
    STD_TORCH_CHECK(are_children(p.child_ptr, p.child_index, p.nodes) &&
                        are_within(p.parents + 1, last, 0, last) &&
                        are_bounds(p.level_ptr, p.levels, p.inner_nodes) &&
                        are_within(p.level_nodes, p.inner_nodes, 0, last),
                    "parents to level_nodes: expected those of a tree of ", p.nodes, " nodes");
  }
};

void table_update_(Tensor context, Tensor keys, Tensor slots, Tensor extra, Tensor counts,
                   Tensor ages, Tensor clock, Tensor epochs, Tensor counters,
                   std::vector<int64_t> orders, int64_t max_count, int64_t vocab_size, Tensor ids,
                   Tensor logits, MaybeTensor lse, MaybeTensor scope, bool strict) {
  const Table table = describe_table(context, keys, slots, extra, counts, epochs, counters, orders);
  CpuTable::update(describe_update(table, context, ages, clock, max_count, vocab_size, ids, logits,
                                   lse, scope, strict));
}

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  using reasonkern::cpu::CpuTable;
  m.impl("table_draft", TORCH_BOX(&reasonkern::TableOperators<CpuTable>::table_draft));
  m.impl("table_update_", TORCH_BOX(&reasonkern::cpu::table_update_));
}
