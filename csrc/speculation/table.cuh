// Device code of what a draft's warps share, of look-ups, and of an entry's candidates.
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

  __device__ Window then(int32_t token) const {
    Window next;
    next.tokens[0] = token;
#pragma unroll
    for (int i = 1; i < kWindow; ++i) next.tokens[i] = tokens[i - 1];
    return next;
  }
};

constexpr int32_t kUndecided = -2;  // the own token of a node whose parent was not drawn from yet

// What a request's warps read and hand to each other, in shared memory.
template <int kWindow>
struct DraftShared {
  int32_t* seen;                                       // look-ups: hits by order, misses
  int32_t* taken;                                      // inner nodes that a warp has looked at
  Window<kWindow>* windows;                            // by node, as the rest
  int32_t *child_index, *parents, *inner, *child_ptr;  // inner: with children, by depth
  int32_t* slots;  // of the warp: those of the sets that it looks up

  static constexpr unsigned kHead = 32;  // bytes before the windows

  __device__ explicit DraftShared(const DraftParams& p)
      : seen(dynamic_shared<int32_t>()),
        taken(seen + kMaxOrders + 1),
        windows(dynamic_shared<Window<kWindow>>(kHead)),
        child_index(dynamic_shared<int32_t>(kHead + sizeof(Window<kWindow>) * unsigned(p.nodes))),
        parents(child_index + p.nodes),
        inner(parents + p.nodes),
        child_ptr(inner + p.nodes),
        slots(dynamic_shared<int32_t>(slots_at(p.nodes) + threadIdx.x / 32 * set_bytes(p.table))) {}

  static unsigned bytes(const DraftParams& p, unsigned threads) {
    return slots_at(p.nodes) + threads / 32 * set_bytes(p.table);
  }

  __host__ __device__ static unsigned slots_at(int nodes) {
    return (kHead + (sizeof(Window<kWindow>) + 4 * 4) * unsigned(nodes) + 4 + 15) / 16 * 16;
  }

  __host__ __device__ static unsigned set_bytes(const Table& t) {
    return unsigned(t.num_orders * kWays * t.topk) * 4;
  }

  __device__ void load_tree(const DraftParams& p) const {
    for (int i = int(threadIdx.x); i <= p.nodes; i += int(blockDim.x)) {
      child_ptr[i] = p.child_ptr[i];
      if (i + 1 < p.nodes) child_index[i] = p.child_index[i];
      if (i < p.nodes) parents[i] = p.parents[i];
      if (i < p.inner_nodes) inner[i] = p.level_nodes[i];
    }
  }

  __device__ int children(int node) const { return child_ptr[node + 1] - child_ptr[node]; }

  // Whether a chain of first children starts at the inner node.
  __device__ bool is_head(int node) const {
    return node == 0 || child_index[child_ptr[parents[node]]] != node;
  }

  // Place of the warp's next inner node; all that come before it are another's, or done.
  __device__ int take() const {
    int place = 0;
    if (threadIdx.x % 32 == 0) place = atomicAdd(taken, 1);
    return __shfl_sync(kFullMask, place, 0);
  }

  // A word of a node's window, atomically: warps wait for it without a barrier. The node's own
  // token, in place 0, comes last: it shows the others that the rest is there.
  __device__ void put(int node, int place, int32_t token) const {
    atomicExch(windows[node].tokens + place, token);
  }

  __device__ int32_t look(int node, int place) const {
    return atomicAdd(windows[node].tokens + place, 0);
  }

  __device__ Window<kWindow> await(int node) const {
    const int lane = int(threadIdx.x % 32);
    if (lane == 0) {
      while (look(node, 0) == kUndecided) __nanosleep(100);
    }
    __syncwarp();
    __threadfence_block();
    const int32_t mine = lane < kWindow ? look(node, lane) : 0;
    Window<kWindow> window;
#pragma unroll
    for (int i = 0; i < kWindow; ++i) window.tokens[i] = __shfl_sync(kFullMask, mine, i);
    return window;
  }
};

