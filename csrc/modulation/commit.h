// Accepted tokens and their statistics go into a slot, by one thread, for host and device.
#pragma once

#include <cmath>

#include "control.h"

namespace reasonkern {
namespace modulation {

// What a commit writes: that of a slot's record, or a copy of it.
struct Written {
  int64_t* progress;
  float *confidence_ring, *entropy_ring;
};

RK_HOST_DEVICE Written written_of(int64_t* record) {
  return {record, reinterpret_cast<float*>(record + kConfidenceRing),
          reinterpret_cast<float*>(record + kEntropyRing)};
}

RK_HOST_DEVICE const float* ring_of(const int64_t* record, int column) {
  return reinterpret_cast<const float*>(record + column);
}

// The running mean of DeepConf; once it is below the threshold the request stays stopped.
RK_HOST_DEVICE void push_confidence(const int64_t* record, const Written& to, float value) {
  const int64_t window = record[kConfidenceWindow], pushed = to.progress[kConfidencePushed]++;
  float* at = to.confidence_ring + pushed % window;
  const double sum =
      number(to.progress, kConfidenceSum) + (double(value) - (pushed < window ? 0.0 : double(*at)));
  std::memcpy(to.progress + kConfidenceSum, &sum, sizeof(sum));
  *at = value;
  const double threshold = number(record, kConfidenceThreshold);
  if (pushed + 1 >= window && sum < threshold * double(window)) to.progress[kStopped] = 1;
}

RK_HOST_DEVICE void push_entropy(const int64_t* record, const Written& to, float value) {
  to.entropy_ring[to.progress[kEntropyPushed]++ % record[kEntropyWindow]] = value;
}

// Entropy above which a row triggers: from the last N committed rows, the unbiased deviation.
RK_HOST_DEVICE double entropy_threshold(const int64_t* record, const float* ring, int64_t pushed) {
  const int64_t window = record[kEntropyWindow];
  if (pushed < window) return number(record, kEntropyFirst);
  double sum = 0, squares = 0;
  for (int64_t k = 0; k < window; ++k) sum += ring[k];
  const double mean = sum / double(window);
  for (int64_t k = 0; k < window; ++k) squares += product(ring[k] - mean, ring[k] - mean);
  const double deviation = std::sqrt(squares / double(window - 1));
  const double least = number(record, kEntropyStd), floor = number(record, kEntropyFloor);
  const double spread = deviation > least ? deviation : least;
  const double high = mean + product(number(record, kEntropyFactor), spread);
  return high > floor ? high : floor;
}

RK_HOST_DEVICE void store_progress(int64_t* p, const Progress& s) {
  p[kT] = s.t, p[kSpent] = s.spent, p[kSwitch] = s.switched, p[kPhase] = s.phase;
  p[kPhrase] = s.phrase, p[kWaitAt] = s.wait, p[kIgnore] = s.ignore;
}

RK_HOST_DEVICE void push_statistics(const CommitParams& c, const int64_t* record, const Written& to,
                                    int64_t at) {
  const int64_t parts = record[kParts];
  if ((parts & kDeepConf) && c.confidence != nullptr && is_finite(c.confidence[at])) {
    push_confidence(record, to, c.confidence[at]);
  }
  if ((parts & kTrigger) && c.entropy != nullptr && is_finite(c.entropy[at])) {
    push_entropy(record, to, c.entropy[at]);
  }
}

// Row b's tokens into a slot in use. The law of a forced row is not the model's and says nothing to
// the windows; a token that was due came by force.
RK_HOST_DEVICE void commit_row(const CommitParams& c, int64_t b, const int64_t* record,
                               const Written& to) {
  Progress p = load_progress(to.progress);
  for (int64_t j = 0; j < c.length[b] && j < c.steps; ++j) {
    const int64_t at = b * c.steps + j, token = c.tokens[at];
    if (token < 0) break;
    const bool forced = token == forced_id(record, p);
    fold(c.state.sets, record, p, token);
    if (!forced) push_statistics(c, record, to, at);
    p.stopped = to.progress[kStopped];
  }
  store_progress(to.progress, p);
}

}  // namespace modulation
}  // namespace reasonkern
