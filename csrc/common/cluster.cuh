// Shared memory, copies to it, thread-block clusters, early launches: the hardware-only features
// behind thin wrappers. Below sm_90 a cluster is one block. Static __shared__ variables are not
// used anywhere: the simulator keeps several blocks alive at once, so all shared memory is dynamic.
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

// The cluster's place among those of the grid: no division, which takes a device long.
__device__ __forceinline__ unsigned cluster_index() {
#if !defined(__CUDACC__)
  return blockIdx.x / cuda_sim::cluster_size();
#elif __CUDA_ARCH__ >= 900
  unsigned index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
#else
  return blockIdx.x;
#endif
}

__device__ __forceinline__ unsigned cluster_count() {
#if !defined(__CUDACC__)
  return gridDim.x / cuda_sim::cluster_size();
#elif __CUDA_ARCH__ >= 900
  unsigned count;
  asm("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
#else
  return gridDim.x;
#endif
}

// The split barrier hides its latency behind the work between the halves. Every thread of every
// block of the cluster calls arrive, then wait; writes before arrive are seen after wait, unless it
// was the relaxed one, which does not wait for the thread's stores under way.
__device__ __forceinline__ void cluster_arrive() {
#if !defined(__CUDACC__)
  cuda_sim::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release;" ::: "memory");
#endif
}

__device__ __forceinline__ void cluster_arrive_relaxed() {
#if !defined(__CUDACC__)
  cuda_sim::cluster_arrive();
#elif __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory");
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

// Starts a copy of 16 bytes from global to shared memory, past the L1 cache.
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
#if defined(__CUDACC__)
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(__cvta_generic_to_global(global))
               : "memory");
#else
  cuda_sim::copy_async(shared, global);
#endif
}

// Waits for those of the calling thread.
__device__ __forceinline__ void wait_for_copies() {
#if defined(__CUDACC__)
  asm volatile("cp.async.wait_all;" ::: "memory");
#else
  cuda_sim::wait_for_copies();
#endif
}

// For a kernel that may be launched early (launch in stream.h): lets the next such kernel be
// launched, and waits until those before are over and what they wrote can be read.
__device__ __forceinline__ void wait_for_kernels_before() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace reasonkern