// Has the compiler work out x here, and neither later, where it is used, nor anew.
__device__ __forceinline__ float settled(float x) {
#if defined(__CUDACC__)
  asm volatile("" : "+f"(x));
#endif
  return x;
}
__device__ __forceinline__ uint64_t settled(uint64_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+l"(x));
#endif
  return x;
}
__device__ __forceinline__ uint32_t settled(uint32_t x) {
#if defined(__CUDACC__)
  asm volatile("" : "+r"(x));
#endif
  return x;
}
__device__ __forceinline__ ChildDraw settled(const ChildDraw& d) {
  return {d.seed, settled(d.position), settled(d.stream), d.temperature,
          settled(uint32_t(d.noisy)) != 0};
}

// Where a lane reads of a set, and what of its slots.
struct SetReader {
  const uint64_t* keys;  // of the lane's way in set 0
  const char* slots;     // of set 0, from the lane's first vector on
  char* copies;          // of the vectors, in shared memory
  int64_t sets;
  unsigned bytes, first;  // of a set's slots; of those before the lane's first vector
  static constexpr unsigned kVector = 16, kTurn = kWays * kVector;  // bytes: a lane's, eight lanes'

  __device__ SetReader(const Table& t, int32_t* copies, unsigned lane)
      : keys(t.keys + lane % kWays),
        sets(t.sets),
        bytes(kWays * 4 * unsigned(t.topk)),
        first(lane % kWays * kVector) {
    slots = reinterpret_cast<const char*>(t.slots) + first;
    slots = shuffle_from(slots, int(lane));  // else it is loaded anew where it is used
    this->copies = reinterpret_cast<char*>(copies) + lane / kWays * bytes + first;
  }
};

// What is loaded of a request: all of it is on its way before any of it is used.
struct DraftInput {
  int64_t seed, position;
  int64_t token = -1;     // lane i: the i-th newest one
  float temperature = 0;  // lane 0's: else the compiler waits for it before the loads of the tree
  int64_t scope = 0;
  int32_t epoch = 0;
  bool known;  // the scope

  __device__ DraftInput(const DraftParams& p, int64_t index)
      : seed(p.seed[index]), position(p.position[index]) {
    const int lane = int(threadIdx.x % 32), back = p.table.window - 1 - lane;
    if (lane == 0) temperature = p.temperature[index];
    if (back >= 0) token = p.context[index * p.context_stride + back];
    if (p.scope != nullptr) scope = p.scope[index];
    known = scope >= 0 && scope < p.table.scopes;
    if (known) epoch = p.table.epochs[scope];
  }
};

// A request's constants, of every thread.
struct DraftRequest {
  int64_t index, seed, position;
  unsigned lane;  // by way of a shuffle, as topk: else it is read anew wherever it is used
  int32_t topk;
  float temperature, reciprocal;
  int32_t context;  // lane i: the i-th newest token
  int32_t order;    // of the lane's keys, eight lanes each; 0: none
  uint64_t start;   // of the hashes

  __device__ DraftRequest(const DraftParams& p, int64_t index, const DraftInput& input)
      : index(index),
        seed(input.seed),
        position(input.position),
        lane(shuffle_from(threadIdx.x % 32, int(threadIdx.x % 32))),
        topk(__shfl_sync(kFullMask, lane == 0 ? p.table.topk : 0, 0)),
        temperature(__shfl_sync(kFullMask, input.temperature, 0)),
        reciprocal(settled(noise::divide(1.0f, temperature))),
        context(-1),
        order(0) {
    if (is_present(input.token)) context = int32_t(input.token);
    if (!input.known) return;
    start = hash_start(input.scope, input.epoch);
    if (int(lane / kWays) < p.table.num_orders) order = p.table.orders[lane / kWays];
  }

  // log_p over the temperature, rounded as a division is (Markstein): the reciprocal is rounded to
  // nearest, the first step leaves less than a unit of error, the second none. log_p is 0, or
  // between 2^-25 and 2^6: nothing overflows.
  __device__ float tempered(float log_p) const {
    float q = noise::mul(log_p, reciprocal);
    q = __fmaf_rn(__fmaf_rn(-temperature, q, log_p), reciprocal, q);
    return __fmaf_rn(__fmaf_rn(-temperature, q, log_p), reciprocal, q);
  }

