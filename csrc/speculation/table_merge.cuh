// Device code of the table's update: rows to keys, then a warp per set merges the set's keys in
// order. Where the items are few a warp finds its own by looking through all keys; where they are
// many they are sorted outside, by reasonkern/speculation/table_sorted.py. Results are those of
// reference_table.py to the bit.
#pragma once

#include "table.cuh"

namespace reasonkern {

constexpr uint64_t kSignBit = uint64_t(1) << 63;  // flipped, unsigned order is signed order
constexpr uint64_t kLeftOut = ~uint64_t(0);       // the key of an item that is not merged
constexpr int kPairIdBits = 27;                   // of a pair; all ones: no candidate
constexpr uint64_t kPairIdMask = (1u << kPairIdBits) - 1;

// What merging needs between its two kernels; items are (row, order) pairs.
struct MergeParams {
  UpdateParams update;
  uint64_t* keys;         // items, sign bit flipped; sorted where there are pairs
  int32_t* values;        // rows x width, units of 2^-30
  const int64_t* pairs;   // items x width, sorted: (rank of the key, id)
  const int64_t* totals;  // items x width: values of the pairs
  int32_t* sum_ids;       // few items: room for 2 x items x width
  int64_t* sums;
  int64_t items;
};

// ---- rows to keys

constexpr int kRowLanes = 16;  // of a row: one to a candidate, one to a token, one to an order
static_assert(kRowLanes >= kMaxTopk && kRowLanes >= kMaxWindow && kRowLanes >= kMaxOrders, "lanes");

// What the lanes of a row find out together; `first`: their first lane.
__device__ __forceinline__ bool any_of_row(bool mine, int first) {
  return (__ballot_sync(kFullMask, mine) >> first & 0xffff) != 0;
}

__device__ __forceinline__ int64_t sum_of_row(int64_t x) {
#pragma unroll
  for (int offset = 1; offset < kRowLanes; offset *= 2) x += shuffle_xor(x, offset);
  return x;
}

// Sixteen lanes per row: its values, and the keys of its orders.
__global__ void table_keys_kernel(MergeParams m) {
  const UpdateParams& p = m.update;
  const Table& t = p.table;
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*t.clock;
  const int lane = threadIdx.x % 32, slot = lane % kRowLanes, first = lane - slot;
  int merged = 0, rejected = 0;
  int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kRowLanes;
  const int64_t step = int64_t(gridDim.x) * blockDim.x / kRowLanes;
  for (; __any_sync(kFullMask, row < p.rows); row += step) {
    const bool inside = row < p.rows, candidate = inside && slot < p.width;
    const int64_t scope = p.scope == nullptr || !inside ? 0 : p.scope[row];
    const bool known = scope >= 0 && scope < t.scopes;
    const int64_t id = candidate ? p.ids[row * p.width + slot] : -1;
    float x = candidate ? p.logits[row * p.width + slot] : 0.0f;
    if (p.lse != nullptr && candidate) x = noise::add(x, -p.lse[row]);
    const int64_t token = inside && slot < t.window ? p.context[row * p.context_stride + slot] : -1;
    const bool good = id >= -1 && id < p.vocab && (id < 0 || x <= 1.0f);
    const int64_t value = good && id >= 0 ? fixed_of(exp_fixed(x)) : 0;  // at most e

    const bool bad = !good || token < -1 || token >= p.vocab || !known;
    const int64_t sum = sum_of_row(value);
    const bool fine = !any_of_row(bad, first) && sum <= kTotalLimit;
    if (candidate) m.values[row * p.width + slot] = fine ? int32_t(value) : 0;
    const bool any = any_of_row(id != -1, first);
    const int64_t newest = shuffle_from(token, first + t.window - 1);  // by all lanes: two rows
    const bool active = any && newest != -1;
    merged += inside && active && fine;
    rejected += inside && active && !fine;

    const int order = slot < t.num_orders ? t.orders[slot] : 0;
    uint64_t h = known ? hash_start(scope, t.epochs[scope]) : 0;
    bool present = active && fine;
    for (int i = 0; i < t.window; ++i) {
      const int64_t past = shuffle_from(token, first + t.window - 1 - i);
      present &= past >= 0 || i >= order;
      if (i < order) h = hash_step(h, uint64_t(past));
    }
    if (inside && order > 0) {
      m.keys[row * t.num_orders + slot] = (present ? key_of(h, order) : kLeftOut) ^ kSignBit;
    }
  }
  if (slot == 0) {
    count(t.counters + kRows, merged);
    count(t.counters + kRejected, rejected);
  }
}

// ---- a key's merge

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
struct RankedSum {
  int32_t id;
  int64_t sum;  // 0: none
};

__device__ __forceinline__ void insert(RankedSum& best, int topk, int32_t id, int64_t sum) {
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

// A key's merge by a warp: find its entry, add the sums of its tokens one by one, each token once
// and with a sum above 0, store.
class KeyMerge {
 public:
  __device__ KeyMerge(const UpdateParams& p, uint64_t key, int64_t rows) : p_(p) {
    const Table& t = p.table;
    bool found;
    entry_ = claim_entry(t, key, found);
    const int64_t n = found ? t.counts[entry_] : 0;
    total_ = n + rows;
    if (found && lane() < t.topk) old_ = load_slot(t, entry_ * t.topk + lane(), n);
  }

  __device__ void add(int32_t token, int64_t sum) {
    const unsigned same = __ballot_sync(kFullMask, old_.id == token);
    if (same != 0) {
      const int owner = __ffs(int(same)) - 1;
      sum += __shfl_sync(kFullMask, old_.sum, owner);
      if (lane() == owner) old_.id = -1;
    }
    insert(best_, p_.table.topk, token, sum);
  }

  __device__ void store() {
    const Table& t = p_.table;
    for (int k = 0; k < t.topk; ++k) {  // tokens that the rows do not have
      const int32_t id = __shfl_sync(kFullMask, old_.id, k);
      const int64_t sum = __shfl_sync(kFullMask, old_.sum, k);
      if (id >= 0) insert(best_, t.topk, id, sum);
    }
    if (lane() < t.topk) {
      store_slot(t, entry_ * t.topk + lane(), best_.id, best_.sum, total_, p_.max_count);
    }
    if (lane() == 0) {
      t.counts[entry_] = int16_t(total_ < p_.max_count ? total_ : p_.max_count);
      t.ages[entry_] = int32_t(uint32_t(*t.clock));
    }
    __syncwarp();
  }

 private:
  __device__ static int lane() { return int(threadIdx.x % 32); }

  const UpdateParams& p_;
  int64_t entry_, total_;
  Slot old_{-1, 0};
  RankedSum best_{-1, 0};
};

// ---- few items: no sort, each warp looks through all keys

// Sums by token, in shared or global memory: an open hash that the lanes of a warp fill together.
struct TokenSums {
  int32_t* ids;  // -1: free
  int64_t* sums;
  uint32_t size;  // more than there are tokens

  __device__ void clear() const {
    for (uint32_t i = threadIdx.x % 32; i < size; i += 32) ids[i] = -1, sums[i] = 0;
    __syncwarp();
  }

  __device__ void add(int32_t id, int64_t value) const {
    uint32_t at = uint32_t(uint64_t(uint32_t(id) * 0x9e3779b9u) * size >> 32);
    while (true) {
      const int32_t held = atomicCAS(ids + at, -1, id);
      if (held == -1 || held == id) break;
      at = at + 1 < size ? at + 1 : 0;
    }
    count(sums + at, value);
  }
};

// Where a key stands among all items of the call.
struct KeyPlace {
  int before;     // items of lower keys
  int rows;       // items of the key
  uint64_t next;  // the lowest higher key of the set; kLeftOut: none
  bool leads;     // no item of the set has a lower key, or the same one and comes first
};

__device__ inline KeyPlace place_of_key(const MergeParams& m, const uint64_t* keys, uint64_t key,
                                        int item) {
  const int64_t sets = m.update.table.sets, set = set_of(key, sets);
  KeyPlace place{0, 0, kLeftOut, true};
  for (int j = int(threadIdx.x % 32); j < m.items; j += 32) {
    const uint64_t other = keys[j];
    place.before += other < key;
    place.rows += other == key;
    if (other == kLeftOut || set_of(other, sets) != set) continue;
    if (other < key || (other == key && j < item)) place.leads = false;
    if (other > key && other < place.next) place.next = other;
  }
  return warp_reduce(place, [](KeyPlace a, const KeyPlace& b) {
    a.before += b.before, a.rows += b.rows;
    a.next = a.next < b.next ? a.next : b.next;
    a.leads = a.leads && b.leads;
    return a;
  });
}

__device__ __forceinline__ int nth_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffs(int(bits)) - 1;
}

// Adds up the candidates of the items of a key.
__device__ inline void sum_tokens(const MergeParams& m, const uint64_t* keys, uint64_t key,
                                  const TokenSums& sums) {
  const UpdateParams& p = m.update;
  const int lane = int(threadIdx.x % 32);
  for (int first = 0; first < m.items; first += 32) {
    const unsigned hits =
        __ballot_sync(kFullMask, first + lane < m.items && keys[first + lane] == key);
    for (int i = lane; i < __popc(hits) * p.width; i += 32) {
      const int64_t item = first + nth_bit(hits, i / p.width);
      const int64_t at = item / p.table.num_orders * p.width + i % p.width;
      const int32_t value = m.values[at];
      if (value > 0) sums.add(int32_t(p.ids[at]), value);
    }
  }
  __syncwarp();
}

// Items of a call that a block holds the keys of, and sums that a warp has room for beside them.
constexpr int kFewItems = 4096, kWarpSums = 256;

// Bytes of a block of `threads`: keys, then sums and their ids by warp.
inline unsigned few_shared_bytes(int64_t items, unsigned threads) {
  return unsigned(items) * 8 + threads / 32 * kWarpSums * 12;
}

__device__ inline TokenSums sums_of_warp(const MergeParams& m, const KeyPlace& place) {
  const uint32_t size = 2 * uint32_t(place.rows) * uint32_t(m.update.width);
  if (size > kWarpSums) {
    const int64_t begin = 2 * int64_t(place.before) * m.update.width;
    return {m.sum_ids + begin, m.sums + begin, size};
  }
  const unsigned warp = threadIdx.x / 32, warps = blockDim.x / 32;
  auto* sums = dynamic_shared<int64_t>(unsigned(m.items) * 8) + warp * kWarpSums;
  auto* ids = dynamic_shared<int32_t>(unsigned(m.items) * 8 + warps * kWarpSums * 8);
  return {ids + warp * kWarpSums, sums, size};
}

// The warp of the first item of a set merges the set's keys, in order.
__device__ inline void merge_set(const MergeParams& m, const uint64_t* keys, int item) {
  uint64_t key = keys[item];
  if (key == kLeftOut) return;
  KeyPlace place = place_of_key(m, keys, key, item);
  if (!place.leads) return;
  while (true) {
    const TokenSums sums = sums_of_warp(m, place);
    sums.clear();
    KeyMerge merge(m.update, key, place.rows);
    sum_tokens(m, keys, key, sums);
    for (uint32_t first = 0; first < sums.size; first += 32) {
      const uint32_t i = first + threadIdx.x % 32;
      const int32_t id = i < sums.size ? sums.ids[i] : -1;
      const int64_t sum = id >= 0 ? sums.sums[i] : 0;
      unsigned there = __ballot_sync(kFullMask, id >= 0);
      for (; there != 0; there &= there - 1) {
        const int lane = __ffs(int(there)) - 1;
        merge.add(__shfl_sync(kFullMask, id, lane), __shfl_sync(kFullMask, sum, lane));
      }
    }
    merge.store();
    key = place.next;
    if (key == kLeftOut) return;
    place = place_of_key(m, keys, key, item);
  }
}

// A warp per item.
__global__ void __launch_bounds__(256) table_few_kernel(MergeParams m) {
  uint64_t* keys = dynamic_shared<uint64_t>();
  for (int i = int(threadIdx.x); i < m.items; i += int(blockDim.x)) keys[i] = m.keys[i] ^ kSignBit;
  __syncthreads();
  const int warps = int(blockDim.x / 32);
  for (int item = int(blockIdx.x) * warps + int(threadIdx.x / 32); item < m.items;
       item += int(gridDim.x) * warps) {
    merge_set(m, keys, item);
  }
}

// ---- many items: sorted outside

// Items [begin, end) have one key; its pairs come in order of their ids.
__device__ __forceinline__ void merge_key(const MergeParams& m, int64_t begin, int64_t end) {
  KeyMerge merge(m.update, m.keys[begin] ^ kSignBit, end - begin);
  int64_t at = begin * m.update.width;
  const int64_t stop = end * m.update.width;
  while (at < stop) {
    const int64_t pair = m.pairs[at];
    int64_t sum = 0;
    for (; at < stop && m.pairs[at] == pair; ++at) sum += m.totals[at];
    const uint64_t token = uint64_t(pair) & kPairIdMask;
    if (token != kPairIdMask && sum > 0) merge.add(int32_t(token), sum);
  }
  merge.store();
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
