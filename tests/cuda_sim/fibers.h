// The machine below cuda_sim.h: each thread of a cluster is a fiber with its own stack, run by a
// scheduler one at a time until it waits for others. The clusters of a grid run one by one.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
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
#else
inline void __sanitizer_start_switch_fiber(void**, const void*, std::size_t) {}
inline void __sanitizer_finish_switch_fiber(void*, const void**, std::size_t*) {}
inline void __asan_unpoison_memory_region(const volatile void*, std::size_t) {}
#endif

#define CUDA_SIM_INLINE __attribute__((always_inline)) inline

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace cuda_sim {

enum class Order { forward, reverse, random };
enum class State { ready, waiting, exited };

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

struct Site {  // the built-in at which a thread waits and the line that called it
  const char* what = "";
  const char* file = "";
  int line = 0;
  std::string text() const {
    const std::string path(file), place = path.substr(path.rfind('/') + 1);
    return place.empty() ? what : what + (" (" + place) + ":" + std::to_string(line) + ")";
  }
  bool operator!=(const Site& o) const { return line != o.line || std::strcmp(file, o.file) != 0; }
};

// A suspended point of execution. On x86-64 a switch costs some nanoseconds: it saves the six
// registers that calls preserve, and jumps, since a ret to another stack is always mispredicted.
struct Context {
  const void* stack = nullptr;
  std::size_t size = 0;
#if defined(__x86_64__)
  void* sp = nullptr;
  void start(void (*entry)()) {
    void** top = static_cast<void**>(const_cast<void*>(stack)) + size / sizeof(void*);
    top[-1] = nullptr;  // the return address of the entry function, which never returns
    top[-2] = reinterpret_cast<void*>(entry);
    sp = top - 8;
  }
  __attribute__((naked, noinline)) static void swap(void** /*from*/, void** /*to*/) {
    asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15\n\t"
        "mov %rsp, (%rdi); mov (%rsi), %rsp\n\t"
        "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; pop %rax; jmp *%rax");
  }
#else
  ucontext_t sp;
  void start(void (*entry)()) {
    getcontext(&sp);
    sp.uc_stack.ss_sp = const_cast<void*>(stack);
    sp.uc_stack.ss_size = size;
    makecontext(&sp, entry, 0);
  }
  static void swap(ucontext_t* from, ucontext_t* to) { swapcontext(from, to); }
#endif
};

CUDA_SIM_INLINE void switch_context(Context& from, Context& to, bool forever = false) {
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(forever ? nullptr : &fake, to.stack, to.size);
  Context::swap(&from.sp, &to.sp);
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
}

struct Copy {  // an asynchronous copy under way
  void* to;
  const void* from;
  unsigned group;
};

struct Fiber {
  Context context;
  State state = State::ready;
  Site site;
  struct Block* block = nullptr;
  unsigned rank = 0;  // in the block, x fastest
  dim3 thread;
  unsigned arrivals = 0, waits = 0;  // at the cluster barrier
  unsigned committed = 0;            // groups of copies
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
  unsigned rank = 0, live = 0, present = 0;  // present: at __syncthreads
  Site barrier;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<Fiber> fibers;
  std::vector<std::vector<Meeting>> meetings;  // of each warp
};

struct Machine {
  unsigned threads = 0, cluster = 1;  // per block, blocks per cluster
  unsigned arrived = 0, opened = 0;   // at the cluster barrier: threads now, times so far
  unsigned live = 0, idle = 0;        // idle: resumptions since a thread exited or was released
  std::size_t shared_bytes = 0;
  Order order = Order::forward;
  std::mt19937_64 random;
  std::vector<Block> blocks;
  std::vector<std::vector<Fiber*>> warps;  // of the cluster, in the order of their turns
  Fiber* running = nullptr;
  Context scheduler;
  std::function<void()> kernel;
  std::exception_ptr error;
};
inline Machine machine;

inline Fiber& self() {
  if (machine.running == nullptr) fail("a device built-in was called outside cuda_sim::launch");
  return *machine.running;
}

CUDA_SIM_INLINE void park(State state, const Site& site) {
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
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler.stack, &machine.scheduler.size);
  try {
    machine.kernel();
  } catch (...) {
    machine.error = std::current_exception();
  }
  machine.idle = 0;
  --machine.live;
  Block& block = *self().block;  // its shared memory goes with its last thread, mapped or not
  if (--block.live == 0) std::memset(block.shared.get(), 0xff, machine.shared_bytes);
  park(State::exited, {});
}

// The stack of a thread, below it a page that traps an overflow. An odd number of pages, and tops
// spread over a page: stacks a power of two apart would share their cache sets.
inline void give_stack(Context& context, std::size_t number) {
  constexpr std::size_t kPage = 4096, kStack = 33 * kPage;
  static std::vector<unsigned char*> stacks;
  while (stacks.size() <= number) {
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fail("launch: no stack");
    stacks.push_back(static_cast<unsigned char*>(memory) + kPage);
  }
  __asan_unpoison_memory_region(stacks[number], kStack);  // frames a failed launch abandoned
  context.stack = stacks[number];
  context.size = kStack - number % 64 * 64;
  context.start(run_thread);
}

