// Shared memory, thread-block clusters and asynchronous copies: the hardware-only features behind
// thin wrappers. Below sm_90 a cluster is one block. Static __shared__ variables are not used
// anywhere: the simulator keeps several blocks alive at once, so all shared memory is dynamic.
#pragma once

#include "vec.h"

namespace reasonkern {

#if defined(__CUDACC__)
extern __shared__ __align__(128) unsigned char reasonkern_dynamic_shared[];
#endif

// The block's dynamic shared memory (128-byte aligned), `offset` bytes in.
template <class T>
__device__ __forceinline__ T* dynamic_shared(unsigned offset = 0) {
#if defined(__CUDACC__)
  return reinterpret_cast<T*>(reasonkern_dynamic_shared + offset);
#else
  return reinterpret_cast<T*>(cuda_sim::shared_base(offset, alignof(T)));
#endif
}

__device__ __forceinline__ unsigned cluster_rank() {
#if !defined(__CUDACC__)
  return cuda_sim::cluster_rank();
#elif __CUDA_ARCH__ >= 900
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
#else
  return 0;
#endif
}

__device__ __forceinline__ unsigned cluster_size() {
#if !defined(__CUDACC__)
  return cuda_sim::cluster_size();
#elif __CUDA_ARCH__ >= 900
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
#else
  return 1;
#endif
}

// The split barrier hides its latency behind the work between the halves. Every thread of every
// block of the cluster calls arrive, then wait; writes before arrive are seen after wait.
__device__ __forceinline__ void cluster_arrive() {
#if !defined(__CUDACC__)
  cuda_sim::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_wait() {
#if !defined(__CUDACC__)
  cuda_sim::cluster_wait();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.wait.acquire;" ::: "memory");
#else
  __syncthreads();
#endif
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive();
  cluster_wait();
}

// The address of block `rank`'s copy of `p`, a pointer into this block's shared memory. That block
// must have started (a cluster barrier lies behind) and must not exit before the access is done (a
// cluster barrier lies ahead); the simulator reports an early or a late call.
template <class T>
__device__ __forceinline__ T* cluster_map(T* p, unsigned rank) {
#if !defined(__CUDACC__)
  return static_cast<T*>(cuda_sim::cluster_map(p, rank));
#elif __CUDA_ARCH__ >= 900
  std::uint64_t mapped;
  asm("mapa.u64 %0, %1, %2;" : "=l"(mapped) : "l"(p), "r"(rank));
  return reinterpret_cast<T*>(mapped);
#else
  return p;
#endif
}

// 16 bytes from global to shared memory without passing through registers. The copies issued since
// the last commit form a group; copy_wait<n> returns when at most the n youngest of this thread's
// groups are still under way. Other threads see the bytes after a __syncthreads behind the wait.
template <class T>
__device__ __forceinline__ void copy_async(T* shared, const T* global) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#else
  cuda_sim::copy_async16(shared, global);
#endif
}

__device__ __forceinline__ void copy_commit() {
#if defined(__CUDACC__)
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  cuda_sim::copy_commit();
#endif
}

template <int groups>
__device__ __forceinline__ void copy_wait() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_group %0;" ::"n"(groups) : "memory");
#else
  cuda_sim::copy_wait(groups);
#endif
}

}  // namespace reasonkern
