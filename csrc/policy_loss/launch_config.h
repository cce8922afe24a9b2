// Every launch decision of the CUDA kernels in one place: pure functions of the vocabulary, the
// element size and a few numbers of the device. Plain C++, also called by the simulator's tests.
#pragma once

#include <cstddef>
#include <cstdint>

#include "../common/device.h"

namespace reasonkern {

// How a row is cut: `slices` pieces of `slice_len` elements, each walked by `group` threads, whose
// warps take `share_len` elements each (the last slices and shares may be shorter or empty). The
// tiling fixes the bits of the statistics; it depends on V and the element size only, never on the
// architecture, the number of rows or an address.
struct Tiling {
  int slices, group;
  int64_t slice_len;
  int share_len;
};

struct LaunchConfig {
  Tiling tiling;
  bool resident;     // the row stays in shared memory, one slice per block of the cluster
  unsigned cluster;  // blocks that share a row
  unsigned block;
  std::size_t shared_bytes;
};

constexpr int kGroup = 256;
constexpr int kMaxSlices = 8;    // the largest portable cluster
constexpr int kStatsGroups = 4;  // slices that a block of the statistics takes at a time, at most
constexpr int kSweepGroups = 2;  // slices that a block of the two-sweep loss takes at a time
// An SM of 228 KiB holds three blocks of this size (1 KiB of each is the driver's), so that one
// block's loads, another's arithmetic and a third's stores overlap.
constexpr int64_t kResidentBytes = 228 * 1024 / 3 - 1024;
constexpr int64_t kRowwiseBytes = 320 * 1024;  // of a slice without a reduction, at most
constexpr int64_t kScratchBytes = 832;  // behind a cluster block's slice: partials, row scratch

inline Tiling cut(int64_t vocab, int64_t element_bytes, int slices, int group) {
  const int64_t vec = 16 / element_bytes, warps = group / 32;
  const int64_t len = (vocab + slices - 1) / slices, vectors = (len + vec - 1) / vec;
  return {slices, group, vectors * vec, int((vectors + warps - 1) / warps * vec)};
}

inline Tiling choose_tiling(int64_t vocab, int64_t element_bytes) {
  int slices = 1;
  while (slices < kMaxSlices &&
         cut(vocab, element_bytes, slices, kGroup).slice_len * element_bytes + kScratchBytes >
             kResidentBytes) {
    slices *= 2;
  }
  return cut(vocab, element_bytes, slices, kGroup);
}

// Shared memory of a block that walks whole rows: one partial per warp of every slice, for two
// rows, and the row scratch; the bound covers float64 statistics.
inline std::size_t sweep_shared_bytes(const Tiling& t) {
  return std::size_t(t.slices) * (t.group / 32) * 2 * 56 + 512;
}

inline std::size_t cluster_shared_bytes(const Tiling& t, int64_t element_bytes) {
  return std::size_t(t.slice_len * element_bytes + kScratchBytes);
}

inline LaunchConfig sweep_config(const Tiling& t, unsigned groups) {
  return {t, false, 1, groups * t.group, sweep_shared_bytes(t)};
}

// Statistics: a row per block, four blocks of one slice at a time to an SM; where the rows are
// fewer than that, larger blocks take several slices at a time.
inline LaunchConfig stats_config(int64_t rows, int64_t vocab, int64_t element_bytes,
                                 const Device& device) {
  const Tiling t = choose_tiling(vocab, element_bytes);
  const int most = element_bytes == 8 ? 1 : t.slices < kStatsGroups ? t.slices : kStatsGroups;
  int groups = 1;
  while (groups < most && rows * groups * 2 <= 4 * int64_t(device.multiprocessors)) groups *= 2;
  return sweep_config(t, unsigned(groups));
}

// Rows among the blocks of the statistics: block b takes row b, the first `again` blocks more, one
// each time round. A block that takes several reads on while it finishes one; the last rows, as
// many as are left for the blocks that end first, are single ones, which the device balances.
struct Turns {
  unsigned blocks, again;
};
inline Turns stats_turns(int64_t rows, const LaunchConfig& c, const Device& device) {
  const int64_t at_once = 4 * int64_t(device.multiprocessors) * kGroup / c.block;
  const int64_t most = rows / (3 * at_once), each = most < 1 ? 1 : most > 4 ? 4 : most;
  const int64_t again = (rows - (each - 1) * at_once / 2) / each,
                blocks = rows - again * (each - 1);
  if (blocks > INT32_MAX) return {INT32_MAX, INT32_MAX};
  return {unsigned(blocks), unsigned(again)};
}

// The fused loss: a cluster where the row fits on chip, else two sweeps of one block per row, one
// block to an SM: few rows are under way and the second sweep finds them in L2.
inline LaunchConfig loss_config(int64_t vocab, int64_t element_bytes, bool needs_grad,
                                const Device& device) {
  const Tiling t = choose_tiling(vocab, element_bytes);
  const std::size_t resident = cluster_shared_bytes(t, element_bytes);
  if (needs_grad && device.arch >= 90 && element_bytes < 8 && resident <= device.shared_per_block) {
    return {t, true, unsigned(t.slices), unsigned(t.group), resident};
  }
  return sweep_config(t, t.slices < kSweepGroups ? t.slices : kSweepGroups);
}

// Kernels without a reduction: one block per row and slice. Long slices, but enough blocks.
inline LaunchConfig rowwise_config(int64_t rows, int64_t vocab, int64_t element_bytes,
                                   const Device& device) {
  const int64_t blocks = 12 * int64_t(device.multiprocessors);
  int slices = 1;
  while (slices < kMaxSlices &&
         (vocab * element_bytes > slices * kRowwiseBytes || rows * slices < blocks)) {
    slices *= 2;
  }
  return {cut(vocab, element_bytes, slices, kGroup), false, 1, kGroup, 0};
}

// Clusters for resident rows. One that takes several rows loads the next while it stores the last;
// but the device must stay full to the end, so only as many rows each as leave 5 waves.
inline unsigned resident_clusters(int64_t rows, unsigned cluster, const Device& device) {
  const int64_t at_once = 3 * int64_t(device.multiprocessors) / cluster + 1;
  const int64_t share = rows / (5 * at_once);
  const int64_t each = share < 1 ? 1 : share > 8 ? 8 : share;
  return unsigned((rows + each - 1) / each);
}

// One-dimensional grids; kernels stride over rows, so any number of clusters gives the same bits.
inline unsigned grid_blocks(int64_t rows, unsigned blocks_per_row) {
  const int64_t limit = INT32_MAX / blocks_per_row;
  return unsigned(rows < limit ? rows : limit) * blocks_per_row;
}

}  // namespace reasonkern
