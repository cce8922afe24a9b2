// CUDA operators of logit control: one launch per call.
#include "../common/stream.h"
#include "kernels.cuh"
#include "operators.h"

namespace reasonkern {
namespace modulation {
namespace {

struct CudaBackend {
  static void modulate(ScalarType dtype, const RowsParams& p, int32_t device) {
    check_address(p.state);
    switch (dtype) {
      case ScalarType::Float:
        return launch_rows(modulate_kernel<float>, p, device);
      case ScalarType::BFloat16:
        return launch_rows(modulate_kernel<bf16>, p, device);
      case ScalarType::Half:
        return launch_rows(modulate_kernel<fp16>, p, device);
      case ScalarType::Double:
        return launch_rows(modulate_kernel<double>, p, device);
      default:
        STD_TORCH_CHECK(false, "logits: expected float32, bfloat16, float16 or float64, got ",
                        dtype);
    }
  }

  static void commit(const CommitParams& p, int32_t device) {
    check_address(p.state);
    check_grid(p.batch, "tokens");
    const LaunchScope scope(device);
    launch<true>(commit_kernel, unsigned(p.batch), kCommitThreads, 1, sizeof(CommitShared),
                 scope.stream, p);
  }

 private:
  static void launch_rows(void (*kernel)(RowsParams), const RowsParams& p, int32_t device) {
    check_grid(p.rows, "logits");
    const LaunchScope scope(device);
    const dim3 grid(unsigned(p.rows / p.nodes), unsigned(p.nodes));
    launch<true>(kernel, grid, row_threads(p.state.entries, p.dense), 1, sizeof(RowShared),
                 scope.stream, p);
  }

  // Records are read by pairs of columns.
  static void check_address(const State& s) {
    STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(s.records) % 16 == 0,
                    "records: expected an address that is a multiple of 16");
  }

  static void check_grid(int64_t rows, const char* name) {
    STD_TORCH_CHECK(rows <= INT32_MAX, name, ": expected fewer than 2^31 rows, got ", rows);
  }
};

}  // namespace
}  // namespace modulation
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using Ops = reasonkern::modulation::Operators<reasonkern::modulation::CudaBackend>;
  m.impl("modulate_logits_", TORCH_BOX(&Ops::modulate_logits_));
  m.impl("commit_", TORCH_BOX(&Ops::commit_));
}
