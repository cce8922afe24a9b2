// CUDA for a host compiler: csrc/common includes this where nvcc is absent. Each thread of a
// cluster is a fiber, and one runs at a time until it waits at a barrier; the clusters of a grid
// run one by one. Kernels start with cuda_sim::launch. Static __shared__ variables fail to compile,
// since there would be one for all blocks: csrc/common/cluster.cuh has dynamic_shared.
#pragma once

#include <malloc.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
#endif

#define CUDA_SIM 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_sim {

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

struct Site {  // the built-in that a thread called, and where
  const char *what, *file;
  int line;
  std::string text() const {
    return std::string(what) + " (" + file + ":" + std::to_string(line) + ")";
  }
};

struct Barrier {  // of the threads of a block, of a cluster, or of a mask of a warp
  unsigned arrived = 0, opened = 0;  // threads now, times so far
  Site site{};                       // of those who have arrived
  bool said[3] = {};                 // to __syncthreads_or, by turns; the next one's is empty
  // What lanes bring to a warp collective. Two sets, used in turn: a lane may come to the next
  // collective before another has read what it needs of this one.
  alignas(16) unsigned char brought[2][32][64];
};

struct Fiber {
  const void* stack = nullptr;
  std::size_t stack_size = 0;
  struct Block* block = nullptr;
  unsigned rank = 0;                 // in the block, x fastest
  const Barrier* barrier = nullptr;  // null: it has exited
  unsigned opening = 0;              // it goes on when the barrier has opened so often
  unsigned cluster_opening = 0;      // from cluster_arrive to cluster_wait
  void *fake_stack = nullptr, *registers[5] = {};  // while it does not run
};

struct Block {
  dim3 index;
  unsigned live;
  std::shared_ptr<unsigned char> shared;
  Barrier barrier;
  std::map<std::pair<unsigned, unsigned>, Barrier> warp_barriers;  // by warp and mask
  std::vector<Fiber> fibers;
};

struct Letter {  // sent to a mailbox and not there yet
  void* to;
  std::vector<unsigned char> bytes;
};

enum class Order { forward, reverse, random };
constexpr std::size_t kStack = 1 << 17;  // takes memory only as far as it is used

struct Machine {
  unsigned threads, cluster;  // per block, blocks per cluster
  std::size_t shared_bytes;
  Order order;
  std::mt19937_64 random;
  std::function<void()> kernel;
  std::unique_ptr<char[]> stacks{};
  std::vector<Block> blocks{};  // of the running cluster
  std::vector<bool> asleep{};   // its warps that miss this pass
  unsigned last = 0;            // the one that misses most
  Barrier barrier{};
  std::map<const void*, std::vector<Letter>> letters{};  // by mailbox
  Fiber scheduler{}, *running = nullptr;
  std::exception_ptr error{};
};
inline Machine machine;
inline Fiber& self() { return *machine.running; }
void run_thread();

// The compiler's own setjmp: swapcontext costs a system call, and longjmp would make the address
// sanitizer forget the frames it leaves. Neither function may be inlined.
#define CUDA_SIM_SWITCH __attribute__((noinline, no_sanitize("address"))) inline
CUDA_SIM_SWITCH void leap(Fiber& to) { __builtin_longjmp(to.registers, 1); }
CUDA_SIM_SWITCH void switch_fiber(Fiber& from, Fiber& to) {
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_size);
  if (__builtin_setjmp(from.registers) == 0) {
    if (to.registers[1] != nullptr) leap(to);  // the address at which it stopped
    ucontext_t fresh;
    getcontext(&fresh);
    fresh.uc_stack.ss_sp = const_cast<void*>(to.stack);
    fresh.uc_stack.ss_size = to.stack_size;
    makecontext(&fresh, run_thread, 0);
    setcontext(&fresh);
  }
  __sanitizer_finish_switch_fiber(from.fake_stack, nullptr, nullptr);
}

inline void yield() { switch_fiber(self(), machine.scheduler); }

inline void wait(const Barrier* barrier, unsigned opening) {
  self().barrier = barrier;
  self().opening = opening;
  yield();
}

