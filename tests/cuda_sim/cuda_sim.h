// CUDA's keywords and built-ins for a host compiler; csrc/common includes it where nvcc is absent.
// Kernels start with cuda_sim::launch. Unsupported, so that use fails to compile: static __shared__
// variables (take csrc/common/cluster.cuh's dynamic_shared), __activemask, textures, tensor cores.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "fibers.h"
#include "numbers.h"

#define CUDA_SIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __cluster_dims__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

constexpr int warpSize = 32;

namespace cuda_sim {

template <class T>
using same_t = std::enable_if_t<true, T>;  // takes no part in template argument deduction

inline void check_aligned(const volatile void* p, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes != 0) {
    fail(std::string(what) + ": the address is misaligned, not a multiple of " +
         std::to_string(bytes) + " bytes");
  }
}

inline void copy16(void* to, const void* from, const char* what) {
  check_aligned(to, 16, what);
  check_aligned(from, 16, what);
  std::memcpy(to, from, 16);
}

inline void* shared_base(std::size_t offset, std::size_t alignment) {
  if (offset > machine.shared_bytes) fail("dynamic_shared: the offset lies behind the end");
  check_aligned(reinterpret_cast<void*>(offset), alignment, "dynamic_shared");
  return self().block->shared.get() + offset;
}

inline std::size_t shared_offset(const void* p, std::size_t bytes, const char* what) {
  const auto base = reinterpret_cast<std::uintptr_t>(self().block->shared.get());
  const std::size_t offset = reinterpret_cast<std::uintptr_t>(p) - base;
  if (offset > machine.shared_bytes || bytes > machine.shared_bytes - offset) {
    fail(std::string(what) + ": the pointer is not into this block's shared memory");
  }
  return offset;
}

inline unsigned cluster_rank() { return self().block->rank; }
inline unsigned cluster_size() { return machine.cluster; }

inline void cluster_arrive() {
  Fiber& fiber = self();
  if (fiber.arrivals++ != fiber.waits) fail("cluster_arrive: called twice without a cluster_wait");
  if (++machine.arrived < machine.cluster * machine.threads) return;
  machine.arrived = 0;
  ++machine.opened;
  for (Block& block : machine.blocks) {
    for (Fiber& f : block.fibers) {
      if (f.waits == machine.opened) release(f);
    }
  }
}

inline void cluster_wait() {
  Fiber& fiber = self();
  if (++fiber.waits != fiber.arrivals) fail("cluster_wait: called without a cluster_arrive");
  const bool open = machine.opened >= fiber.waits;
  park(open ? State::ready : State::waiting, {"the cluster barrier"});
}

inline void* cluster_map(const void* p, unsigned rank) {
  const std::size_t offset = shared_offset(p, 0, "cluster_map");
  if (rank >= machine.cluster) fail("cluster_map: no such block in the cluster");
  Block& block = machine.blocks[rank];
  if (&block != self().block) {
    if (machine.opened == 0) fail("cluster_map: before the first cluster barrier");
    if (block.live < machine.threads) fail("cluster_map: threads of the block have exited");
  }
  return block.shared.get() + offset;
}

inline void copy_async16(void* shared, const void* global) {
  shared_offset(shared, 16, "copy_async");
  check_aligned(shared, 16, "copy_async");
  check_aligned(global, 16, "copy_async");
  self().copies.push_back({shared, global, self().committed});
}
inline void copy_commit() { ++self().committed; }
inline void copy_wait(unsigned pending) {  // as late as the hardware may: nothing lands before
  auto& copies = self().copies;
  auto young = copies.begin();
  for (; young != copies.end() && young->group + pending < self().committed; ++young) {
    std::memcpy(young->to, young->from, 16);
  }
  copies.erase(copies.begin(), young);
}

// A warp collective: the last lane to come computes every lane's result with combine(lane, value),
// where value(l) is what lane l brought.
template <class Out, class In, class Combine>
Out meet(const Site& site, unsigned mask, const In& in, Combine combine) {
  struct Slot {
    In in;
    Out out;
  } mine{in, Out()};
  static const char kind = 0;
  Fiber& fiber = self();
  const unsigned lane = fiber.rank % 32;
  if (!(mask >> lane & 1)) fail(site.text() + ": the mask does not name the calling lane");
  auto& meetings = fiber.block->meetings[fiber.rank / 32];
  auto it = std::find_if(meetings.begin(), meetings.end(),
                         [&](const Meeting& m) { return m.mask == mask; });
  if (it == meetings.end()) it = meetings.insert(it, Meeting{mask, 0, &kind, site, {}});
  if (it->kind != &kind) {
    fail("divergent warp: " + site.text() + " meets " + it->site.text() + " under one mask");
  }
  it->present |= 1u << lane;
  it->slot[lane] = &mine;
  if (it->present != mask) {
    park(State::waiting, site);
    return mine.out;
  }
  const auto value = [&](unsigned l) -> const In& {
    if (l > 31 || !(mask >> l & 1)) fail(site.text() + ": reads a lane that is not in the mask");
    return static_cast<Slot*>(it->slot[l])->in;
  };
  for (unsigned l = 0; l < 32; ++l) {
    if (!(mask >> l & 1)) continue;
    static_cast<Slot*>(it->slot[l])->out = combine(l, value);
    release(fiber.block->fibers[fiber.rank - lane + l]);
  }
  meetings.erase(it);
  park(State::ready, site);
  return mine.out;
}

