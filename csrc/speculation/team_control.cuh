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
  double confidence_sum;
  float confidence;  // of the last row
};

struct TeamSlot {
  const ControlParams* params;
  int64_t slot;  // -1: no control

  __device__ TeamSlot(const ControlParams& p, int64_t b)
      : params(&p), slot(p.slot != nullptr && p.state.controls(p.slot[b]) ? p.slot[b] : -1) {}

  __device__ bool has(modulation::Part part) const {
    return slot >= 0 && (params->state.spec_of(slot)[modulation::kParts] & part) != 0;
  }

  // `walks`: with the windows, too.
  __device__ void load(ControlShared& s, bool walks) const {
    __syncthreads();  // the request before is done
    if (slot < 0) return;
    const int64_t* progress = params->state.progress + slot * modulation::kProgressWidth;
    for (int i = int(threadIdx.x); i < modulation::kProgressWidth; i += int(blockDim.x)) {
      s.progress[i] = progress[i];
    }
    const float* entropy = params->entropy_ring + slot * modulation::kMaxEntropy;
    for (int i = int(threadIdx.x); i < modulation::kMaxEntropy; i += int(blockDim.x)) {
      s.entropy_ring[i] = entropy[i];
    }
    if (walks && has(modulation::kDeepConf)) {
      const float* ring = params->confidence_ring + slot * modulation::kMaxConfidence;
      for (int i = int(threadIdx.x); i < modulation::kMaxConfidence; i += int(blockDim.x)) {
        s.confidence_ring[i] = ring[i];
      }
      if (threadIdx.x == 0) s.confidence_sum = params->confidence_sum[slot];
    }
    __syncthreads();
  }

  // This slot alone, with what the walk has committed.
  __device__ modulation::State state(const ControlShared& s) const {
    const modulation::State& all = params->state;
    return {all.spec_of(slot), all.numbers_of(slot), s.progress, all.sets, 1};
  }

  RK_DEVICE_CALL bool triggers(const ControlShared& s, float entropy) const {
    if (!has(modulation::kTrigger)) return false;
    const modulation::State own = state(s);
    return double(entropy) > modulation::entropy_threshold(own.spec, own.numbers, s.entropy_ring,
                                                           s.progress[modulation::kEntropyPushed]);
  }

  // By one thread of each block. A statistic of -inf is not pushed.
  RK_DEVICE_CALL void commit(ControlShared& s, int64_t token, float entropy,
                             float confidence) const {
    const int64_t first = 0, length = 1;
    modulation::CommitParams p{};
    p.state = state(s);
    p.progress = s.progress;
    p.slot = &first, p.tokens = &token, p.length = &length;
    p.batch = p.steps = 1;
    p.entropy = &entropy, p.confidence = &confidence;
    p.confidence_ring = s.confidence_ring, p.entropy_ring = s.entropy_ring;
    p.confidence_sum = &s.confidence_sum;
    modulation::commit_row(p, 0, 0);
  }
};

// TeamRow whose allowed logits are those after control.
struct ControlledRow : TeamRow<AnyElement> {
  const modulation::Sets& sets;
  ControlShared& shared;

  __device__ ControlledRow(Team& team, const LogitRows& rows, int64_t b, int64_t node,
                           const modulation::Sets& sets, ControlShared& shared)
      : TeamRow(team, rows, b, node), sets(sets), shared(shared) {}

  __device__ bool apply_mask(int v, float (&x)[4]) const {
    const bool masked = TeamRow::apply_mask(v, x);
    if (!may_change(v)) return masked;
    const Four after = changed(v, Four{{x[0], x[1], x[2], x[3]}});
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = after.lane[k];
    return true;
  }

  __device__ float at(int64_t v) const {
    const float x = TeamRow::at(v);
    return may_change(v) ? changed(v, x) : x;
  }

  // Whether a ban is what leaves nothing finite in a row whose largest logit has no id.
  __device__ bool ban_takes_all(int top_id) const {
    return shared.active && !shared.forced && shared.control.ban >= 0 && top_id < 0;
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
  }

 private:
  __device__ bool may_change(int64_t v) const {
    if (!shared.active) return false;
    const int64_t group = v >> shared.map_shift;
    return (shared.map[group / 32] >> (group % 32) & 1) != 0;
  }

  __device__ void mark(int64_t v) {
    if (v < 0 || v >= vocab) return;
    const int64_t group = v >> shared.map_shift;
    atomicOr(&shared.map[group / 32], 1u << (group % 32));
  }

  __device__ void mark_set(int32_t set) {
    if (set < 0) return;
    for (int32_t k = sets.offsets[set] + int32_t(threadIdx.x); k < sets.offsets[set + 1];
         k += int32_t(blockDim.x)) {
      mark(sets.ids[k]);
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
    s.active = slot.slot >= 0;
    if (!s.active) return;
    const modulation::State own = slot.state(s);
    modulation::RowControl& c = s.control;
    c = modulation::control_of(own.spec, own.numbers, modulation::load_progress(own, 0));
    s.map_shift = 2;
    while (vocab > 32 * kMapWords << s.map_shift) ++s.map_shift;
    s.forced = c.force >= 0 && c.force < vocab && modulation::can_force(TeamRow::at(c.force));
    s.soft_value = -kInf;
    if (!bans) c.ban = -1;
    const bool minimum = c.end >= 0 && c.end < vocab && c.wait < vocab;
    const float wait = minimum ? by_sets(c.wait, TeamRow::at(c.wait)) : 0.0f;
    if (minimum && modulation::can_wait(wait)) {
      s.wait_value = modulation::merged(wait, by_sets(c.end, TeamRow::at(c.end)), temperature);
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

  __device__ int64_t find(int32_t set, int64_t v) const {
    if (set < 0) return 0;
    const int32_t entry = modulation::entry_of(sets, set, v);
    return entry < 0 ? 0 : sets.member[entry];
  }
};

}  // namespace reasonkern
