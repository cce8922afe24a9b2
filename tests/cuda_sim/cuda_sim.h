// CUDA's keywords and built-ins for a host compiler: include it before device code and start
// kernels with cuda_sim::launch. Unsupported, so that use fails to compile: static __shared__
// variables (take csrc/common/cluster.cuh's dynamic_shared), __activemask, textures, tensor cores.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "fibers.h"

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
  const unsigned all = machine.cluster * machine.threads;
  if (++machine.arrived < all) return;
  machine.arrived = 0;
  ++machine.barriers;
  for (unsigned i = 0; i < all; ++i) {
    if (machine.fibers[i].waits == machine.barriers) release(machine.fibers[i]);
  }
}

inline void cluster_wait() {
  Fiber& fiber = self();
  if (++fiber.waits != fiber.arrivals) fail("cluster_wait: called without a cluster_arrive");
  const bool open = machine.barriers >= fiber.waits;
  park(open ? State::ready : State::waiting, {"the cluster barrier"});
}

inline void* cluster_map(const void* p, unsigned rank) {
  const std::size_t offset = shared_offset(p, 0, "cluster_map");
  if (rank >= machine.cluster) fail("cluster_map: no such block in the cluster");
  Block& block = machine.blocks[rank];
  if (&block != self().block) {
    if (machine.barriers == 0) fail("cluster_map: before the first cluster barrier");
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

// ---- warp collectives: the last lane to come computes every lane's result ----

template <class Out, class In, class Combine>
Out meet(const Site& site, unsigned mask, const In& in, Combine combine) {
  struct Slot {
    In in;
    Out out;
  } mine{in, Out()};
  static const char kind = 0;
  Fiber& fiber = self();
  const unsigned lane = fiber.rank % 32, first = fiber.rank - lane;
  const unsigned lanes = std::min(32u, machine.threads - first);
  if (!(mask >> lane & 1)) fail(site.text() + ": the mask does not name the calling lane");
  if (lanes < 32 && mask >> lanes != 0) fail(site.text() + ": the mask names lanes past the block");
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
  const auto value = [&](unsigned from) -> const In& {
    if (from > 31 || !(mask >> from & 1)) fail(site.text() + ": reads a lane that is not in the mask");
    return static_cast<Slot*>(it->slot[from])->in;
  };
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1) static_cast<Slot*>(it->slot[l])->out = combine(l, value);
  }
  meetings.erase(it);
  for (unsigned l = 0; l < 32; ++l) {
    if (mask >> l & 1) release(fiber.block->fibers[first + l]);
  }
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

inline unsigned block_barrier(const Site& site, bool vote) {
  Block& block = *self().block;
  if (block.present != 0 && block.barrier != site) {
    fail("divergent barrier: " + site.text() + " meets " + block.barrier.text());
  }
  block.barrier = site;
  block.votes += vote;
  if (++block.present == machine.threads) {
    block.result = std::exchange(block.votes, block.present = 0);
    for (unsigned i = 0; i < machine.threads; ++i) release(block.fibers[i]);
  }
  park(block.present == 0 ? State::ready : State::waiting, site);
  return block.result;
}

template <class T, class Update>
T atomic(T* p, const char* what, Update update) {
  check_aligned(p, sizeof(T), what);
  park(State::ready, {what});  // other threads come between, and a spinning thread lets them
  const T old = *p;
  *p = update(old);
  return old;
}

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
struct Same {  // a parameter that takes no part in template argument deduction
  using type = T;
};

// Runs kernel(args...) over the grid; `cluster` blocks along x form a cluster (1: none).
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster,
            std::size_t shared_bytes, Order order, std::uint64_t seed, Args... args) {
  const auto call = [&] { kernel(static_cast<Params>(args)...); };
  machine.kernel = &call;
  machine.body = [](const void* f) { (*static_cast<decltype(call)*>(f))(); };
  run_grid(grid, block, cluster, shared_bytes, order, seed);
}

}  // namespace cuda_sim

#define CUDA_SIM_HERE(name) cuda_sim::Site at = {name, __builtin_FILE(), __builtin_LINE()}

inline void __syncthreads(CUDA_SIM_HERE("__syncthreads")) { cuda_sim::block_barrier(at, false); }
inline int __syncthreads_count(int vote, CUDA_SIM_HERE("__syncthreads_count")) {
  return static_cast<int>(cuda_sim::block_barrier(at, vote != 0));
}
inline int __syncthreads_or(int vote, CUDA_SIM_HERE("__syncthreads_or")) {
  return cuda_sim::block_barrier(at, vote != 0) != 0;
}
inline int __syncthreads_and(int vote, CUDA_SIM_HERE("__syncthreads_and")) {
  return cuda_sim::block_barrier(at, vote == 0) == 0;
}

