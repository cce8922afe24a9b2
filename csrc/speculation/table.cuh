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

// The newest tokens up to a node, its own first; -1: missing.
template <int kWindow>
struct alignas(16) Window {
  int32_t tokens[kWindow];
};

// What every level of a request reads, in shared memory: from global memory each first touch would
// wait on the way from a level to the next.
template <int kWindow>
struct DraftShared {
  int32_t* seen;             // look-ups: hits by order, misses
  Window<kWindow>* windows;  // by node, as the rest
  int32_t *child_index, *level_nodes, *child_ptr;

  static constexpr unsigned kHead = 32;  // bytes before the windows

  __device__ explicit DraftShared(int nodes)
      : seen(dynamic_shared<int32_t>()),
        windows(dynamic_shared<Window<kWindow>>(kHead)),
        child_index(dynamic_shared<int32_t>(kHead + sizeof(Window<kWindow>) * unsigned(nodes))),
        level_nodes(child_index + nodes),
        child_ptr(level_nodes + nodes) {}

  static unsigned bytes(int nodes) {
    return kHead + (sizeof(Window<kWindow>) + 3 * 4) * unsigned(nodes) + 4;
  }

  __device__ void load_tree(const DraftParams& p) const {
    for (int i = int(threadIdx.x); i <= p.nodes; i += int(blockDim.x)) {
      child_ptr[i] = p.child_ptr[i];
      if (i + 1 < p.nodes) child_index[i] = p.child_index[i];
      if (i < p.inner_nodes) level_nodes[i] = p.level_nodes[i];
    }
  }
};

// A request's constants, of every thread.
struct DraftRequest {
  int64_t index, seed, position;
  float temperature;
  int32_t context;  // lane i: the i-th newest token
  int32_t order;    // of the lane's look-ups, eight lanes each; 0: none
  uint64_t start;   // of the hashes

  __device__ DraftRequest(const DraftParams& p, int64_t index)
      : index(index),
        seed(p.seed[index]),
        position(p.position[index]),
        temperature(p.temperature[index]),
        context(-1),
        order(0) {
    const int lane = int(threadIdx.x % 32), back = p.table.window - 1 - lane;
    // What fits no token is in no entry either: as good as missing.
    const int64_t token = back >= 0 ? p.context[index * p.context_stride + back] : -1;
    if (token <= INT32_MAX) context = int32_t(token);
    const int64_t scope = p.scope == nullptr ? 0 : p.scope[index];
    if (scope < 0 || scope >= p.table.scopes) return;
    start = hash_start(scope, p.table.epochs[scope]);
    if (lane / kWays < p.table.num_orders) order = p.table.orders[lane / kWays];
  }
};

// The slots of the way are on their way to the L2 while its key is compared: one wait, not two.
__device__ __forceinline__ void prefetch_slots(const Table& t, int64_t entry) {
#if defined(__CUDACC__)
  const int32_t* slots = t.slots + entry * t.topk;
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(slots)));
  asm volatile("prefetch.global.L2 [%0];" ::"l"(__cvta_generic_to_global(slots + t.topk - 1)));
#endif
}

// The entry of the longest order that is in the table: eight lanes to an order, one to a way.
// Returns the order's number, or -1; every lane gets the same. A level's time is that of its
// dependent instructions, so no step branches.
template <int kWindow>
__device__ __forceinline__ int find_entry(const Table& t, const DraftRequest& request,
                                          const Window<kWindow>& window, int64_t& entry) {
  uint64_t h = request.start;
  bool present = request.order > 0;
#pragma unroll
  for (int i = 0; i < kWindow; ++i) {
    const bool inside = i < request.order;
    const uint64_t next = hash_step(h, uint32_t(window.tokens[i]));
    present = present && (!inside || window.tokens[i] >= 0);
    h = inside ? next : h;
  }
  const uint64_t key = key_of(h, request.order);
  const int64_t at = set_of(key, t.sets) * kWays + threadIdx.x % kWays;
  bool match = false;
  if (present) {
    const uint64_t held = t.keys[at];
    prefetch_slots(t, at);
    match = held == key;
  }
  const unsigned found = __ballot_sync(kFullMask, match);
  const int first = found == 0 ? 0 : __ffs(int(found)) - 1;
  entry = shuffle_from(at, first);
  return found == 0 ? -1 : first / kWays;
}

