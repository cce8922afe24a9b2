// Accepted tokens and their statistics go into a slot, by one thread, for host and device.
#pragma once

#include <cmath>

#include "control.h"

namespace reasonkern {
namespace modulation {

// The running mean of DeepConf; once it is below the threshold the request stays stopped.
RK_HOST_DEVICE void push_confidence(const CommitParams& c, int64_t slot, float value) {
  const int64_t* spec = c.state.spec_of(slot);
  int64_t* progress = c.progress + slot * kProgressWidth;
  const int64_t window = spec[kConfidenceWindow], pushed = progress[kConfidencePushed]++;
  float* at = c.confidence_ring + slot * kMaxConfidence + pushed % window;
  double& sum = c.confidence_sum[slot];
  sum += double(value) - (pushed < window ? 0.0 : double(*at));
  *at = value;
  const double threshold = c.state.numbers_of(slot)[kConfidenceThreshold];
  if (pushed + 1 >= window && sum < threshold * double(window)) progress[kStopped] = 1;
}

RK_HOST_DEVICE void push_entropy(const CommitParams& c, int64_t slot, float value) {
  int64_t& pushed = c.progress[slot * kProgressWidth + kEntropyPushed];
  const int64_t window = c.state.spec_of(slot)[kEntropyWindow];
  c.entropy_ring[slot * kMaxEntropy + pushed % window] = value;
  ++pushed;
}

// Entropy above which a row triggers: from the last N committed rows, the unbiased deviation.
RK_HOST_DEVICE double entropy_threshold(const int64_t* spec, const double* numbers,
                                        const float* ring, int64_t pushed) {
  const int64_t window = spec[kEntropyWindow];
  if (pushed < window) return numbers[kEntropyFirst];
  double sum = 0, squares = 0;
  for (int64_t k = 0; k < window; ++k) sum += ring[k];
  const double mean = sum / double(window);
  for (int64_t k = 0; k < window; ++k) squares += product(ring[k] - mean, ring[k] - mean);
  const double deviation = std::sqrt(squares / double(window - 1));
  const double least = numbers[kEntropyStd], floor = numbers[kEntropyFloor];
  const double spread = deviation > least ? deviation : least;
  const double high = mean + product(numbers[kEntropyFactor], spread);
  return high > floor ? high : floor;
}

RK_HOST_DEVICE void store_progress(const CommitParams& c, int64_t slot, const Progress& s) {
  int64_t* p = c.progress + slot * kProgressWidth;
  p[kT] = s.t, p[kSpent] = s.spent, p[kSwitch] = s.switched, p[kPhase] = s.phase;
  p[kPhrase] = s.phrase, p[kWaitAt] = s.wait, p[kIgnore] = s.ignore;
}

RK_HOST_DEVICE void push_statistics(const CommitParams& c, int64_t slot, int64_t at) {
  const int64_t parts = c.state.spec_of(slot)[kParts];
  if ((parts & kDeepConf) && c.confidence != nullptr && is_finite(c.confidence[at])) {
    push_confidence(c, slot, c.confidence[at]);
  }
  if ((parts & kTrigger) && c.entropy != nullptr && is_finite(c.entropy[at])) {
    push_entropy(c, slot, c.entropy[at]);
  }
}

// Row b's tokens into the slot that it names, one in use. The law of a forced row is not the
// model's and says nothing to the windows; a token that was due came by force.
RK_HOST_DEVICE void commit_row(const CommitParams& c, int64_t b, int64_t slot) {
  const int64_t* spec = c.state.spec_of(slot);
  Progress p = load_progress(c.state, slot);
  for (int64_t j = 0; j < c.length[b] && j < c.steps; ++j) {
    const int64_t at = b * c.steps + j, token = c.tokens[at];
    if (token < 0) break;
    const bool forced = token == forced_id(spec, p);
    fold(c.state.sets, spec, p, token);
    if (!forced) push_statistics(c, slot, at);
    p.stopped = c.progress[slot * kProgressWidth + kStopped];
  }
  store_progress(c, slot, p);
}

}  // namespace modulation
}  // namespace reasonkern
