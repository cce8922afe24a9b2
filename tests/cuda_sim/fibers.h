// The machine below cuda_sim.h: each thread of a cluster is a fiber with its own stack, run by a
// scheduler one at a time until it waits for others. The clusters of a grid run one by one.
#pragma once

#include <sys/mman.h>

#include <algorithm>
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
  void start(std::size_t used, void (*entry)()) {
    void** top = static_cast<void**>(const_cast<void*>(stack)) + used / sizeof(void*);
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
  void start(std::size_t used, void (*entry)()) {
    getcontext(&sp);
    sp.uc_stack.ss_sp = const_cast<void*>(stack);
    sp.uc_stack.ss_size = used;
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
  Fiber* fibers = nullptr;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  std::vector<std::vector<Meeting>> meetings;  // of each warp
};

struct Machine {
  unsigned threads = 0, cluster = 1;           // per block, blocks per cluster
  unsigned live = 0, arrived = 0, opened = 0;  // threads now, and at the cluster barrier
  unsigned idle = 0;                           // resumptions since a thread exited or was released
  std::size_t shared_bytes = 0;
  Order order = Order::forward;
  std::mt19937_64 random;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<unsigned> turns;
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

inline void start_thread(Fiber& fiber, Block& block, unsigned rank) {
  // An odd number of pages, and starts spread over a page, or the stacks would share cache sets.
  constexpr std::size_t kPage = 4096, kStack = 33 * kPage;
  Context& context = fiber.context;
  if (context.stack == nullptr) {
    void* memory = mmap(nullptr, kStack + kPage, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kPage, PROT_NONE) != 0) fail("launch: no stack");
    context.stack = static_cast<unsigned char*>(memory) + kPage;
    context.size = kStack;
  }
  __asan_unpoison_memory_region(context.stack, kStack);  // frames a failed launch abandoned
  context.start(kStack - rank % 64 * 64, run_thread);
  fiber.state = State::ready;
  fiber.block = &block;
  fiber.rank = rank;
  const unsigned row = rank / blockDim.x;
  fiber.thread = dim3(rank % blockDim.x, row % blockDim.y, row / blockDim.y);
  fiber.arrivals = fiber.waits = fiber.committed = 0;
  fiber.copies.clear();
}

inline void start_cluster(unsigned first_block) {
  machine.arrived = machine.opened = machine.idle = 0;
  machine.live = machine.cluster * machine.threads;
  for (Block& block : machine.blocks) {
    const unsigned id = first_block + block.rank, row = id / gridDim.x;
    block.index = dim3(id % gridDim.x, row % gridDim.y, row / gridDim.y);
    block.live = machine.threads;
    block.present = 0;
    block.meetings.assign((machine.threads + 31) / 32, {});
    std::memset(block.shared.get(), 0xff, machine.shared_bytes);  // NaN in every float format
    for (unsigned i = 0; i < machine.threads; ++i) start_thread(block.fibers[i], block, i);
  }
}

[[noreturn]] inline void report_deadlock() {
  std::string text = "deadlock";
  const std::string all = "/" + std::to_string(machine.threads) + " threads ";
  for (const Block& block : machine.blocks) {
    std::map<std::string, unsigned> groups;
    for (const Fiber* f = block.fibers; f != block.fibers + machine.threads; ++f) {
      ++groups[f->state == State::exited ? "have exited" : "wait at " + f->site.text()];
    }
    text += "; block " + std::to_string(block.index.x) + "," + std::to_string(block.index.y) + "," +
            std::to_string(block.index.z);
    for (const auto& [where, count] : groups) text += ": " + std::to_string(count) + all + where;
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

// Takes turns in groups of a warp's size, some rounds each: a warp's stacks stay in the cache for
// its next shuffle.
inline void run_cluster() {
  auto& turns = machine.turns;
  while (machine.live > 0) {
    if (machine.order == Order::random) std::shuffle(turns.begin(), turns.end(), machine.random);
    bool any = false;
    for (std::size_t group = 0; group < turns.size(); group += 32) {
      bool ran = true;
      for (int round = 0; ran && round < 16; ++round) {
        ran = false;
        for (std::size_t i = group; i < std::min(group + 32, turns.size()); ++i) {
          ran |= resume(machine.fibers[turns[i]]);
        }
        any |= ran;
      }
    }
    if (!any) report_deadlock();
  }
}

// 0, step, 2 step, … below `end`, in the machine's order.
inline std::vector<unsigned> in_order(unsigned end, unsigned step) {
  std::vector<unsigned> list;
  for (unsigned i = 0; i < end; i += step) list.push_back(i);
  if (machine.order == Order::reverse) std::reverse(list.begin(), list.end());
  if (machine.order == Order::random) std::shuffle(list.begin(), list.end(), machine.random);
  return list;
}

inline void run_grid(dim3 grid, dim3 block, unsigned cluster, std::size_t shared_bytes) {
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
  if (machine.fibers.size() < threads * cluster) machine.fibers.resize(threads * cluster);
  machine.blocks.clear();
  machine.blocks.resize(cluster);
  for (unsigned rank = 0; rank < cluster; ++rank) {
    void* memory = nullptr;  // of the exact size, for the address sanitizer
    if (posix_memalign(&memory, 1024, shared_bytes) != 0) fail("launch: no shared memory");
    machine.blocks[rank].shared.reset(static_cast<unsigned char*>(memory));
    machine.blocks[rank].rank = rank;
    machine.blocks[rank].fibers = &machine.fibers[rank * threads];
  }
  machine.turns = in_order(threads * cluster, 1);
  for (unsigned first : in_order(blocks, cluster)) {
    start_cluster(first);
    run_cluster();
  }
}

}  // namespace cuda_sim