// Returns the opening to wait for, which happens when `expected` threads have arrived.
inline unsigned arrive(Barrier& b, unsigned expected, const Site& site) {
  if (b.arrived++ == 0) b.site = site;
  if (b.site.line != site.line || std::strcmp(b.site.what, site.what) != 0) {
    fail("divergent barrier: " + site.text() + " meets " + b.site.text());
  }
  if (b.arrived < expected) return b.opened + 1;
  b.arrived = 0;
  return ++b.opened;
}

inline void run_thread() {
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack, &machine.scheduler.stack_size);
  try {
    machine.kernel();
  } catch (...) {
    machine.error = std::current_exception();
  }
  Block& block = *self().block;  // its shared memory goes with its last thread, mapped or not
  if (--block.live == 0) std::memset(block.shared.get(), 0xff, machine.shared_bytes);
  wait(nullptr, 0);
}

inline dim3 place(unsigned i, const dim3& shape) {
  return dim3(i % shape.x, i / shape.x % shape.y, i / shape.x / shape.y);
}

inline bool resume(Fiber& fiber) {
  if (fiber.barrier == nullptr || fiber.barrier->opened < fiber.opening) return false;
  machine.running = &fiber;
  threadIdx = place(fiber.rank, blockDim);
  blockIdx = fiber.block->index;
  switch_fiber(machine.scheduler, fiber);
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
  return true;
}

inline std::vector<unsigned> turns(unsigned n) {  // 0 … n - 1 in the order of the launch
  std::vector<unsigned> list(n);
  for (unsigned i = 0; i < n; ++i) list[i] = i;
  if (machine.order == Order::reverse) std::reverse(list.begin(), list.end());
  if (machine.order == Order::random) std::shuffle(list.begin(), list.end(), machine.random);
  return list;
}

// The threads of the cluster that run in this pass. In random order warps fall behind, one of them
// far, and farther than their next barrier lets them where nothing else holds them together.
inline std::vector<unsigned> awake_threads() {
  std::vector<unsigned> list = turns(machine.cluster * machine.threads);
  if (machine.order != Order::random) return list;
  const bool changes = machine.random() % 16 == 0;
  for (unsigned i = 0; changes && i < machine.asleep.size(); ++i)
    machine.asleep[i] = machine.random() % (i == machine.last ? 8 : 2) != 0;
  const auto sleeps = [](unsigned i) { return machine.asleep[i / 32]; };
  list.erase(std::remove_if(list.begin(), list.end(), sleeps), list.end());
  return list;
}

// Whether there was one.
inline bool wake_all() {
  const auto n = std::count(machine.asleep.begin(), machine.asleep.end(), true);
  machine.asleep.assign(machine.asleep.size(), false);
  return n > 0;
}

[[noreturn]] inline void report_deadlock() {
  std::ostringstream text("deadlock", std::ios::ate);
  for (const Block& block : machine.blocks) {
    std::map<std::string, unsigned> groups;
    for (const Fiber& f : block.fibers) {
      ++groups[f.barrier == nullptr ? "have exited" : "wait at " + f.barrier->site.text()];
    }
    const auto [x, y, z] = block.index;
    text << "; block (" << x << "," << y << "," << z << ")";
    for (const auto& [what, n] : groups) {
      text << ": " << n << "/" << machine.threads << " threads " << what;
    }
  }
  fail(text.str());
}

inline void start_block(unsigned id, unsigned rank) {
  Block& block = machine.blocks[rank];
  block.index = place(id, gridDim);
  block.live = machine.threads;
  void* memory = memalign(1024, machine.shared_bytes);  // no byte more, for the sanitizer
  block.shared.reset(static_cast<unsigned char*>(memory), free);
  std::memset(memory, 0xff, machine.shared_bytes);  // NaN in every float format
  for (unsigned i = 0; i < machine.threads; ++i) {
    const char* stack = machine.stacks.get() + (rank * machine.threads + i) * kStack;
    const std::size_t size = kStack - i % 64 * 64;  // stacks in step would share cache sets
    block.fibers.push_back({stack, size, &block, i, &block.barrier});
  }
}

