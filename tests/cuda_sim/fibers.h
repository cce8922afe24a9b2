// The machine below cuda_sim.h: every thread of a cluster is a fiber with its own stack, run by a
// scheduler one at a time until it waits for others. Clusters of a grid run one after another.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_sim {

enum class Order { forward, reverse, random };

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

struct Site {  // the built-in at which a thread waits and the line that called it
  const char* what;
  const char* file = "";
  int line = 0;
  std::string text() const {
    const std::string path(file);
    if (path.empty()) return what;
    return what + (" (" + path.substr(path.rfind('/') + 1) + ":" + std::to_string(line) + ")");
  }
  bool operator!=(const Site& o) const { return line != o.line || std::strcmp(file, o.file) != 0; }
};

// A suspended point of execution. On x86-64 a switch is six pushes and a new stack pointer;
// elsewhere swapcontext, which costs two system calls more.
struct Context {
  const void* stack = nullptr;
  std::size_t size = 0;
#if defined(__x86_64__)
  void* sp = nullptr;
  void start(unsigned char* end, void (*entry)()) {
    void** top = reinterpret_cast<void**>(end);
    top[-1] = nullptr;  // the return address of the entry function, which never returns
    top[-2] = reinterpret_cast<void*>(entry);
    sp = top - 8;
  }
  __attribute__((naked, noinline)) static void swap(Context* /*from*/, Context* /*to*/) {
    asm("push %%rbp; push %%rbx; push %%r12; push %%r13; push %%r14; push %%r15\n\t"
        "mov %%rsp, %c0(%%rdi); mov %c0(%%rsi), %%rsp\n\t"
        "pop %%r15; pop %%r14; pop %%r13; pop %%r12; pop %%rbx; pop %%rbp; ret" ::"i"(
            2 * sizeof(void*)));
  }
#else
  ucontext_t state;
  void start(unsigned char* end, void (*entry)()) {
    getcontext(&state);
    state.uc_stack.ss_sp = const_cast<void*>(stack);
    state.uc_stack.ss_size = static_cast<std::size_t>(end - static_cast<const unsigned char*>(stack));
    makecontext(&state, entry, 0);
  }
  static void swap(Context* from, Context* to) { swapcontext(&from->state, &to->state); }
#endif
};

inline void switch_context(Context& from, Context& to, [[maybe_unused]] bool forever = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, to.stack, to.size);
  Context::swap(&from, &to);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
  Context::swap(&from, &to);
#endif
}

struct Copy {  // an asynchronous copy under way
  void* to;
  const void* from;
  unsigned group;
};

enum class State { ready, waiting, exited };

struct Block;

struct Fiber {
  Context context;
  State state = State::ready;
  Site site{""};
  Block* block = nullptr;
  unsigned rank = 0;  // in the block, x fastest
  dim3 thread;
  unsigned arrivals = 0, waits = 0;  // at the cluster barrier
  unsigned committed = 0;
  std::vector<Copy> copies;
};

struct Meeting {  // lanes of one warp gathering for a collective under one mask
  unsigned mask, present;
  const void* kind;
  Site site;
  void* slot[32];
};

struct Block {
  dim3 index;
  unsigned rank = 0, live = 0;
  unsigned present = 0, votes = 0, result = 0;  // at the block barrier
  Site barrier{""};
  Fiber* fibers = nullptr;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<std::vector<Meeting>> meetings;  // of each warp
};

struct Machine {
  unsigned threads = 0, cluster = 1, arrived = 0, barriers = 0, live = 0;
  std::size_t shared_bytes = 0;
  Order order = Order::forward;
  std::mt19937_64 random;
  std::uint64_t idle = 0;  // resumptions since a thread exited or was released
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<unsigned> turns;
  Fiber* running = nullptr;
  Context scheduler;
  void (*body)(const void*) = nullptr;
  const void* kernel = nullptr;
  std::exception_ptr error;
};
inline Machine machine;

inline Fiber& self() {
  if (machine.running == nullptr) fail("a device built-in was called outside cuda_sim::launch");
  return *machine.running;
}

inline void park(State state, const Site& site) {
  Fiber& fiber = self();
  fiber.state = state;
  fiber.site = site;
  switch_context(fiber.context, machine.scheduler, state == State::exited);
}

inline void release(Fiber& fiber) {
  fiber.state = State::ready;
  machine.idle = 0;
}

inline void run_thread() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack, &machine.scheduler.size);
#endif
  try {
    machine.body(machine.kernel);
  } catch (...) {
    machine.error = std::current_exception();
  }
  machine.idle = 0;
  --machine.live;
  Block& block = *self().block;  // its shared memory goes with its last thread, mapped or not
  if (--block.live == 0) std::memset(block.shared.get(), 0xff, machine.shared_bytes);
  park(State::exited, {"exit"});
}