  // Whether it has to be divided.
  __device__ bool extreme() const {
    return temperature > 0 && !(temperature > 0x1p-40f && temperature < 0x1p40f);
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

// The key of the lane's order; 0, which is no key: there is none.
template <int kWindow>
__device__ __forceinline__ uint64_t key_of_window(const DraftRequest& request,
                                                  const Window<kWindow>& window) {
  uint64_t h = request.start;
  bool present = request.order > 0;
#pragma unroll
  for (int i = 0; i < kWindow; ++i) {
    const bool inside = i < request.order;
    const uint64_t next = hash_step(h, uint32_t(window.tokens[i]));
    present = present && (!inside || window.tokens[i] >= 0);
    h = inside ? next : h;
  }
  const uint64_t key = settled(key_of(h, request.order));  // no branch around it
  return present ? key : 0;
}

// A look-up of the longest order that is in the table, eight lanes to an order, one to a way: first
// the loads, then the answer. A draft's time is that of its dependent instructions, so no step
// branches. The slots of all ways come to shared memory beside the keys: one trip, not two.
class LookUp {
 public:
  __device__ LookUp(const SetReader& r, uint64_t key)
      : key_(key), set_(uint32_t(set_of(key, r.sets))), held_(0) {
    if (key == 0) return;  // else all requests would ask for the one set of no key
    held_ = r.keys[uint64_t(set_) * kWays];
    const char* from = r.slots + uint64_t(set_) * r.bytes;
#pragma unroll
    for (unsigned i = 0; i < kWays * 4 * kMaxTopk; i += SetReader::kTurn) {
      if (r.first + i < r.bytes) copy_async(r.copies + i, from + i);
    }
  }

  // Returns the lane whose way it is, or -1; every lane gets the same.
  __device__ int find() const {
    const unsigned found = __ballot_sync(kFullMask, held_ == key_ && key_ != 0);
    wait_for_copies();
    __syncwarp();
    return __ffs(int(found)) - 1;
  }

  // The entry of the lane's way.
  __device__ int64_t entry() const { return int64_t(set_) * kWays + threadIdx.x % kWays; }

 private:
  uint64_t key_;
  uint32_t set_;
  uint64_t held_;
};

constexpr unsigned kLowerLanes = (1u << kMaxTopk) - 1;

// What a lane knows of slot lane % 16 of an entry.
struct Candidate {
  int32_t id = -1;
  float probability = 0;
  uint64_t place = 0;  // larger for one that goes before another; 0: unused, or of the upper half
  uint64_t child_key = 0;  // of the lane's order: of the child that takes slot lane % 8
};

// The key, of the lane's order, of the child that takes a candidate, whose lane is given and whose
// token comes first in the child's window. The keys of the first eight candidates, the most
// probable ones, are worked out beside the noise, before it is known which of them is drawn.
template <int kWindow>
__device__ __forceinline__ uint64_t key_of_child(const DraftRequest& request, const Candidate& mine,
                                                 int taken, const Window<kWindow>& child) {
  if (taken >= kWays) return key_of_window(request, child);
  return shuffle_from(mine.child_key, int(request.lane / kWays * kWays) + taken);
}

// Of the warp's lower half noise::exponential_of(u), of its upper -log p: two logarithms in one.
__device__ __forceinline__ float log_of_half(bool upper, float u, float p) {
  using namespace noise;
  const float x = upper ? p : add(1.0f, -u);
  const int32_t n = binade(x);
  return minus_log(n, !upper && n == 0 ? -u : add(mantissa(x, n), -1.0f));
}

// What a candidate of the lower half is ranked by, and its child's keys. The branch comes first,
// with a logarithm of its own, and parts nothing: the chains of instructions run side by side.
template <int kWindow>
__device__ __forceinline__ float set_score(const DraftRequest& request,
                                           const Window<kWindow>& window, const ChildDraw& draw,
                                           float p, Candidate& mine) {
  float tempered = 0;
  const bool extreme = request.extreme();
  if (extreme) tempered = noise::divide(-noise::minus_log(settled(p)), draw.temperature);
  const int32_t token = __shfl_sync(kFullMask, mine.id, int(request.lane % kWays));
  mine.child_key = settled(key_of_window(request, window.then(token)));
  const uint32_t word = noise_word(draw.seed, draw.position, draw.stream, uint32_t(mine.id));
  const float log = log_of_half(request.lane >= kMaxTopk, noise::uniform_of(word), p);
  const float log_p = -__shfl_sync(kFullMask, log, int(request.lane | kMaxTopk));
  if (!extreme) tempered = request.tempered(log_p);
  const float gumbel = settled(noise::minus_log(log));
  return draw.noisy ? noise::add(tempered, gumbel) : log_p;
}

// The lane of the candidate that goes before all others; -1: there is none. Places are
// distinct, most of them in their upper halves.
__device__ __forceinline__ int best_of(uint64_t place) {
  const uint32_t upper = uint32_t(place >> 32), top = __reduce_max_sync(kFullMask, upper);
  bool mine = place != 0 && upper == top;
  unsigned best = __ballot_sync(kFullMask, mine);
  if ((best & (best - 1)) != 0) {
    const uint32_t lower = mine ? uint32_t(place) : 0, most = __reduce_max_sync(kFullMask, lower);
    mine = mine && lower == most;
    best = __ballot_sync(kFullMask, mine);
  }
  return 31 - __clz(int(best));  // its one bit
}

// How many lanes hold something that goes before this lane's candidate, a larger number: each half
// of the warp counts half of the candidates. Lanes from topk on hold nothing. Ranks are distinct as
// places are: whoever waits for a node of no rank waits for ever.
__device__ __forceinline__ int rank_among(uint64_t mine, int topk) {
  static_assert(kMaxTopk == 16, "half a warp");
  mine = shuffle_from(mine, int(threadIdx.x % kMaxTopk));
  const int share = (topk + 1) / 2, first = threadIdx.x % 32 < kMaxTopk ? 0 : share;
  int rank = 0;
#pragma unroll
  for (int i = 0; i < kMaxTopk / 2; ++i) {
    if (i == 6 && share <= 6) break;  // as usual
    const uint64_t other = shuffle_from(mine, (first + i) % kMaxTopk);
    rank += i < share && other > mine;
  }
  return rank + __shfl_xor_sync(kFullMask, rank, kMaxTopk);
}

// Lane k stores slot k of a node's law, normalised over the slots in slot order.
__device__ __forceinline__ void store_law(const DraftParams& p, int64_t node_at,
                                          const ChildDraw& draw, const Candidate& mine, int best) {
  const int lane = threadIdx.x % 32;
  const bool used = mine.place != 0;
  const float z = used ? tempered(draw, mine.probability) : -INFINITY;
  float top = -1e30f, total = 0;
  for (int k = 0; k < p.table.topk; ++k) top = fmaxf(top, __shfl_sync(kFullMask, z, k));
  const float mass = exp_fixed(noise::add(z, -top));
  for (int k = 0; k < p.table.topk; ++k) {
    total = noise::add(total, __shfl_sync(kFullMask, mass, k));
  }
  const float lse = noise::add(top, -noise::minus_log(fmaxf(total, 1.0f)));
  float q = noise::add(z, -lse);
  if (!(draw.temperature > 0)) q = lane == best ? 0.0f : -INFINITY;
  if (lane < p.table.topk && used) {
    p.q_ids[node_at * p.table.topk + lane] = mine.id;
    p.q_logprob[node_at * p.table.topk + lane] = q;
  }
}

// The candidates of the entry that `lane` has found, for the children of a node.
template <int kWindow>
__device__ __forceinline__ Candidate candidate_of(const Table& t, const DraftRequest& request,
                                                  const Window<kWindow>& window,
                                                  const ChildDraw& draw, const LookUp& look_up,
                                                  const int32_t* slots, int lane) {
  const int last = request.topk - 1, own = int(request.lane % kMaxTopk);
  const int slot = own < last ? own : last;
  Candidate mine;
  if (t.sums == nullptr && t.high == nullptr) {
    mine.id = read_packed(t, 0, uint32_t(slots[lane * request.topk + slot]), mine.probability);
  } else {
    const int64_t entry = shuffle_from(look_up.entry(), lane);
    mine.id = read_slot(t, entry * t.topk + slot, entry, mine.probability);
  }
  const bool used = request.lane <= unsigned(last) && mine.id >= 0;
  const float score = set_score(request, window, draw, mine.probability, mine);
  const uint64_t place = rank_key(score, mine.id, uint32_t(own));
  mine.place = used ? place : 0;
  return mine;
}

}  // namespace reasonkern
