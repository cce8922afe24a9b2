// Functions written once for host and device compilers.
#pragma once

#if defined(__CUDACC__) || defined(CUDA_SIM)
#define RK_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define RK_HOST_DEVICE inline
#endif
