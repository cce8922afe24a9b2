// A row of logits as a block that is a team of its own reads it: all of it, from global memory.
#pragma once

#include "team_draw.cuh"

namespace reasonkern {

// A thread reads its share by batches of chunks, whose largest logits stay in shared memory: the
// few batches that count are read again, not all of a thread's, which on memory that is busy anyway
// would take a third of the time that the row takes.
template <class E>
struct AloneRow : TeamRow<E> {
  static constexpr int kChunk = Group<E>::kChunk;
  static constexpr int kAhead = 10;  // chunks of a batch, all under way at a time

  float* batch_tops;  // (batches, threads of the block)

  __device__ AloneRow(Team& team, const LogitRows& rows, int64_t b, int64_t node, float* batch_tops)
      : TeamRow<E>(team, rows, b, node), batch_tops(batch_tops + threadIdx.x) {}

  // There is no mask.
  __device__ static constexpr bool may_change() { return false; }
  __device__ static constexpr bool apply_mask(int, float (&)[4]) { return false; }

  // As TeamRow's.
  __device__ float share_top() const {
    const int step = kChunk * int(blockDim.x), count = this->slice.last;
    float top = -kInf, *batch_top = batch_tops;
#pragma unroll 1
    for (int i = kChunk * int(threadIdx.x); i < count; i += kAhead * step) {
      *batch_top =
          this->whole ? top_of_batch<kAhead>(i, step, count, true) : slow_top(i, step, count);
      top = max_nan(top, *batch_top);
      batch_top += blockDim.x;
    }
    return top;
  }

  // body(batch) for this thread's batches that reach `floor`.
  template <class Body>
  __device__ __forceinline__ void each_likely_batch(float floor, const Body& body) const {
    const int step = kChunk * int(blockDim.x);
    int batch = int(threadIdx.x);
#pragma unroll 1
    for (int i = kChunk * int(threadIdx.x); i < this->slice.last; i += kAhead * step) {
      if (!(*(batch_tops - threadIdx.x + batch) < floor)) body(batch);
      batch += int(blockDim.x);
    }
  }

  // body(chunk) for the chunks of the listed batches, three of them to a warp.
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
      this->mine.load(group.first, step, group.last, this->whole, group.chunk);
      body(group);
    }
  }

 private:
  template <int kChunks>
  __device__ __forceinline__ float top_of_batch(int i, int step, int count, bool whole) const {
    typename Elements<E>::Chunk chunk[kChunks];
    this->mine.load(i, step, count, whole, chunk);
    return Elements<E>::top_of_all(chunk, kChunks);
  }

  __device__ float slow_top(int i, int step, int count) const {
    float top = -kInf;
#pragma unroll 1
    for (int j = 0; j < kAhead && i + j * step < count; ++j) {
      top = max_nan(top, top_of_batch<1>(i + j * step, step, count, false));
    }
    return top;
  }
};

// Shared memory that the largest logits of a row's batches take.
template <class E>
std::size_t batch_bytes(int64_t vocab, unsigned threads) {
  const int64_t batch = int64_t(AloneRow<E>::kAhead) * AloneRow<E>::kChunk * threads;
  return std::size_t((vocab + batch - 1) / batch * threads) * sizeof(float);
}

// Overload: batches are listed instead of threads.
template <class E>
__device__ bool list_likely(TeamShared& s, const AloneRow<E>& row, float floor) {
  const int limit = int(blockDim.x / 4);
  if (!(row.tops.raw < floor)) {
    row.each_likely_batch(floor, [&](int batch) {
      const int slot = atomicAdd(&s.likely_count, 1);
      if (slot < limit) s.likely[slot] = uint16_t(batch);
    });
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
