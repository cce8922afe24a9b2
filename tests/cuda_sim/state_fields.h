// A state of logit control, from the fields that modulation_backend.state_fields hands over.
#pragma once

#include "fields.h"
#include "modulation/modulation.h"

namespace cuda_sim {

inline reasonkern::modulation::State state_of(const Fields& f) {
  reasonkern::modulation::State s{};
  f.point(s.records, "records");
  f.point(s.sets.bounds, "sets");
  s.sets.entries = s.sets.bounds + reasonkern::modulation::Sets::kEntries;
  s.entries = f.number<int64_t>("entries");
  s.slots = f.number<int64_t>("slots");
  return s;
}

}  // namespace cuda_sim
