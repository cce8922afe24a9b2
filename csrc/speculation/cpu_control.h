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
  Slot(const ControlParams& c, int64_t b)
      : c_(c), record_(is_controlled(c, b) ? c.state.record_of(c.slot[b]) : nullptr) {
    if (record_ != nullptr) std::copy(record_, record_ + modulation::kProgressWidth, progress_);
  }

  void control(Row& row, float temperature) const {
    if (record_ == nullptr) return;
    ControlledRow edited{row};
    const modulation::Progress p = modulation::load_progress(progress_);
    modulation::apply_control(edited, modulation::control_of(record_, p), c_.state.sets,
                              row.vocab(), temperature, true);
    row.refresh();
  }

  bool triggers(float entropy) const {
    if (!has(modulation::kTrigger)) return false;
    const float* ring =
        entropy_.empty() ? modulation::ring_of(record_, modulation::kEntropyRing) : entropy_.data();
    const int64_t pushed = progress_[modulation::kEntropyPushed];
    return double(entropy) > modulation::entropy_threshold(record_, ring, pushed);
  }

  // -inf, of a bad row, is not pushed to a window.
  void commit(int64_t token, float entropy, float confidence) {
    if (record_ == nullptr) return;
    copy_ring(modulation::kTrigger, modulation::kEntropyRing, modulation::kMaxEntropy, entropy_);
    copy_ring(modulation::kDeepConf, modulation::kConfidenceRing, modulation::kMaxConfidence,
              confidence_);
    const int64_t length = 1;
    modulation::CommitParams p{};
    p.state = c_.state;
    p.tokens = &token, p.length = &length;
    p.batch = p.steps = 1;
    p.entropy = &entropy, p.confidence = &confidence;
    modulation::commit_row(p, 0, record_, {progress_, confidence_.data(), entropy_.data()});
  }

 private:
  static bool is_controlled(const ControlParams& c, int64_t b) {
    return c.slot != nullptr && c.state.controls(c.slot[b]);
  }

  bool has(modulation::Part part) const {
    return record_ != nullptr && (record_[modulation::kParts] & part) != 0;
  }

  void copy_ring(modulation::Part part, int column, int size, std::vector<float>& to) const {
    if (!has(part) || !to.empty()) return;
    const float* ring = modulation::ring_of(record_, column);
    to.assign(ring, ring + size);
  }

  const ControlParams& c_;
  const int64_t* record_;  // null: no control
  int64_t progress_[modulation::kProgressWidth];
  std::vector<float> confidence_, entropy_;
};

}  // namespace cpu
}  // namespace reasonkern
