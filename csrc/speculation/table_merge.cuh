// Device code of the table's update: rows to keys, then a warp per set merges the set's keys in
// order. Where the items are few a block picks those of its sets (table_few.cuh); where they are
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
  uint16_t* bins;         // few items: where their sets belong, padded to whole vectors
  const int64_t* pairs;   // items x width, sorted: (rank of the key, id)
  const int64_t* totals;  // items x width: values of the pairs
  int32_t* sum_ids;       // few items: room for 2 x items x width
  int64_t* sums;
  int64_t items;
};

// ---- rows to keys

constexpr uint32_t kLastBin = 0xffff;  // of the items that are not merged

// Which bin of a fixed number: all have about as many sets.
__device__ __forceinline__ uint16_t bin_of(uint64_t key, int64_t sets) {
  const uint32_t bin = uint32_t(set_of(key, sets)) * 0x9e3779b9u >> 16;
  return uint16_t(key == kLeftOut ? kLastBin : bin < kLastBin ? bin : kLastBin - 1);
}

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
  wait_for_kernels_before();
  if (blockIdx.x == 0 && threadIdx.x == 0) ++*t.clock;
  const int lane = threadIdx.x % 32, slot = lane % kRowLanes, first = lane - slot;
  int merged = 0, rejected = 0;
  int64_t row = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) / kRowLanes;
  const int64_t step = int64_t(gridDim.x) * blockDim.x / kRowLanes;
  for (; __any_sync(kFullMask, row < p.rows); row += step) {
    const bool inside = row < p.rows, candidate = inside && slot < p.width;
    const int64_t scope = p.scope == nullptr || !inside ? 0 : p.scope[row];
    const bool known = scope >= 0 && scope < t.scopes;
    const int32_t epoch = known ? t.epochs[scope] : 0;  // on its way beside the row
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
    uint64_t h = hash_start(scope, epoch);
    bool present = active && fine;
    for (int i = 0; i < t.window; ++i) {
      const int64_t past = shuffle_from(token, first + t.window - 1 - i);
      present &= past >= 0 || i >= order;
      if (i < order) h = hash_step(h, uint64_t(past));
    }
    if (inside && order > 0) {
      const uint64_t key = present ? key_of(h, order) : kLeftOut;
      m.keys[row * t.num_orders + slot] = key ^ kSignBit;
      if (m.bins != nullptr) m.bins[row * t.num_orders + slot] = bin_of(key, t.sets);
    }
  }
  merged += __shfl_xor_sync(kFullMask, merged, kRowLanes);
  rejected += __shfl_xor_sync(kFullMask, rejected, kRowLanes);
  if (lane == 0) {
    count(t.counters + kRows, merged);
    count(t.counters + kRejected, rejected);
  }
}

// ---- a key's merge

// What a lane knows of one way of a key's set: way w of lanes w, w + 8, ... Only loaded, so that it
// can be on its way from memory while something else is found out.
struct Way {
  int64_t first = 0;  // the set's first entry
  uint64_t held = 0;  // key
  int64_t clock = 0;
  int32_t count = 0, age = 0;

  __device__ static int number() { return int(threadIdx.x % kWays); }

  Way() = default;
  __device__ Way(const Table& t, uint64_t key) : first(set_of(key, t.sets) * kWays) {
    const int64_t entry = first + number();
    held = t.keys[entry];
    count = t.counts[entry];
    age = t.ages[entry];
    clock = *t.clock;
    prefetch_slots(t, entry);
  }

  // Of eviction: the lowest goes.
  __device__ uint64_t order() const {
    return eviction_order(held, age, clock, count) * kWays + number();
  }
};

// The entry of a key, or the one it takes, and what it remembers. Every lane has the same.
struct Claim {
  int64_t entry;
  int16_t count;  // 0: new
  int32_t age;    // from now on

  Claim() = default;

  __device__ Claim(const Table& t, uint64_t key, const Way& mine)
      : count(0), age(int32_t(uint32_t(mine.clock))) {
    const unsigned match = __ballot_sync(kFullMask, mine.held == key);
    int way = __ffs(int(match)) - 1;
    if (match != 0) {
      count = int16_t(__shfl_sync(kFullMask, mine.count, way));
    } else {
      uint64_t lowest = mine.order();
#pragma unroll
      for (int offset = 1; offset < kWays; offset *= 2) {
        const uint64_t other = shuffle_xor(lowest, offset);
        lowest = other < lowest ? other : lowest;
      }
      way = int(lowest % kWays);
      if (int(threadIdx.x % 32) == way) {
        reasonkern::count(t.counters + kEvictions, mine.held != 0);
        t.keys[mine.first + way] = key;
      }
    }
    entry = mine.first + way;
  }

  // The lane's slot.
  __device__ RawSlot slot(const Table& t) const {
    const int lane = int(threadIdx.x % 32);
    return raw_slot(t, entry * t.topk + (lane < t.topk ? lane : 0));
  }
};

// A token and its sum.
struct alignas(16) RankedSum {
  int32_t id;   // -1: none
  int32_t pad;  // written to shared memory whole
  int64_t sum;
};

// Shared memory of a warp that merges.
constexpr int kMergeSums = 2 * kMaxTopk;
constexpr unsigned kMergeBytes = kMergeSums * sizeof(RankedSum);

