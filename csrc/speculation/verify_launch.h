// Launch decisions of the verification kernels: pure functions of sizes and the device. Plain C++.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/host_device.h"

namespace reasonkern {

constexpr int kTeamBlocks = 8;                    // of a cluster, at most: the largest portable one
constexpr std::size_t kSharedBytes = 227 * 1024;  // of a multiprocessor, and of a block at most

// Tokens of a row that each of the blocks takes: words of the mask, hence whole vectors.
RK_HOST_DEVICE int64_t slice_tokens(int64_t vocab, unsigned blocks) {
  return (vocab + 32 * blocks - 1) / (32 * blocks) * 32;
}

struct TeamShape {
  unsigned blocks;     // that share a request
  bool staged;         // slices are copied to shared memory
  std::size_t shared;  // bytes of a block
};

// Enough blocks to occupy the device, and to have a slice leave room for other teams beside it.
// `scratch`: what a block needs besides its slice; `inside`: blocks that the registers of a
// multiprocessor leave room for. Below sm_90 there are neither clusters nor copies in bulk.
inline TeamShape team_shape(int64_t batch, int64_t vocab, int element_bytes, std::size_t scratch,
                            int inside, int multiprocessors, int arch) {
  if (arch < 90) return {1, false, scratch};
  unsigned blocks = 1;
  const auto shared = [&] { return scratch + slice_tokens(vocab, blocks) * element_bytes; };
  while (blocks < kTeamBlocks && (batch * blocks * 2 <= inside * multiprocessors ||
                                  shared() + 1024 > kSharedBytes / inside)) {
    blocks *= 2;
  }
  const bool fits = shared() <= kSharedBytes;
  return {blocks, fits, fits ? shared() : scratch};
}

// The widest word that divides a head's bytes and the strides and addresses in bytes.
inline int word_bytes(int64_t head_bytes, int64_t alignment) {
  int bytes = 16;
  while (bytes > 1 && (head_bytes % bytes != 0 || alignment % bytes != 0)) bytes /= 2;
  return bytes;
}

}  // namespace reasonkern
