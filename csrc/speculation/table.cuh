// Device code of the table. Drafting: one block per request, level by level, a warp per node.
// Merging: rows to keys, a sort outside, then one warp per set, which handles its keys in order.
// Results are those of reasonkern/speculation/reference_table.py to the bit.
#pragma once

#include "../common/reduce.cuh"
#include "table.h"

namespace reasonkern {

constexpr uint64_t kSignBit = uint64_t(1) << 63;  // flipped, unsigned order is signed order
constexpr uint64_t kLeftOut = ~uint64_t(0);       // the key of an item that is not merged
constexpr int kPairIdBits = 27;                   // of a pair; all ones: no candidate
constexpr uint64_t kPairIdMask = (1u << kPairIdBits) - 1;

// What merging needs between its two kernels; items are (row, order) pairs.
struct MergeParams {
  UpdateParams update;
  uint64_t* keys;         // items, sign bit flipped; sorted for the merge
  int32_t* values;        // rows x width, units of 2^-30
  const int64_t* pairs;   // items x width, sorted: (rank of the key, id)
  const int64_t* totals;  // items x width: values of the pairs
  int64_t items;
};

__device__ __forceinline__ void count(int64_t* counter, int64_t n) {
  using Word = unsigned long long;
  if (n != 0) atomicAdd(reinterpret_cast<Word*>(counter), static_cast<Word>(n));
}

// ---- drafting

// Drafted tokens of the block's request, -1 where a node is not valid, and how to see back from
// one: through its ancestors, then through the context.
struct Window {
  const int32_t* tokens;
  const int32_t* parents;
  const int64_t* context;
  int node, at;

  __device__ int64_t operator()(int) {
    if (node == 0) return context[at--];
    const int64_t token = tokens[node];
    node = parents[node];
    return token;
  }
};

// The entry of the longest order that is in the table: eight lanes to an order, one to a way.
// Returns the order, or -1; every lane gets the same.
__device__ __forceinline__ int find_entry(const DraftParams& p, int64_t request, int node,
                                          const int32_t* tokens, int64_t& entry) {
  const Table& t = p.table;
  const int lane = threadIdx.x % 32, order = lane / kWays, way = lane % kWays;
  const int64_t scope = p.scope == nullptr ? 0 : p.scope[request];
  int64_t at = 0;
  bool match = false;
  if (scope >= 0 && scope < t.scopes && order < t.num_orders) {
    Window window{tokens, p.parents, p.context + request * p.context_stride, node, t.window - 1};
    uint64_t h = hash_start(scope, t.epochs[scope]);
    bool present = true;
    for (int i = 0; i < t.orders[order] && present; ++i) {
      const int64_t token = window(i);
      present = token >= 0;
      h = hash_step(h, uint64_t(token));
    }
    const uint64_t key = key_of(h, t.orders[order]);
    at = set_of(key, t.sets) * kWays + way;
    match = present && t.keys[at] == key;
  }
  const unsigned found = __ballot_sync(kFullMask, match);
  const int first = found == 0 ? 0 : __ffs(int(found)) - 1;
  entry = __shfl_sync(kFullMask, at, first);
  return found == 0 ? -1 : first / kWays;
}

// How many lanes below `lanes` hold something that goes before this lane's candidate.
template <class T>
__device__ __forceinline__ int rank_among(int lanes, bool used, T score, int32_t id) {
  int rank = 0;
  for (int other = 0; other < lanes; ++other) {
    const bool there = __shfl_sync(kFullMask, int(used), other) != 0;
    const T its_score = __shfl_sync(kFullMask, score, other);
    const int32_t its_id = __shfl_sync(kFullMask, id, other);
    rank += there && goes_before(its_score, its_id, score, id);
  }
  return rank;
}

// Lane k stores slot k of a node's law, normalised over the slots in slot order.
__device__ __forceinline__ void store_law(const DraftParams& p, int64_t node_at, const Draw& draw,
                                          bool used, int32_t id, float probability, int rank) {
  const int lane = threadIdx.x % 32;
  const float z = used ? tempered(draw, probability) : -INFINITY;
  float top = -1e30f, total = 0;
  for (int k = 0; k < p.table.topk; ++k) top = fmaxf(top, __shfl_sync(kFullMask, z, k));
  const float mass = exp_fixed(noise::add(z, -top));
  for (int k = 0; k < p.table.topk; ++k) {
    total = noise::add(total, __shfl_sync(kFullMask, mass, k));
  }
  const float lse = noise::add(top, -noise::minus_log(fmaxf(total, 1.0f)));
  float q = noise::add(z, -lse);
  if (!(draw.temperature > 0)) q = rank == 0 ? 0.0f : -INFINITY;
  if (lane < p.table.topk && used) {
    p.q_ids[node_at * p.table.topk + lane] = id;
    p.q_logprob[node_at * p.table.topk + lane] = q;
  }
}

// A warp draws the children of a node from an entry; lane k holds slot k.
__device__ __forceinline__ void draw_children(const DraftParams& p, int64_t request, int node,
                                              int64_t entry, int32_t* tokens) {
  const Table& t = p.table;
  const int lane = threadIdx.x % 32;
  const Draw draw =
      draw_at(p.kind, p.seed[request], p.position[request], p.depths[node], p.temperature[request]);
  float probability = 1, score = 0;
  int32_t id = -1;
  if (lane < t.topk) id = read_slot(t, entry * t.topk + lane, entry, probability);
  const bool used = id >= 0;
  if (used) score = score_of(draw, probability, id);
  const int rank = rank_among(t.topk, used, score, id);
  const int first = p.child_ptr[node], children = p.child_ptr[node + 1] - first;
  if (used && rank < children) tokens[p.child_index[first + rank]] = id;
  if (p.kind == kRejection) {
    store_law(p, request * p.nodes + node, draw, used, id, probability, rank);
  }
}

// Before the first level: everything is empty but the root.
__device__ __forceinline__ void start_request(const DraftParams& p, int64_t request,
                                              int32_t* tokens) {
  const int64_t last = p.context[request * p.context_stride + p.table.window - 1];
  for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
    tokens[node] = node == 0 && last >= 0 ? int32_t(last) : -1;
  }
  if (p.kind != kRejection) return;
  const int64_t slots = int64_t(p.nodes) * p.table.topk;
  for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
    p.q_ids[request * slots + i] = -1;
    p.q_logprob[request * slots + i] = -INFINITY;
  }
}

