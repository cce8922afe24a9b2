// The kernels of the family. Block and cluster shapes come from launch_config.h; every kernel
// strides over rows, so the grid does not change the result.
#pragma once

#include "loss_cluster.cuh"

namespace reasonkern {

// ---- token_stats: one block per row

template <class A>
__device__ __forceinline__ void write_inactive_stats(const StatsOut<A>& out, int64_t row) {
  out.logprob[row] = out.entropy[row] = out.lse[row] = out.collision[row] = A(0);
  out.varentropy[row] = out.max_prob[row] = out.row_max[row] = A(0);
  out.is_top1[row] = false;
}

template <class T>
__device__ __forceinline__ void write_stats(const StatsOut<acc_t<T>>& out, int64_t row,
                                            const FullMoments<acc_t<T>>& a, const Target<T>& target,
                                            const RowScale<T>& scale) {
  using A = acc_t<T>;
  const bool valid = target.index >= 0;
  A x_y = to_acc(target.logit);
  if (scale.softcap.value != A(0)) x_y = soft_capped(x_y, scale.softcap);
  const RowStats<A> stats = row_stats(a, x_y, valid, scale);
  const A nan = stats.inv_sum;  // where the row is not finite
  // In double: what is near 1, or a difference, keeps the accuracy of the sums.
  const auto to = settle<double>(static_cast<const Moments<A>&>(a), scale);
  const double s = a.s * to.factor, sum = s + a.n, u = (a.u - to.shift * a.s) * to.factor;
  const double w = (a.w - to.shift * (2.0 * a.u - to.shift * a.s)) * to.factor;
  const double mean = u / sum * to.unit, second = w / sum * (to.unit * to.unit);
  const double collision = (a.q * (to.factor * to.factor) + a.n) / (sum * sum);
  out.logprob[row] = stats.logprob;
  out.entropy[row] = stats.entropy;
  out.lse[row] = a.m / scale.temperature.value + stats.log_sum;
  out.collision[row] = stats.finite ? A(collision) : nan;
  out.varentropy[row] = stats.finite ? A(std::fmax(second - mean * mean, 0.0)) : nan;
  out.max_prob[row] = stats.inv_sum;
  // A row of -inf is told from one with a NaN or +inf: a shard of a vocabulary may be all masked.
  const bool empty = valid && a.m == -kInfinity<A> && !std::isnan(a.s);
  out.row_max[row] = stats.finite || empty ? a.m : nan;
  out.is_top1[row] = stats.finite && a.rivals == A(0);
}

// Block b takes row b and, if it is one of the first `again`, more: the first `again` rows behind
// those of the grid are the blocks' second ones, and so on.
__device__ __forceinline__ int64_t next_row(int64_t row, int64_t rows, unsigned again) {
  if (row >= gridDim.x) return row + again;
  return blockIdx.x < again ? row + gridDim.x : rows;
}

// A row's target, -1 if it is none.
__device__ __forceinline__ int target_of(const Rows& rows, int64_t row) {
  const int64_t y = rows.targets[row];
  return y >= 0 && y < rows.vocab ? int(y) : -1;
}

// While one warp, another for each row, finishes a row, the others read the next one.
template <class T>
__global__ void __launch_bounds__((sizeof(T) == 8 ? 1 : kStatsGroups) * kGroup, 1)
    stats_kernel(StatsParams<acc_t<T>> p, Tiling tiling, unsigned again) {
  using A = acc_t<T>;
  const unsigned warp = threadIdx.x / 32;
  int64_t row = blockIdx.x;
  int y = row < p.rows.rows ? target_of(p.rows, row) : 0;
  unsigned turn = 0;
  while (row < p.rows.rows) {
    if (p.mask != nullptr && !p.mask[row]) {
      if (threadIdx.x == 0) write_inactive_stats(p.out, row);
      row = next_row(row, p.rows.rows, again);
      if (row < p.rows.rows) y = target_of(p.rows, row);
    } else {
      auto* parts =
          dynamic_shared<FullMoments<A>>() + turn % 2 * tiling.slices * (tiling.group / 32);
      const RowScale<T> scale = row_scale<T>(p.scale, row);
      const T* logits = pinned(logits_row<T>(p.rows, row));
      const Target<T> target{y >= 0 ? logits[y] : from_acc<T>(A(0)), y};
      sweep_moments<Reuse::last>(parts, logits, int(p.rows.vocab), tiling, scale, target);
      const int64_t next = next_row(row, p.rows.rows, again);
      if (next < p.rows.rows) y = target_of(p.rows, next);
      __syncthreads();
      if (warp == turn % (blockDim.x / 32)) {
        const auto total = merge_row(parts, tiling, scale);
        if (threadIdx.x % 32 == 0) write_stats(p.out, row, total, target, scale);
      }
      ++turn;
      row = next;
    }
  }
}

// ---- policy_loss, other rows: one block per row reads it twice, or once when grad is null

template <class T>
__global__ void __launch_bounds__(kSweepGroups* kGroup, 1)
    loss_sweep_kernel(LossParams<acc_t<T>> p, Tiling tiling) {
  using A = acc_t<T>;
  const int vocab = int(p.rows.vocab);
  auto* scratch = dynamic_shared<RowScratch<A>>();
  auto* parts = reinterpret_cast<Moments<A>*>(scratch + 1);
  for (int64_t row = blockIdx.x; row < p.rows.rows; row += gridDim.x) {
    T* grad = p.rows.grad != nullptr ? grad_row_pointer<T>(p.rows, row) : nullptr;
    if (!is_active(p, row)) {
      if (grad != nullptr) write_zeros(grad, vocab, threadIdx.x, blockDim.x);
      if (threadIdx.x == 0) write_inactive_loss(p, row);
      continue;
    }
    const T* logits = logits_row<T>(p.rows, row);
    const RowScale<T> scale = row_scale<T>(p.scale, row);
    if (threadIdx.x == 0) {
      scratch->task = load_task(p, row);
      scratch->x_y = target_logit(logits, scratch->task.target, p.rows.vocab);
    }
    sweep_moments<Reuse::again>(parts, logits, vocab, tiling, scale, Target<T>{});
    __syncthreads();
    if (threadIdx.x < 32) {
      const auto total = merge_row(parts, tiling, scale);
      if (threadIdx.x == 0) decide_row(*scratch, p, row, total, scale, true);
    }
    __syncthreads();
    const GradCoefs<A> c = scratch->grad;
    if (grad != nullptr && c.live) {
      write_gradient<false>(grad, logits, Slice{0, vocab}, c, scale, threadIdx.x, blockDim.x);
    } else if (grad != nullptr) {
      write_zeros(grad, vocab, threadIdx.x, blockDim.x);
    }
  }
}

// ---- token_stats_backward: one block per row and slice, the row's constants by every thread

template <class T>
__device__ __forceinline__ GradCoefs<acc_t<T>> saved_coefs(const GradParams<acc_t<T>>& p,
                                                           int64_t row, const RowScale<T>& scale) {
  using A = acc_t<T>;
  const A max_prob = p.max_prob[row];
  if (!(max_prob > A(0)) || !std::isfinite(max_prob) || !std::isfinite(p.logprob[row])) {
    return zero_row<A>();
  }
  const auto grad = [row](const A* g) { return g != nullptr ? g[row] : A(0); };
  const GradRow<A> g = grad_row(p.row_max[row], max_prob, p.entropy[row], p.collision[row],
                                grad(p.grad_logprob), grad(p.grad_entropy), grad(p.grad_collision),
                                grad(p.grad_lse), A(1) / scale.temperature.value);
  return fold(g, p.row_max[row], scale, p.rows.targets[row]);
}

template <class T>
__global__ void __launch_bounds__(kGroup, sizeof(T) == 8 ? 1 : 4)
    grad_kernel(GradParams<acc_t<T>> p, Tiling tiling) {
  const int64_t blocks = p.rows.rows * tiling.slices;
  for (int64_t i = blockIdx.x; i < blocks; i += gridDim.x) {
    const int64_t row = i / tiling.slices;
    const Slice slice = slice_of(tiling, p.rows.vocab, int(i % tiling.slices));
    T* grad = grad_row_pointer<T>(p.rows, row) + slice.begin;
    const RowScale<T> scale = row_scale<T>(p.scale, row);
    const auto c = saved_coefs(p, row, scale);
    if (c.live) {
      write_gradient<true>(grad, logits_row<T>(p.rows, row) + slice.begin, slice, c, scale,
                           threadIdx.x, blockDim.x);
    } else {
      write_zeros(grad, slice.n, threadIdx.x, blockDim.x);
    }
  }
}

// ---- scale_rows_: a row whose factor is 1 is not touched; as a rule that is every row, so that a
// block looks at the factors of several rows at once

constexpr int kScaleRows = 8;

template <class T>
__global__ void __launch_bounds__(kGroup)
    scale_kernel(Rows rows, const acc_t<T>* factors, Tiling tiling) {
  using A = acc_t<T>;
  constexpr int N = Vec<T>::size;
  const int64_t blocks = (rows.rows + kScaleRows - 1) / kScaleRows * tiling.slices;
  for (int64_t i = blockIdx.x; i < blocks; i += gridDim.x) {
    const Slice slice = slice_of(tiling, rows.vocab, int(i % tiling.slices));
    const int64_t first = i / tiling.slices * kScaleRows;
    bool all_one = true;
#pragma unroll
    for (int k = 0; k < kScaleRows; ++k) {
      all_one &= first + k >= rows.rows || factors[first + k] == A(1);
    }
    if (all_one) continue;
    for (int64_t row = first; row < first + kScaleRows && row < rows.rows; ++row) {
      const A factor = factors[row];
      if (factor == A(1)) continue;
      T* x = grad_row_pointer<T>(rows, row) + slice.begin;
      const bool aligned = is_aligned(x);
      for (int at = threadIdx.x * N; at < slice.n; at += blockDim.x * N) {
        const Vec<T> v =
            aligned && at + N <= slice.n ? load_global(x + at) : load_elements(x, slice.n, at);
        A y[N];
        unpack(v, y);
#pragma unroll
        for (int j = 0; j < N; ++j) y[j] *= factor;
        store_vector(x, slice.n, aligned, at, pack<T>(y));
      }
    }
  }
}

}  // namespace reasonkern
