// Device code of an update of few items, without a sort: each block picks the items of its share of
// the sets, and a warp per set finds the items of the set among those.
#pragma once

#include "table_merge.cuh"

namespace reasonkern {

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

// Items of a call that a block has room for, and sums that it has room for beside them, for each of
// its warps: together, for a few keys are of many rows and most of one.
constexpr int kFewItems = 4096, kWarpSums = 64;
constexpr int kBinsAtOnce = 8;  // of a thread's load

// The items of a block, in any order, in shared memory; then the sums of its warps.
struct Share {
  int* size;
  uint32_t* used;  // of the room for sums
  uint64_t* keys;
  uint16_t* items;
  uint8_t* ways;  // that hold the keys, before the block changes one; kWays: none does

  static constexpr unsigned kHead = 8, kItemBytes = 11;  // bytes: of the sizes, of an item

  __device__ explicit Share(int64_t items)
      : size(dynamic_shared<int>()),
        used(dynamic_shared<uint32_t>(4)),
        keys(dynamic_shared<uint64_t>(kHead)),
        items(dynamic_shared<uint16_t>(kHead + 8 * unsigned(items))),
        ways(dynamic_shared<uint8_t>(kHead + 10 * unsigned(items))) {}

  __host__ __device__ static unsigned warps_at(int64_t items) {
    return (kHead + kItemBytes * unsigned(items) + 15) / 16 * 16;
  }

  __device__ static RankedSum* scratch(int64_t items) {
    return dynamic_shared<RankedSum>(warps_at(items)) + threadIdx.x / 32 * kMergeSums;
  }

