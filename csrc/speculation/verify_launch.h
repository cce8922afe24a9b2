// Launch decisions of the verification kernels: pure functions of the batch and the device. Plain
// C++.
#pragma once

#include <cstdint>

namespace reasonkern {

// Blocks that share a request: enough to occupy the device at a small batch, one at a large one,
// where a row per block reads memory as fast as a row per cluster and needs no cluster barriers.
inline unsigned team_blocks(int64_t batch, int multiprocessors, int arch) {
  unsigned blocks = 1;
  while (arch >= 90 && blocks < 8 && batch * blocks * 2 <= 2 * multiprocessors) blocks *= 2;
  return blocks;
}

// The widest word that divides a head's bytes and the strides and addresses in bytes.
inline int word_bytes(int64_t head_bytes, int64_t alignment) {
  int bytes = 16;
  while (bytes > 1 && (head_bytes % bytes != 0 || alignment % bytes != 0)) bytes /= 2;
  return bytes;
}

}  // namespace reasonkern
