// Merging rows into the table on the CPU: rows to keys, keys sorted, one thread per run of sets.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "table_operators.h"

namespace reasonkern {
namespace cpu {

struct Item {  // one order of one row
  uint64_t key;
  int64_t row;
  bool operator<(const Item& other) const { return key < other.key; }
};

struct Sum {
  int32_t id;
  int64_t total;
};

// The rows' probabilities in units of 2^-30, and their keys in order; counts what it leaves out.
struct Rows {
  std::vector<int32_t> values;  // rows x width
  std::vector<Item> items;
  int64_t merged = 0, rejected = 0;
};

// False: not a distribution over the vocabulary.
inline bool read_row(const UpdateParams& p, int64_t row, int32_t* values) {
  const int64_t* context = p.context + row * p.context_stride;
  for (int i = 0; i < p.table.window; ++i) {
    if (context[i] < -1 || context[i] >= p.vocab) return false;
  }
  int64_t total = 0;
  bool fine = true;
  for (int k = 0; k < p.width; ++k) {
    const int64_t id = p.ids[row * p.width + k];
    float x = p.logits[row * p.width + k];
    if (p.lse != nullptr) x -= p.lse[row];
    fine &= id >= -1 && id < p.vocab && (id < 0 || x <= 1.0f);
    const int64_t value = id >= 0 && fine ? fixed_of(exp_fixed(x)) : 0;
    values[k] = int32_t(value);  // one that does not fit is more than a distribution may hold
    total += value;
  }
  return fine && total <= kTotalLimit;
}

inline bool has_ids(const UpdateParams& p, int64_t row) {
  const int64_t* ids = p.ids + row * p.width;
  return std::any_of(ids, ids + p.width, [](int64_t id) { return id != -1; });
}

inline Rows read_rows(const UpdateParams& p) {
  const Table& t = p.table;
  Rows rows;
  rows.values.resize(p.rows * p.width);
  rows.items.reserve(p.rows * t.num_orders);
  for (int64_t row = 0; row < p.rows; ++row) {
    const int64_t* context = p.context + row * p.context_stride;
    if (context[t.window - 1] == -1 || !has_ids(p, row)) continue;
    const int64_t scope = p.scope == nullptr ? 0 : p.scope[row];
    if (scope < 0 || scope >= t.scopes || !read_row(p, row, &rows.values[row * p.width])) {
      STD_TORCH_CHECK(!p.strict, "table_update_: row ", row, " is not a distribution of a scope");
      ++rows.rejected;
      continue;
    }
    ++rows.merged;
    const auto token = [&](int i) { return context[t.window - 1 - i]; };
    visit_keys(t, hash_start(scope, t.epochs[scope]), token,
               [&](int, uint64_t key) { rows.items.push_back({key, row}); });
  }
  std::sort(rows.items.begin(), rows.items.end());
  return rows;
}

// The way of a key, or the one it takes: empty, else smallest (last update, count, way).
inline int64_t claim_entry(const Table& t, uint64_t key, bool& found, int64_t& evictions) {
  const int64_t first = set_of(key, t.sets) * kWays;
  int64_t victim = first;
  uint64_t smallest = ~uint64_t(0);
  for (int64_t e = first; e < first + kWays; ++e) {
    if (t.keys[e] == key) return found = true, e;
    const uint64_t order = eviction_order(t.keys[e], t.ages[e], *t.clock, t.counts[e]);
    if (order < smallest) smallest = order, victim = e;
  }
  found = false;
  evictions += t.keys[victim] != 0;
  t.keys[victim] = key;
  return victim;
}

// Adds equal ids up; the order of `sums` becomes that of the ids.
inline void reduce_by_id(std::vector<Sum>& sums) {
  std::sort(sums.begin(), sums.end(), [](const Sum& a, const Sum& b) { return a.id < b.id; });
  size_t last = 0;
  for (size_t i = 1; i < sums.size(); ++i) {
    if (sums[i].id == sums[last].id) {
      sums[last].total += sums[i].total;
    } else {
      sums[++last] = sums[i];
    }
  }
  if (!sums.empty()) sums.resize(last + 1);
}

// The candidates of one row into those of the entry: few enough for a search.
inline void add_row(const UpdateParams& p, const Rows& rows, int64_t row, std::vector<Sum>& sums) {
  for (int k = 0; k < p.width; ++k) {
    const int64_t at = row * p.width + k;
    const int32_t id = int32_t(p.ids[at]);
    if (id < 0 || rows.values[at] == 0) continue;
    size_t place = 0;
    while (place < sums.size() && sums[place].id != id) ++place;
    if (place == sums.size()) sums.push_back({id, 0});
    sums[place].total += rows.values[at];
  }
}

// The candidates of many rows: sorted by id and added up.
inline void add_rows(const UpdateParams& p, const Rows& rows, const Item* begin, const Item* end,
                     std::vector<Sum>& sums) {
  for (const Item* item = begin; item < end; ++item) {
    for (int k = 0; k < p.width; ++k) {
      const int64_t at = item->row * p.width + k;
      if (p.ids[at] >= 0 && rows.values[at] > 0) {
        sums.push_back({int32_t(p.ids[at]), rows.values[at]});
      }
    }
  }
  reduce_by_id(sums);
}

// Sorts the largest sums to the front; returns how many there are, at most topk. The entry's own
// candidates come sorted, so insertion beats a heap while there are few others.
inline int64_t keep_largest(std::vector<Sum>& sums, int topk) {
  const auto before = [](const Sum& a, const Sum& b) {
    return a.total > b.total || (a.total == b.total && a.id < b.id);
  };
  const int64_t kept = std::min<int64_t>(topk, int64_t(sums.size()));
  if (sums.size() > 2 * kMaxTopk) {
    std::partial_sort(sums.begin(), sums.begin() + kept, sums.end(), before);
    return kept;
  }
  for (size_t i = 1; i < sums.size(); ++i) {
    const Sum moving = sums[i];
    size_t place = i;
    for (; place > 0 && before(moving, sums[place - 1]); --place) sums[place] = sums[place - 1];
    sums[place] = moving;
  }
  return kept;
}

// Items [begin, end) have one key.
inline void merge_key(const UpdateParams& p, const Rows& rows, const Item* begin, const Item* end,
                      std::vector<Sum>& sums, int64_t& evictions) {
  const Table& t = p.table;
  bool found;
  const int64_t entry = claim_entry(t, begin->key, found, evictions);
  const int64_t n = found ? t.counts[entry] : 0, total = n + (end - begin);
  sums.clear();
  for (int k = 0; k < t.topk && found; ++k) {
    const Slot s = load_slot(t, entry * t.topk + k, n);
    if (s.id >= 0) sums.push_back({s.id, s.sum});
  }
  if (end - begin == 1) {
    add_row(p, rows, begin->row, sums);
  } else {
    add_rows(p, rows, begin, end, sums);
  }
  const int64_t kept = keep_largest(sums, t.topk);
  for (int k = 0; k < t.topk; ++k) {
    const Sum s = k < kept ? sums[k] : Sum{0, 0};
    store_slot(t, entry * t.topk + k, s.id, s.total, total, p.max_count);
  }
  t.counts[entry] = int16_t(std::min<int64_t>(total, p.max_count));
  t.ages[entry] = int32_t(uint32_t(*t.clock));
}

// Merges the keys of items [begin, end), whose sets no other thread touches.
inline int64_t merge_items(const UpdateParams& p, const Rows& rows, const Item* begin,
                           const Item* end) {
  int64_t evictions = 0;
  std::vector<Sum> sums;
  for (const Item* item = begin; item < end;) {
    const Item* next = item;
    while (next < end && next->key == item->key) ++next;
    merge_key(p, rows, item, next, sums, evictions);
    item = next;
  }
  return evictions;
}

}  // namespace cpu
}  // namespace reasonkern
