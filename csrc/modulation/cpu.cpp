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

template <class E>
void apply_row(const RowsParams& p, int64_t row, const RowControl& c) {
  InPlace<E> logits{static_cast<E*>(p.logits) + row * p.stride, p.vocab};
  const float temperature = p.temperature == nullptr ? 1.0f : p.temperature[row];
  apply_control(logits, c, p.state.sets, p.vocab, temperature, p.dense);
}

template <class E>
void modulate_tree(const RowsParams& p, int64_t b) {
  const int64_t slot = p.slot[b];
  const State& s = p.state;
  if (!s.controls(slot)) return;
  // Parents come before children. A -1 ends the fold for the nodes below, too.
  thread_local std::vector<Progress> folded;
  thread_local std::vector<char> ended;
  folded.assign(size_t(p.nodes), load_progress(s, slot));
  ended.assign(size_t(p.nodes), 0);
  for (int64_t i = 0; i < p.nodes; ++i) {
    if (i > 0) {
      const int64_t token = p.draft_tokens[b * p.nodes + i];
      folded[i] = folded[p.parents[i]];
      ended[i] = ended[p.parents[i]] || token < 0;
      if (!ended[i]) fold(s.sets, s.spec_of(slot), folded[i], token);
    }
    const RowControl c = control_of(s.spec_of(slot), s.numbers_of(slot), folded[i]);
    apply_row<E>(p, b * p.nodes + i, c);
  }
}

template <class E>
void modulate_chains(const RowsParams& p, int64_t begin, int64_t end) {
  const State& s = p.state;
  for (int64_t row = begin; row < end; ++row) {
    const int64_t slot = p.slot[row];
    if (!s.controls(slot)) continue;
    apply_row<E>(p, row, control_of(s.spec_of(slot), s.numbers_of(slot), fold_chain(p, slot, row)));
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
  torch::stable::parallel_for(0, p.rows, p.dense ? 1 : 256, [&p](int64_t begin, int64_t end) {
    modulate_chains<E>(p, begin, end);
  });
}

void check_slots(const RowsParams& p) {
  const State& s = p.state;
  const int64_t batch = p.rows / p.nodes;
  for (int64_t b = 0; b < batch; ++b) {
    STD_TORCH_CHECK(p.slot[b] >= -1 && p.slot[b] < s.slots, "slot: got ", p.slot[b], " at ", b);
  }
  for (int32_t set = 0; set < s.sets.count; ++set) {
    const int32_t last = s.sets.ids[s.sets.offsets[set + 1] - 1];
    STD_TORCH_CHECK(last < p.vocab, "logits: expected a vocabulary above ", last, ", got ",
                    p.vocab);
  }
  for (int64_t b = 0; b < batch; ++b) {
    if (!s.controls(p.slot[b])) continue;
    const int64_t largest = s.spec_of(p.slot[b])[kMaxId];
    STD_TORCH_CHECK(largest < p.vocab, "logits: expected a vocabulary above ", largest, ", got ",
                    p.vocab);
  }
}

void check_rows(const RowsParams& p) {
  for (int64_t r = 0; p.temperature != nullptr && r < p.rows; ++r) {
    const float t = p.temperature[r];
    STD_TORCH_CHECK(t >= 0 && is_finite(t), "temperature: got ", t, " at ", r);
  }
  for (int64_t r = 0; p.local_pos != nullptr && r < p.rows; ++r) {
    const int64_t drafts = p.local_pos[r];
    if (p.slot[r] < 0 || drafts == 0) continue;
    STD_TORCH_CHECK(drafts > 0 && drafts <= r + 1 && p.slot[r - drafts + 1] == p.slot[r],
                    "local_pos: got ", drafts, " at ", r);
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
        if (p.state.controls(p.slot[b])) commit_row(p, b, p.slot[b]);
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