inline void prepare(Fiber& fiber, Block& block, unsigned rank, unsigned number) {
  constexpr std::size_t kGuard = 4096, kStack = 256 * 1024;
  if (fiber.context.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuard, PROT_NONE) != 0) {
      fail("launch: no memory for the stack of thread " + std::to_string(number));
    }
    fiber.context.stack = static_cast<unsigned char*>(memory) + kGuard;
    fiber.context.size = kStack - kGuard;
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(fiber.context.stack, fiber.context.size);  // abandoned frames
#endif
  // Equal offsets in page-aligned stacks would fall into a few cache sets: stagger them.
  auto* end = static_cast<unsigned char*>(const_cast<void*>(fiber.context.stack)) + kStack - kGuard;
  fiber.context.start(end - number % 64 * 64, run_thread);
  fiber.state = State::ready;
  fiber.block = &block;
  fiber.rank = rank;
  fiber.thread = dim3(rank % blockDim.x, rank / blockDim.x % blockDim.y,
                      rank / blockDim.x / blockDim.y);
  fiber.arrivals = fiber.waits = fiber.committed = 0;
  fiber.copies.clear();
}

[[noreturn]] inline void report_deadlock() {
  std::string text = "deadlock";
  for (const Block& block : machine.blocks) {
    std::map<std::string, unsigned> groups;
    for (unsigned i = 0; i < machine.threads; ++i) {
      const Fiber& fiber = block.fibers[i];
      ++groups[fiber.state == State::exited ? "have exited" : "wait at " + fiber.site.text()];
    }
    text += "; block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) +
            "," + std::to_string(block.index.z) + ")";
    for (const auto& [where, count] : groups) {
      text += ": " + std::to_string(count) + "/" + std::to_string(machine.threads) + " threads " +
              where;
    }
  }
  fail(text);
}

inline void start_cluster(std::size_t cluster_id) {
  machine.arrived = machine.barriers = 0;
  machine.live = machine.cluster * machine.threads;
  for (unsigned r = 0; r < machine.cluster; ++r) {
    Block& block = machine.blocks[r];
    const std::size_t id = cluster_id * machine.cluster + r, row = id / gridDim.x;
    block.index = dim3(unsigned(id % gridDim.x), unsigned(row % gridDim.y), unsigned(row / gridDim.y));
    block.rank = r;
    block.present = block.votes = 0;
    block.live = machine.threads;
    block.fibers = &machine.fibers[r * machine.threads];
    std::memset(block.shared.get(), 0xff, machine.shared_bytes);  // NaN in every float format
    block.meetings.assign((machine.threads + 31) / 32, {});
    for (unsigned i = 0; i < machine.threads; ++i) {
      prepare(block.fibers[i], block, i, r * machine.threads + i);
    }
  }
}

inline void run_cluster() {
  constexpr std::uint64_t kIdleLimit = 10'000'000;  // under a second of spinning
  for (machine.idle = 0; machine.live > 0;) {
    if (machine.order == Order::random) {
      std::shuffle(machine.turns.begin(), machine.turns.end(), machine.random);
    }
    bool ran = false;
    for (unsigned turn : machine.turns) {
      Fiber& fiber = machine.fibers[turn];
      if (fiber.state != State::ready) continue;
      ran = true;
      machine.running = &fiber;
      threadIdx = fiber.thread;
      blockIdx = fiber.block->index;
      switch_context(machine.scheduler, fiber.context);
      machine.running = nullptr;
      if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
      if (++machine.idle > kIdleLimit) fail("livelock: the threads only wait on memory");
    }
    if (!ran) report_deadlock();
  }
}

inline void run_grid(dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes, Order order,
                     std::uint64_t seed) {
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  if (machine.running != nullptr) fail("launch: called from device code");
  if (threads < 1 || threads > 1024) fail("launch: a block has 1 to 1024 threads");
  if (cluster < 1 || cluster > 16) fail("launch: a cluster has 1 to 16 blocks");
  if (blocks < 1 || grid.x % cluster != 0) fail("launch: grid.x is a multiple of the cluster size");
  if (shared_bytes > 227 * 1024) fail("launch: a block has at most 227 KiB of shared memory");
  gridDim = grid;
  blockDim = block;
  machine.threads = static_cast<unsigned>(threads);
  machine.cluster = cluster;
  machine.shared_bytes = shared_bytes;
  machine.order = order;
  machine.random.seed(seed);
  if (machine.fibers.size() < threads * cluster) machine.fibers.resize(threads * cluster);
  machine.blocks.clear();
  machine.blocks.resize(cluster);
  for (Block& b : machine.blocks) {  // of the exact size, for the address sanitizer
    void* memory = nullptr;
    if (posix_memalign(&memory, 1024, shared_bytes) != 0) fail("launch: no shared memory");
    b.shared.reset(static_cast<unsigned char*>(memory));
  }
  std::vector<std::size_t> clusters(blocks / cluster);
  machine.turns.resize(threads * cluster);
  std::iota(clusters.begin(), clusters.end(), std::size_t{0});
  std::iota(machine.turns.begin(), machine.turns.end(), 0u);
  if (order == Order::reverse) {
    std::reverse(clusters.begin(), clusters.end());
    std::reverse(machine.turns.begin(), machine.turns.end());
  } else if (order == Order::random) {
    std::shuffle(clusters.begin(), clusters.end(), machine.random);
  }
  for (std::size_t id : clusters) {
    start_cluster(id);
    run_cluster();
  }
}

}  // namespace cuda_sim
