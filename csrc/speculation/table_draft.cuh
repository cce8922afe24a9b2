// Device code of the table's drafts: one block per request, a warp per chain of first children.
// Results are those of reasonkern/speculation/reference_table.py to the bit.
#pragma once

#include "table.cuh"

namespace reasonkern {

// A node's children take the candidates by rank; `window`: a child's, its own token the best one.
template <int kWindow>
__device__ __forceinline__ void decide_children(const DraftShared<kWindow>& s, int node, int topk,
                                                const Window<kWindow>& window,
                                                const Candidate& mine) {
  const int lane = int(threadIdx.x % 32), children = s.children(node);
  const int32_t* child = s.child_index + s.child_ptr[node];
  if (children == 1) {  // as most have: no ranks
    if (lane == 0) s.put(child[0], 0, window.tokens[0]);
    return;
  }
  const int rank = rank_among(mine.place, topk);
  const bool taken = lane < kMaxTopk && mine.place != 0 && rank < children;
  if (taken && rank > 0) {  // heads of chains of other warps
#pragma unroll
    for (int i = 1; i < kWindow; ++i) s.put(child[rank], i, window.tokens[i]);
  }
  __threadfence_block();
  const int used = __popc(__ballot_sync(kFullMask, mine.place != 0));
  if (taken) s.put(child[rank], 0, mine.id);
  for (int i = used + lane; i < children; i += 32) s.put(child[i], 0, -1);
}

// What most drafts are: slots are all there is of candidates, and no laws are returned. These have
// a kernel of their own, half as long.
inline bool is_plain(const DraftParams& p) {
  return p.table.sums == nullptr && p.table.high == nullptr && p.kind != kRejection;
}

template <bool kPlain>
__device__ __forceinline__ Table known(Table t) {
  if (kPlain) t.sums = nullptr, t.high = nullptr;  // as they are
  return t;
}

// A warp drafts from a node to its first child, that one's first child and so on, without a stop:
// the longest such chain is what a draft takes. Other children start chains of their own. Each
// lane counts a kind of the look-ups' outcomes in `seen`.
template <bool kPlain, int kWindow>
__device__ __forceinline__ void draft_chain(const DraftParams& p, const DraftShared<kWindow>& s,
                                            const DraftRequest& request, const SetReader& reader,
                                            int node, int& seen) {
  int level = p.depths[node];
  Window<kWindow> window = s.await(node);
  LookUp look_up(reader, key_of_window(request, window));
  for (bool more = true; more; ++level) {
    const int child = s.child_index[s.child_ptr[node]];
    more = s.children(child) > 0;
    const ChildDraw draw =
        settled(draw_at(p.kind, request.seed, request.position, level, request.temperature));
    Candidate mine;
    int found = -1;
    const bool there = window.tokens[0] >= 0;
    if (there) {
      found = look_up.find();
      if (found >= 0) {
        mine = candidate_of(known<kPlain>(p.table), request, window, draw, look_up, s.slots, found);
      }
    }
    const int best = best_of(mine.place), from = best < 0 ? 0 : best;
    const int32_t token = __shfl_sync(kFullMask, mine.id, from);
    if (more && best >= 0) {  // the rest is done while it is on its way
      __syncwarp();           // all have read the slots
      look_up = LookUp(reader, key_of_child(request, mine, from, window.then(token)));
    }
    window = window.then(best < 0 ? -1 : token);
    if (!kPlain && p.kind == kRejection && found >= 0) {
      store_law(p, request.index * p.nodes + node, draw, mine, best);
    }
    decide_children(s, node, p.table.topk, window, mine);
    const unsigned outcome = found < 0 ? unsigned(kMisses) : unsigned(found) / kWays;
    seen += there && request.lane == outcome;
    node = child;
  }
}

// Before the first chain: nothing is decided but the root.
template <bool kPlain, int kWindow>
__device__ __forceinline__ void start_request(const DraftParams& p, const DraftShared<kWindow>& s,
                                              const DraftRequest& request) {
  for (int node = 1 + int(threadIdx.x); node < p.nodes; node += int(blockDim.x)) {
    s.windows[node].tokens[0] = kUndecided;
  }
  if (threadIdx.x == 0) *s.taken = int(blockDim.x / 32);
  if (threadIdx.x < kWindow) s.windows[0].tokens[threadIdx.x] = request.context;
  if (kPlain || p.kind != kRejection) return;
  const int64_t slots = int64_t(p.nodes) * p.table.topk;
  for (int64_t i = threadIdx.x; i < slots; i += blockDim.x) {
    p.q_ids[request.index * slots + i] = -1;
    p.q_logprob[request.index * slots + i] = -INFINITY;
  }
}

// Warps take inner nodes by depth, and chains where nodes are their heads. Whoever waits for a node
// waits for a chain that was taken before, however nodes are numbered: none waits for ever.
template <bool kPlain, int kWindow>
__device__ __forceinline__ void draft_chains(const DraftParams& p, const DraftShared<kWindow>& s,
                                             const DraftRequest& request) {
  const SetReader reader(p.table, s.slots, request.lane);
  int seen = 0;  // lane i: outcome i of the look-ups, as in s.seen
  for (int i = int(threadIdx.x / 32); i < p.inner_nodes; i = s.take()) {
    const int node = s.inner[i];
    if (s.is_head(node)) draft_chain<kPlain>(p, s, request, reader, node, seen);
  }
  if (request.lane <= kMaxOrders) atomicAdd(s.seen + request.lane, seen);
}

// Of 80 nodes ten are one chain; while its warp is busy, seven others can do the rest.
constexpr int kDraftThreads = 256;

// kWindow: at least the table's.
template <int kWindow, bool kPlain>
__global__ void __launch_bounds__(kDraftThreads, kWindow <= 4 ? 2 : 1)
    table_draft_kernel(DraftParams p) {
  const DraftShared<kWindow> s(p);
  if (threadIdx.x <= kMaxOrders) s.seen[threadIdx.x] = 0;
  for (int64_t index = blockIdx.x; index < p.batch; index += gridDim.x) {
    const DraftInput input(p, index);
    if (index == blockIdx.x) s.load_tree(p);  // on its way together with the request
    const DraftRequest request(p, index, input);
    start_request<kPlain>(p, s, request);
    __syncthreads();
    draft_chains<kPlain>(p, s, request);
    __syncthreads();
    for (int node = threadIdx.x; node < p.nodes; node += blockDim.x) {
      const int32_t token = s.windows[node].tokens[0], root = s.windows[0].tokens[0];
      p.tokens[index * p.nodes + node] = token >= 0 ? token : root >= 0 ? root : 0;
      p.valid[index * p.nodes + node] = token >= 0;
    }
    __syncthreads();
  }
  if (threadIdx.x <= kMaxOrders) count(p.table.counters + threadIdx.x, s.seen[threadIdx.x]);
}

template <int kWindow, class Launch>
void with_draft_kernel_of_window(const DraftParams& p, const Launch& launch) {
  const unsigned bytes = DraftShared<kWindow>::bytes(p, kDraftThreads);
  if (is_plain(p)) {
    launch(table_draft_kernel<kWindow, true>, bytes);
  } else {
    launch(table_draft_kernel<kWindow, false>, bytes);
  }
}

// Calls launch(kernel, bytes of shared memory) with the kernel of a draft.
template <class Launch>
void with_draft_kernel(const DraftParams& p, const Launch& launch) {
  constexpr int kUsual = 4;
  if (p.table.window <= kUsual) {
    with_draft_kernel_of_window<kUsual>(p, launch);
  } else {
    with_draft_kernel_of_window<kMaxWindow>(p, launch);
  }
}

}  // namespace reasonkern
