// A state of logit control, from the fields that modulation_backend.state_fields hands over.
#pragma once

#include "fields.h"
#include "modulation/modulation.h"

namespace cuda_sim {

inline reasonkern::modulation::State state_of(const Fields& f) {
  reasonkern::modulation::State s{};
  f.point(s.spec, "spec");
  f.point(s.numbers, "numbers");
  f.point(s.progress, "progress");
  f.point(s.sets.offsets, "set_offsets");
  f.point(s.sets.ids, "set_ids");
  f.point(s.sets.member, "set_member");
  s.sets.count = f.number<int32_t>("count");
  s.sets.entries = f.number<int64_t>("entries");
  s.slots = f.number<int64_t>("slots");
  return s;
}

// The windows of whatever parameters hold them.
template <class Params>
void point_windows(const Fields& f, Params& p) {
  f.point(p.confidence_ring, "confidence_ring");
  f.point(p.entropy_ring, "entropy_ring");
  f.point(p.confidence_sum, "confidence_sum");
}

}  // namespace cuda_sim
