// A row of logits as a block of a team reads it: its slice, four tokens at a time.
#pragma once

#include "../common/fast_math.cuh"
#include "team.cuh"

namespace reasonkern {

// Whole words, so that the lanes come by one load.
template <class E>
struct alignas(sizeof(E) < 4 ? 4 * sizeof(E) : 16) Quad {
  uint32_t word[sizeof(E)];
};

template <class E>
__device__ __forceinline__ void unpack(const Quad<E>& quad, float (&x)[4]) {
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    if constexpr (sizeof(E) == 8) {
      x[k] = float(recast<double>(quad.word[2 * k] | uint64_t(quad.word[2 * k + 1]) << 32));
    } else if constexpr (sizeof(E) == 4) {
      x[k] = recast<float>(quad.word[k]);
    } else if constexpr (std::is_same<E, bf16>::value) {  // the upper half of a float
      const uint32_t word = quad.word[k / 2];
      x[k] = recast<float>(k % 2 == 0 ? word << 16 : word & 0xffff0000u);
    } else {
      x[k] = to_acc(recast<E>(uint16_t(quad.word[k / 2] >> 16 * (k % 2))));
    }
  }
}

__device__ __forceinline__ float top_of(const float (&x)[4]) {  // NaN if a lane is
  return max_nan(max_nan(x[0], x[1]), max_nan(x[2], x[3]));
}

// A row's logits: four of them as floats, or chunks as they came.
template <class E>
struct Elements {
  using Chunk = Vec<E>;
  static constexpr int kChunk = Vec<E>::size;

  const E* data;

  __device__ Elements(const void* data, ElementType) : data(static_cast<const E*>(data)) {}
  __device__ Elements beside(const void* other) const { return {other, ElementType{}}; }

  __device__ float at(int64_t i) const { return float(to_acc(data[i])); }

  // x[j]: logits from i + j * step on, of `count`. All loads come before a use, without a branch
  // among them, hence of the first quad again where there is none. `whole`: 16-byte words are
  // aligned and full; else logits are read one by one and filled up with -inf.
  template <int kAhead>
  __device__ void load(int i, int step, int count, bool whole, float (&x)[kAhead][4]) const {
    if (whole) {
      Quad<E> quad[kAhead];
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
        quad[j] =
            *reinterpret_cast<const Quad<E>*>(data + (i + j * step < count ? i + j * step : i));
      }
#pragma unroll
      for (int j = 0; j < kAhead; ++j) unpack(quad[j], x[j]);
    } else {
#pragma unroll
      for (int j = 0; j < kAhead; ++j) {
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const int at = i + j * step + k;
          x[j][k] = at < count ? this->at(at) : -kInf;
        }
      }
    }
  }

  // The same of chunks.
  template <int kChunks>
  __device__ void load(int i, int step, int count, bool whole, Chunk (&chunk)[kChunks]) const {
    if (whole) {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        chunk[j] =
            *reinterpret_cast<const Chunk*>(data + (i + j * step < count ? i + j * step : i));
      }
    } else {
#pragma unroll
      for (int j = 0; j < kChunks; ++j) {
        chunk[j] = make_vec<E>([&](int k) {
          const int at = i + j * step + k;
          return at < count ? data[at] : from_acc<E>(-kInf);
        });
      }
    }
  }

  __device__ static float top_of_all(const Chunk* chunk, int count) {
    Top<E> top = top_of(chunk[0]);
#pragma unroll
    for (int j = 1; j < count; ++j) top = higher<E>(top, top_of(chunk[j]));
    return float(top_value<E>(top));
  }

  __device__ static void to_floats(const Chunk& chunk, float (&x)[kChunk]) { unpack(chunk, x); }
};

// Any element type, told apart where logits are loaded: one kernel instead of four.
struct AnyElement;

template <class E>
constexpr bool knows_type() {
  return !std::is_same<E, AnyElement>::value;
}

// Blocks on a multiprocessor: telling types apart takes registers.
template <class E>
constexpr int blocks_inside() {
  return knows_type<E>() ? kBlocksInside : 1;
}

template <>
struct Elements<AnyElement> {
  struct Chunk {
    float x[4];
  };
  static constexpr int kChunk = 4;

  const void* data;
  ElementType type;

  __device__ Elements(const void* data, ElementType type) : data(data), type(type) {}
  __device__ Elements beside(const void* other) const { return {other, type}; }

