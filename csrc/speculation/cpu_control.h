// Control of the rows of one request on the CPU (csrc/modulation): what it does to a row, and what
// the tokens of a walk do to it.
#pragma once

#include <vector>

#include "../modulation/apply.h"
#include "../modulation/commit.h"
#include "cpu_row.h"

namespace reasonkern {
namespace cpu {

// A row as modulation::apply_control writes it.
struct ControlledRow {
  typedef float Value;
  Row& row;

  float get(int64_t id) const { return row.logit(id); }
  void set(int64_t id, float logit) { row.write(id, logit); }
  float largest() {
    row.refresh();
    const int64_t id = row.is_sound() ? row.argmax() : row.fallback();
    return id < 0 ? -kInf : row.logit(id);
  }
};

// A request's slot. Tokens that a walk emits are committed to a copy: rows do not write the state.
class Slot {
 public:
  Slot(const ControlParams& c, int64_t b) : c_(c), slot_(c.slot == nullptr ? -1 : c.slot[b]) {
    if (!is_controlled()) return;
    const int64_t* progress = c.state.progress + slot_ * modulation::kProgressWidth;
    std::copy(progress, progress + modulation::kProgressWidth, progress_);
  }

  void control(Row& row, float temperature) const {
    if (!is_controlled()) return;
    ControlledRow edited{row};
    const modulation::State state = copied_state();
    const modulation::Progress p = modulation::load_progress(state, 0);
    modulation::apply_control(edited, modulation::control_of(state.spec, state.numbers, p),
                              state.sets, row.vocab(), temperature, true);
    row.refresh();
  }

  bool triggers(float entropy) const {
    if (!has(modulation::kTrigger)) return false;
    const modulation::State state = copied_state();
    return double(entropy) > modulation::entropy_threshold(state.spec, state.numbers,
                                                           entropy_ring(),
                                                           progress_[modulation::kEntropyPushed]);
  }

  // -inf, of a bad row, is not pushed to a window.
  void commit(int64_t token, float entropy, float confidence) {
    if (!is_controlled()) return;
    copy_windows();
    const int64_t slot = 0, length = 1;
    modulation::CommitParams p{};
    p.state = copied_state();
    p.progress = progress_;
    p.slot = &slot, p.tokens = &token, p.length = &length;
    p.batch = p.steps = 1;
    p.entropy = &entropy, p.confidence = &confidence;
    p.confidence_ring = confidence_.data(), p.entropy_ring = entropy_.data();
    p.confidence_sum = &confidence_sum_;
    modulation::commit_row(p, 0, 0);
  }

 private:
  bool is_controlled() const { return c_.slot != nullptr && c_.state.controls(slot_); }

  bool has(modulation::Part part) const {
    return is_controlled() && (c_.state.spec_of(slot_)[modulation::kParts] & part) != 0;
  }

  // One slot: this one, with what the walk has committed.
  modulation::State copied_state() const {
    return {c_.state.spec_of(slot_), c_.state.numbers_of(slot_), progress_, c_.state.sets, 1};
  }

  const float* entropy_ring() const {
    return entropy_.empty() ? c_.entropy_ring + slot_ * modulation::kMaxEntropy : entropy_.data();
  }

  void copy_windows() {
    if (has(modulation::kTrigger) && entropy_.empty()) {
      const float* ring = entropy_ring();
      entropy_.assign(ring, ring + modulation::kMaxEntropy);
    }
    if (has(modulation::kDeepConf) && confidence_.empty()) {
      const float* ring = c_.confidence_ring + slot_ * modulation::kMaxConfidence;
      confidence_.assign(ring, ring + modulation::kMaxConfidence);
      confidence_sum_ = c_.confidence_sum[slot_];
    }
  }

  const ControlParams& c_;
  const int64_t slot_;
  int64_t progress_[modulation::kProgressWidth];
  std::vector<float> confidence_, entropy_;
  double confidence_sum_ = 0;
};

}  // namespace cpu
}  // namespace reasonkern
