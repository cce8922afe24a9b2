// A row of logits as a block that is a team of its own reads it: all of it, from global memory, but
// for the first tokens, which a copy brings to shared memory for the sweep.
#pragma once

#include "team_logits.cuh"

namespace reasonkern {

// A row's first tokens in shared memory: whole turns of the block, from when the mailbox's turn is
// over.
struct Head {
  const void* data = nullptr;
  int tokens = 0;
  Mailbox* box = nullptr;  // null: there are none
  unsigned turn = 0;
};

template <class E>
struct AloneRow : TeamRow<E> {
  Head head;

  __device__ AloneRow(Team& team, const LogitRows& rows, int64_t b, int64_t node)
      : TeamRow<E>(team, rows, b, node) {}

  // As TeamRow's. A share of 152,000 two-byte tokens is 75 chunks, 38 of twice the threads, and
  // nothing but these loads hides the memory's latency.
  __device__ float share_top() const {
    const int count = this->slice.last;
    if (!this->whole) return this->template top_of_share<1>(this->mine, 0, count, false);
    const float top = this->template top_of_share<10>(this->mine, head.tokens, count, true);
    if (head.box == nullptr) return top;
    wait_for_turn<Sender::self>(head.box, head.turn);
    const Elements<E> near = this->mine.beside(head.data);
    return max_nan(top, this->template top_of_share<4>(near, 0, head.tokens, true));
  }

  // As TeamRow's, for chunks that reach `floor`: a warp looks at all its turns for a few owners
  // together, and reads those chunks again. One share after the other would be as many latencies.
  template <class Body>
  __device__ __forceinline__ void each_listed_chunk(const uint16_t* owners, int count, float floor,
                                                    const Body& body) const {
    const int step = kChunk * int(blockDim.x), tokens = this->slice.last;
    const int warps = int(blockDim.x / 32), lane = int(threadIdx.x % 32);
    const bool whole = this->whole;
    const int some = whole ? kOwners * warps : warps, turns = 32 * step * (whole ? kTurns : 1);
#pragma unroll 1
    for (int i = int(threadIdx.x / 32); i < count; i += some) {
#pragma unroll 1
      for (int from = 0; from < tokens; from += turns) {
        const int at = from + step * lane;
        unsigned likely = whole ? find_likely<kOwners, kTurns>(owners, i, count, at, floor, true)
                                : find_likely<1, 1>(owners, i, count, at, floor, false);
#pragma unroll 1  // rarely entered: one copy
        for (; likely != 0; likely &= likely - 1) {
          const int hit = __ffs(int(likely)) - 1, k = hit / kTurns, j = hit % kTurns;
          Group<E, 1> group;
          group.first = kChunk * int(owners[i + k * warps]) + at + 32 * step * j;
          group.step = step, group.last = tokens;
          this->mine.load(group.first, step, tokens, whole, group.chunk);
          body(group);
        }
      }
    }
  }

 private:
  static constexpr int kChunk = Group<E>::kChunk;
  static constexpr int kOwners = 4, kTurns = 3;  // of a warp that are looked at together

  // Bit k * kTurns + j: chunk `at` of the share of the k-th next owner from the i-th on, j turns of
  // a warp later, reaches `floor`.
  template <int owned, int turns>
  __device__ __forceinline__ unsigned find_likely(const uint16_t* owners, int i, int count, int at,
                                                  float floor, bool whole) const {
    const int turn = 32 * kChunk * int(blockDim.x), tokens = this->slice.last;
    const int warps = int(blockDim.x / 32);
    typename Elements<E>::Chunk chunk[owned][turns];
    int first[owned];
#pragma unroll
    for (int k = 0; k < owned; ++k) {
      first[k] = i + k * warps < count ? kChunk * int(owners[i + k * warps]) + at : tokens;
      this->mine.load(first[k] < tokens ? first[k] : 0, turn, tokens, whole, chunk[k]);
    }
    unsigned likely = 0;
#pragma unroll
    for (int k = 0; k < owned; ++k) {
#pragma unroll
      for (int j = 0; j < turns; ++j) {
        const bool reaches = !(Elements<E>::top_of_all(chunk[k] + j, 1) < floor);
        likely |= unsigned(reaches && first[k] + turn * j < tokens) << (k * kTurns + j);
      }
    }
    return likely;
  }
};

}  // namespace reasonkern
