// CPU operators of the family: values checked, rows to threads, registration.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "apply.h"
#include "commit.h"
#include "operators.h"

namespace reasonkern {
namespace modulation {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;

// A row modulated in place.
template <class E>
struct InPlace {
  typedef std::conditional_t<std::is_same_v<E, double>, double, float> Value;
  E* logits;
  int64_t vocab;

  Value get(int64_t id) const { return Value(logits[id]); }
  void set(int64_t id, Value z) { logits[id] = E(z); }
  Value largest() const {
    Value best = -Value(kInfinity);
    for (int64_t id = 0; id < vocab; ++id) {
      const Value z = get(id);
      best = z > best && z < Value(kInfinity) ? z : best;
    }
    return best;
  }
};

// After a pass through a model nothing of a call is in cache, and rows would wait for one line of
// memory after the other. So what rows will touch is asked for beforehand. (Inlined: GCC takes a
// function that only prefetches for one without effect and deletes the call.)
#define RK_FETCHES __attribute__((always_inline)) inline

// The lines of a record that a row with every part reads.
RK_FETCHES void fetch_record(const int64_t* record) {
  for (const int column : {0, 8, 16, 24, int(kWindow), int(kPoint)}) {
    __builtin_prefetch(record + column);
  }
}

template <class E>
RK_FETCHES void fetch_id(const InPlace<E>& row, int64_t id) {
  if (id >= 0 && id < row.vocab) __builtin_prefetch(row.logits + id, 1);
}

template <class E>
RK_FETCHES void fetch_set(const InPlace<E>& row, const Sets& sets, int64_t set) {
  if (set < 0) return;
  for (int64_t k = sets.bounds[set]; k < sets.bounds[set + 1]; ++k) fetch_id(row, sets.id(k));
}

template <class E>
RK_FETCHES void fetch_logits(const InPlace<E>& row, const RowControl& c, const Sets& sets) {
  for (const int64_t id : {c.force, c.end, c.wait, c.soft}) fetch_id(row, id);
  fetch_set(row, sets, c.ban);
  for (int part = 0; part < kAdders; ++part) {
    if (part == 0 || c.sets[part] != c.sets[part - 1]) fetch_set(row, sets, c.sets[part]);
  }
}

template <class E>
InPlace<E> row_of(const RowsParams& p, int64_t row) {
  return {static_cast<E*>(p.logits) + row * p.stride, p.vocab};
}

float temperature_of(const RowsParams& p, int64_t row) {
  return p.temperature == nullptr ? 1.0f : p.temperature[row];
}

template <class E>
void modulate_tree(const RowsParams& p, int64_t b) {
  const State& s = p.state;
  if (!s.controls(p.slot[b])) return;
  const int64_t* record = s.record_of(p.slot[b]);
  // Parents come before children. A -1 ends the fold for the nodes below, too.
  thread_local std::vector<Progress> folded;
  thread_local std::vector<char> ended;
  folded.assign(size_t(p.nodes), load_progress(record));
  ended.assign(size_t(p.nodes), 0);
  for (int64_t i = 0; i < p.nodes; ++i) {
    if (i > 0) {
      const int64_t token = p.draft_tokens[b * p.nodes + i];
      folded[i] = folded[p.parents[i]];
      ended[i] = ended[p.parents[i]] || token < 0;
      if (!ended[i]) fold(s.sets, record, folded[i], token);
    }
    const int64_t row = b * p.nodes + i;
    InPlace<E> logits = row_of<E>(p, row);
    apply_control(logits, control_of(record, folded[i]), s.sets, p.vocab, temperature_of(p, row),
                  p.dense);
  }
}

// Committed progress advanced by the drafts before row r's logits, up to the first -1.
Progress fold_chain(const RowsParams& r, int64_t slot, int64_t row) {
  const int64_t* record = r.state.record_of(slot);
  Progress p = load_progress(record);
  const int64_t drafts = r.local_pos == nullptr ? 0 : r.local_pos[row];
  for (int64_t j = row - drafts + 1; j <= row; ++j) {
    const int64_t token = r.draft_tokens[j];
    if (token < 0) break;
    fold(r.state.sets, record, p, token);
  }
  return p;
}

constexpr int64_t kTogether = 16;  // rows: what one of them waits for does not hold up the others

template <class E>
void modulate_chains(const RowsParams& p, int64_t begin, int64_t end) {
  const State& s = p.state;
  RowControl decided[kTogether];
  int64_t rows[kTogether];
  for (int64_t first = begin; first < end; first += kTogether) {
    int count = 0;
    for (int64_t row = first; row < std::min(first + kTogether, end); ++row) {
      const int64_t slot = p.slot[row];
      if (!s.controls(slot)) continue;
      decided[count] = control_of(s.record_of(slot), fold_chain(p, slot, row));
      fetch_logits(row_of<E>(p, row), decided[count], s.sets);
      rows[count++] = row;
    }
    for (int i = 0; i < count; ++i) {
      InPlace<E> logits = row_of<E>(p, rows[i]);
      if (apply_ids(logits, decided[i], s.sets, p.vocab) >= 0) rows[i] = -1;
    }
    for (int i = 0; i < count; ++i) {
      if (rows[i] < 0) continue;
      InPlace<E> logits = row_of<E>(p, rows[i]);
      apply_rest(logits, decided[i], p.vocab, temperature_of(p, rows[i]), p.dense);
    }
  }
}

template <class E>
void modulate_all(const RowsParams& p) {
  if (p.parents != nullptr) {
    const auto trees = [&p](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) modulate_tree<E>(p, b);
    };
    return torch::stable::parallel_for(0, p.rows / p.nodes, p.dense ? 1 : 16, trees);
  }
  const int64_t grain = p.dense ? 1 : 256;
  if (p.rows <= grain) return modulate_chains<E>(p, 0, p.rows);
  torch::stable::parallel_for(
      0, p.rows, grain, [&p](int64_t begin, int64_t end) { modulate_chains<E>(p, begin, end); });
}

// Records are asked for, not read: none is waited for before all of them are on their way.
void check_slots(const RowsParams& p) {
  const State& s = p.state;
  for (int64_t b = 0; b < p.rows / p.nodes; ++b) {
    const int64_t slot = p.slot[b];
    STD_TORCH_CHECK(slot >= -1 && slot < s.slots, "slot: got ", slot, " at ", b);
    if (slot >= 0) fetch_record(s.record_of(slot));
  }
  const int64_t largest = s.sets.bounds[Sets::kLargestId];
  STD_TORCH_CHECK(largest < p.vocab, "logits: expected a vocabulary above ", largest, ", got ",
                  p.vocab);
}

void check_rows(const RowsParams& p) {
  for (int64_t r = 0; p.temperature != nullptr && r < p.rows; ++r) {
    const float t = p.temperature[r];
    STD_TORCH_CHECK(t >= 0 && is_finite(t), "temperature: got ", t, " at ", r);
  }
  for (int64_t r = 0; p.local_pos != nullptr && r < p.rows; ++r) {
    const int64_t drafts = p.local_pos[r];
    if (p.slot[r] < 0 || drafts == 0) continue;
    const bool follows = r > 0 && p.slot[r - 1] == p.slot[r];
    STD_TORCH_CHECK(drafts == (follows ? p.local_pos[r - 1] : 0) + 1, "local_pos: got ", drafts,
                    " at ", r);
  }
  for (int64_t i = 0; p.parents != nullptr && i < p.nodes; ++i) {
    const bool sound = i == 0 ? p.parents[i] == -1 : p.parents[i] >= 0 && p.parents[i] < i;
    STD_TORCH_CHECK(sound, "parents: got ", p.parents[i], " at ", i);
  }
}

void check_commit(const CommitParams& p) {
  thread_local std::vector<int64_t> used;
  used.clear();
  for (int64_t b = 0; b < p.batch; ++b) {
    STD_TORCH_CHECK(p.slot[b] >= -1 && p.slot[b] < p.state.slots, "slot: got ", p.slot[b], " at ",
                    b);
    STD_TORCH_CHECK(p.length[b] >= 0 && p.length[b] <= p.steps, "length: got ", p.length[b], " at ",
                    b);
    if (p.slot[b] >= 0) used.push_back(p.slot[b]);
  }
  std::sort(used.begin(), used.end());
  STD_TORCH_CHECK(std::adjacent_find(used.begin(), used.end()) == used.end(),
                  "slot: a slot is given twice");
}

struct CpuBackend {
  static void modulate(ScalarType dtype, const RowsParams& p, int32_t) {
    check_slots(p);
    check_rows(p);
    switch (dtype) {
      case ScalarType::Float:
        return modulate_all<float>(p);
      case ScalarType::BFloat16:
        return modulate_all<BFloat16>(p);
      case ScalarType::Half:
        return modulate_all<Half>(p);
      case ScalarType::Double:
        return modulate_all<double>(p);
      default:
        STD_TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64, got ",
                        dtype);
    }
  }

  static void commit(const CommitParams& p, int32_t) {
    check_commit(p);
    torch::stable::parallel_for(0, p.batch, 256, [&p](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        if (!p.state.controls(p.slot[b])) continue;
        int64_t* record = p.records + p.slot[b] * kRecordWidth;
        commit_row(p, b, record, written_of(record));
      }
    });
  }
};

}  // namespace
}  // namespace modulation
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  using Ops = reasonkern::modulation::Operators<reasonkern::modulation::CpuBackend>;
  m.impl("modulate_logits_", TORCH_BOX(&Ops::modulate_logits_));
  m.impl("commit_", TORCH_BOX(&Ops::commit_));
}