inline unsigned draft_shared_bytes(int nodes) { return unsigned(nodes) * 4; }

__global__ void __launch_bounds__(256) table_draft_kernel(DraftParams p) {
  int32_t* tokens = dynamic_shared<int32_t>();
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int32_t seen[kMaxOrders + 1] = {};
  for (int64_t request = blockIdx.x; request < p.batch; request += gridDim.x) {
    start_request(p, request, tokens);
    __syncthreads();
    for (int level = 0; level < p.levels; ++level) {
      for (int i = p.level_ptr[level] + warp; i < p.level_ptr[level + 1]; i += warps) {
        const int node = p.level_nodes[i];
        if (tokens[node] < 0) continue;
        int64_t entry;
        const int order = find_entry(p, request, node, tokens, entry);
#pragma unroll
        for (int k = 0; k <= kMaxOrders; ++k) seen[k] += k == (order < 0 ? kMisses : order);
        if (order >= 0) draw_children(p, request, node, entry, tokens);
      }
      __syncthreads();
    }
    for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
      const int32_t token = tokens[node], root = tokens[0];
      p.tokens[request * p.nodes + node] = token >= 0 ? token : root >= 0 ? root : 0;
      p.valid[request * p.nodes + node] = token >= 0;
    }
    __syncthreads();
  }
  if (threadIdx.x % 32 == 0) {
#pragma unroll
    for (int k = 0; k <= kMaxOrders; ++k) count(p.table.counters + k, seen[k]);
  }
}

// ---- merging

// The values of a row; false: it is not a distribution over the vocabulary.
__device__ __forceinline__ bool read_row(const UpdateParams& p, int64_t row, int32_t* values) {
  const int64_t* context = p.context + row * p.context_stride;
  bool fine = true;
  for (int i = 0; i < p.table.window; ++i) fine &= context[i] >= -1 && context[i] < p.vocab;
  int64_t total = 0;
  for (int k = 0; k < p.width; ++k) {
    const int64_t id = p.ids[row * p.width + k];
    float x = p.logits[row * p.width + k];
    if (p.lse != nullptr) x = noise::add(x, -p.lse[row]);
    const bool good = id >= -1 && id < p.vocab && (id < 0 || x <= 1.0f);
    values[k] = good && id >= 0 ? int32_t(fixed_of(exp_fixed(x))) : 0;
    fine &= good;
    total += values[k];
  }
  return fine && total <= kTotalLimit;
}

// A thread per row: its values and the keys of its orders.
__global__ void table_keys_kernel(MergeParams m) {
  const UpdateParams& p = m.update;
  const Table& t = p.table;
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*t.clock;
  int64_t merged = 0, rejected = 0;
  const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
  for (int64_t row = first; row < p.rows; row += int64_t(gridDim.x) * blockDim.x) {
    const int64_t* context = p.context + row * p.context_stride;
    const int64_t scope = p.scope == nullptr ? 0 : p.scope[row];
    bool active = false;
    for (int k = 0; k < p.width; ++k) active |= p.ids[row * p.width + k] != -1;
    active &= context[t.window - 1] != -1;
    const bool fine = read_row(p, row, m.values + row * p.width) && scope >= 0 && scope < t.scopes;
    merged += active && fine;
    rejected += active && !fine;
    uint64_t* keys = m.keys + row * t.num_orders;
    for (int k = 0; k < t.num_orders; ++k) keys[k] = kLeftOut ^ kSignBit;
    if (!active || !fine) continue;
    const auto token = [&](int i) { return context[t.window - 1 - i]; };
    visit_keys(t, hash_start(scope, t.epochs[scope]), token,
               [&](int k, uint64_t key) { keys[k] = key ^ kSignBit; });
  }
  count(t.counters + kRows, merged);
  count(t.counters + kRejected, rejected);
}

