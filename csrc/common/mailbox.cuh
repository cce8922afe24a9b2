// Bytes that come to shared memory by themselves and are counted there (sm_90): values from other
// blocks of the cluster, and bulk copies from global memory. Unlike a cluster barrier, whose
// arrival is a fence that waits for all the thread's stores to global memory, a wait is for the
// bytes alone.
#pragma once

#include "cluster.cuh"

namespace reasonkern {

// In shared memory; one thread opens it, and a cluster barrier lies before another thread's or
// block's first use. It works in turns: one thread of its block says how many bytes come this turn,
// before or after they do; whoever waits for the turn sees them.
struct Mailbox {
  std::uint64_t state;
};

#if defined(__CUDACC__)
__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}
#endif

__device__ __forceinline__ void open_mailbox(Mailbox* box) {
#if !defined(__CUDACC__)
  cuda_sim::open_mailbox(&box->state);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(box)) : "memory");
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void expect_bytes(Mailbox* box, unsigned bytes) {
#if !defined(__CUDACC__)
  cuda_sim::expect_bytes(&box->state, bytes);
#elif __CUDA_ARCH__ >= 900
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(box)),
               "r"(bytes)
               : "memory");
#endif
}

// To block `rank`'s copies of `to` and `box`.
template <class T>
__device__ __forceinline__ void send(T* to, Mailbox* box, unsigned rank, const T& value) {
  static_assert(sizeof(T) % 16 == 0, "sent by 16 bytes");
#if !defined(__CUDACC__)
  cuda_sim::send(to, &box->state, rank, &value, sizeof(T));
#elif __CUDA_ARCH__ >= 900
  unsigned remote, remote_box;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote) : "r"(shared_address(to)), "r"(rank));
  asm("mapa.shared::cluster.u32 %0, %1, %2;"
      : "=r"(remote_box)
      : "r"(shared_address(box)), "r"(rank));
  unsigned word[sizeof(T) / 4];
  std::memcpy(word, &value, sizeof(T));
#pragma unroll
  for (unsigned i = 0; i < sizeof(T) / 4; i += 4) {
    asm volatile(
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.b32"
        " [%0], {%1, %2, %3, %4}, [%5];" ::"r"(remote + 4 * i),
        "r"(word[i]), "r"(word[i + 1]), "r"(word[i + 2]), "r"(word[i + 3]), "r"(remote_box)
        : "memory");
  }
#endif
}

// `bytes` from global to shared memory, both aligned to 16 bytes, by one thread. The threads that
// read the shared memory before are behind a barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes,
                                          Mailbox* box) {
#if !defined(__CUDACC__)
  cuda_sim::copy_bulk(shared, global, bytes, &box->state);
#elif __CUDA_ARCH__ >= 900
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
          "r"(shared_address(shared)),
      "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(box))
      : "memory");
#endif
}

// Starts the way of such bytes to the L2 cache.
__device__ __forceinline__ void prefetch_bulk(const void* global, unsigned bytes) {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(__cvta_generic_to_global(global)),
               "r"(bytes)
               : "memory");
#endif
}

// Orders the calling thread's stores to shared memory, mailboxes included, before later bulk copies
// over or through them.
__device__ __forceinline__ void fence_for_bulk() {
#if defined(__CUDACC__) && __CUDA_ARCH__ >= 900
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

enum class Sender { self, peers };  // bulk copies of the own block; blocks of the cluster

// Returns when the bytes of turn 0, 1, ... have come. The next but one does not begin before:
// parity is all that tells turns apart. What peers send is released at the cluster's scope and
// acquired at no smaller one, which also empties the L1 cache.
template <Sender from>
__device__ __forceinline__ void wait_for_turn(Mailbox* box, unsigned turn) {
#if !defined(__CUDACC__)
  cuda_sim::wait_for_turn(&box->state, turn);
#elif __CUDA_ARCH__ >= 900
  unsigned done = 0;
  while (!done) {
    if constexpr (from == Sender::peers) {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(box)), "r"(turn % 2)
          : "memory");
    } else {
      asm volatile(
          "{\n.reg .pred done;\n"
          "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%1], %2;\n"
          "selp.u32 %0, 1, 0, done;\n}"
          : "=r"(done)
          : "r"(shared_address(box)), "r"(turn % 2)
          : "memory");
    }
  }
#endif
}

}  // namespace reasonkern