  // The block's bins are the same part of all as the block is of the grid.
  __device__ void pick(const MergeParams& m) const {
    if (threadIdx.x == 0) *size = 0, *used = 0;
    __syncthreads();
    const uint32_t low = first_bin(blockIdx.x), bins = first_bin(blockIdx.x + 1) - low;
    const int step = kBinsAtOnce * int(blockDim.x);
    for (int i = kBinsAtOnce * int(threadIdx.x); i < m.items; i += step) {
      const auto loaded = load_global<Reuse::again>(m.bins + i);
      uint32_t mine = 0;
#pragma unroll
      for (int j = 0; j < kBinsAtOnce; ++j) {
        if (get_lane(loaded, j) - low < bins && i + j < m.items) mine |= 1u << j;
      }
      RK_ROLLED
      for (; mine != 0; mine &= mine - 1) {
        items[atomicAdd(size, 1)] = uint16_t(i + __ffs(int(mine)) - 1);
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < *size; i += int(blockDim.x)) {
      keys[i] = m.keys[items[i]] ^ kSignBit;
    }
    __syncthreads();
    find_ways(m.update.table);
    __syncthreads();
  }

 private:
  // Eight lanes to an item, one to a way.
  __device__ void find_ways(const Table& t) const {
    const int lane = int(threadIdx.x % 32), items_at_once = int(blockDim.x) / kWays;
    RK_ROLLED
    for (int first = int(threadIdx.x / 32) * (32 / kWays); first < *size; first += items_at_once) {
      const int i = first + lane / kWays;
      bool held = false;
      if (i < *size) held = t.keys[set_of(keys[i], t.sets) * kWays + lane % kWays] == keys[i];
      const unsigned match = __ballot_sync(kFullMask, held) >> lane / kWays * kWays & 0xff;
      if (i < *size && lane % kWays == 0) ways[i] = match == 0 ? kWays : __ffs(int(match)) - 1;
    }
  }

  __device__ static uint32_t first_bin(unsigned block) { return block * kLastBin / gridDim.x; }
};

// Bytes of a block of `threads`: items, then by warp what merges, sums and their ids.
inline unsigned few_shared_bytes(int64_t items, unsigned threads) {
  return Share::warps_at(items) + threads / 32 * (kMergeBytes + kWarpSums * 12);
}

// Where a key stands among the items of its block.
struct KeyPlace {
  int rows;         // items of the key
  int first, last;  // of them
  bool found;       // the table has all the keys of the set: no key's merge touches another's
  bool leads;     // no item has the same key and comes first; nor a lower one, if not all are found
  uint64_t next;  // the lowest higher key of the set, if not all are found; kLeftOut: none
};

__device__ inline KeyPlace place_of_key(const MergeParams& m, const Share& share, uint64_t key,
                                        int item) {
  const int64_t sets = m.update.table.sets, set = set_of(key, sets);
  const int lane = int(threadIdx.x % 32), size = *share.size;
  KeyPlace place{0, 0, 0, true, true, kLeftOut};
  bool follows = false, second = false, lower = false, missing = false;
  RK_ROLLED
  for (int first = 0; first < size; first += 32) {
    const int j = first + lane;
    const uint64_t other = j < size ? share.keys[j] : kLeftOut;
    const bool near = other != kLeftOut && set_of(other, sets) == set;
    const unsigned same = __ballot_sync(kFullMask, other == key);
    if (same != 0 && place.rows == 0) place.first = first + __ffs(int(same)) - 1;
    if (same != 0) place.last = first + 31 - __clz(int(same));
    place.rows += __popc(same);
    if (near && share.ways[j] == kWays) missing = true;
    if (near && other < key) lower = true;
    if (other == key && j < item) second = true;
    if (near && other > key) follows = true, place.next = other < place.next ? other : place.next;
  }
  place.found = !__any_sync(kFullMask, missing);
  place.leads = !__any_sync(kFullMask, second || (lower && !place.found));
  if (place.found) {
    place.next = kLeftOut;
  } else if (__any_sync(kFullMask, follows)) {
    place.next = warp_reduce(place.next, [](uint64_t a, uint64_t b) { return a < b ? a : b; });
  }
  return place;
}

__device__ __forceinline__ int nth_bit(unsigned bits, int n) {
  for (; n > 0; --n) bits &= bits - 1;
  return __ffs(int(bits)) - 1;
}

// item / num_orders, without a division.
__device__ __forceinline__ int row_of(const Table& t, int item) {
  static_assert(kMaxOrders == 4 && kFewItems <= 1 << 15, "item * 43691 >> 17 is a third of it");
  return t.num_orders == 3 ? item * 43691 >> 17 : item >> t.num_orders / 2;
}

// Adds up the candidates of the items of a key.
__device__ inline void sum_tokens(const MergeParams& m, const Share& share, uint64_t key,
                                  const TokenSums& sums) {
  const UpdateParams& p = m.update;
  const int lane = int(threadIdx.x % 32), size = *share.size;
  RK_ROLLED
  for (int first = 0; first < size; first += 32) {
    const unsigned hits =
        __ballot_sync(kFullMask, first + lane < size && share.keys[first + lane] == key);
    RK_ROLLED
    for (int i = lane; i < __popc(hits) * p.width; i += 32) {
      const int item = share.items[first + nth_bit(hits, i / p.width)];
      const int64_t at = int64_t(row_of(p.table, item)) * p.width + i % p.width;
      const int32_t value = m.values[at];
      if (value > 0) sums.add(int32_t(p.ids[at]), value);
    }
  }
  __syncwarp();
}

// Items of the call whose keys are lower.
__device__ inline int lower_items(const MergeParams& m, uint64_t key) {
  int lower = 0;
  RK_ROLLED
  for (int i = int(threadIdx.x % 32); i < m.items; i += 32) lower += (m.keys[i] ^ kSignBit) < key;
  return warp_reduce(lower, [](int a, int b) { return a + b; });
}

// Room for the sums of a key with `rows` items; where the block has none left, in global memory.
__device__ inline TokenSums room_for_sums(const MergeParams& m, const Share& share, uint64_t key,
                                          int rows) {
  const uint32_t size = 2 * uint32_t(rows) * uint32_t(m.update.width);
  const unsigned warps = blockDim.x / 32;
  uint32_t at = 0;
  if (threadIdx.x % 32 == 0) at = atomicAdd(share.used, size);
  at = __shfl_sync(kFullMask, at, 0);
  if (at + size > warps * kWarpSums) {
    const int64_t begin = 2 * int64_t(lower_items(m, key)) * m.update.width;
    return {m.sum_ids + begin, m.sums + begin, size};
  }
  const unsigned begin = Share::warps_at(m.items) + warps * kMergeBytes;
  auto* sums = dynamic_shared<int64_t>(begin);
  auto* ids = dynamic_shared<int32_t>(begin + warps * kWarpSums * 8);
  return {ids + at, sums + at, size};
}

// The tokens of a row or two, sixteen lanes each; of one, twice.
struct RowTokens {
  int32_t id, value;
  int64_t sum = 0;  // by token, once they are joined

