// Rows under control (csrc/modulation), read by a team. Nothing is copied: what control changes is
// recomputed where it is read, for the few tokens that a bitmap in shared memory admits.
#pragma once

#include "../modulation/commit.h"
#include "../modulation/control.h"
#include "team_logits.cuh"

namespace reasonkern {

constexpr int kMapWords = 1024;

// Of a block; every block of a team computes the same. The slot is a copy: rows do not write the
// state, a walk commits to the copy.
struct ControlShared : TeamShared {
  modulation::RowControl control;
  bool active, forced;
  int map_shift;  // bit v >> map_shift of the map: tokens that may be changed
  unsigned map[kMapWords];
  float wait_value, soft_value;  // the latter -inf until the row's largest logit is known
  int64_t progress[modulation::kProgressWidth];
  float confidence_ring[modulation::kMaxConfidence], entropy_ring[modulation::kMaxEntropy];
  float confidence;  // of the last row
};

struct TeamSlot {
  const modulation::State* state;
  const int64_t* record;  // null: no control

  __device__ TeamSlot(const ControlParams& p, int64_t b)
      : state(&p.state),
        record(p.slot != nullptr && p.state.controls(p.slot[b]) ? p.state.record_of(p.slot[b])
                                                                : nullptr) {}

  __device__ bool has(modulation::Part part) const {
    return record != nullptr && (record[modulation::kParts] & part) != 0;
  }

  // `walks`: with the window of confidences, too.
  __device__ void load(ControlShared& s, bool walks) const {
    __syncthreads();  // the request before is done
    if (record == nullptr) return;
    copy(record, modulation::kProgressWidth, s.progress);
    copy(modulation::ring_of(record, modulation::kEntropyRing), modulation::kMaxEntropy,
         s.entropy_ring);
    if (walks && has(modulation::kDeepConf)) {
      copy(modulation::ring_of(record, modulation::kConfidenceRing), modulation::kMaxConfidence,
           s.confidence_ring);
    }
    __syncthreads();
  }

  RK_DEVICE_CALL bool triggers(const ControlShared& s, float entropy) const {
    if (!has(modulation::kTrigger)) return false;
    return double(entropy) > modulation::entropy_threshold(record, s.entropy_ring,
                                                           s.progress[modulation::kEntropyPushed]);
  }

  // By one thread of each block. A statistic of -inf is not pushed.
  RK_DEVICE_CALL void commit(ControlShared& s, int64_t token, float entropy,
                             float confidence) const {
    const int64_t length = 1;
    modulation::CommitParams p{};
    p.state = *state;
    p.tokens = &token, p.length = &length;
    p.batch = p.steps = 1;
    p.entropy = &entropy, p.confidence = &confidence;
    modulation::commit_row(p, 0, record, {s.progress, s.confidence_ring, s.entropy_ring});
  }

 private:
  template <class T>
  __device__ static void copy(const T* from, int count, T* to) {
    for (int i = int(threadIdx.x); i < count; i += int(blockDim.x)) to[i] = from[i];
  }
};

// TeamRow whose allowed logits are those after control.
struct ControlledRow : TeamRow<AnyElement> {
  const modulation::Sets& sets;
  ControlShared& shared;

  __device__ ControlledRow(Team& team, const LogitRows& rows, int64_t b, int64_t node,
                           const modulation::Sets& sets, ControlShared& shared)
      : TeamRow(team, rows, b, node), sets(sets), shared(shared) {}

  __device__ bool may_change() const { return shared.active || TeamRow::may_change(); }

  __device__ bool apply_mask(int v, float (&x)[4]) const {
    const bool masked = TeamRow::apply_mask(v, x);
    if (!is_marked(v)) return masked;
    const Four after = changed(v, Four{{x[0], x[1], x[2], x[3]}});
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = after.lane[k];
    return true;
  }

  __device__ float at(int64_t v) const {
    const float x = TeamRow::at(v);
    return is_marked(v) ? changed(v, x) : x;
  }

  // Whether a ban is what leaves nothing finite in a row of that largest logit.
  __device__ bool ban_takes_all(float top) const {
    return shared.active && !shared.forced && shared.control.ban >= 0 && !(top > -kInf);
  }

  // Before the row is read: what control does to it, bar the soft budget. `bans`: whether it may.
  RK_DEVICE_CALL void prepare(const TeamSlot& slot, float temperature, bool bans) {
    __syncthreads();  // the row before is read
    if (threadIdx.x == 0) describe(slot, temperature, bans);
    for (int i = int(threadIdx.x); i < kMapWords; i += int(blockDim.x)) shared.map[i] = 0;
    __syncthreads();
    if (shared.active) mark();
    __syncthreads();
  }

