// Device code of the table's drafts: one block per request, level by level, a warp per node.
// Results are those of reasonkern/speculation/table_reference.py to the bit.
#pragma once

#include "../common/reduce.cuh"
#include "table.h"

namespace reasonkern {

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

}  // namespace reasonkern