inline void start_block(Block& block, unsigned id, unsigned rank) {
  const unsigned row = id / gridDim.x;
  block.index = dim3(id % gridDim.x, row % gridDim.y, row / gridDim.y);
  block.rank = rank;
  block.live = machine.threads;
  void* memory = nullptr;  // of the exact size, for the address sanitizer
  if (posix_memalign(&memory, 1024, machine.shared_bytes) != 0) fail("launch: no shared memory");
  block.shared.reset(static_cast<unsigned char*>(memory));
  std::memset(memory, 0xff, machine.shared_bytes);  // NaN in every float format
  block.meetings.resize((machine.threads + 31) / 32);
  block.fibers.resize(machine.threads);
  for (unsigned i = 0; i < machine.threads; ++i) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.rank = i;
    fiber.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
    give_stack(fiber.context, rank * machine.threads + i);
    if (i % 32 == 0) machine.warps.emplace_back();
    machine.warps.back().push_back(&fiber);
  }
}

[[noreturn]] inline void report_deadlock() {
  std::string text = "deadlock";
  for (const Block& block : machine.blocks) {
    std::map<std::string, unsigned> groups;
    for (const Fiber& fiber : block.fibers) {
      ++groups[fiber.state == State::exited ? "have exited" : "wait at " + fiber.site.text()];
    }
    const std::string of = "/" + std::to_string(machine.threads) + " threads ";
    text += "; block (" + std::to_string(block.index.x) + "," + std::to_string(block.index.y) +
            "," + std::to_string(block.index.z) + ")";
    for (const auto& [where, count] : groups) text += ": " + std::to_string(count) + of + where;
  }
  fail(text);
}

CUDA_SIM_INLINE bool resume(Fiber& fiber) {
  constexpr unsigned kIdleLimit = 10'000'000;  // under a second of spinning
  if (fiber.state != State::ready) return false;
  machine.running = &fiber;
  threadIdx = fiber.thread;
  blockIdx = fiber.block->index;
  switch_context(machine.scheduler, fiber.context);
  machine.running = nullptr;
  if (machine.error) std::rethrow_exception(std::exchange(machine.error, nullptr));
  if (++machine.idle > kIdleLimit) fail("livelock: the threads only wait on memory");
  return true;
}

template <class List>
void put_in_order(List& list) {
  if (machine.order == Order::reverse) std::reverse(list.begin(), list.end());
  if (machine.order == Order::random) std::shuffle(list.begin(), list.end(), machine.random);
}

// A warp keeps its turn for some rounds: its stacks are in the cache for the next shuffle.
inline void run_cluster() {
  const bool random = machine.order == Order::random;
  for (bool first = true; machine.live > 0; first = false) {
    if (first || random) {
      put_in_order(machine.warps);
      for (auto& warp : machine.warps) put_in_order(warp);
    }
    bool any = false;
    for (auto& warp : machine.warps) {
      bool ran = true;
      for (auto rounds = random ? machine.random() % 16 + 1 : 16; ran && rounds > 0; --rounds) {
        ran = false;
        for (Fiber* fiber : warp) ran |= resume(*fiber);
        any |= ran;
      }
    }
    if (!any) report_deadlock();
  }
}

inline void run_grid(unsigned blocks) {
  std::vector<unsigned> clusters(blocks / machine.cluster);
  std::iota(clusters.begin(), clusters.end(), 0u);
  put_in_order(clusters);
  for (unsigned id : clusters) {
    machine.arrived = machine.opened = machine.idle = 0;
    machine.live = machine.cluster * machine.threads;
    machine.blocks = std::vector<Block>(machine.cluster);
    machine.warps.clear();
    for (unsigned rank = 0; rank < machine.cluster; ++rank) {
      start_block(machine.blocks[rank], id * machine.cluster + rank, rank);
    }
    run_cluster();
  }
}

// Runs kernel(args...) over the grid; `cluster` blocks along x form a cluster (1: none).
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster,
            std::size_t shared_bytes, Order order, std::uint64_t seed, Args... args) {
  const unsigned threads = block.x * block.y * block.z, blocks = grid.x * grid.y * grid.z;
  if (machine.running != nullptr) fail("launch: called from device code");
  if (threads < 1 || threads > 1024) fail("launch: a block has 1 to 1024 threads");
  if (cluster < 1 || cluster > 16) fail("launch: a cluster has 1 to 16 blocks");
  if (blocks < 1 || grid.x % cluster != 0) fail("launch: grid.x is a multiple of the cluster size");
  if (shared_bytes > 227 * 1024) fail("launch: a block has at most 227 KiB of shared memory");
  gridDim = grid;
  blockDim = block;
  machine.threads = threads;
  machine.cluster = cluster;
  machine.shared_bytes = shared_bytes;
  machine.order = order;
  machine.random.seed(seed);
  machine.kernel = [&] { kernel(static_cast<Params>(args)...); };
  run_grid(blocks);
}

}  // namespace cuda_sim
