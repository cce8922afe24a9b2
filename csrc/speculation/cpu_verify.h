// One request on the CPU: its sample, or its walk down the tree.
#pragma once

#include "cpu_control.h"
#include "rejection.h"

namespace reasonkern {
namespace cpu {

inline RequestFilters filters_of(const RequestParams& r, int64_t b) {
  return {r.temperature[b], r.top_k[b], r.top_p[b], r.min_p[b]};
}

template <class E>
const E* row_pointer(const LogitRows& rows, int64_t b, int64_t node) {
  return static_cast<const E*>(rows.data) + b * rows.stride_b + node * rows.stride_n;
}

inline void apply_mask(Row& row, const LogitRows& rows, int64_t b, int64_t node) {
  if (rows.mask != nullptr) {
    row.mask(rows.mask + b * rows.mask_stride_b + node * rows.mask_stride_n);
  }
}

// Before mask and control.
inline void write_raw_statistics(const StatisticsParams& s, Row& row, int64_t out) {
  if (s.entropy_raw == nullptr) return;
  Moments m;
  s.entropy_raw[out] = row.moments(m) ? float(m.entropy()) : -kInf;
}

// After the choice. A bad row has no law.
inline void write_law_statistics(const StatisticsParams& s, Row& row, const Outcome& chosen,
                                 const Slot& slot, int64_t out) {
  if (s.entropy_raw == nullptr) return;
  Moments m;
  const bool law = !chosen.bad && row.moments(m);
  s.logprob[out] = law ? float(m.log_probability(row.logit(chosen.token))) : -kInf;
  s.entropy[out] = law ? float(row.kept_entropy()) : -kInf;
  s.confidence[out] = law ? float(row.confidence(m, kConfidenceTokens)) : -kInf;
  s.max_prob[out] = law ? float(1 / m.s) : -kInf;
  s.trigger[out] = slot.triggers(s.entropy[out]);
}

template <class E>
void sample_request(const SampleParams& p, Row& row, int64_t b) {
  const Slot slot(p.control, b);
  row.load(row_pointer<E>(p.rows, b, 0), p.rows.vocab, false);
  write_raw_statistics(p.statistics, row, b);
  apply_mask(row, p.rows, b, 0);
  slot.control(row, p.requests.temperature[b]);
  const NoiseKey key(p.requests.seed[b], p.requests.position[b], kTarget);
  const bool sound = row.filter(filters_of(p.requests, b));
  const Outcome chosen{sound ? row.choose(key, nullptr, 0, {-kInf, -1}) : row.fallback(), !sound};
  p.token[b] = chosen.token;
  write_law_statistics(p.statistics, row, chosen, slot, b);
}

struct Children {
  const int32_t *begin, *end;
};

// A walk's place: the request, the node whose row is read, its depth.
struct Place {
  int64_t b, node;
  int depth;
};

inline Children children_of(const VerifyParams& p, int64_t node) {
  return {p.child_index + p.child_ptr[node], p.child_index + p.child_ptr[node + 1]};
}

inline bool is_usable(const VerifyParams& p, int64_t b, int64_t node) {
  return p.valid[b * p.rows.nodes + node] && (p.num_nodes == nullptr || node < p.num_nodes[b]);
}

// An accepted child's token, else a draw from the residual law.
inline int64_t choose_by_rejection(const VerifyParams& p, const Row& row, const Place& at) {
  const uint64_t seed = p.requests.seed[at.b], position = p.requests.position[at.b];
  const int64_t entry = (at.b * p.rows.nodes + at.node) * p.entry;
  double s[kMaxEntry], r[kMaxEntry];
  int64_t mass[kMaxEntry];
  Rejection law{p.q_ids + entry, p.entry, s, r, 0, 0, 0, false, false};
  for (int i = 0; i < p.entry; ++i) mass[i] = row.mass(law.ids[i]);
  law.start(p.q_logprob + entry, mass, row.total_mass());
  const Children children = children_of(p, at.node);
  for (const int32_t* child = children.begin; child != children.end; ++child) {
    if (!is_usable(p, at.b, *child)) continue;
    const int64_t token = p.tokens[at.b * p.rows.nodes + *child];
    const double coin = coin_of(seed, position, at.depth, int(child - children.begin));
    if (law.test(token, coin)) return token;
  }
  const NoiseKey key(seed, position, stream_word(kResidual, at.depth));
  Best best{-kInf, -1};
  for (int i = 0; law.patched && i < p.entry; ++i) {
    if (law.ids[i] < 0 || law.ids[i] >= p.rows.vocab) continue;
    const float noise = gumbel_noise(seed, position, uint32_t(law.ids[i]), key.stream);
    best.offer(noise::add(law.log_weight(i, row.top_value()), noise), int(law.ids[i]));
  }
  return row.choose(key, law.ids, law.patched ? p.entry : 0, best);
}

inline Outcome choose_token(const VerifyParams& p, Row& row, const Slot& slot, const Place& at) {
  apply_mask(row, p.rows, at.b, at.node);
  slot.control(row, p.requests.temperature[at.b]);
  if (!row.filter(filters_of(p.requests, at.b))) return {row.fallback(), true};
  if (p.q_ids != nullptr && p.requests.temperature[at.b] != 0) {
    return {choose_by_rejection(p, row, at), false};
  }
  const NoiseKey key(p.requests.seed[at.b], p.requests.position[at.b] + at.depth, kTarget);
  return {row.choose(key, nullptr, 0, {-kInf, -1}), false};
}

inline bool is_eos(const VerifyParams& p, int64_t token) {
  return std::find(p.eos, p.eos + p.eos_count, token) != p.eos + p.eos_count;
}

// The child that holds the token, -1 when there is none.
inline int64_t find_child(const VerifyParams& p, const Place& at, int64_t token) {
  const Children children = children_of(p, at.node);
  for (const int32_t* child = children.begin; child != children.end; ++child) {
    if (is_usable(p, at.b, *child) && p.tokens[at.b * p.rows.nodes + *child] == token) {
      return *child;
    }
  }
  return -1;
}

// Rows of the outputs from `first` on, of request b.
inline void clear_outputs(const VerifyParams& p, int64_t b, int first) {
  const int64_t row = b * (p.depth + 1) + first, rows = p.depth + 1 - first;
  std::fill_n(p.out_tokens + row, rows, int64_t{-1});
  std::fill_n(p.path + row, rows, int64_t{-1});
  std::fill_n(p.lse + row, rows, -kInf);
  std::fill_n(p.topk_ids + row * p.topk, rows * p.topk, int64_t{-1});
  std::fill_n(p.topk_logits + row * p.topk, rows * p.topk, -kInf);
  for (float* x : {p.statistics.logprob, p.statistics.entropy, p.statistics.entropy_raw,
                   p.statistics.confidence, p.statistics.max_prob}) {
    if (x != nullptr) std::fill_n(x + row, rows, -kInf);
  }
  if (p.statistics.trigger != nullptr) std::fill_n(p.statistics.trigger + row, rows, false);
  if (first == 0) p.path[row] = 0;
}

template <class E>
void verify_request(const VerifyParams& p, Row& row, int64_t b) {
  const bool active = p.valid[b * p.rows.nodes];
  const int64_t limit = p.max_length != nullptr ? p.max_length[b] : p.depth + 1;
  int32_t status = 0;
  int length = 0;
  Slot slot(p.control, b);
  Place at{b, 0, 0};
  while (active && length < limit && at.node >= 0 && at.depth <= p.depth) {
    row.load(row_pointer<E>(p.rows, b, at.node), p.rows.vocab, true);
    const int64_t out = b * (p.depth + 1) + at.depth;
    row.statistics(p.topk, p.topk_ids + out * p.topk, p.topk_logits + out * p.topk, p.lse + out);
    write_raw_statistics(p.statistics, row, out);
    const Outcome outcome = choose_token(p, row, slot, at);
    if (outcome.bad) status |= kBadRow;
    if (outcome.token < 0) break;
    write_law_statistics(p.statistics, row, outcome, slot, out);
    const bool known = p.statistics.entropy != nullptr;
    slot.commit(outcome.token, known ? p.statistics.entropy[out] : -kInf,
                known ? p.statistics.confidence[out] : -kInf);
    p.out_tokens[out] = outcome.token;
    p.path[out] = at.node;
    ++length;
    if (is_eos(p, outcome.token)) {
      status |= kEos;
      break;
    }
    at = {b, find_child(p, at, outcome.token), at.depth + 1};
  }
  if (active && p.max_length != nullptr && length >= limit) status |= kCapped;
  clear_outputs(p, b, length);
  p.length[b] = length;
  p.status[b] = status;
}

}  // namespace cpu
}  // namespace reasonkern
