// Launch decisions of the verification kernels: pure functions of sizes and the device. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/device.h"
#include "../common/host_device.h"

namespace reasonkern {

constexpr int kTeamBlocks = 8;     // of a cluster, at most: the largest portable one
constexpr int kTeamThreads = 256;  // of a block; a power of two
constexpr int kWideThreads = 512;  // of a block that draws rows alone and fills a multiprocessor

// Tokens of a row that each of the blocks, a power of two, takes: words of the mask, hence whole
// vectors. No division: a device takes long for one.
RK_HOST_DEVICE int64_t slice_tokens(int64_t vocab, unsigned blocks) {
  int shift = 5;
  while (blocks >> (shift - 5) > 1) ++shift;
  return (vocab + (int64_t(1) << shift) - 1) >> shift << 5;
}

struct TeamShape {
  unsigned blocks;     // that share a request
  int stages;          // slices that fit into a block's shared memory: 2 to guess the next one
  std::size_t shared;  // bytes of a block
};

// Blocks that are resident at once in clusters. A cluster lies within one of the device's groups of
// 14 to 18 multiprocessors, where the largest ones leave a rest; those behind would wait for a
// whole walk.
inline int64_t resident_blocks(unsigned cluster, int inside, int multiprocessors) {
  const int64_t all = int64_t(inside) * multiprocessors;
  return cluster < kTeamBlocks ? all : all * 7 / 8;
}

// What a team reads: rows that follow one another, or a single one.
enum class Reads { walk, row };

// Enough blocks to occupy the device, and to have a slice leave room for other teams beside it.
// Where single rows fill it by themselves, a block takes one of them straight from global memory:
// the exchanges cost more than a longer way through a row. `scratch`: what a block needs besides
// its slice; `inside`: blocks that the registers of a multiprocessor leave room for. Below sm_90
// there are neither clusters nor copies in bulk.
inline TeamShape team_shape(int64_t batch, int64_t vocab, int element_bytes, std::size_t scratch,
                            int inside, const Device& device, Reads reads = Reads::walk) {
  if (device.arch < 90) return {1, 0, scratch};
  const std::size_t room = (device.shared_per_block + 1024) / inside - 1024;
  const auto resident = [&](unsigned cluster) {
    return batch * cluster <= resident_blocks(cluster, inside, device.multiprocessors);
  };
  unsigned blocks = 1;
  const auto shared = [&](int stages) {
    return scratch + stages * slice_tokens(vocab, blocks) * element_bytes;
  };
  if (reads == Reads::row && !resident(2) && shared(1) > room) return {1, 0, scratch};
  while (blocks < kTeamBlocks && (resident(blocks * 2) || shared(1) > room)) blocks *= 2;
  // A wrong guess takes shared memory's room and bandwidth, which a device that is not full has
  // left.
  const bool guesses = resident(blocks) && shared(2) <= room;
  const int stages = guesses ? 2 : shared(1) <= device.shared_per_block ? 1 : 0;
  return {blocks, stages, shared(stages)};
}

// Rows that a walk's blocks draw abreast, and the threads of each.
struct AbreastShape {
  unsigned rows, threads;
};

constexpr unsigned kMostAbreast = 5;  // few walks are longer

// As many rows as are resident at once for all requests, no more than a walk can have: 5 in wide
// blocks, which have a multiprocessor to themselves, or as many as possible in others, two on one.
// Clusters of more than two blocks leave a rest of most groups of multiprocessors.
inline AbreastShape abreast_shape(int64_t batch, int depth, const Device& device) {
  const unsigned most = depth + 1 < int(kMostAbreast) ? unsigned(depth + 1) : kMostAbreast;
  const auto resident = [&](unsigned rows, int inside) {
    const int64_t all = int64_t(inside) * device.multiprocessors;
    return batch * rows <= (rows > 2 ? all * 7 / 8 : all);
  };
  if (resident(most, 1)) return {most, kWideThreads};
  unsigned rows = most;
  while (rows > 1 && !resident(rows, 2)) --rows;
  return {rows, kTeamThreads};
}

// The widest word that divides a head's bytes and the strides and addresses in bytes.
inline int word_bytes(int64_t head_bytes, int64_t alignment) {
  int bytes = 16;
  while (bytes > 1 && (head_bytes % bytes != 0 || alignment % bytes != 0)) bytes /= 2;
  return bytes;
}

}  // namespace reasonkern
