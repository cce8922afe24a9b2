// Device code of the table's drafts: one block per request, level by level, a warp per node.
// Results are those of reasonkern/speculation/reference_table.py to the bit.
#pragma once

#include "../common/reduce.cuh"
#include "table.h"

namespace reasonkern {

__device__ __forceinline__ void count(int64_t* counter, int64_t n) {
  using Word = unsigned long long;
  if (n != 0) atomicAdd(reinterpret_cast<Word*>(counter), static_cast<Word>(n));
}

// ---- drafting

// What every level of a request reads, in shared memory: from global memory each first touch would
// wait on the way from a level to the next.
struct DraftShared {
  int64_t* context;  // window
  int32_t* seen;     // look-ups: hits by order, misses
  int32_t *tokens, *parents, *depths, *child_index, *level_nodes, *child_ptr;  // by node

  static constexpr unsigned kHead = 8 * kMaxWindow + 4 * 8;  // bytes before the tokens

  __device__ explicit DraftShared(int nodes)
      : context(dynamic_shared<int64_t>()),
        seen(dynamic_shared<int32_t>(8 * kMaxWindow)),
        tokens(dynamic_shared<int32_t>(kHead)),
        parents(tokens + nodes),
        depths(parents + nodes),
        child_index(depths + nodes),
        level_nodes(child_index + nodes),
        child_ptr(level_nodes + nodes) {}

  __device__ void load_tree(const DraftParams& p) const {
    const int levels = p.level_ptr[p.levels];
    for (int i = int(threadIdx.x); i <= p.nodes; i += int(blockDim.x)) {
      child_ptr[i] = p.child_ptr[i];
      if (i < p.nodes) parents[i] = p.parents[i], depths[i] = p.depths[i];
      if (i + 1 < p.nodes) child_index[i] = p.child_index[i];
      if (i < levels) level_nodes[i] = p.level_nodes[i];
    }
    if (threadIdx.x <= kMaxOrders) seen[threadIdx.x] = 0;
  }
};

inline unsigned draft_shared_bytes(int nodes) {
  return DraftShared::kHead + 4 * (6 * unsigned(nodes) + 1);
}

// A request's constants, of every thread.
struct DraftRequest {
  int64_t index, seed, position;
  float temperature;
  uint64_t start;  // of the hashes
  bool known;      // the scope

  __device__ DraftRequest(const DraftParams& p, int64_t index)
      : index(index),
        seed(p.seed[index]),
        position(p.position[index]),
        temperature(p.temperature[index]) {
    const int64_t scope = p.scope == nullptr ? 0 : p.scope[index];
    known = scope >= 0 && scope < p.table.scopes;
    start = known ? hash_start(scope, p.table.epochs[scope]) : 0;
  }
};

// Tokens back from a node: through its ancestors, then through the context.
struct Window {
  const DraftShared& shared;
  int node, at;

  __device__ int64_t operator()() {
    if (node == 0) return shared.context[at--];
    const int64_t token = shared.tokens[node];
    node = shared.parents[node];
    return token;
  }
};

// The way's candidates are on their way to the L2 while its key is compared: one wait, not two.
__device__ __forceinline__ void prefetch_slots(const Table& t, int64_t entry) {
#if defined(__CUDACC__)
  const int32_t* slots = t.slots + entry * t.topk;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(slots)));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(slots + t.topk - 1)));
#endif
}

// The entry of the longest order that is in the table: eight lanes to an order, one to a way.
// Returns the order, or -1; every lane gets the same.
__device__ __forceinline__ int find_entry(const DraftParams& p, const DraftShared& s,
                                          const DraftRequest& request, int node, int64_t& entry) {
  const Table& t = p.table;
  const int lane = threadIdx.x % 32, order = lane / kWays, way = lane % kWays;
  int64_t at = 0;
  bool match = false;
  if (request.known && order < t.num_orders) {
    Window window{s, node, t.window - 1};
    uint64_t h = request.start;
    bool present = true;
    for (int i = 0; i < t.orders[order] && present; ++i) {
      const int64_t token = window();
      present = token >= 0;
      h = hash_step(h, uint64_t(token));
    }
    const uint64_t key = key_of(h, t.orders[order]);
    at = set_of(key, t.sets) * kWays + way;
    if (present) prefetch_slots(t, at);
    match = present && t.keys[at] == key;
  }
  const unsigned found = __ballot_sync(kFullMask, match);
  const int first = found == 0 ? 0 : __ffs(int(found)) - 1;
  entry = __shfl_sync(kFullMask, at, first);
  return found == 0 ? -1 : first / kWays;
}

