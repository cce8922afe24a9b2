// Host side of a launch (nvcc only): the caller's device and stream through the stable ABI, and one
// launch function for plain and clustered kernels.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include <atomic>

#include "device.h"

#if !defined(USE_CUDA)
#error "compile with -DUSE_CUDA: the shim declares its CUDA functions only then"
#endif

namespace reasonkern {

// Makes `device` current for its lifetime; `stream` is the stream torch uses there now.
class LaunchScope {
 public:
  explicit LaunchScope(int32_t device) : guard_(device) {
    void* handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &handle));
    stream = static_cast<cudaStream_t>(handle);
  }
  cudaStream_t stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

inline int device_attribute(cudaDeviceAttr attribute, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, attribute, device));
  return value;
}

// The architecture that this library was compiled for where it runs on `device`, which is current:
// an older one than the device's if the driver compiled its PTX, and such code lacks what
// cluster.cuh and mailbox.cuh leave out below sm_90. Asked once; `kernel` is any of the library's.
inline int code_arch(const void* kernel, int device) {
  static std::atomic<int> known[128];
  int arch = known[device];
  if (arch > 0) return arch;
  cudaFuncAttributes code{};
  STD_CUDA_CHECK(cudaFuncGetAttributes(&code, kernel));
  arch = 10 * device_attribute(cudaDevAttrComputeCapabilityMajor, device) +
         device_attribute(cudaDevAttrComputeCapabilityMinor, device);
  if (code.ptxVersion < arch) arch = code.ptxVersion;
  known[device] = arch;
  return arch;
}

template <class... Params>
Device describe(void (*kernel)(Params...), int32_t device) {
  return {code_arch(reinterpret_cast<const void*>(kernel), device),
          device_attribute(cudaDevAttrMultiProcessorCount, device),
          std::size_t(device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device))};
}

// Launches on `stream` with `cluster` blocks per cluster along x (1: none; at most 8, what is
// portable) and checks the launch. `early`: blocks may start while the kernel before is running;
// one that calls wait_for_kernels_before first thing can be launched so.
template <bool early = false, class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, unsigned cluster,
            std::size_t shared_bytes, cudaStream_t stream, Args... args) {
  // More must be asked for: all there may be, or a thread that launches the kernel with less room
  // would take this one's between the two calls.
  constexpr std::size_t kUnrequested = 48 * 1024;
  int device = 0;
  STD_CUDA_CHECK(cudaGetDevice(&device));
  if (shared_bytes > kUnrequested) {
    STD_CUDA_CHECK(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)));
  }
  cudaLaunchAttribute attributes[2]{};
  unsigned count = 0;
  if (cluster > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count++].val.clusterDim = {cluster, 1, 1};
  }
  if (early && code_arch(reinterpret_cast<const void*>(kernel), device) >= 90) {
    attributes[count].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[count++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  STD_CUDA_CHECK(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace reasonkern