// The way of a key, or the one it takes; lane w looks at way w. Every lane gets the same.
__device__ __forceinline__ int64_t claim_entry(const Table& t, uint64_t key, bool& found) {
  const int lane = threadIdx.x % 32;
  const int64_t first = set_of(key, t.sets) * kWays;
  uint64_t order = ~uint64_t(0), held = 0;
  if (lane < kWays) {
    held = t.keys[first + lane];
    const uint64_t age = uint32_t(uint32_t(t.ages[first + lane]) - uint32_t(*t.clock) - 1);
    order = held == 0 ? 0 : 1 + (age << 16 | uint16_t(t.counts[first + lane]));
  }
  const unsigned match = __ballot_sync(kFullMask, lane < kWays && held == key);
  found = match != 0;
  if (found) return first + __ffs(int(match)) - 1;
  int way = 0;
  for (int other = 1; other < kWays; ++other) {
    const uint64_t best = __shfl_sync(kFullMask, order, way);
    if (__shfl_sync(kFullMask, order, other) < best) way = other;
  }
  if (lane == way) {
    count(t.counters + kEvictions, held != 0);
    t.keys[first + way] = key;
  }
  return first + way;
}

// The best candidates so far: lane k holds the one of rank k.
struct Best {
  int32_t id;
  int64_t sum;  // 0: none
};

__device__ __forceinline__ void insert(Best& best, int topk, int32_t id, int64_t sum) {
  const int lane = threadIdx.x % 32;
  const bool stays = lane < topk && best.sum > 0 && goes_before(best.sum, best.id, sum, id);
  const int rank = __popc(__ballot_sync(kFullMask, stays));
  const int32_t id_above = __shfl_up_sync(kFullMask, best.id, 1);
  const int64_t sum_above = __shfl_up_sync(kFullMask, best.sum, 1);
  if (lane == rank) {
    best = {id, sum};
  } else if (lane > rank) {
    best = {id_above, sum_above};
  }
}

// Items [begin, end) have one key; its pairs come in order of their ids.
__device__ __forceinline__ void merge_key(const MergeParams& m, int64_t begin, int64_t end) {
  const UpdateParams& p = m.update;
  const Table& t = p.table;
  const int lane = threadIdx.x % 32;
  bool found;
  const uint64_t key = m.keys[begin] ^ kSignBit;
  const int64_t entry = claim_entry(t, key, found);
  const int64_t n = found ? t.counts[entry] : 0, total = n + (end - begin);
  Slot old{-1, 0};
  if (found && lane < t.topk) old = load_slot(t, entry * t.topk + lane, n);
  Best best{-1, 0};
  int64_t at = begin * p.width;
  const int64_t stop = end * p.width;
  while (at < stop) {
    const int64_t pair = m.pairs[at];
    int64_t sum = 0;
    for (; at < stop && m.pairs[at] == pair; ++at) sum += m.totals[at];
    const uint64_t token = uint64_t(pair) & kPairIdMask;
    if (token == kPairIdMask || sum == 0) continue;
    const unsigned same = __ballot_sync(kFullMask, old.id == int32_t(token));
    if (same != 0) {
      const int owner = __ffs(int(same)) - 1;
      sum += __shfl_sync(kFullMask, old.sum, owner);
      if (lane == owner) old.id = -1;
    }
    insert(best, t.topk, int32_t(token), sum);
  }
  for (int k = 0; k < t.topk; ++k) {
    const int32_t id = __shfl_sync(kFullMask, old.id, k);
    const int64_t sum = __shfl_sync(kFullMask, old.sum, k);
    if (id >= 0) insert(best, t.topk, id, sum);
  }
  if (lane < t.topk) {
    store_slot(t, entry * t.topk + lane, best.id, best.sum, total, p.max_count);
  }
  if (lane == 0) {
    t.counts[entry] = int16_t(total < p.max_count ? total : p.max_count);
    t.ages[entry] = int32_t(uint32_t(*t.clock));
  }
  __syncwarp();
}

__device__ __forceinline__ bool same_set(const MergeParams& m, int64_t a, int64_t b) {
  const int64_t sets = m.update.table.sets;
  return set_of(m.keys[a] ^ kSignBit, sets) == set_of(m.keys[b] ^ kSignBit, sets);
}

// The warp at the first item of a set merges the set's keys, in order.
__global__ void __launch_bounds__(128) table_merge_kernel(MergeParams m) {
  const int64_t warps = int64_t(gridDim.x) * (blockDim.x / 32);
  const int64_t first = int64_t(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  for (int64_t item = first; item < m.items; item += warps) {
    if (item > 0 && same_set(m, item - 1, item)) continue;
    int64_t begin = item;
    while (begin < m.items && same_set(m, item, begin)) {
      int64_t end = begin + 1;
      while (end < m.items && m.keys[end] == m.keys[begin]) ++end;
      if (m.keys[begin] != (kLeftOut ^ kSignBit)) merge_key(m, begin, end);
      begin = end;
    }
  }
}

}  // namespace reasonkern