// How many lanes hold something that goes before this lane's candidate. All shuffles are under way
// at once; lanes from kMaxTopk on hold nothing.
__device__ __forceinline__ int rank_among(bool used, float score, int32_t id) {
  const unsigned there = __ballot_sync(kFullMask, used);
  int rank = 0;
#pragma unroll
  for (int other = 0; other < kMaxTopk; ++other) {
    const float its_score = __shfl_sync(kFullMask, score, other);
    const int32_t its_id = __shfl_sync(kFullMask, id, other);
    rank += (there >> other & 1) != 0 && goes_before(its_score, its_id, score, id);
  }
  return rank;
}

// Lane k stores slot k of a node's law, normalised over the slots in slot order.
__device__ __forceinline__ void store_law(const DraftParams& p, int64_t node_at,
                                          const ChildDraw& draw, bool used, int32_t id,
                                          float probability, int rank) {
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
__device__ __forceinline__ void draw_children(const DraftParams& p, const DraftShared& s,
                                              const DraftRequest& request, int node,
                                              int64_t entry) {
  const Table& t = p.table;
  const int lane = threadIdx.x % 32;
  const ChildDraw draw =
      draw_at(p.kind, request.seed, request.position, s.depths[node], request.temperature);
  float probability = 1, score = 0;
  int32_t id = -1;
  if (lane < t.topk) id = read_slot(t, entry * t.topk + lane, entry, probability);
  const bool used = id >= 0;
  if (used) score = score_of(draw, probability, id);
  const int rank = rank_among(used, score, id);
  const int first = s.child_ptr[node], children = s.child_ptr[node + 1] - first;
  if (used && rank < children) s.tokens[s.child_index[first + rank]] = id;
  if (p.kind == kRejection) {
    store_law(p, request.index * p.nodes + node, draw, used, id, probability, rank);
  }
}

// Before the first level: everything is empty but the root.
__device__ __forceinline__ void start_request(const DraftParams& p, const DraftShared& s,
                                              int64_t request) {
  const int64_t* context = p.context + request * p.context_stride;
  const int64_t last = context[p.table.window - 1];
  for (int i = int(threadIdx.x); i < p.table.window; i += int(blockDim.x))
    s.context[i] = context[i];
  for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
    s.tokens[node] = node == 0 && last >= 0 ? int32_t(last) : -1;
  }
  if (p.kind != kRejection) return;
  const int64_t slots = int64_t(p.nodes) * p.table.topk;
  for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
    p.q_ids[request * slots + i] = -1;
    p.q_logprob[request * slots + i] = -INFINITY;
  }
}

// A warp per node of a level.
__device__ __forceinline__ void draft_levels(const DraftParams& p, const DraftShared& s,
                                             const DraftRequest& request) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int begin = 0;
  for (int level = 0; level < p.levels; ++level) {
    const int end = p.level_ptr[level + 1];
    for (int i = begin + warp; i < end; i += warps) {
      const int node = s.level_nodes[i];
      if (s.tokens[node] < 0) continue;
      int64_t entry;
      const int order = find_entry(p, s, request, node, entry);
      if (threadIdx.x % 32 == 0) atomicAdd(s.seen + (order < 0 ? int(kMisses) : order), 1);
      if (order >= 0) draw_children(p, s, request, node, entry);
    }
    begin = end;
    __syncthreads();
  }
}

constexpr int kDraftThreads = 512;  // a warp for each node of a level of the usual trees

__global__ void __launch_bounds__(kDraftThreads) table_draft_kernel(DraftParams p) {
  const DraftShared s(p.nodes);
  s.load_tree(p);
  for (int64_t index = blockIdx.x; index < p.batch; index += gridDim.x) {
    const DraftRequest request(p, index);
    start_request(p, s, index);
    __syncthreads();
    draft_levels(p, s, request);
    for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
      const int32_t token = s.tokens[node], root = s.tokens[0];
      p.tokens[index * p.nodes + node] = token >= 0 ? token : root >= 0 ? root : 0;
      p.valid[index * p.nodes + node] = token >= 0;
    }
    __syncthreads();
  }
  if (threadIdx.x <= kMaxOrders) count(p.table.counters + threadIdx.x, s.seen[threadIdx.x]);
}

}  // namespace reasonkern
