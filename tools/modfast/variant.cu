// The kernels of one variant behind plain functions, for compare.py: loaded side by side.
#include "modulation/kernels.cuh"

using namespace reasonkern::modulation;

template <class Params>
static int start(void (*kernel)(Params), dim3 grid, unsigned threads, size_t shared,
                 const Params& p, cudaStream_t stream) {
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared;
  config.stream = stream, config.attrs = &early, config.numAttrs = 1;
  return int(cudaLaunchKernelEx(&config, kernel, p));
}

extern "C" __attribute__((visibility("default"))) int rows(const RowsParams* p, cudaStream_t s) {
  const dim3 grid(unsigned(p->rows / p->nodes), unsigned(p->nodes));
  return start(modulate_kernel<reasonkern::bf16>, grid, row_threads(p->state.entries, p->dense),
               sizeof(RowShared), *p, s);
}

extern "C" __attribute__((visibility("default"))) int commit(const CommitParams* p,
                                                             cudaStream_t s) {
  return start(commit_kernel, unsigned(p->batch), kCommitThreads, sizeof(COMMIT_SHARED), *p, s);
}