  __device__ RowTokens(const MergeParams& m, int item) {
    const UpdateParams& p = m.update;
    const int slot = int(threadIdx.x % kMaxTopk), last = p.width - 1;
    const int64_t at = int64_t(row_of(p.table, item)) * p.width + (slot < last ? slot : last);
    id = int32_t(p.ids[at]);
    value = slot < p.width ? m.values[at] : 0;
  }

  // Gives each token to one lane of sixteen, or of two rows to one lane of all: to the first row's
  // if both have it. False where a row has a token twice.
  __device__ bool join(bool two) {
    sum = value;
    const int lane = int(threadIdx.x % 32);
    const int32_t mine = sum > 0 ? id : -1 - lane % kMaxTopk;
    const unsigned same = __match_any_sync(kFullMask, mine);
    const unsigned own = lane < kMaxTopk ? kLowerLanes : ~kLowerLanes;
    if (__any_sync(kFullMask, __popc(same & own) > 1)) return false;
    if (two) {
      const bool both = (same & ~own) != 0 && sum > 0;
      const int64_t other = shuffle_from(sum, both ? __ffs(int(same & ~own)) - 1 : lane);
      if (both) sum = lane < kMaxTopk ? sum + other : 0;
    }
    return true;
  }

  // Sixteen of them, twice.
  __device__ void take(int part, int32_t& token, int64_t& total) const {
    const int from = part * kMaxTopk + int(threadIdx.x % kMaxTopk);
    token = __shfl_sync(kFullMask, id, from);
    total = shuffle_from(sum, from);
  }
};

// The usual key is of one row or two; the tokens of others are summed first.
__device__ inline void merge_rows(const MergeParams& m, const Share& share, uint64_t key,
                                  const Claim& claim, const RawSlot& slot, RowTokens& row,
                                  const KeyPlace& place) {
  const bool in_lanes = place.rows <= 2 && row.join(place.rows == 2);
  TokenSums sums{nullptr, nullptr, uint32_t(place.rows * kMaxTopk)};
  if (!in_lanes) {
    sums = room_for_sums(m, share, key, place.rows);
    sums.clear();
    sum_tokens(m, share, key, sums);
  }
  KeyMerge merge(m.update, claim, slot, place.rows, Share::scratch(m.items));
  merge.run((sums.size + kMaxTopk - 1) / kMaxTopk, [&](int64_t part, int32_t& id, int64_t& sum) {
    if (in_lanes) return row.take(int(part), id, sum);
    const uint32_t i = uint32_t(part) * kMaxTopk + threadIdx.x % kMaxTopk;
    id = i < sums.size ? sums.ids[i] : -1;
    sum = id >= 0 ? sums.sums[i] : 0;
  });
}

// The warp of a key's first item merges the key, if the table has all keys of the set; else the
// warp of the set's first item merges them all, in order. Before it knows whether it is that warp,
// what the usual key needs is on its way from memory.
__device__ inline void merge_set(const MergeParams& m, const Share& share, int item) {
  const Table& t = m.update.table;
  const uint64_t own = share.keys[item];
  const int held = share.ways[item];
  Way way;
  Claim claim{};
  RawSlot slot{};
  if (held == kWays) {
    way = Way(t, own);
  } else {
    claim.entry = set_of(own, t.sets) * kWays + held;
    claim.count = t.counts[claim.entry];
    claim.age = int32_t(uint32_t(*t.clock));
    slot = claim.slot(t);
  }
  RowTokens row(m, share.items[item]);
  for (uint64_t key = own; key != kLeftOut;) {
    const KeyPlace place = place_of_key(m, share, key, item);
    if (key == own && !place.leads) return;
    if (!place.found) {
      if (key != own || held != kWays) way = Way(t, key);
      claim = Claim(t, key, way);
      slot = claim.slot(t);
    }
    if (place.rows <= 2 && (place.first != item || place.last != item)) {
      const bool second = threadIdx.x % 32 >= kMaxTopk;
      row = RowTokens(m, share.items[second ? place.last : place.first]);
    }
    merge_rows(m, share, key, claim, slot, row, place);
    key = place.next;
  }
}

// A warp per item of a block's share.
__global__ void __launch_bounds__(1024) table_few_kernel(MergeParams m) {
  const Share share(m.items);
  wait_for_kernels_before();
  share.pick(m);
  for (int item = int(threadIdx.x / 32); item < *share.size; item += int(blockDim.x / 32)) {
    merge_set(m, share, item);
  }
}

}  // namespace reasonkern