  template <class Body>
  __device__ void visit(const Body& body) const {
    switch (type) {
      case ElementType::kFloat32:
        return body(Elements<float>(data, type));
      case ElementType::kBFloat16:
        return body(Elements<bf16>(data, type));
      case ElementType::kFloat16:
        return body(Elements<fp16>(data, type));
      case ElementType::kFloat64:
        return body(Elements<double>(data, type));
    }
  }

  RK_DEVICE_CALL float at(int64_t i) const {
    float x = 0;
    visit([&](const auto& elements) { x = elements.at(i); });
    return x;
  }

  template <int kAhead>
  __device__ void load(int i, int step, int count, bool whole, float (&x)[kAhead][4]) const {
    visit([&](const auto& elements) { elements.load(i, step, count, whole, x); });
  }

  template <int kChunks>
  __device__ void load(int i, int step, int count, bool whole, Chunk (&chunk)[kChunks]) const {
    float x[kChunks][4];
    load(i, step, count, whole, x);
    std::memcpy(chunk, x, sizeof(x));
  }

  __device__ static float top_of_all(const Chunk* chunk, int count) {
    float top = top_of(chunk[0].x);
#pragma unroll
    for (int j = 1; j < count; ++j) top = max_nan(top, top_of(chunk[j].x));
    return top;
  }

  __device__ static void to_floats(const Chunk& chunk, float (&x)[4]) {
    std::memcpy(x, chunk.x, sizeof(x));
  }
};

constexpr int kGroupTokens = 16, kGroupQuads = kGroupTokens / 4;

// Tokens that a thread reads at a time, as they came: a group, or a chunk of it; those behind the
// slice are its first ones, or -inf.
template <class E, int kChunks = kGroupTokens / Elements<E>::kChunk>
struct Group {
  static constexpr int kChunk = Elements<E>::kChunk, kQuads = kChunks * kChunk / 4;

  typename Elements<E>::Chunk chunk[kChunks];
  int first, step, last;  // chunk j: from first + j * step on; the slice's end

  __device__ float top() const { return Elements<E>::top_of_all(chunk, kChunks); }  // NaN if one is

  __device__ int quad_of(int quad) const {  // its first token
    return first + 4 * quad / kChunk * step + 4 * quad % kChunk;
  }

  // body(v, x, quad) for the quads inside the slice.
  template <class Body>
  __device__ void each(const Body& body) const {
#pragma unroll
    for (int j = 0; j < kChunks; ++j) {
      if (first + j * step >= last) return;
      float x[kChunk];
      Elements<E>::to_floats(chunk[j], x);
#pragma unroll
      for (int k = 0; k < kChunk; k += 4) {
        float quad[4] = {x[k], x[k + 1], x[k + 2], x[k + 3]};
        body(first + j * step + k, quad, (j * kChunk + k) / 4);
      }
    }
  }
};

// Of a thread's share of a slice: the largest logits, NaN if one is.
struct ShareTops {
  float raw, allowed;
};

template <class E>
struct TeamRow {
  // In registers: where types are told apart, neither for looking at listed shares nor for noise of
  // two quads at a time.
  static constexpr bool kHasRoom = knows_type<E>();

  Slice slice;
  Elements<E> mine;     // the slice's logits
  const int32_t* mask;  // of this row, or null
  int vocab;
  bool whole;
  ShareTops tops;  // once `find_block_top` has swept the slice

  // Waits until the slice has come.
  __device__ TeamRow(Team& team, const LogitRows& rows, int64_t b, int64_t node)
      : TeamRow(team, Slice(rows, b, node, team.rank()), rows, b, node) {}
  __device__ TeamRow(Team& team, const Slice& slice, const LogitRows& rows, int64_t b, int64_t node)
      : TeamRow(slice, team.await(slice), rows, b, node) {}

  // data: where the slice is.
  __device__ TeamRow(const Slice& slice, const void* data, const LogitRows& rows, int64_t b,
                     int64_t node)
      : slice(slice),
        mine(data, rows.type),
        mask(rows.mask == nullptr ? nullptr
                                  : rows.mask + b * rows.mask_stride_b + node * rows.mask_stride_n),
        vocab(int(rows.vocab)),
        whole((slice.last - slice.first) % 4 == 0 && slice.bytes % 16 == 0 &&
              reinterpret_cast<std::uintptr_t>(mine.data) % 16 == 0),
        tops{-kInf, -kInf} {}

