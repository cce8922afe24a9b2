// Runs the blocks of a launch one after another: each warp in lockstep until it waits or ends.
#include "sim.h"

namespace {

enum { BARRIER = 1, RETURN, BRANCH };      // in place of a function: CONTROL in program.py
constexpr int64_t LIMIT = 10'000'000'000;  // steps of the warps of a block

// Of the active lanes those of `taken` go on at the target; then those furthest behind are active.
void part(Warp& w, uint32_t active, uint32_t taken, int target) {
  for (int l = 0; l < LANES; ++l)
    if (active >> l & 1) w.lane_pc[l] = taken >> l & 1 ? target : w.pc;
  w.pc = w.next = INT32_MAX;
  w.mask = 0;
  for (int l = 0; l < LANES; ++l)
    if (w.live >> l & 1) w.pc = std::min(w.pc, w.lane_pc[l]);
  for (int l = 0; l < LANES; ++l) {
    if (!(w.live >> l & 1)) continue;
    if (w.lane_pc[l] == w.pc)
      w.mask |= 1u << l;
    else
      w.next = std::min(w.next, w.lane_pc[l]);
  }
}

// Until it waits or ends. Of lanes that have parted, those behind go first.
void go(Warp& w, const Op* ops, int& here) {
  while (w.live && !w.waits) {
    if (w.pc >= w.next) part(w, w.mask, 0, 0);
    if (++w.block->steps > LIMIT) fail("no end in sight");
    here = w.pc;
    const Op& op = ops[w.pc++];
    const uint32_t active = w.mask;
    if (op.guard >= 0) {
      const auto* guard = w.at<uint8_t>(op.guard);
      for (int l = 0; l < LANES; ++l)
        if ((guard[l] & 1) == op.negated) w.mask &= ~(1u << l);
      if (!w.mask) {
        w.mask = active;
        continue;
      }
    }
    switch (reinterpret_cast<uintptr_t>(op.run)) {
      case BARRIER:
        w.together();
        w.waits = true;
        break;
      case RETURN:
        w.live &= ~w.mask;
        part(w, active, 0, 0);
        break;
      case BRANCH:
        if (w.mask == active)
          w.pc = op.imm[0];
        else
          part(w, active, w.mask, op.imm[0]);
        break;
      default:
        op.run(w, op);
        w.mask = active;
    }
  }
}

}  // namespace

// -1, or the instruction of which `message` says what is wrong.
extern "C" int launch(const Op* ops, const char* file, int64_t size, int tid, int ctaid, int warps,
                      const int* grid, int64_t shared, const Range* tensors, int tensor_count,
                      int backwards, char* message, int capacity) {
  const int64_t blocks = int64_t(grid[0]) * grid[1] * grid[2];
  for (int64_t n = 0; n < blocks; ++n) {
    const int64_t b = backwards ? blocks - 1 - n : n;
    const int64_t place[3] = {b % grid[0], b / grid[0] % grid[1], b / grid[0] / grid[1]};
    Block block{std::vector<uint8_t>(shared), std::vector<Byte>(shared), tensors, tensor_count};
    std::vector<std::vector<char>> files(warps, std::vector<char>(file, file + size));
    std::vector<Warp> w;
    for (int k = 0; k < warps; ++k) {
      w.push_back({&block, files[k].data(), k});
      for (int l = 0; l < LANES; ++l) {
        w[k].at<uint32_t>(tid)[l] = k * LANES + l;
        for (int d = 0; d < 3; ++d) w[k].at<uint32_t>(ctaid)[d * LANES + l] = place[d];
      }
    }
    int here = 0, waiting;
    try {
      do {
        waiting = 0;
        for (int k = 0; k < warps; ++k) {
          Warp& turn = w[backwards ? warps - 1 - k : k];
          turn.waits = false;
          go(turn, ops, here);
          waiting += turn.waits;
        }
        if (waiting && waiting < warps) fail("a barrier that warps have ended before");
        ++block.barrier;
      } while (waiting);
    } catch (const std::exception& error) {
      std::strncpy(message, (error.what() + (", block " + std::to_string(b))).c_str(),
                   capacity - 1);
      return here;
    }
  }
  return -1;
}