  // Once the largest logit is known. The soft budget stays below it.
  RK_DEVICE_CALL void raise(float top) {
    const modulation::RowControl& c = shared.control;
    if (!shared.active || shared.forced || c.soft < 0) return;
    __syncthreads();
    if (threadIdx.x == 0) {
      shared.soft_value = modulation::raised(at(c.soft), top, c.weight, c.margin);
    }
    __syncthreads();
    if (owns(c.soft)) tops.allowed = max_nan(tops.allowed, shared.soft_value);
  }

 private:
  __device__ bool is_marked(int64_t v) const {
    if (!shared.active) return false;
    const int64_t group = v >> shared.map_shift;
    return (shared.map[group / 32] >> (group % 32) & 1) != 0;
  }

  __device__ void mark(int64_t v) {
    if (v < 0 || v >= vocab) return;
    const int64_t group = v >> shared.map_shift;
    atomicOr(&shared.map[group / 32], 1u << (group % 32));
  }

  __device__ void mark_set(int64_t set) {
    if (set < 0) return;
    for (int64_t k = sets.bounds[set] + threadIdx.x; k < sets.bounds[set + 1]; k += blockDim.x) {
      mark(sets.id(k));
    }
  }

  __device__ void mark() {
    const modulation::RowControl& c = shared.control;
    if (threadIdx.x == 0) mark(c.force), mark(c.end), mark(c.wait), mark(c.soft);
    if (shared.forced) return;
    mark_set(c.ban);
    for (int k = 0; k < modulation::kAdders; ++k) mark_set(c.sets[k]);
  }

  __device__ void describe(const TeamSlot& slot, float temperature, bool bans) {
    ControlShared& s = shared;
    s.active = slot.record != nullptr;
    if (!s.active) return;
    modulation::RowControl& c = s.control;
    c = modulation::control_of(slot.record, modulation::load_progress(s.progress));
    s.map_shift = 2;
    while (vocab > 32 * kMapWords << s.map_shift) ++s.map_shift;
    s.forced = c.force >= 0 && c.force < vocab && modulation::can_force(TeamRow::at(c.force));
    s.soft_value = -kInf;
    if (!bans) c.ban = -1;
    const bool minimum = c.end >= 0 && c.end < vocab && c.wait < vocab;
    const float wait = minimum ? by_sets(c.wait, TeamRow::at(c.wait)) : 0.0f;
    if (minimum && modulation::can_wait(wait)) {
      s.wait_value =
          modulation::merged(wait, by_sets(c.end, TeamRow::at(c.end)), Divisor(temperature));
    } else {
      c.end = c.wait = -1;
    }
    if (c.soft >= vocab) c.soft = -1;
  }

  struct Four {
    float lane[4];
  };

  // By value: the logits of a sweep stay in registers.
  RK_DEVICE_CALL Four changed(int v, Four x) const {
#pragma unroll
    for (int k = 0; k < 4; ++k) x.lane[k] = changed(int64_t(v + k), x.lane[k]);
    return x;
  }

  RK_DEVICE_CALL float changed(int64_t v, float x) const {
    const modulation::RowControl& c = shared.control;
    if (shared.forced) return v == c.force ? float(modulation::kForced) : x;
    if (v == c.soft && shared.soft_value > -kInf) return shared.soft_value;
    if (v == c.wait) return shared.wait_value;
    if (v == c.end) return -kInf;
    return by_sets(v, x);
  }

  RK_DEVICE_CALL float by_sets(int64_t v, float x) const {
    const modulation::RowControl& c = shared.control;
    const int64_t member = member_of(v);
    if (c.ban >= 0 && (member >> c.ban & 1) != 0) return modulation::banned(x);
    return modulation::with_added(x, modulation::added_to(c, member));
  }

  // The sets that hold the token, as far as the row uses one of them.
  __device__ int64_t member_of(int64_t v) const {
    const modulation::RowControl& c = shared.control;
    int64_t member = find(c.ban, v);
    for (int k = 0; member == 0 && k < modulation::kAdders; ++k) member = find(c.sets[k], v);
    return member;
  }

  __device__ int64_t find(int64_t set, int64_t v) const {
    if (set < 0) return 0;
    const int64_t entry = modulation::entry_of(sets, set, v);
    return entry < 0 ? 0 : sets.member(entry);
  }
};

}  // namespace reasonkern
