// Functions written once for host and device compilers.
#pragma once

#if defined(__CUDACC__) || defined(CUDA_SIM)
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline
#endif

// Device functions that stay calls: long, rarely run, and used by many kernels.
#if defined(__CUDACC__)
#define RK_DEVICE_CALL __device__ __noinline__
#else
#define RK_DEVICE_CALL __device__
#endif

// Before a loop of a few turns at most, whose unrolled code would be read for nothing.
#if defined(__CUDACC__)
#define RK_ROLLED _Pragma("unroll 1")
#else
#define RK_ROLLED
#endif

namespace reasonkern {

// The rounded product: on a device never fused with a sum, so that both round alike. (The host's
// compiler is told not to fuse by its flags.)
RK_HOST_DEVICE double product(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

}  // namespace reasonkern
