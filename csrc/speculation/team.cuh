// A team: the blocks of a cluster that work on one request, a slice of each row to a block. They
// meet by sending each other what they found: a cluster barrier would wait for every store under
// way. Reductions over the team give every thread the same bits.
#pragma once

#include "../common/mailbox.cuh"
#include "../common/reduce.cuh"
#include "row.h"
#include "verify_launch.h"

namespace reasonkern {

constexpr int kMaxWarps = kWideThreads / 32;
constexpr int kBlocksInside = 2;     // of a multiprocessor, of kernels that know the element type
constexpr unsigned kPartBytes = 64;  // the largest value that is reduced
constexpr int kCandidates = 512;
constexpr int kLikelyThreads = kWideThreads / 4;
constexpr int kGroups = 64;  // of threads, whose largest logits bound the k-th largest

// Two logits of a list; id -1 and -inf behind the last.
struct alignas(16) TopPair {
  float value[2];
  int id[2];
};

// A node's child, or the absence of one, as a walk finds it.
struct alignas(16) Child {
  int32_t node, token;  // token: -1 where there is no child that may be entered
  int32_t first, last;  // its own children's places in child_index
};

// What a request's rows are drawn with.
struct Request {
  float temperature, top_p, min_p;
  int64_t top_k;
  uint64_t seed, position;

  __device__ bool filters(int vocab) const {
    return !(top_p >= 1) || min_p > 0 || filters_by_rank(top_k, vocab);
  }
};

// Shared memory of a block; behind it lies the slice of the row. Nothing is static: the simulator
// keeps several blocks alive at once.
struct TeamShared {
  alignas(16) unsigned char parts[2][kMaxWarps][kPartBytes];    // of the block's warps
  alignas(16) unsigned char inbox[2][kTeamBlocks][kPartBytes];  // from the team's blocks
  TopPair candidates[kCandidates / 2];                          // of the top-k statistics
  TopPair top[kMaxTopK / 2];  // this block's largest, in order, if they are too many
  TopPair tops[2][kTeamBlocks][kMaxTopK / 2];  // lists of all blocks, of two rows in turn
  Mailbox arrived[2], tops_arrived[2], fetched[2];
  Request request;
  double s[kMaxEntry], r[kMaxEntry];  // rejection state
  int64_t skip[kMaxEntry], mass[kMaxEntry];
  float log_weight[kMaxEntry];
  int64_t accepted;       // child that passed the coins, or -1
  Child children[2][32];  // of a walk's node and of its likeliest child, in turn
  bool patched;
  alignas(16) float group_top[kGroups], my_groups[kGroups];  // of the row; of the block
  int64_t last_sum;  // of the row before, whose statistics are still to be written
  float last_top;    // -inf: there are none
  unsigned best;     // key of a value that the draw's best one is not below
  int count;         // of candidates
  int likely_count;  // threads whose share is drawn from by a warp
  uint16_t likely[kLikelyThreads];
};

// Where a slice lies behind them: bulk copies start at 16-byte addresses.
template <class Shared>
constexpr unsigned stage_offset() {
  return unsigned(sizeof(Shared) + 15) / 16 * 16;
}

// a / b for a power of two b; a device takes long for a division.
__device__ __forceinline__ unsigned quotient(unsigned a, unsigned b) {
  return a >> (31 - __clz(int(b)));
}

// op over the values of lanes 0 ... n - 1, which the lanes above repeat; n is a power of two. Ops
// commute to the bit, hence every lane gets the same ones.
template <class T, class Op>
__device__ __forceinline__ T reduce_lanes(T value, unsigned n, Op op) {
#pragma unroll 1
  for (unsigned offset = 1; offset < n; offset *= 2) {
    value = op(value, shuffle_xor(value, int(offset)));
  }
  return value;
}

struct Sum {
  __device__ int64_t operator()(int64_t a, int64_t b) const { return a + b; }
};

// Of integers from 0 to 2^62, by 21 bits at a time.
__device__ __forceinline__ int64_t reduce_lanes(int64_t value, unsigned n, Sum) {
  if (threadIdx.x % 32 >= n) value = 0;
  constexpr unsigned kMask = (1u << 21) - 1;
  const unsigned low = __reduce_add_sync(kFullMask, unsigned(value) & kMask);
  const unsigned middle = __reduce_add_sync(kFullMask, unsigned(value >> 21) & kMask);
  const unsigned high = __reduce_add_sync(kFullMask, unsigned(value >> 42));
  return (int64_t(high) << 42) + (int64_t(middle) << 21) + int64_t(low);
}

// A block's share of a row: tokens [first, last), which are copied to shared memory if the launch
// has room for them and 16-byte words hold them exactly.
struct Slice {
  int first, last;
  const char* data;
  unsigned bytes, room;  // of this slice, of any
  bool aligned, staged;