  // From now on the slice is read where the row is, not from its copy.
  __device__ void leave_copy() { mine = mine.beside(slice.data); }

  __device__ bool may_change() const { return mask != nullptr; }

  // False: nothing has changed.
  __device__ bool apply_mask(int v, float (&x)[4]) const {
    if (mask == nullptr) return false;
    const unsigned allowed = unsigned(mask[v / 32]) >> (v % 32);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = allowed >> k & 1 ? x[k] : -kInf;
    return true;
  }

  __device__ float at(int64_t v) const {
    const bool allowed = mask == nullptr || (unsigned(mask[v / 32]) >> (v % 32) & 1) != 0;
    return allowed ? raw(v) : -kInf;
  }

  // Of any token of the row.
  __device__ float raw(int64_t v) const { return mine.beside(slice.data).at(v - slice.first); }

  // The four logits from v on, of this slice.
  __device__ void read(int v, float (&x)[4]) const {
    float quad[1][4];
    mine.load(v - slice.first, 0, slice.last - slice.first, whole, quad);
#pragma unroll
    for (int k = 0; k < 4; ++k) x[k] = quad[0][k];
  }

  // body(v, x) for the quads of this thread's share of the slice, one by one: for what is rare.
  template <class Body>
  __device__ __forceinline__ void each_quad(const Body& body) const {
    constexpr int kChunk = Group<E>::kChunk;
    const int step = kChunk * int(blockDim.x);
#pragma unroll 1
    for (int v = slice.first + kChunk * int(threadIdx.x); v < slice.last; v += step) {
#pragma unroll 1
      for (int k = 0; k < kChunk && v + k < slice.last; k += 4) {
        float x[4];
        read(v + k, x);
        body(v + k, x);
      }
    }
  }

  // The largest logit of this thread's share, as they came. kAhead loads are under way at a time:
  // shares of 152,000 two-byte tokens in 2, 4 or 8 blocks are 38, 19 and 10 chunks.
  __device__ float share_top() const {
    return whole ? share_top<kHasRoom ? 5 : 2>(true) : share_top<1>(false);
  }

  // Whether a token is in this thread's share.
  __device__ bool owns(int64_t v) const {
    const unsigned chunk = unsigned(v - slice.first) / Group<E>::kChunk;
    return v >= slice.first && v < slice.last && (chunk & (blockDim.x - 1)) == threadIdx.x;
  }

  // body(chunk) for the chunks of the share of thread `owner`, by a warp.
  template <class Body>
  __device__ __forceinline__ void each_chunk(unsigned owner, const Body& body) const {
    constexpr int kChunk = Group<E>::kChunk;
    const int step = kChunk * int(blockDim.x), count = slice.last - slice.first;
#pragma unroll 1
    for (int i = kChunk * int(owner) + step * int(threadIdx.x % 32); i < count; i += 32 * step) {
      Group<E, 1> group;
      mine.load(i, step, count, whole, group.chunk);
      group.first = slice.first + i, group.step = step, group.last = slice.last;
      body(group);
    }
  }

  // body(group) for this thread's share of the slice, in order.
  template <class Body>
  __device__ void each_group(const Body& body) const {
    constexpr int kChunk = Group<E>::kChunk;
    const Elements<E> from = mine;
    const int step = kChunk * int(blockDim.x), count = slice.last - slice.first;
    for (int i = kChunk * int(threadIdx.x); i < count; i += kGroupTokens / kChunk * step) {
      Group<E> group;
      from.load(i, step, count, whole, group.chunk);
      group.first = slice.first + i, group.step = step, group.last = slice.last;
      body(group);
    }
  }

 private:
  template <int kAhead>
  __device__ __forceinline__ float share_top(bool whole) const {
    constexpr int kChunk = Group<E>::kChunk;
    const Elements<E> from = mine;
    const int step = kChunk * int(blockDim.x), count = slice.last - slice.first;
    float top = -kInf;
#pragma unroll 1
    for (int i = kChunk * int(threadIdx.x); i < count; i += kAhead * step) {
      typename Elements<E>::Chunk chunk[kAhead];
      from.load(i, step, count, whole, chunk);
      top = max_nan(top, Elements<E>::top_of_all(chunk, kAhead));
    }
    return top;
  }
};

}  // namespace reasonkern
