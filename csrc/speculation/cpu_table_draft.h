// Drafting on the CPU. Memory is what costs: a thread takes a few requests through a level of the
// tree together, so that their cache lines are under way at the same time.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu_table_scores.h"

namespace reasonkern {
namespace cpu {

constexpr int kTogether = 8;  // requests per thread and level

// A node whose children are to be drawn.
struct Visit {
  int32_t request, node;
  uint64_t keys[kMaxOrders];
  int32_t present;  // bit k: order k has a key and is not looked up yet
  int32_t order;    // the one found, or -1
  int64_t entry;
};

inline void prefetch_keys(const Table& t, const Visit& v, int mask) {
  for (int k = 0; k < t.num_orders; ++k) {
    if (mask >> k & 1) __builtin_prefetch(t.keys + set_of(v.keys[k], t.sets) * kWays);
  }
}

inline void prepare_visit(const DraftParams& p, Visit& v) {
  const Table& t = p.table;
  const int64_t* context = p.context + v.request * p.context_stride;
  const int64_t* tokens = p.tokens + int64_t(v.request) * p.nodes;
  const int64_t scope = p.scope == nullptr ? 0 : p.scope[v.request];
  v.present = 0;
  v.order = -1;
  if (scope < 0 || scope >= t.scopes) return;
  int node = v.node, at = t.window - 1;
  const auto token = [&](int) {
    if (node > 0) {
      const int64_t x = tokens[node];
      node = p.parents[node];
      return x;
    }
    return context[at--];
  };
  visit_keys(t, hash_start(scope, t.epochs[scope]), token, [&](int k, uint64_t key) {
    v.keys[k] = key;
    v.present |= 1 << k;
  });
  prefetch_keys(t, v, v.present & -v.present);
}

// Looks in the orders of the mask, the longest (the lowest bit) first.
inline void find_entry(const Table& t, Visit& v, int mask) {
  for (int k = 0; k < t.num_orders; ++k) {
    if (!(mask >> k & 1)) continue;
    const int64_t first = set_of(v.keys[k], t.sets) * kWays;
    uint32_t ways = 0;  // all of them are compared: which one holds the key nobody can predict
    for (int way = 0; way < kWays; ++way) ways |= uint32_t(t.keys[first + way] == v.keys[k]) << way;
    if (ways == 0) continue;
    v.order = k;
    v.entry = first + __builtin_ctz(ways);
    const char* slots = reinterpret_cast<const char*>(t.slots + v.entry * t.topk);
    __builtin_prefetch(slots);
    __builtin_prefetch(slots + 4 * t.topk - 1);
    return;
  }
}

// Most contexts are known by their longest order: only the others fetch further lines.
inline void find_entries(const Table& t, std::vector<Visit>& visits) {
  for (Visit& v : visits) {
    const int longest = v.present & -v.present;
    find_entry(t, v, longest);
    v.present ^= longest;
    if (v.order < 0) prefetch_keys(t, v, v.present);
  }
  for (Visit& v : visits) {
    if (v.order < 0) find_entry(t, v, v.present);
  }
}

// The candidates of an entry in its slots' order.
struct Candidates {
  int32_t count;
  int32_t id[kMaxTopk];
  float p[kMaxTopk], score[kMaxTopk];
};

// Candidates come in order of their probability, so the empty slots are the last ones.
inline void load_candidates(const Table& t, int64_t entry, const CandidateKernels& kernels,
                            Candidates& c) {
  const int64_t at = entry * t.topk;
  c.count = 0;
  if (t.high == nullptr && t.sums == nullptr) {
    int32_t words[kMaxTopk] = {};
    std::memcpy(words, t.slots + at, sizeof(int32_t) * t.topk);
    while (c.count < t.topk && uint32_t(words[c.count]) >> kIdBits != 0) ++c.count;
    kernels.unpack(words, c.id, c.p);
  } else {
    std::fill_n(c.id, kMaxTopk, 0);
    std::fill_n(c.p, kMaxTopk, 1.0f);
    while (c.count < t.topk) {
      float p;
      const int32_t id = read_slot(t, at + c.count, entry, p);
      if (id < 0) break;
      c.id[c.count] = id;
      c.p[c.count++] = p;
    }
  }
}

// Normalised log-probabilities of the candidates, summed in slot order.
inline void store_law(const DraftParams& p, const Visit& v, const ChildDraw& draw,
                      const Candidates& c, int32_t best) {
  const int64_t at = (int64_t(v.request) * p.nodes + v.node) * p.table.topk;
  float top = -1e30f, total = 0;
  for (int i = 0; i < c.count; ++i) top = std::max(top, tempered(draw, c.p[i]));
  for (int i = 0; i < c.count; ++i) total += exp_fixed(tempered(draw, c.p[i]) - top);
  const float lse = top - noise::minus_log(std::max(total, 1.0f));
  for (int i = 0; i < c.count; ++i) {
    float q = tempered(draw, c.p[i]) - lse;
    if (!(draw.temperature > 0)) q = c.id[i] == best ? 0.0f : -INFINITY;
    p.q_ids[at + i] = c.id[i];
    p.q_logprob[at + i] = q;
  }
}

// Of a `rank_key`.
inline int32_t token_of(uint64_t key) { return int32_t(~(uint32_t(key) >> 4) & 0x0fffffffu); }

// Gives the children of a node the best candidates that are left.
inline void draw_children(const DraftParams& p, const Visit& v, const CandidateKernels& kernels) {
  Candidates c;
  load_candidates(p.table, v.entry, kernels, c);
  const ChildDraw draw = draw_at(p.kind, p.seed[v.request], p.position[v.request], p.depths[v.node],
                                 p.temperature[v.request]);
  kernels.score(draw, c.count, c.id, c.p, c.score);
  const int32_t* child = p.child_index + p.child_ptr[v.node];
  const int children = p.child_ptr[v.node + 1] - p.child_ptr[v.node];
  const int64_t row = int64_t(v.request) * p.nodes;
  uint64_t keys[kMaxTopk], last = ~uint64_t{0};
  for (int i = 0; i < c.count; ++i) keys[i] = rank_key(c.score[i], c.id[i], uint32_t(i));
  int32_t best_of_all = -1;
  for (int rank = 0; rank < std::min(children, c.count); ++rank) {
    uint64_t best = 0;
    for (int i = 0; i < c.count; ++i) best = std::max(best, keys[i] < last ? keys[i] : 0);
    last = best;
    const int32_t token = token_of(best);
    if (rank == 0) best_of_all = token;
    p.tokens[row + child[rank]] = token;
    p.valid[row + child[rank]] = true;
  }
  if (p.kind == kRejection) store_law(p, v, draw, c, best_of_all);
}

// An id outside the vocabulary or an unknown scope would only find nothing.
inline bool is_known(const DraftParams& p, int32_t request) {
  const int64_t* context = p.context + request * p.context_stride;
  for (int i = 0; i < p.table.window; ++i) {
    if (context[i] < -1 || context[i] >= p.vocab) return false;
  }
  const int64_t scope = p.scope == nullptr ? 0 : p.scope[request];
  return scope >= 0 && scope < p.table.scopes;
}

inline void start_request(const DraftParams& p, int32_t request) {
  const int64_t row = int64_t(request) * p.nodes;
  const int64_t last = p.context[request * p.context_stride + p.table.window - 1];
  std::fill_n(p.tokens + row, p.nodes, is_present(last) ? last : 0);
  std::fill_n(p.valid + row, p.nodes, false);
  p.valid[row] = is_present(last);
  if (p.kind != kRejection) return;
  std::fill_n(p.q_ids + row * p.table.topk, int64_t(p.nodes) * p.table.topk, int64_t(-1));
  std::fill_n(p.q_logprob + row * p.table.topk, int64_t(p.nodes) * p.table.topk, -INFINITY);
}

// Requests [begin, end); `seen` counts look-ups by result: each order, then none.
inline void draft_requests(const DraftParams& p, int32_t begin, int32_t end, int64_t* seen) {
  const CandidateKernels kernels = candidate_kernels();
  std::vector<Visit> visits;
  for (int32_t r = begin; r < end; ++r) start_request(p, r);
  for (int level = 0; level < p.levels; ++level) {
    visits.clear();
    for (int32_t r = begin; r < end; ++r) {
      for (int i = p.level_ptr[level]; i < p.level_ptr[level + 1]; ++i) {
        const int32_t node = p.level_nodes[i];
        if (p.valid[int64_t(r) * p.nodes + node]) visits.push_back({r, node, {}, 0, -1, 0});
      }
    }
    for (Visit& v : visits) prepare_visit(p, v);
    find_entries(p.table, visits);
    for (const Visit& v : visits) {
      ++seen[v.order < 0 ? kMisses : v.order];
      if (v.order >= 0) draw_children(p, v, kernels);
    }
  }
}

}  // namespace cpu
}  // namespace reasonkern
