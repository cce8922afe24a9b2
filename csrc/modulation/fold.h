// What a token does to a request: pure, on a copy of its progress, for host and device.
#pragma once

#include "modulation.h"

namespace reasonkern {
namespace modulation {

struct Progress {
  int64_t t;         // tokens generated
  int64_t spent;     // of them, tokens of the thinking phase
  int64_t switched;  // t after the last switch token
  int64_t phase;
  int64_t phrase;  // ids of the budget's phrase that the text ends with, or kDone
  int64_t wait;    // ids of the minimum's phrase written, 0 outside one
  int64_t ignore;  // ends of thinking still to be replaced
  int64_t stopped;
};

// A record is one in memory, or, in a warp, a copy of it whose columns are in registers
// (warp_record.cuh). Element k of the array that begins at a column:
RK_HOST_DEVICE int64_t entry(const int64_t* record, int column, int64_t k) {
  return record[column + k];
}

template <class Record>
RK_HOST_DEVICE Progress load_progress(const Record& p) {
  return {p[kT], p[kSpent], p[kSwitch], p[kPhase], p[kPhrase], p[kWaitAt], p[kIgnore], p[kStopped]};
}

// The entry of a token in a set, or -1.
RK_HOST_DEVICE int64_t entry_of(const Sets& sets, int64_t set, int64_t token) {
  int64_t low = sets.bounds[set], high = sets.bounds[set + 1];
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (sets.id(middle) < token) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low < sets.bounds[set + 1] && sets.id(low) == token ? low : -1;
}

RK_HOST_DEVICE bool holds(const Sets& sets, int64_t set, int64_t token) {
  return entry_of(sets, set, token) >= 0;
}

template <class Record>
RK_HOST_DEVICE bool must_think(const Record& record, const Progress& p) {
  // (Without branches, whose conditions would wait for one another.)
  return (p.phase == kThinking) & ((p.spent < record[kMinTokens]) | (p.ignore > 0));
}

template <class Record>
RK_HOST_DEVICE void fold_wait(const Record& record, Progress& p, int64_t token) {
  if (p.wait > 0 && token == entry(record, kWait, p.wait)) {
    p.wait = p.wait + 1 == record[kWaitLength] ? 0 : p.wait + 1;
  } else if (must_think(record, p) && token == record[kWait]) {
    p.wait = record[kWaitLength] > 1 ? 1 : 0;
    p.ignore -= p.ignore > 0;
  } else {
    p.wait = 0;
  }
}

// The automaton runs from the count kTrackFrom on. Once thinking has ended, with the phrase or
// without it, there is nothing left to enforce and a mismatch gives the phrase up.
template <class Record>
RK_HOST_DEVICE void fold_phrase(const Record& record, Progress& p, int64_t token) {
  const bool open = p.phase == kThinking;
  if (p.phrase == kDone || p.spent < record[kTrackFrom] || !(open || p.phrase > 0)) return;
  int64_t matched = p.phrase;
  while (matched > 0 && entry(record, kEnd, matched) != token)
    matched = entry(record, kFailure, matched - 1);
  if (entry(record, kEnd, matched) == token) ++matched;
  const bool stays_open = open && token != record[kThinkEnd];
  const bool given_up = !stays_open && matched != p.phrase + 1;
  p.phrase = given_up || matched == record[kEndLength] ? kDone : matched;
}

template <class Record>
RK_HOST_DEVICE void fold_phase(const Record& record, Progress& p, int64_t token) {
  if (p.phase == kThinking) {
    if (token == record[kThinkEnd]) {
      p.phase = kClosed;
    } else {
      ++p.spent;
    }
  } else if (p.phase == kBefore && token == record[kThinkStart]) {
    p.phase = kThinking;
    p.spent = 0;
  }
}

// Whether the token is one that TIP waits for.
RK_HOST_DEVICE bool switches(const Sets& sets, const int64_t* record, int64_t token) {
  return (record[kParts] & kTip) && holds(sets, record[kAddedSets + 1], token);
}

// `token` >= 0.
template <class Record>
RK_HOST_DEVICE void fold(const Record& record, Progress& p, int64_t token, bool switches) {
  const int64_t parts = record[kParts];
  if (parts & kMinThink) fold_wait(record, p, token);
  if (parts & kBudget) fold_phrase(record, p, token);
  fold_phase(record, p, token);
  ++p.t;
  if (switches) p.switched = p.t;
}

RK_HOST_DEVICE void fold(const Sets& sets, const int64_t* record, Progress& p, int64_t token) {
  fold(record, p, token, switches(sets, record, token));
}

}  // namespace modulation
}  // namespace reasonkern
