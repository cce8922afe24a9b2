// Every launch decision of the CUDA kernels in one place: pure functions of the vocabulary, the
// element size and a few numbers of the device. Plain C++, also called by the simulator's tests.
#pragma once

#include <cstddef>
#include <cstdint>

namespace reasonkern {

// How a row is cut: `slices` pieces of `slice_len` elements (the last ones may be shorter or
// empty), each walked by `group` threads. Statistics are merged warp by warp in slice order, so the
// tiling fixes their bits; it depends on V and the element size only, never on the architecture,
// the number of rows or an address.
struct Tiling {
  int slices, group;
  int64_t slice_len;
};

struct Device {
  int arch;  // 90 is sm_90
  int64_t shared_per_block;
};

struct LaunchConfig {
  Tiling tiling;
  bool resident;     // the row stays in shared memory, one slice per block of the cluster
  unsigned cluster;  // blocks that share a row
  unsigned block;
  std::size_t shared_bytes;
};

constexpr int kGroup = 256;
constexpr int kMaxSlices = 8;  // the largest portable cluster
constexpr int kMaxParts = kMaxSlices * kGroup / 32;
// An SM of 228 KiB holds three blocks of this size (1 KiB of each is the driver's), so that one
// block's loads, another's arithmetic and a third's stores overlap.
constexpr int64_t kResidentBytes = 228 * 1024 / 3 - 1024;
constexpr int64_t kScratchBytes = 512;  // behind a cluster block's slice: partials, row scratch

inline Tiling choose_tiling(int64_t vocab, int64_t element_bytes) {
  int slices = 1;
  while (slices < kMaxSlices &&
         (vocab + slices - 1) / slices * element_bytes > kResidentBytes - kScratchBytes) {
    slices *= 2;
  }
  const int64_t vec = 16 / element_bytes;
  const int64_t len = (vocab + slices - 1) / slices;
  return {slices, kGroup, (len + vec - 1) / vec * vec};
}

// Shared memory of a block that walks whole rows: one partial per warp of every slice and the row
// scratch; the bound covers float64 statistics.
inline std::size_t sweep_shared_bytes(const Tiling& t) {
  return std::size_t(t.slices) * (t.group / 32) * 48 + 512;
}

// Statistics: two slices of a row at a time, four blocks' loads in flight on an SM.
inline LaunchConfig stats_config(int64_t vocab, int64_t element_bytes) {
  const Tiling t = choose_tiling(vocab, element_bytes);
  const unsigned groups = element_bytes == 8 || t.slices == 1 ? 1 : 2;
  return {t, false, 1, groups * t.group, sweep_shared_bytes(t)};
}

// The fused loss: a cluster where the row fits on chip, else two sweeps of one block, as many
// threads as possible per row so that few rows are under way and the second sweep finds them in L2.
inline LaunchConfig loss_config(int64_t vocab, int64_t element_bytes, bool needs_grad,
                                const Device& device) {
  const Tiling t = choose_tiling(vocab, element_bytes);
  const int64_t resident = t.slice_len * element_bytes + kScratchBytes;
  if (needs_grad && device.arch >= 90 && element_bytes < 8 && resident <= device.shared_per_block) {
    return {t, true, unsigned(t.slices), unsigned(t.group), std::size_t(resident)};
  }
  if (!needs_grad) return stats_config(vocab, element_bytes);
  const unsigned groups = element_bytes == 8 ? 1 : t.slices < 4 ? t.slices : 4;
  return {t, false, 1, groups * t.group, sweep_shared_bytes(t)};
}

// Kernels without a reduction: one block per row and slice.
inline LaunchConfig rowwise_config(int64_t vocab, int64_t element_bytes) {
  return {choose_tiling(vocab, element_bytes), false, 1, kGroup, 0};
}

// One-dimensional grids; kernels stride over rows, so any number of clusters gives the same bits.
inline unsigned grid_blocks(int64_t rows, unsigned blocks_per_row) {
  const int64_t limit = INT32_MAX / blocks_per_row;
  return unsigned(rows < limit ? rows : limit) * blocks_per_row;
}

}  // namespace reasonkern