inline void run_cluster(unsigned id) {
  machine.barrier = {};
  machine.blocks = std::vector<Block>(machine.cluster);
  for (unsigned i = 0; i < machine.cluster; ++i) start_block(id * machine.cluster + i, i);
  machine.asleep.assign(machine.cluster * machine.threads / 32 + 1, false);
  machine.last = unsigned(machine.random() % machine.asleep.size());
  bool any = true;
  for (unsigned passes = 0; any || wake_all(); ++passes) {
    if (passes > 1'000'000) fail("livelock: the threads only wait on memory");
    any = false;
    for (unsigned i : awake_threads()) {
      any |= resume(machine.blocks[i / machine.threads].fibers[i % machine.threads]);
    }
  }
  for (const Block& block : machine.blocks) {
    if (block.live > 0) report_deadlock();
  }
  for (const auto& [box, letters] : machine.letters) {
    if (!letters.empty()) fail("send: nobody waited for it");
  }
  machine.letters.clear();
}

// Runs kernel(args...) over the grid; `cluster` blocks along x form a cluster (1: none).
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster,
            std::size_t shared_bytes, Order order, std::uint64_t seed, Args... args) {
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (threads < 1 || threads > 1024) fail("launch: a block has 1 to 1024 threads");
  if (cluster < 1 || cluster > 16) fail("launch: a cluster has 1 to 16 blocks");
  if (blocks < 1 || grid.x % cluster != 0) fail("launch: grid.x is a multiple of the cluster size");
  if (shared_bytes > 227 * 1024) fail("launch: a block has at most 227 KiB of shared memory");
  gridDim = grid;
  blockDim = block;
  const auto run = [&] { kernel(static_cast<Params>(args)...); };
  machine = {threads, cluster, shared_bytes, order, std::mt19937_64(seed), run};
  machine.stacks.reset(new char[cluster * threads * kStack]);
  for (unsigned id : turns(blocks / cluster)) run_cluster(id);
}

// The last parameter of a built-in at which threads meet; the default is the place of the call.
#define CUDA_SIM_HERE(name) cuda_sim::Site at = {name, __builtin_FILE(), __builtin_LINE()}

template <class T>
T* aligned(T* p, std::size_t bytes, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(p) % bytes == 0) return p;
  fail(std::string(what) + ": the address is misaligned");
}

inline void copy16(void* to, const void* from, const char* what) {
  std::memcpy(aligned(to, 16, what), aligned(from, 16, what), 16);
}

inline void* shared_base(std::size_t offset, std::size_t alignment) {
  return aligned(self().block->shared.get() + offset, alignment, "dynamic_shared");
}

inline unsigned cluster_rank() { return self().block - machine.blocks.data(); }
inline unsigned cluster_size() { return machine.cluster; }

inline void cluster_arrive(CUDA_SIM_HERE("the cluster barrier")) {
  if (self().cluster_opening != 0) fail("cluster_arrive: called twice without a cluster_wait");
  self().cluster_opening = arrive(machine.barrier, machine.cluster * machine.threads, at);
}

inline void cluster_wait() {
  if (self().cluster_opening == 0) fail("cluster_wait: called without a cluster_arrive");
  wait(&machine.barrier, std::exchange(self().cluster_opening, 0));
}

inline void* cluster_map(const void* p, unsigned rank) {
  const std::size_t offset = static_cast<const unsigned char*>(p) - self().block->shared.get();
  if (offset > machine.shared_bytes) fail("cluster_map: not into this block's shared memory");
  if (rank >= machine.cluster) fail("cluster_map: no such block in the cluster");
  const Block& block = machine.blocks[rank];
  if (&block != self().block) {
    if (machine.barrier.opened == 0) fail("cluster_map: before the first cluster barrier");
    if (block.live < machine.threads) fail("cluster_map: threads of the block have exited");
  }
  return block.shared.get() + offset;
}

// A warp collective: each lane of `mask` brings a value and, when all have come, reads what it
// needs of them, read(lane), before its next collective.
template <class T>
auto collective(const Site& at, unsigned mask, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 64, "Barrier::brought");
  const unsigned warp = self().rank / 32, lane = self().rank % 32;
  if (!(mask >> lane & 1)) fail(at.text() + ": the mask does not name the calling lane");
  Barrier& barrier = self().block->warp_barriers[{warp, mask}];
  auto& brought = barrier.brought[barrier.opened % 2];
  std::memcpy(brought[lane], &value, sizeof(T));
  wait(&barrier, arrive(barrier, __builtin_popcount(mask), at));
  return [=, &brought](unsigned from) {
    if (from > 31 || !(mask >> from & 1)) fail(at.text() + ": reads a lane outside the mask");
    T read = value;
    std::memcpy(&read, brought[from], sizeof(T));
    return read;
  };
}

}  // namespace cuda_sim