// A key's merge by a warp: find its entry, add the sums of its tokens, sixteen at a time, each
// token once, store. The upper lanes bring tokens, the lower ones hold what the entry had and the
// best.
class KeyMerge {
 public:
  // `slot`: the claim's.
  __device__ KeyMerge(const UpdateParams& p, const Claim& claim, const RawSlot& slot, int64_t rows,
                      RankedSum* scratch)
      : p_(p), claim_(claim), total_(claim_.count + rows), scratch_(scratch) {
    if (claim_.count > 0 && lane() < p.table.topk) old_ = slot_of(p.table, slot, claim_.count);
  }

  // load(k, id, sum) gives lane i token i % 16 of part k; id -1 or sum 0: none.
  template <class Load>
  __device__ void run(int64_t parts, const Load& load) {
    for (int64_t part = 0; part <= parts; ++part) {
      int32_t id;
      int64_t sum;
      if (part < parts) {
        load(part, id, sum);
        join(id, sum);
        if (parts == 1) {  // the lower lanes are free for what the row has not
          best_ = {old_.id, 0, old_.sum};
          old_.id = -1;
        }
      } else {  // what no row has
        if (!__any_sync(kFullMask, old_.id >= 0)) break;
        id = __shfl_sync(kFullMask, old_.id, lane() % kMaxTopk);
        sum = shuffle_from(old_.sum, lane() % kMaxTopk);
      }
      rank(id, sum);
    }
    store();
  }

 private:
  static constexpr unsigned kLower = (1u << kMaxTopk) - 1;

  __device__ static int lane() { return int(threadIdx.x % 32); }
  __device__ static bool upper() { return lane() >= kMaxTopk; }

  // A token that the entry has takes its sum over.
  __device__ void join(int32_t id, int64_t& sum) {
    if (sum == 0) id = -1;
    const int32_t mine = upper() ? id : old_.id;
    const unsigned same = __match_any_sync(kFullMask, mine >= 0 ? mine : -1 - lane());
    const int64_t before = shuffle_from(old_.sum, __ffs(int(same)) - 1);
    if (upper() && (same & kLower) != 0) sum += before;
    if (!upper() && (same & ~kLower) != 0) old_.id = -1;
  }

  // Ranks the upper lanes' tokens among the best so far. All lanes read the same one at a time.
  __device__ void rank(int32_t id, int64_t sum) {
    const int first = __any_sync(kFullMask, best_.id >= 0) ? 0 : kMaxTopk;
    if (!upper()) id = best_.id, sum = best_.sum;
    if (id < 0) sum = 0;
    scratch_[lane()] = {id, 0, sum};
    __syncwarp();
    int before = 0;
#pragma unroll 1
    for (int part = first; part < kMergeSums; part += kMaxTopk) {
#pragma unroll
      for (int i = 0; i < kMaxTopk; ++i) {
        const RankedSum other = scratch_[part + i];
        before += int(other.sum > sum) | (int(other.sum == sum) & int(other.id < id));
      }
    }
    const int all = __popc(__ballot_sync(kFullMask, sum > 0));
    __syncwarp();  // all have read
    if (sum > 0 && before < kMaxTopk) scratch_[before] = {id, 0, sum};
    __syncwarp();
    best_ = {-1, 0, 0};
    if (lane() < p_.table.topk && lane() < all) best_ = scratch_[lane()];
    __syncwarp();
  }

  __device__ void store() {
    const Table& t = p_.table;
    if (lane() < t.topk) {
      store_slot(t, claim_.entry * t.topk + lane(), best_.id, best_.sum, total_, p_.max_count);
    }
    if (lane() == 0) {
      t.counts[claim_.entry] = int16_t(total_ < p_.max_count ? total_ : p_.max_count);
      t.ages[claim_.entry] = claim_.age;
    }
    __syncwarp();
  }

  const UpdateParams& p_;
  const Claim claim_;
  const int64_t total_;
  RankedSum* const scratch_;
  Slot old_{-1, 0};
  RankedSum best_{-1, 0, 0};
};

// ---- sorted items

inline unsigned merge_shared_bytes(unsigned threads) { return threads / 32 * kMergeBytes; }

// Items [begin, end) have one key; its pairs come in order of their ids. The first lane of a token
// adds up its pairs.
__device__ __forceinline__ void merge_key(const MergeParams& m, int64_t begin, int64_t end) {
  auto* scratch = dynamic_shared<RankedSum>() + threadIdx.x / 32 * kMergeSums;
  const uint64_t key = m.keys[begin] ^ kSignBit;
  const Table& t = m.update.table;
  const Claim claim(t, key, Way(t, key));
  KeyMerge merge(m.update, claim, claim.slot(t), end - begin, scratch);
  const int64_t start = begin * m.update.width, stop = end * m.update.width;
  const int64_t parts = (stop - start + kMaxTopk - 1) / kMaxTopk;
  merge.run(parts, [&](int64_t part, int32_t& id, int64_t& sum) {
    int64_t at = start + part * kMaxTopk + threadIdx.x % kMaxTopk;
    id = -1, sum = 0;
    const int64_t pair = at < stop ? m.pairs[at] : -1;
    const uint64_t token = uint64_t(pair) & kPairIdMask;
    if (token == kPairIdMask || (at > start && m.pairs[at - 1] == pair)) return;
    id = int32_t(token);
    for (; at < stop && m.pairs[at] == pair; ++at) sum += m.totals[at];
  });
}

__device__ __forceinline__ bool same_set(const MergeParams& m, int64_t a, int64_t b) {
  const int64_t sets = m.update.table.sets;
  return set_of(m.keys[a] ^ kSignBit, sets) == set_of(m.keys[b] ^ kSignBit, sets);
}

// The warp at the first item of a set merges the set's keys, in order.
__global__ void __launch_bounds__(128, 8) table_merge_kernel(MergeParams m) {
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