// How many lanes hold something that goes before this lane's candidate: a larger number. All
// shuffles are under way at once; lanes from topk on hold nothing.
__device__ __forceinline__ int rank_among(bool used, float score, int32_t id, int topk) {
  const uint32_t word = noise::word_of(noise::add(score, 0.0f));  // 0 and -0 are the same
  const uint32_t high = word ^ (uint32_t(int32_t(word) >> 31) | 0x80000000u);
  const uint64_t mine = used ? uint64_t(high) << 32 | uint32_t(~id) : 0;
  int rank = 0;
#pragma unroll
  for (int other = 0; other < kMaxTopk; ++other) {
    if (other % 4 == 0 && other >= topk) break;
    rank += shuffle_from(mine, other) > mine;
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
template <int kWindow>
__device__ __forceinline__ void draw_children(const DraftParams& p, const DraftShared<kWindow>& s,
                                              const DraftRequest& request, int node, int level,
                                              Window<kWindow> window, int64_t entry) {
  const Table& t = p.table;
  const int lane = threadIdx.x % 32;
  const int first = s.child_ptr[node], children = s.child_ptr[node + 1] - first;
  const ChildDraw draw =
      draw_at(p.kind, request.seed, request.position, level, request.temperature);
  float probability = 1, score = 0;
  int32_t id = -1;
  if (lane < t.topk) id = read_slot(t, entry * t.topk + lane, entry, probability);
  const bool used = id >= 0;
  if (used) score = score_of(draw, probability, id);
  const int rank = rank_among(used, score, id, t.topk);
  if (used && rank < children) {
#pragma unroll
    for (int i = kWindow - 1; i > 0; --i) window.tokens[i] = window.tokens[i - 1];
    window.tokens[0] = id;
    s.windows[s.child_index[first + rank]] = window;
  }
  if (p.kind == kRejection) {
    store_law(p, request.index * p.nodes + node, draw, used, id, probability, rank);
  }
}

// Before the first level: everything is empty but the root.
template <int kWindow>
__device__ __forceinline__ void start_request(const DraftParams& p, const DraftShared<kWindow>& s,
                                              const DraftRequest& request) {
  for (int node = 1 + int(threadIdx.x); node < p.nodes; node += int(blockDim.x)) {
    s.windows[node].tokens[0] = -1;
  }
  if (threadIdx.x < kWindow) s.windows[0].tokens[threadIdx.x] = request.context;
  if (p.kind != kRejection) return;
  const int64_t slots = int64_t(p.nodes) * p.table.topk;
  for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
    p.q_ids[request.index * slots + i] = -1;
    p.q_logprob[request.index * slots + i] = -INFINITY;
  }
}

// A warp per node of a level; the nodes of level d have depth d, the first is the root.
template <int kWindow>
__device__ __forceinline__ void draft_levels(const DraftParams& p, const DraftShared<kWindow>& s,
                                             const DraftRequest& request) {
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  int begin = 0, end = 1;
  for (int level = 0; level < p.levels; ++level) {
    const int next = level + 1 < p.levels ? p.level_ptr[level + 2] : end;
    for (int i = begin + warp; i < end; i += warps) {
      const int node = s.level_nodes[i];
      const Window<kWindow> window = s.windows[node];
      if (window.tokens[0] < 0) continue;
      int64_t entry;
      const int order = find_entry(p.table, request, window, entry);
      if (order >= 0) draw_children(p, s, request, node, level, window, entry);
      if (threadIdx.x % 32 == 0) atomicAdd(s.seen + (order < 0 ? int(kMisses) : order), 1);
    }
    begin = end, end = next;
    __syncthreads();
  }
}

constexpr int kDraftThreads = 512;  // a warp for each node of a level of the usual trees

// kWindow: at least the table's.
template <int kWindow>
__global__ void __launch_bounds__(kDraftThreads, 2) table_draft_kernel(DraftParams p) {
  const DraftShared<kWindow> s(p.nodes);
  if (threadIdx.x <= kMaxOrders) s.seen[threadIdx.x] = 0;
  for (int64_t index = blockIdx.x; index < p.batch; index += gridDim.x) {
    const DraftRequest request(p, index);
    if (index == blockIdx.x) s.load_tree(p);  // on its way together with the request
    start_request(p, s, request);
    __syncthreads();
    draft_levels(p, s, request);
    for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
      const int32_t token = s.windows[node].tokens[0], root = s.windows[0].tokens[0];
      p.tokens[index * p.nodes + node] = token >= 0 ? token : root >= 0 ? root : 0;
      p.valid[index * p.nodes + node] = token >= 0;
    }
    __syncthreads();
  }
  if (threadIdx.x <= kMaxOrders) count(p.table.counters + threadIdx.x, s.seen[threadIdx.x]);
}

// Calls launch(kernel, bytes of shared memory) with the kernel of a table's window.
template <class Launch>
void with_draft_kernel(const DraftParams& p, const Launch& launch) {
  constexpr int kUsual = 4;
  if (p.table.window <= kUsual) {
    launch(table_draft_kernel<kUsual>, DraftShared<kUsual>::bytes(p.nodes));
  } else {
    launch(table_draft_kernel<kMaxWindow>, DraftShared<kMaxWindow>::bytes(p.nodes));
  }
}

}  // namespace reasonkern