template <class T>
T shuffle(const Site& site, unsigned mask, T value, unsigned from) {
  const auto take = [](unsigned lane, auto& in) { return in(in(lane).second).first; };
  return meet<T>(site, mask, std::pair<T, unsigned>(value, from), take);
}

template <class Out, class T, class Fold>
Out fold(const Site& site, unsigned mask, T value, Out start, Fold step) {
  return meet<Out>(site, mask, value, [=](unsigned lane, auto& in) {
    Out result = start;
    for (unsigned l = 0; l < 32; ++l) {
      if (mask >> l & 1) result = step(result, l, in(l), in(lane));
    }
    return result;
  });
}

inline void block_barrier(const Site& site) {
  Block& block = *self().block;
  if (block.present != 0 && block.barrier != site) {
    fail("divergent barrier: " + site.text() + " meets " + block.barrier.text());
  }
  block.barrier = site;
  if (++block.present < machine.threads) return park(State::waiting, site);
  block.present = 0;
  for (Fiber& f : block.fibers) release(f);
  park(State::ready, site);
}

template <class T, class Update>
T atomic(T* p, const char* what, Update update) {
  check_aligned(p, sizeof(T), what);
  park(State::ready, {what});  // other threads come between, and a spinning thread lets them
  const T old = *p;
  *p = update(old);
  return old;
}

}  // namespace cuda_sim

#define CUDA_SIM_HERE(name) cuda_sim::Site at = {name, __builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_SIM_HERE("__syncthreads")) { cuda_sim::block_barrier(at); }

#define CUDA_SIM_SHUFFLE(name, from)                                                     \
  template <class T>                                                                     \
  T name(unsigned mask, T value, int k, int width = 32, CUDA_SIM_HERE(#name)) {          \
    const int lane = static_cast<int>(cuda_sim::self().rank % 32), base = lane & -width; \
    return cuda_sim::shuffle(at, mask, value, static_cast<unsigned>(from));              \
  }
CUDA_SIM_SHUFFLE(__shfl_sync, base + (k & (width - 1)))
CUDA_SIM_SHUFFLE(__shfl_up_sync, lane - k < base ? lane : lane - k)
CUDA_SIM_SHUFFLE(__shfl_down_sync, lane + k >= base + width ? lane : lane + k)
CUDA_SIM_SHUFFLE(__shfl_xor_sync, (lane ^ k) >= base + width ? lane : lane ^ k)

// r: the result so far, l: a lane of the mask, v: its value, own: the calling lane's value.
#define CUDA_SIM_FOLD(name, Out, start, step)                                       \
  template <class T>                                                                \
  Out name(unsigned mask, T value, CUDA_SIM_HERE(#name)) {                          \
    return cuda_sim::fold<Out>(at, mask, value, start,                              \
                               [](Out r, [[maybe_unused]] unsigned l, T v,          \
                                  [[maybe_unused]] T own) -> Out { return step; }); \
  }
CUDA_SIM_FOLD(__ballot_sync, unsigned, 0u, r | (v != T() ? 1u << l : 0u))
CUDA_SIM_FOLD(__any_sync, int, 0, r | (v != T()))
CUDA_SIM_FOLD(__all_sync, int, 1, r&(v != T()))
CUDA_SIM_FOLD(__match_any_sync, unsigned, 0u, r | (v == own ? 1u << l : 0u))
CUDA_SIM_FOLD(__reduce_add_sync, T, T(0), static_cast<T>(0u + r + v))
CUDA_SIM_FOLD(__reduce_min_sync, T, std::numeric_limits<T>::max(), std::min(r, v))
CUDA_SIM_FOLD(__reduce_max_sync, T, std::numeric_limits<T>::min(), std::max(r, v))
inline void __syncwarp(unsigned mask = ~0u, CUDA_SIM_HERE("__syncwarp")) {
  cuda_sim::fold(at, mask, 0, 0, [](int, unsigned, int, int) { return 0; });
}

#define CUDA_SIM_ATOMIC(name, update)                                      \
  template <class T>                                                       \
  T name(T* p, cuda_sim::same_t<T> v) {                                    \
    return cuda_sim::atomic(p, #name, [v](T old) -> T { return update; }); \
  }
CUDA_SIM_ATOMIC(atomicAdd, old + v)
CUDA_SIM_ATOMIC(atomicMax, old < v ? v : old)
CUDA_SIM_ATOMIC(atomicMin, old < v ? old : v)
CUDA_SIM_ATOMIC(atomicExch, (static_cast<void>(old), v))
template <class T>
T atomicCAS(T* p, cuda_sim::same_t<T> expected, cuda_sim::same_t<T> v) {
  return cuda_sim::atomic(p, "atomicCAS", [=](T old) { return old == expected ? v : old; });
}

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { cuda_sim::park(cuda_sim::State::ready, {"__nanosleep"}); }
inline void __trap() { cuda_sim::fail("__trap"); }

template <class T>
T __ldg(const T* p) {
  cuda_sim::check_aligned(p, sizeof(T), "__ldg");
  return *p;
}