inline int __syncthreads_or(int mine, CUDA_SIM_HERE("__syncthreads_or")) {
  auto& barrier = cuda_sim::self().block->barrier;
  const unsigned turn = barrier.opened % 3;
  barrier.said[turn] |= mine != 0;
  barrier.said[(turn + 1) % 3] = false;
  cuda_sim::wait(&barrier, cuda_sim::arrive(barrier, cuda_sim::machine.threads, at));
  return barrier.said[turn];
}
inline void __syncthreads(CUDA_SIM_HERE("__syncthreads")) { __syncthreads_or(0, at); }
inline void __syncwarp(unsigned mask = ~0u, CUDA_SIM_HERE("__syncwarp")) {
  cuda_sim::collective(at, mask, 0);
}

#define CUDA_SIM_SHUFFLE(name, from)                                                     \
  template <class T>                                                                     \
  T name(unsigned mask, T value, int k, int width = 32, CUDA_SIM_HERE(#name)) {          \
    const int lane = static_cast<int>(cuda_sim::self().rank % 32), base = lane & -width; \
    return cuda_sim::collective(at, mask, value)(from);                                  \
  }
CUDA_SIM_SHUFFLE(__shfl_sync, base + (k & (width - 1)))
CUDA_SIM_SHUFFLE(__shfl_up_sync, lane - k < base ? lane : lane - k)
CUDA_SIM_SHUFFLE(__shfl_down_sync, lane + k >= base + width ? lane : lane + k)
CUDA_SIM_SHUFFLE(__shfl_xor_sync, (lane ^ k) >= base + width ? lane : lane ^ k)

// Folds `step` over the lanes of the mask; r: the result so far, read(l): what lane l brought.
#define CUDA_SIM_FOLD(name, Out, start, step)                \
  template <class T>                                         \
  Out name(unsigned mask, T value, CUDA_SIM_HERE(#name)) {   \
    const auto read = cuda_sim::collective(at, mask, value); \
    Out r = start;                                           \
    for (unsigned l = 0; l < 32; ++l) {                      \
      if (mask >> l & 1) r = step;                           \
    }                                                        \
    return r;                                                \
  }
CUDA_SIM_FOLD(__ballot_sync, unsigned, 0, read(l) != T() ? r | 1u << l : r)
CUDA_SIM_FOLD(__any_sync, int, 0, r || read(l) != T())
CUDA_SIM_FOLD(__all_sync, int, 1, read(l) != T() && r)
CUDA_SIM_FOLD(__match_any_sync, unsigned, 0, read(l) == value ? r | 1u << l : r)
CUDA_SIM_FOLD(__reduce_add_sync, T, 0, static_cast<T>(0u + r + read(l)))
CUDA_SIM_FOLD(__reduce_min_sync, T, value, std::min(r, read(l)))
CUDA_SIM_FOLD(__reduce_max_sync, T, value, std::max(r, read(l)))
CUDA_SIM_FOLD(__reduce_or_sync, T, 0, r | read(l))

// Other threads come between two atomics, and a spinning thread lets them. v: the operands.
#define CUDA_SIM_ATOMIC(name, update)                      \
  template <class T, class... Values>                      \
  T name(T* p, Values... values) {                         \
    const T v[] = {static_cast<T>(values)...};             \
    cuda_sim::yield();                                     \
    const T old = *cuda_sim::aligned(p, sizeof(T), #name); \
    *p = update;                                           \
    return old;                                            \
  }
CUDA_SIM_ATOMIC(atomicAdd, old + v[0])
CUDA_SIM_ATOMIC(atomicMax, std::max(old, v[0]))
CUDA_SIM_ATOMIC(atomicMin, std::min(old, v[0]))
CUDA_SIM_ATOMIC(atomicOr, old | v[0])
CUDA_SIM_ATOMIC(atomicExch, v[0])
CUDA_SIM_ATOMIC(atomicCAS, old == v[0] ? v[1] : old)

inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __nanosleep(unsigned) { cuda_sim::yield(); }

#include "cuda_sim_async.h"
#include "cuda_sim_numbers.h"
