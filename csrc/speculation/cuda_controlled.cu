// CUDA operators of the sampler under control: one launch per call.
#include "controlled_kernels.cuh"
#include "team_launch.cuh"
#include "verify_operators.h"

namespace reasonkern {
namespace {

struct ControlledBackend {
  static void sample(const SampleParams& p, int32_t device) {
    launch_teams<ControlShared, AnyElement>(sample_controlled_kernel, p, device);
  }

  static void verify(const VerifyParams& p, int32_t device) {
    launch_teams<ControlShared, AnyElement>(verify_controlled_kernel, p, device);
  }
};

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using Ops = reasonkern::VerifyOperators<reasonkern::ControlledBackend>;
  m.impl("sample_controlled", TORCH_BOX(&Ops::sample_controlled));
  m.impl("verify_controlled", TORCH_BOX(&Ops::verify_controlled));
}
