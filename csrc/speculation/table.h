// The n-gram table: layout, hashing and arithmetic, once for host and device. The definition, with
// the same names, is reasonkern/speculation/reference_table.py; every result has the same bits.
#pragma once

#include "noise.h"

namespace reasonkern {

constexpr int kWays = 8;  // keys per set: one cache line
constexpr int kMaxTopk = 16, kMaxOrders = 4, kMaxWindow = 8;
constexpr int64_t kOne = int64_t(1) << 30;  // probability 1 in sums
constexpr int64_t kTotalLimit = kOne + kOne / 1000;
constexpr int kIdBits = 18;
constexpr uint32_t kIdMask = (1u << kIdBits) - 1;

enum Counter { kHits = 0, kMisses = 4, kEvictions = 5, kRejected = 6, kRows = 7, kCounters = 8 };
enum DraftKind { kNoNoise = 0, kShared = 1, kRejection = 2 };

struct Table {
  uint64_t* keys;  // sets x kWays
  int32_t* slots;  // entries x topk: packed words, or ids where sums are there
  uint8_t* high;   // entries x topk: bits of the ids above kIdBits, or null
  int64_t* sums;   // entries x topk in units of 2^-30, or null
  int16_t* counts;
  int32_t* ages;
  int64_t* clock;
  const int32_t* epochs;
  int64_t* counters;
  int64_t sets;
  int32_t topk, scopes, window, num_orders;
  int32_t orders[kMaxOrders];
};

struct DraftParams {
  Table table;
  const int64_t* context;  // batch x window, rows context_stride apart
  int64_t context_stride;
  const int32_t *parents, *depths, *child_ptr, *child_index, *level_ptr, *level_nodes;
  const int64_t* scope;  // or null: 0
  const float* temperature;
  const int64_t *seed, *position;
  int64_t vocab;
  int32_t batch, nodes, inner_nodes, levels, kind;  // inner: with children
  bool strict;                                      // a bad row is an error; else it is ignored
  int64_t* tokens;                                  // batch x nodes
  bool* valid;                                      // batch x nodes
  int64_t* q_ids;                                   // batch x nodes x topk, rejection only
  float* q_logprob;                                 // batch x nodes x topk, rejection only
};

struct UpdateParams {
  Table table;
  const int64_t* context;  // rows x window
  int64_t context_stride;
  const int64_t* ids;   // rows x width
  const float* logits;  // rows x width
  const float* lse;     // rows, or null
  const int64_t* scope;
  int64_t rows, vocab;
  int32_t width, max_count;
  bool strict;  // a bad row is an error; else it is ignored and counted
};

// Whether a draft's context has this token. Operators take any number of 64 bits: those beyond
// int32 are missing, and others outside the vocabulary are in no entry.
RK_HOST_DEVICE bool is_present(int64_t token) { return token >= 0 && token <= INT32_MAX; }

// ---- hashing

RK_HOST_DEVICE uint64_t hash_step(uint64_t h, uint64_t x) {
  h = (h ^ x) * 0x9e3779b97f4a7c15u;
  return h ^ (h >> 32);
}

RK_HOST_DEVICE uint64_t hash_start(int64_t scope, int32_t epoch) {
  return hash_step(hash_step(0x243f6a8885a308d3u, uint64_t(scope)), uint64_t(int64_t(epoch)));
}

// 0 marks an empty way; all ones, a row that is left out of the sorted merge.
RK_HOST_DEVICE uint64_t key_of(uint64_t h, int order) {
  h ^= uint64_t(order) * 0xd1342543de82ef95u;
  h = (h ^ (h >> 30)) * 0xbf58476d1ce4e5b9u;
  h = (h ^ (h >> 27)) * 0x94d049bb133111ebu;
  h ^= h >> 31;
  return h + 1 <= 1 ? 1 : h;
}

// Increasing in the key: rows sorted by key are sorted by set.
RK_HOST_DEVICE int64_t set_of(uint64_t key, int64_t sets) {
  return int64_t(((key >> 33) * uint64_t(sets)) >> 31);
}

// Of two ways of a set the one that goes first is lower: empty, else by (last update, count). Ages
// count from the present, modulo 2^32: the present itself is the youngest.
RK_HOST_DEVICE uint64_t eviction_order(uint64_t key, int32_t age, int64_t clock, int32_t count) {
  const uint64_t calls = uint32_t(uint32_t(age) - uint32_t(clock) - 1);
  return key == 0 ? 0 : 1 + (calls << 16 | uint16_t(count));
}

// Calls visit(k, key) for each order k whose tokens are there; `token(i)` is the i-th newest one,
// negative where there is none.
template <class Token, class Visit>
RK_HOST_DEVICE void visit_keys(const Table& t, uint64_t start, const Token& token,
                               const Visit& visit) {
  uint64_t h = start;
  int k = t.num_orders - 1;  // orders descend, tokens come from the newest
  for (int i = 0; i < t.window; ++i) {
    const int64_t x = token(i);
    if (x < 0) return;
    h = hash_step(h, uint64_t(x));
    if (t.orders[k] == i + 1) {
      visit(k, key_of(h, i + 1));
      --k;
    }
  }
}

// ---- probabilities: 14-bit codes of 4 exponent and 10 mantissa bits; sums in units of 2^-30

// Units of 2^-24.
RK_HOST_DEVICE int32_t decode(uint32_t code) {
  const uint32_t exponent = code >> 10, mantissa = code & 1023;
  return int32_t(exponent == 0 ? mantissa : (mantissa + 1024) << (exponent - 1));
}

RK_HOST_DEVICE int bit_length(uint32_t x) {
#if defined(__CUDA_ARCH__)
  return 32 - __clz(int(x));
#else
  return x == 0 ? 0 : 32 - __builtin_clz(x);
#endif
}

// The mean total / n, rounded half up: to 2^-24, then to 11 bits.
RK_HOST_DEVICE uint32_t encode(int64_t total, int64_t n) {
  const uint64_t units = (uint64_t(total) + 32 * uint64_t(n)) / 64;
  const bool small = units <= UINT32_MAX;  // up to 255 occurrences: a short division
  const uint32_t mean = n == 1  ? uint32_t(units)
                        : small ? uint32_t(units) / uint32_t(n)
                                : uint32_t(units / uint64_t(n));
  const int excess = bit_length(mean) - 11;
  const int shift = excess > 0 ? excess : 0;
  return uint32_t(shift << 10) + ((mean + (1u << shift >> 1)) >> shift);
}

// e^x for x <= 1; 0 below -80.
RK_HOST_DEVICE float exp_fixed(float x) {
  using namespace noise;
  if (x < -80.0f) return 0.0f;
  const float t = add(mul(x, 1.44269504f), 12582912.0f);  // adding it rounds to an integer
  const float steps = add(t, -12582912.0f);
  float r = add(x, mul(steps, -0.693359375f));
  r = add(r, mul(steps, 2.12194440e-4f));
  float q = 1.0f / 5040;
  q = add(mul(q, r), 1.0f / 720);
  q = add(mul(q, r), 1.0f / 120);
  q = add(mul(q, r), 1.0f / 24);
  q = add(mul(q, r), 1.0f / 6);
  q = add(mul(q, r), 0.5f);
  q = add(mul(q, r), 1.0f);
  q = add(mul(q, r), 1.0f);
  return float_of(word_of(q) + ((word_of(t) - 0x4b400000u) << 23));
}

// To units of 2^-30, to nearest, ties to even; p <= e.
RK_HOST_DEVICE int64_t fixed_of(float p) {
  const float scaled = noise::mul(p, 1073741824.0f);
  if (scaled >= 8388608.0f) return int64_t(scaled);  // an integer
  return int64_t(noise::word_of(noise::add(scaled, 8388608.0f))) - 0x4b000000;
}

// ---- slots

struct Slot {
  int32_t id;   // -1: empty
  int64_t sum;  // n times the mean probability
};

RK_HOST_DEVICE int32_t packed_id(const Table& t, int64_t at, uint32_t word) {
  const uint32_t high = t.high == nullptr ? 0 : t.high[at];
  return int32_t((word & kIdMask) | high << kIdBits);
}

// A slot's bits, as they are loaded.
struct RawSlot {
  int32_t word;
  uint8_t high;
  int64_t sum;
};

RK_HOST_DEVICE RawSlot raw_slot(const Table& t, int64_t at) {
  return {t.slots[at], t.high == nullptr ? uint8_t(0) : t.high[at],
          t.sums == nullptr ? 0 : t.sums[at]};
}

RK_HOST_DEVICE Slot slot_of(const Table& t, const RawSlot& raw, int64_t n) {
  if (t.sums != nullptr) return {raw.sum > 0 ? raw.word : -1, raw.sum};
  const uint32_t word = uint32_t(raw.word), code = word >> kIdBits;
  if (code == 0) return {-1, 0};
  return {int32_t((word & kIdMask) | uint32_t(raw.high) << kIdBits),
          int64_t(decode(code)) * 64 * n};
}

RK_HOST_DEVICE Slot load_slot(const Table& t, int64_t at, int64_t n) {
  return slot_of(t, raw_slot(t, at), n);
}

// `total` of n occurrences, of which max_count are remembered.
RK_HOST_DEVICE void store_slot(const Table& t, int64_t at, int32_t id, int64_t total, int64_t n,
                               int64_t max_count) {
  if (t.sums != nullptr) {
    if (n > max_count) {
      total = total / n * max_count + (total % n * max_count + n / 2) / n;
    }
    t.slots[at] = total > 0 ? id : 0;
    t.sums[at] = total;
    return;
  }
  const uint32_t code = total > 0 ? encode(total, n) : 0;
  t.slots[at] = code == 0 ? 0 : int32_t((uint32_t(id) & kIdMask) | code << kIdBits);
  if (t.high != nullptr) t.high[at] = code == 0 ? 0 : uint8_t(uint32_t(id) >> kIdBits);
}

// Id and probability of a slot, as drafting and verification use them.
RK_HOST_DEVICE int32_t read_packed(const Table& t, int64_t at, uint32_t word, float& p) {
  const uint32_t code = word >> kIdBits;
  p = noise::mul(float(decode(code)), 0x1p-24f);
  return code == 0 ? -1 : packed_id(t, at, word);
}

RK_HOST_DEVICE int32_t read_slot(const Table& t, int64_t at, int64_t entry, float& p) {
  if (t.sums == nullptr) return read_packed(t, at, uint32_t(t.slots[at]), p);
  p = noise::mul(noise::divide(float(t.sums[at]), float(t.counts[entry])), 0x1p-30f);
  return t.sums[at] > 0 ? t.slots[at] : -1;
}

// ---- scores

// What one node's children are drawn with.
struct ChildDraw {
  uint64_t seed, position;
  uint32_t stream;
  float temperature;
  bool noisy;  // false: by probability alone
};

RK_HOST_DEVICE ChildDraw draw_at(int kind, int64_t seed, int64_t position, int depth,
                                 float temperature) {
  const bool shared = kind == kShared;
  return {uint64_t(seed), uint64_t(position + (shared ? depth : 0)),
          shared ? stream_word(kTarget, 0) : stream_word(kDraft, depth), temperature,
          kind != kNoNoise && temperature > 0};
}

// log p over the temperature; log p where the temperature is 0.
RK_HOST_DEVICE float tempered(const ChildDraw& d, float p) {
  const float log_p = -noise::minus_log(p);
  return d.temperature > 0 ? noise::divide(log_p, d.temperature) : log_p;
}

// Larger for a candidate that goes before another, so that candidates are ranked without a branch.
// Never 0; ids have 26 bits. The slot makes keys distinct even where an entry has a token twice, in
// a state that was loaded or is being updated.
RK_HOST_DEVICE uint64_t rank_key(float score, int32_t id, uint32_t slot) {
  const uint32_t bits = noise::word_of(noise::add(score, 0.0f));  // 0 and -0 are the same
  const uint32_t ordered = bits ^ (uint32_t(int32_t(bits) >> 31) | 0x80000000u);
  const uint32_t low = uint32_t(~id) << 4 | (kMaxTopk - 1 - slot);
  return uint64_t(ordered) << 32 | low;
}

}  // namespace reasonkern