#define CUDA_SIM_SHUFFLE(name, from)                                                        \
  template <class T>                                                                        \
  T name(unsigned mask, T value, int k, int width = 32, CUDA_SIM_HERE(#name)) {             \
    const int lane = static_cast<int>(cuda_sim::self().rank % 32), base = lane & -width;    \
    return cuda_sim::shuffle(at, mask, value, static_cast<unsigned>(from));                 \
  }
CUDA_SIM_SHUFFLE(__shfl_sync, base + (k & (width - 1)))
CUDA_SIM_SHUFFLE(__shfl_up_sync, lane - k < base ? lane : lane - k)
CUDA_SIM_SHUFFLE(__shfl_down_sync, lane + k >= base + width ? lane : lane + k)
CUDA_SIM_SHUFFLE(__shfl_xor_sync, (lane ^ k) >= base + width ? lane : lane ^ k)

// r: the result so far, l: a lane of the mask, v: its value, own: the calling lane's value.
#define CUDA_SIM_FOLD(name, Out, start, step)                                               \
  template <class T>                                                                        \
  Out name(unsigned mask, T value, CUDA_SIM_HERE(#name)) {                                  \
    return cuda_sim::fold<Out>(at, mask, value, start,                                      \
                               [](Out r, [[maybe_unused]] unsigned l, T v,                  \
                                  [[maybe_unused]] T own) -> Out { return step; });         \
  }
CUDA_SIM_FOLD(__ballot_sync, unsigned, 0u, r | (v != T() ? 1u << l : 0u))
CUDA_SIM_FOLD(__any_sync, int, 0, r | (v != T()))
CUDA_SIM_FOLD(__all_sync, int, 1, r & (v != T()))
CUDA_SIM_FOLD(__match_any_sync, unsigned, 0u, r | (v == own ? 1u << l : 0u))
CUDA_SIM_FOLD(__reduce_add_sync, T, T(0), static_cast<T>(0u + r + v))
CUDA_SIM_FOLD(__reduce_min_sync, T, std::numeric_limits<T>::max(), std::min(r, v))
CUDA_SIM_FOLD(__reduce_max_sync, T, std::numeric_limits<T>::min(), std::max(r, v))
CUDA_SIM_FOLD(__reduce_and_sync, T, ~T(0), r& v)
CUDA_SIM_FOLD(__reduce_or_sync, T, T(0), r | v)
inline void __syncwarp(unsigned mask = ~0u, CUDA_SIM_HERE("__syncwarp")) {
  cuda_sim::fold(at, mask, 0, 0, [](int, unsigned, int, int) { return 0; });
}

#define CUDA_SIM_ATOMIC(name, update)                                    \
  template <class T>                                                     \
  T name(T* p, typename cuda_sim::Same<T>::type v) {                     \
    return cuda_sim::atomic(p, #name, [v](T old) -> T { return update; }); \
  }
CUDA_SIM_ATOMIC(atomicAdd, old + v)
CUDA_SIM_ATOMIC(atomicMax, old < v ? v : old)
CUDA_SIM_ATOMIC(atomicMin, old < v ? old : v)
CUDA_SIM_ATOMIC(atomicOr, old | v)
CUDA_SIM_ATOMIC(atomicExch, (static_cast<void>(old), v))
template <class T>
T atomicCAS(T* p, typename cuda_sim::Same<T>::type expected, typename cuda_sim::Same<T>::type v) {
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

// Macros: the host's mathematics library reserves, or newly declares, these names.
#define __expf(x) std::exp(static_cast<float>(x))
#define __exp10f(x) std::pow(10.0f, static_cast<float>(x))
#define __logf(x) std::log(static_cast<float>(x))
#define __log2f(x) std::log2(static_cast<float>(x))
#define __powf(x, y) std::pow(static_cast<float>(x), static_cast<float>(y))
#define rsqrtf(x) (1.0f / std::sqrt(static_cast<float>(x)))
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __saturatef(float x) { return x > 0.0f ? std::fmin(x, 1.0f) : 0.0f; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<std::uint64_t>(x) * y >> 32);
}
inline int __float_as_int(float x) { return cuda_sim::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return cuda_sim::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return cuda_sim::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return cuda_sim::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return cuda_sim::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return cuda_sim::bit_cast<double>(x); }
inline float max(float x, float y) { return std::fmax(x, y); }
inline float min(float x, float y) { return std::fmin(x, y); }
inline double max(double x, double y) { return std::fmax(x, y); }
inline double min(double x, double y) { return std::fmin(x, y); }
using std::max;
using std::min;

struct __nv_bfloat16 {
  std::uint16_t bits;
};
struct __half {
  std::uint16_t bits;
};
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(unsigned{x.bits} << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const unsigned bits = __float_as_uint(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float magnitude =
      exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                     : std::ldexp(static_cast<float>(exponent != 0 ? fraction + 1024 : fraction),
                                  std::max(exponent, 1) - 25);
  return std::copysign(magnitude, x.bits >> 15 != 0 ? -1.0f : 1.0f);
}
inline __half __float2half_rn(float x) {
  const float magnitude = std::fabs(x);
  const int sign = std::signbit(x) ? 0x8000 : 0;
  int bits = 0x7fff;
  if (magnitude >= 65520.0f) bits = sign | 0x7c00;
  if (magnitude < 65520.0f) {  // in units of the last place, 2^-24 and up
    const int unit = magnitude < 0x1p-14f ? -24 : std::ilogb(magnitude) - 10;
    bits = sign | (((unit + 24) << 10) + static_cast<int>(std::lrint(std::ldexp(magnitude, -unit))));
  }
  return {static_cast<std::uint16_t>(bits)};
}
