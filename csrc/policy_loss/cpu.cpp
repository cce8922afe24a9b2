// CPU operators of the family: rows to threads, registration.
#include <algorithm>
#include <atomic>

#include "cpu_row.h"
#include "operators.h"

namespace reasonkern {
namespace cpu {
namespace {

// Threads take rows as they get free: inactive rows cost nothing, so equal shares would not be
// equal work. Which thread computes a row does not change its result.
template <class Body>
void for_each_row(const Rows& rows, const Body& body) {
  const int64_t chunk = std::max<int64_t>(1, 16384 / std::max<int64_t>(1, rows.vocab));
  const int64_t chunks = (rows.rows + chunk - 1) / chunk;
  const int64_t workers = std::min<int64_t>(chunks, torch::stable::get_num_threads());
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
    for (int64_t begin; (begin = next.fetch_add(chunk)) < rows.rows;) {
      const int64_t end = std::min(begin + chunk, rows.rows);
      for (int64_t r = begin; r < end; ++r) body(r);
    }
  });
}

template <class T>
void map_sequence(const SequenceParams<T>& p, SequenceRange range) {
  SequenceSums sums{};
  for (int64_t r = range.begin; r < range.end; ++r) sums = sums + sequence_sums(p, r);
  const double log_ratio = sequence_log_ratio(p.kind, sums);
  double slope = 0;
  for (int64_t r = range.begin; r < range.end; ++r) slope += sequence_slope(p, r, log_ratio);
  slope /= std::max(1.0, sums.length);
  for (int64_t r = range.begin; r < range.end; ++r) map_sequence_row(p, r, log_ratio, slope);
}

struct CpuBackend {
  template <class T>
  static void token_stats(LogitsType type, const StatsParams<T>& p, int32_t) {
    dispatch_element<T, BFloat16, Half>(type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_row(p.rows, [&p](int64_t r) { stats_row<E>(p, r); });
    });
  }

  template <class T>
  static void token_stats_backward(LogitsType type, const GradParams<T>& p, int32_t) {
    dispatch_element<T, BFloat16, Half>(type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_row(p.rows, [&p](int64_t r) { grad_row<E>(p, r); });
    });
  }

  template <class T>
  static void policy_loss(LogitsType type, const LossParams<T>& p, int32_t) {
    dispatch_element<T, BFloat16, Half>(type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_row(p.rows, [&p](int64_t r) { loss_row<E>(p, r); });
    });
  }

  template <class T>
  static void scale_rows(LogitsType type, const Rows& rows, const T* factors, int32_t) {
    dispatch_element<T, BFloat16, Half>(type, [&](auto element) {
      typedef typename decltype(element)::type E;
      for_each_row(rows, [&](int64_t r) {
        if (factors[r] == 1) return;
        E* row = static_cast<E*>(rows.grad) + r / rows.seq * rows.grad_stride_b +
                 r % rows.seq * rows.grad_stride_t;
        kernels<E>().scale(row, rows.vocab, factors[r]);
      });
    });
  }

  template <class T>
  static void objective_map(const MapParams<T>& p, int32_t) {
    torch::stable::parallel_for(0, p.loss.rows.rows, 1024, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) map_row(p, r);
    });
  }

  template <class T>
  static void sequence_map(const SequenceParams<T>& p, int32_t) {
    torch::stable::parallel_for(0, p.sequences, 1, [&](int64_t begin, int64_t end) {
      for (int64_t s = begin; s < end; ++s) map_sequence(p, sequence_range(p, s));
    });
  }

  // Chunks of rows are merged in order, whichever thread took them.
  template <class T>
  static void policy_metrics(const MetricsParams<T>& p, int32_t) {
    constexpr int64_t kChunk = 1024;
    std::vector<Metrics> parts(1 + p.rows / kChunk, no_metrics());
    torch::stable::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t c = begin; c < end; ++c) {
        const int64_t stop = std::min(p.rows, (c + 1) * kChunk);
        for (int64_t r = c * kChunk; r < stop; ++r) merge(parts[c], row_metrics(p, r));
      }
    });
    for (size_t c = 1; c < parts.size(); ++c) merge(parts[0], parts[c]);
    write_metrics(p.out, parts[0]);
  }
};

}  // namespace
}  // namespace cpu
}  // namespace reasonkern

// The instruction set in use: v4, v3 or baseline.
extern "C" __attribute__((visibility("default"))) const char* reasonkern_cpu_capability() {
  return reasonkern::cpu::name_of(reasonkern::cpu::capability());
}

STABLE_TORCH_LIBRARY_IMPL(reasonkern, CPU, m) {
  typedef reasonkern::Operators<reasonkern::cpu::CpuBackend> Ops;
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
