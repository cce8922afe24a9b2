// A row of logits as a block that is a team of its own reads it: all of it, from global memory. Its
// words are aligned and full, and it has no mask (`can_be_alone`): a launch runs each instruction
// for the first time, and those that are passed over are fetched, too.
#pragma once

#include "team_draw.cuh"

namespace reasonkern {

// A thread reads its share by batches of chunks, whose largest logits stay in shared memory: the
// few batches that count are read again, not all of a thread's, which on memory that is busy anyway
// would take a third of the time that the row takes.
template <class E>
struct AloneRow : TeamRow<E> {
  static constexpr int kChunk = Group<E>::kChunk;
  // Chunks of a batch, all under way at a time; no other loads hide the memory's latency. A share
  // of 152,000 two-byte tokens is 75 of them.
  static constexpr int kAhead = 15;

  float* batch_tops;  // (batches, threads of the block)

  __device__ AloneRow(const Slice& row, const LogitRows& rows, int64_t b, int64_t node,
                      float* batch_tops)
      : TeamRow<E>(row, row.data, rows, b, node), batch_tops(batch_tops + threadIdx.x) {
    this->whole = true;
  }

  __device__ static constexpr bool may_change() { return false; }
  __device__ static constexpr bool apply_mask(int, float (&)[4]) { return false; }

  // As TeamRow's.
  __device__ float share_top() const {
    const int step = kChunk * int(blockDim.x), count = this->slice.last;
    float top = -kInf, *batch_top = batch_tops;
#pragma unroll 1
    for (int i = kChunk * int(threadIdx.x); i < count; i += kAhead * step) {
      typename Elements<E>::Chunk chunk[kAhead];
      this->mine.load(i, step, count, true, chunk);
      *batch_top = Elements<E>::top_of_all(chunk, kAhead);
      top = max_nan(top, *batch_top);
      batch_top += blockDim.x;
    }
    return top;
  }

  // Bit k: this thread's k-th batch reaches `floor`.
  __device__ __forceinline__ unsigned likely_batches(float floor) const {
    const int step = kChunk * int(blockDim.x);
    const float* batch_top = batch_tops;
    unsigned likely = 0, bit = 1;
#pragma unroll 1
    for (int i = kChunk * int(threadIdx.x); i < this->slice.last; i += kAhead * step) {
      if (!(*batch_top < floor)) likely |= bit;
      batch_top += blockDim.x, bit <<= 1;
    }
    return likely;
  }

  // body(chunk) for the chunks of the listed batches, two of them to a warp.
  template <class Body>
  __device__ __forceinline__ void each_listed_chunk(const uint16_t* list, int count,
                                                    const Body& body) const {
    constexpr int kTogether = 32 / kAhead;
    const int step = kChunk * int(blockDim.x), warps = int(blockDim.x / 32);
    const int lane = int(threadIdx.x % 32);
#pragma unroll 1
    for (int i = int(threadIdx.x / 32); i < count; i += kTogether * warps) {
      const int mine = i + warps * (lane / kAhead);
      if (mine >= count || lane >= kTogether * kAhead) continue;
      const unsigned batch = list[mine], owner = batch & (blockDim.x - 1);
      Group<E, 1> group;
      group.first =
          kChunk * int(owner) + (int(quotient(batch, blockDim.x)) * kAhead + lane % kAhead) * step;
      group.step = step, group.last = this->slice.last;
      if (group.first >= group.last) continue;
      this->mine.load(group.first, step, group.last, true, group.chunk);
      body(group);
    }
  }
};

// Batches of a thread's share: bits of a word.
template <class E>
int batch_count(int64_t vocab, unsigned threads) {
  const int64_t tokens = int64_t(AloneRow<E>::kAhead) * AloneRow<E>::kChunk * threads;
  return int((vocab + tokens - 1) / tokens);
}

// A launch's rows as such blocks take them: whole, and no copies.
inline LogitRows whole_rows(LogitRows rows) {
  rows.slice = int(slice_tokens(rows.vocab, 1)), rows.stages = 0;
  return rows;
}

// Whether blocks of so many threads can read a launch's rows so.
template <class E>
bool can_be_alone(const LogitRows& rows, unsigned threads) {
  const auto fits = [](int64_t elements) { return elements * int64_t(sizeof(E)) % 16 == 0; };
  return rows.mask == nullptr && fits(rows.vocab) && fits(rows.stride_b) && fits(rows.stride_n) &&
         reinterpret_cast<std::uintptr_t>(rows.data) % 16 == 0 &&
         batch_count<E>(rows.vocab, threads) <= 32;
}

// Overload: batches are listed instead of threads.
template <class E>
__device__ bool list_likely(TeamShared& s, const AloneRow<E>& row, float floor) {
  const int limit = int(blockDim.x / 4);
  unsigned likely = row.tops.raw < floor ? 0 : row.likely_batches(floor);
#pragma unroll 1  // most threads have one, if any
  for (; likely != 0; likely &= likely - 1) {
    const int slot = atomicAdd(&s.likely_count, 1);
    if (slot < limit) {
      s.likely[slot] = uint16_t((__ffs(int(likely)) - 1) * int(blockDim.x) + int(threadIdx.x));
    }
  }
  if (threadIdx.x == 0) s.count = 0;
  __syncthreads();
  return s.likely_count <= limit;
}

template <class E, class Body>
__device__ __forceinline__ void each_listed_chunk(const TeamShared& s, const AloneRow<E>& row,
                                                  const Body& body) {
  row.each_listed_chunk(s.likely, s.likely_count, body);
}

}  // namespace reasonkern
