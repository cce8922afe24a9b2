// CUDA operators of the family: one launch per call, configured by launch_config.h.
#include "../common/stream.h"
#include "kernels.cuh"
#include "metrics.cuh"
#include "objective_map.cuh"
#include "operators.h"
#include "sequence_map.cuh"

namespace reasonkern {
namespace {

void check_vocab(const Rows& rows) {
  STD_TORCH_CHECK(rows.vocab < INT32_MAX / 2, "logits: expected fewer than 2^30 columns, got ",
                  rows.vocab);
}

struct CudaBackend {
  template <class T>
  static void token_stats(LogitsType type, const StatsParams<T>& p, int32_t device) {
    check_vocab(p.rows);
    const LaunchScope scope(device);
    dispatch_element<T, bf16, fp16>(type, [&](auto element) {
      using E = typename decltype(element)::type;
      const Device gpu = describe(stats_kernel<E>, device);
      const LaunchConfig c = stats_config(p.rows.rows, p.rows.vocab, sizeof(E), gpu);
      const Turns turns = stats_turns(p.rows.rows, c, gpu);
      launch(stats_kernel<E>, turns.blocks, c.block, 1, c.shared_bytes, scope.stream, p, c.tiling,
             turns.again);
    });
  }

  template <class T>
  static void token_stats_backward(LogitsType type, const GradParams<T>& p, int32_t device) {
    check_vocab(p.rows);
    const LaunchScope scope(device);
    dispatch_element<T, bf16, fp16>(type, [&](auto element) {
      using E = typename decltype(element)::type;
      const LaunchConfig c =
          rowwise_config(p.rows.rows, p.rows.vocab, sizeof(E), describe(grad_kernel<E>, device));
      launch(grad_kernel<E>, grid_blocks(p.rows.rows, c.tiling.slices), c.block, 1, 0, scope.stream,
             p, c.tiling);
    });
  }

  template <class T>
  static void policy_loss(LogitsType type, const LossParams<T>& p, int32_t device) {
    check_vocab(p.rows);
    const LaunchScope scope(device);
    dispatch_element<T, bf16, fp16>(type, [&](auto element) {
      using E = typename decltype(element)::type;
      const bool needs_grad = p.rows.grad != nullptr;
      auto kernel = loss_sweep_kernel<E>;
      const Device gpu = describe(kernel, device);
      const LaunchConfig c = loss_config(p.rows.vocab, sizeof(E), needs_grad, gpu);
      unsigned grid = grid_blocks(p.rows.rows, 1);
      if constexpr (sizeof(E) < 8) {
        if (c.resident) {
          kernel = loss_cluster_kernel<E>;
          grid = grid_blocks(resident_clusters(p.rows.rows, c.cluster, gpu), c.cluster);
        }
      }
      launch(kernel, grid, c.block, c.cluster, c.shared_bytes, scope.stream, p, c.tiling);
    });
  }

  template <class T>
  static void scale_rows(LogitsType type, const Rows& rows, const T* factors, int32_t device) {
    check_vocab(rows);
    const LaunchScope scope(device);
    dispatch_element<T, bf16, fp16>(type, [&](auto element) {
      using E = typename decltype(element)::type;
      const Device gpu = describe(scale_kernel<E>, device);
      const LaunchConfig c = rowwise_config(rows.rows, rows.vocab, sizeof(E), gpu);
      const unsigned all = grid_blocks((rows.rows + kScaleRows - 1) / kScaleRows, c.tiling.slices);
      launch(scale_kernel<E>, all, c.block, 1, 0, scope.stream, rows, factors, c.tiling);
    });
  }

  template <class T>
  static void objective_map(const MapParams<T>& p, int32_t device) {
    const LaunchScope scope(device);
    const int64_t blocks = (p.loss.rows.rows + kMapBlock - 1) / kMapBlock;
    launch(map_kernel<T>, grid_blocks(blocks, 1), kMapBlock, 1, 0, scope.stream, p);
  }

  template <class T>
  static void sequence_map(const SequenceParams<T>& p, int32_t device) {
    const LaunchScope scope(device);
    launch(sequence_kernel<T>, grid_blocks(p.sequences, 1), kSequenceBlock, 1,
           sequence_shared_bytes(kSequenceBlock), scope.stream, p);
  }

  template <class T>
  static void policy_metrics(const MetricsParams<T>& p, int32_t device) {
    const LaunchScope scope(device);
    const unsigned cluster = describe(metrics_kernel<T>, device).arch >= 90 ? kMetricsCluster : 1;
    launch(metrics_kernel<T>, cluster, kMetricsBlock, cluster, metrics_shared_bytes(kMetricsBlock),
           scope.stream, p);
  }
};

}  // namespace
}  // namespace reasonkern

STABLE_TORCH_LIBRARY_IMPL(reasonkern_cuda, CUDA, m) {
  using Ops = reasonkern::Operators<reasonkern::CudaBackend>;
  m.impl("token_stats", TORCH_BOX(&Ops::token_stats));
  m.impl("token_stats_backward", TORCH_BOX(&Ops::token_stats_backward));
  m.impl("token_stats_backward_", TORCH_BOX(&Ops::token_stats_backward_));
  m.impl("policy_loss", TORCH_BOX(&Ops::policy_loss));
  m.impl("policy_loss_", TORCH_BOX(&Ops::policy_loss_));
  m.impl("scale_rows_", TORCH_BOX(&Ops::scale_rows_));
  m.impl("policy_metrics", TORCH_BOX(&Ops::policy_metrics));
  m.impl("objective_map", TORCH_BOX(&Ops::objective_map));
  m.impl("sequence_map", TORCH_BOX(&Ops::sequence_map));
}
