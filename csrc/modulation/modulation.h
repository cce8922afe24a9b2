// Logit control: the state's columns and the parameters of the kernels, for host and device. No
// framework type. The definition, with the same names, is reasonkern/modulation/reference.py; the
// columns are those of reasonkern/modulation/layout.py.
#pragma once

#include <cstdint>
#include <cstring>

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

// Columns of a slot's record of int64; those marked "double" hold its bits. What every row reads is
// in the first lines of 64 bytes.
enum Column {
  // what the committed tokens have made of it
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
  kConfidenceSum,  // double
  kProgressWidth,
  // what was asked for
  kParts = kProgressWidth,
  kMaxId,  // the largest id that the request writes to, beside those of the sets
  kThinkEnd,
  kWindows,
  kPoints,
  kAddedSets = 16,  // four: cyclic, TIP, constant, schedule
  kBanSet = kAddedSets + 4,
  kTipSpan,
  kBudgetTokens,
  kMinTokens,
  kAmplitude,  // double, and so on to kSoftMargin
  kPeriod,
  kShift,
  kAlpha,
  kBias,
  kSoftFrom,
  kSoftMargin,
  kWait,  // the minimum's phrase
  kTrackFrom = kWait + kMaxWait,
  kThinkStart,
  kEndLength,
  kWaitLength,
  kEos,
  kConfidenceWindow,
  kEntropyWindow,
  kConfidenceThreshold,  // double, and so on to kEntropyFirst
  kEntropyFactor,
  kEntropyFloor,
  kEntropyStd,
  kEntropyFirst,
  kWindow = 80,                        // pairs low, high
  kPoint = kWindow + 2 * kMaxWindows,  // pairs t, d; d is double
  kEnd = kPoint + 2 * kMaxPoints,      // the budget's phrase
  kFailure = kEnd + kMaxEnd,           // of its Knuth-Morris-Pratt automaton
  kRowWidth = kFailure + kMaxEnd,
  // rings of floats, two to a column
  kConfidenceRing = kRowWidth,
  kEntropyRing = kConfidenceRing + kMaxConfidence / 2,
  kRecordWidth = kEntropyRing + kMaxEntropy / 2
};

enum Phase : int64_t { kBefore, kThinking, kClosed };
constexpr int64_t kDone = -1;  // kPhrase, once the budget's phrase is complete or given up

// The double of a column.
RK_HOST_DEVICE double number(const int64_t* record, int column) {
#if defined(__CUDA_ARCH__)
  return __longlong_as_double(record[column]);
#else
  double x;
  std::memcpy(&x, record + column, sizeof(x));
  return x;
#endif
}

RK_HOST_DEVICE int64_t bits_of(double x) {
#if defined(__CUDA_ARCH__)
  return __double_as_longlong(x);
#else
  int64_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
#endif
}

// All sets, in one array: bounds, the largest id of sets and slots, entries.
struct Sets {
  static constexpr int kLargestId = kMaxSets + 1, kEntries = 40;  // places

  const int64_t *bounds, *entries;  // set s has the entries from bounds[s] up to bounds[s + 1]

  // An entry's id, ascending within a set, is its lower half; bit s of the upper half: set s holds
  // it.
  RK_HOST_DEVICE static int64_t id_of(int64_t entry) { return entry & 0xffffffff; }
  RK_HOST_DEVICE static int64_t member_of(int64_t entry) { return int64_t(uint64_t(entry) >> 32); }

  RK_HOST_DEVICE int64_t id(int64_t k) const { return id_of(entries[k]); }
  RK_HOST_DEVICE int64_t member(int64_t k) const { return member_of(entries[k]); }
};

// What rows read. `commit` alone writes to records.
struct State {
  const int64_t* records;  // slots x kRecordWidth
  Sets sets;
  int64_t slots;
  int64_t entries;  // of all sets

  RK_HOST_DEVICE const int64_t* record_of(int64_t slot) const {
    return records + slot * kRecordWidth;
  }
  // Rows of padding and of free slots are left alone.
  RK_HOST_DEVICE bool controls(int64_t slot) const {
    return slot >= 0 && slot < slots && (record_of(slot)[kParts] & kActive);
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
  int64_t* records;       // those of state
  const int64_t* slot;    // batch
  const int64_t* tokens;  // batch x steps
  const int64_t* length;  // batch
  int64_t batch, steps;
  const float *entropy, *confidence;  // batch x steps, or null: nothing is pushed
};

}  // namespace modulation
}  // namespace reasonkern
