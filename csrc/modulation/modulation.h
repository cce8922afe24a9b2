// Logit control: the state's columns and the parameters of the kernels, for host and device. No
// framework type. The definition, with the same names, is reasonkern/modulation/reference.py; the
// columns are those of reasonkern/modulation/layout.py.
#pragma once

#include <cstdint>

#include "../common/host_device.h"

namespace reasonkern {
namespace modulation {

constexpr int kMaxSets = 32;
constexpr int kMaxWindows = 8, kMaxPoints = 32, kMaxEnd = 64, kMaxWait = 32;
constexpr int kMaxConfidence = 2048, kMaxEntropy = 64;
constexpr int kMaxNodes = 4096;

enum Part : int64_t {
  kActive = 1,
  kCyclic = 2,
  kTip = 4,
  kConstant = 8,
  kSchedule = 16,
  kBan = 32,
  kBudget = 64,
  kSoft = 128,
  kMinThink = 256,
  kDeepConf = 512,
  kTrigger = 1024
};

// Columns of a slot's row of int64.
enum Spec {
  kParts,
  kThinkStart,
  kThinkEnd,
  kAddedSets,  // four: cyclic, TIP, constant, schedule
  kBanSet = 7,
  kTipSpan,
  kBudgetTokens,
  kTrackFrom,
  kEndLength,
  kMinTokens,
  kWaitLength,
  kWindows,
  kPoints,
  kEos,
  kConfidenceWindow,
  kEntropyWindow,
  kMaxId,  // the largest id that the request writes to, beside those of the sets
  kWindow = 24,
  kPointT = kWindow + 2 * kMaxWindows,
  kEnd = kPointT + kMaxPoints,
  kFailure = kEnd + kMaxEnd,
  kWait = kFailure + kMaxEnd,
  kSpecWidth = kWait + kMaxWait
};

// Columns of a slot's row of doubles.
enum Number {
  kAmplitude,
  kPeriod,
  kShift,
  kAlpha,
  kBias,
  kSoftFrom,
  kSoftMargin,
  kConfidenceThreshold,
  kEntropyFactor,
  kEntropyFloor,
  kEntropyStd,
  kEntropyFirst,
  kPointValue = 16,
  kNumbersWidth = kPointValue + kMaxPoints
};

// Columns of a slot's row of what its tokens have done.
enum ProgressColumn {
  kT,
  kSpent,
  kSwitch,
  kPhase,
  kPhrase,
  kWaitAt,
  kIgnore,
  kStopped,
  kConfidencePushed,
  kEntropyPushed,
  kProgressWidth = 16
};

enum Phase : int64_t { kBefore, kThinking, kClosed };
constexpr int64_t kDone = -1;  // kPhrase, once the budget's phrase is complete or given up

struct Sets {
  const int32_t *offsets, *ids;  // ascending within a set
  const int64_t* member;         // bit s: set s holds the entry's id
  int32_t count;
  int64_t entries;  // of all sets
};

// What rows read. `commit` alone writes progress.
struct State {
  const int64_t* spec;      // slots x kSpecWidth
  const double* numbers;    // slots x kNumbersWidth
  const int64_t* progress;  // slots x kProgressWidth
  Sets sets;
  int64_t slots;

  RK_HOST_DEVICE const int64_t* spec_of(int64_t slot) const { return spec + slot * kSpecWidth; }
  RK_HOST_DEVICE const double* numbers_of(int64_t slot) const {
    return numbers + slot * kNumbersWidth;
  }
  // Rows of padding and of free slots are left alone.
  RK_HOST_DEVICE bool controls(int64_t slot) const {
    return slot >= 0 && slot < slots && (spec_of(slot)[kParts] & kActive);
  }
};

// Row r of a chain has the slot slot[r] and folds the tokens of the rows r - local_pos[r] + 1 to r.
// Row (b, i) of a tree (parents given) folds the tokens of its ancestors below the root and its
// own.
struct RowsParams {
  State state;
  void* logits;  // rows x vocab, the element type given beside the struct
  int64_t rows, vocab, stride;
  const int64_t* slot;          // rows; trees: rows / nodes
  const int64_t* local_pos;     // rows, or null: 0
  const int64_t* draft_tokens;  // rows; null without drafts
  const int32_t* parents;       // nodes, or null: a chain
  int64_t nodes;                // 1 for a chain
  const float* temperature;     // rows; trees too; null: 1
  bool dense;                   // soft budgets are applied, which needs the row's largest logit
};

struct CommitParams {
  State state;
  int64_t* progress;      // that of state
  const int64_t* slot;    // batch
  const int64_t* tokens;  // batch x steps
  const int64_t* length;  // batch
  int64_t batch, steps;
  const float *entropy, *confidence;  // batch x steps, or null: nothing is pushed
  float *confidence_ring, *entropy_ring;
  double* confidence_sum;
};

}  // namespace modulation
}  // namespace reasonkern