  // Of the block that is the team's `rank`-th.
  __device__ Slice(const LogitRows& rows, int64_t b, int64_t node, unsigned rank) {
    const int size = element_bytes(rows.type), vocab = int(rows.vocab);
    first = min(int(rank) * rows.slice, vocab), last = min(first + rows.slice, vocab);
    data = static_cast<const char*>(rows.data) +
           (b * rows.stride_b + node * rows.stride_n + first) * size;
    bytes = unsigned(last - first) * unsigned(size), room = unsigned(rows.slice) * unsigned(size);
    aligned = bytes > 0 && bytes % 16 == 0 && reinterpret_cast<std::uintptr_t>(data) % 16 == 0;
    staged = rows.stages > 0 && aligned;
  }
};

// Whose blocks are a team: all of a cluster, or each one by itself.
enum class Members { cluster, block };

class Team {
 public:
  // `stage`: where the slices of rows lie in the block's shared memory.
  __device__ Team(TeamShared* shared, unsigned stage, const LogitRows& rows,
                  Members members = Members::cluster)
      : shared_(shared), rows_(rows), stage_(stage), alone_(members == Members::block) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < 2; ++i) {
        open_mailbox(shared->arrived + i);
        open_mailbox(shared->tops_arrived + i);
        open_mailbox(shared->fetched + i);
      }
      fence_for_bulk();
    }
    // The mailboxes have their own fence. Waited for where one is first looked into.
    cluster_arrive_relaxed();
  }

  // Before a thread exits. Nothing can still come from other blocks: all that they send is waited
  // for.
  __device__ void leave() {
    meet();
    drain();
  }

  __device__ TeamShared* shared() const { return shared_; }
  __device__ unsigned size() const { return alone_ ? 1 : cluster_size(); }
  __device__ unsigned rank() const { return alone_ ? 0 : cluster_rank(); }
  __device__ bool leads() const { return rank() == 0 && threadIdx.x == 0; }

  // Starts the copy of a request's first row, if rows are copied. What the request needs goes to
  // shared memory: registers are short. Readers are behind a barrier.
  __device__ const Request& begin(const RequestParams& r, int64_t b) {
    __syncthreads();  // the request before is done
    b_ = b;
    if (!alone_) fetch(0);
    // A block alone: by a warp that has no other loads to wait for meanwhile.
    if (threadIdx.x == (alone_ ? blockDim.x - 1 : 0)) {
      shared_->request = {r.temperature[b], r.top_p[b],          r.min_p[b],
                          r.top_k[b],       uint64_t(r.seed[b]), uint64_t(r.position[b])};
    }
    return shared_->request;
  }

  // op over the values of a block by a fixed tree; a barrier of the block. Two sets of parts in
  // turn: a set is written again only behind the barrier of the other one, when all have read it.
  template <class T, class Op>
  __device__ T reduce_block(T value, Op op) {
    static_assert(sizeof(T) <= kPartBytes, "TeamShared::parts");
    auto* parts = shared_->parts[block_turn_++ % 2];
    value = reduce_lanes(value, 32, op);
    if (threadIdx.x % 32 == 0) std::memcpy(aligned(parts[threadIdx.x / 32]), &value, sizeof(T));
    __syncthreads();
    const unsigned warps = blockDim.x / 32;
    std::memcpy(&value, aligned(parts[threadIdx.x & (warps - 1)]), sizeof(T));
    return reduce_lanes(value, warps, op);
  }

  // The block's value to all of the team; lane i gets that of block i % size(). A barrier of the
  // block lies between two calls. Two inboxes in turn: who sends to one again has heard from all
  // blocks in the other one, so all have read it. `meanwhile` is done while the values are on their
  // way. with_groups: the blocks' `my_groups` go to `group_top`, those of a block side by side.
  template <bool with_groups = false, class T, class Work>
  __device__ T exchange(const T& mine, const Work& meanwhile) {
    return pass_round<with_groups>(size(), threadIdx.x & (size() - 1), mine, meanwhile);
  }

  // The same between the blocks of a cluster, of any size, that are teams of their own. The last
  // lanes get the last block's value.
  template <class T, class Work>
  __device__ T tell(const T& mine, const Work& meanwhile) {
    const unsigned size = cluster_size();
    return pass_round<false>(size, min(threadIdx.x % 32, size - 1), mine, meanwhile);
  }

  template <class T, class Op>
  __device__ T reduce(T value, Op op) {
    return reduce_lanes(exchange(reduce_block(value, op), [] {}), size(), op);
  }

  // A list of `count` logits among which this block's k largest are, k or k + 1 at most, to the
  // first block, or to all. Whoever gets a list receives it before the next call, and has read it
  // before it enters the exchange that lies before the next but one; a barrier behind the list's
  // writes.
  __device__ void send_tops(const TopPair* list, int count, int k, bool to_all) {
    static_assert(kMaxTopK / 2 <= 32, "a pair to a lane");
    const unsigned size = this->size(), pairs = unsigned(k + 1) / 2, lane = threadIdx.x % 32;
    const unsigned turn = tops_turn_++ % 2;
    TopPair mine = list[lane < pairs ? lane : 0];
    if (int(2 * lane) >= count) mine.value[0] = -kInf, mine.id[0] = -1;
    if (int(2 * lane + 1) >= count) mine.value[1] = -kInf, mine.id[1] = -1;
    TopPair* to = &shared_->tops[turn][rank()][lane];
    if (size == 1) {
      if (threadIdx.x < pairs) *to = mine;
      return;
    }
    Mailbox* box = shared_->tops_arrived + turn;
    for (unsigned peer = threadIdx.x / 32; peer < (to_all ? size : 1); peer += blockDim.x / 32) {
      if (lane < pairs) send(to, box, peer, mine);
    }
    if (threadIdx.x == 0 && (to_all || rank() == 0)) {
      expect_bytes(box, size * pairs * unsigned(sizeof(TopPair)));
    }
  }

  // Waits for the lists of the last call, by blocks to which they were sent.
  __device__ auto receive_tops() -> const TopPair (*)[kMaxTopK / 2] {
    const unsigned turn = tops_turn_ - 1;
    if (size() == 1) {
      __syncthreads();
    } else {
      wait_for_turn<Sender::peers>(shared_->tops_arrived + turn % 2, turn / 2);
    }
    return shared_->tops[turn % 2];
  }

  // Starts the copy of this block's slice of a row, which is the next one to be read, unless it was
  // guessed. The block has read the slice before it, and a barrier lies between.
  __device__ void fetch(int node) {
    if (guess_ == node) {
      slot_ = spare(), guess_ = -1;
    } else {
      if (spare() == slot_) drain();
      copy(Slice(rows_, b_, node, rank()), slot_);
    }
  }

  // Starts the copy of a row that may be the next one; where there is no room for a second slice
  // its way to the L2.
  __device__ void guess(int node) {
    drain();
    if (node <= 0) return;
    const Slice slice(rows_, b_, node, rank());
    if (spare() != slot_ && slice.staged) {
      guess_ = node;
      copy(slice, spare());
    } else if (slice.aligned && threadIdx.x == 0) {
      prefetch_bulk(slice.data, slice.bytes);
    }
    if (slice.staged && guess_ < 0) guess_ = ~node;
  }

  // Whether a guess waits for the slice of the row that is read to make room for it.
  __device__ bool is_room_wanted() const { return guess_ < -1; }

  // Makes room: nobody reads the slice's copy any more, and a barrier lies between.
  __device__ void make_room() {
    if (!is_room_wanted()) return;
    guess_ = ~guess_;
    copy(Slice(rows_, b_, guess_, rank()), slot_);
  }

  // Where the slice is; waits for the copy.
  __device__ const void* await(const Slice& slice) {
    if (!slice.staged) return slice.data;
    meet();
    wait_for_turn<Sender::self>(shared_->fetched + slot_, turn_of(slot_) - 1);
    return staged(slot_, slice);
  }

 private:
  // Of a part, which is then copied by words.
  template <class Void>
  __device__ static Void* aligned(Void* part) {
    return static_cast<Void*>(__builtin_assume_aligned(part, 16));
  }

  template <bool with_groups, class T, class Work>
  __device__ __forceinline__ T pass_round(unsigned size, unsigned from, const T& mine,
                                          const Work& meanwhile) {
    static_assert(sizeof(T) <= kPartBytes, "TeamShared::inbox");
    const unsigned turn = turn_;
    if (size == 1) {
      meanwhile();
      return mine;
    }
    meet();
    ++turn_;
    struct alignas(16) Part {
      T value;
    } part{mine};
    auto* inbox = shared_->inbox[turn % 2];
    Mailbox* box = shared_->arrived + turn % 2;
    if (threadIdx.x < size) {
      send(reinterpret_cast<Part*>(inbox[cluster_rank()]), box, threadIdx.x, part);
    }
    if (with_groups) send_groups(box);
    if (threadIdx.x == 0) {
      expect_bytes(box, size * unsigned(sizeof(Part)) + (with_groups ? kGroups * 4 : 0));
    }
    meanwhile();
    wait_for_turn<Sender::peers>(box, turn / 2);
    std::memcpy(&part, aligned(inbox[from]), sizeof(Part));
    return part.value;
  }

  __device__ void send_groups(Mailbox* box) {
    const unsigned size = cluster_size(), all = kGroups / 4;  // words of the row's groups
    if (threadIdx.x >= all) return;
    const unsigned peer = threadIdx.x * size / all,
                   at = quotient(threadIdx.x * size % all, size) * 4;
    struct alignas(16) Word {
      float x[4];
    };
    send(
        reinterpret_cast<Word*>(shared_->group_top + cluster_rank() * quotient(kGroups, size) + at),
        box, peer, *reinterpret_cast<const Word*>(shared_->my_groups + at));
  }

  // Where there are two slots a walk copies a row at most once into each.
  __device__ void copy(const Slice& slice, unsigned slot) {
    static_assert(kMaxNodes < 1 << 16, "fetches_");
    if (!slice.staged) return;
    fetches_ += 1u << 16 * slot;
    if (threadIdx.x != 0) return;
    expect_bytes(shared_->fetched + slot, slice.bytes);
    copy_bulk(staged(slot, slice), slice.data, slice.bytes, shared_->fetched + slot);
  }

  // The slot that guesses are copied to.
  __device__ unsigned spare() const { return slot_ ^ unsigned(rows_.stages > 1); }

  // Waits for the copy of a wrong guess: the one thread that starts the next copy, or all where
  // they then wait for that one, by parity.
  __device__ void drain() {
    const bool in_place = spare() == slot_;
    if (guess_ >= 0 && (threadIdx.x == 0 || in_place)) {
      wait_for_turn<Sender::self>(shared_->fetched + spare(), turn_of(spare()) - 1);
    }
    if (guess_ >= 0 && in_place) __syncthreads();
    guess_ = -1;
  }

  __device__ unsigned turn_of(unsigned slot) const { return fetches_ >> 16 * slot & 0xffff; }

  __device__ unsigned char* staged(unsigned slot, const Slice& slice) const {
    return dynamic_shared<unsigned char>(stage_ + slot * slice.room);
  }

  __device__ void meet() {
    if (!met_) cluster_wait();
    met_ = true;
  }

  TeamShared* shared_;
  const LogitRows& rows_;
  unsigned stage_, block_turn_ = 0, turn_ = 0, tops_turn_ = 0;
  unsigned slot_ = 0, fetches_ = 0;  // of slices; copies into either slot, 16 bits each
  int guess_ = -1;  // node of the copy in the spare slot, ~node while it waits for room; -1: none
  int64_t b_ = 0;   // the request
  bool met_ = false;
  const bool alone_;
};

// Integers in the order of floats; 0 is below them all.
__device__ __forceinline__ unsigned key_of(float value) {
  const unsigned bits = noise::word_of(value);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(unsigned key) {
  return noise::float_of(key >> 31 ? key & 0x7fffffffu : ~key);
}

struct TakeBest {
  __device__ Best operator()(Best a, const Best& b) const {
    a.offer(b.score, b.id);
    return a;
  }
};

}  // namespace reasonkern
