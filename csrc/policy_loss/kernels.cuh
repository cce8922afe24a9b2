// The kernels of the family. Block and cluster shapes come from launch_config.h; every kernel
// strides over rows, so the grid does not change the result.
#pragma once

#include "row_gradient.cuh"

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
                                            const FullMoments<acc_t<T>>& a, acc_t<T> x_y,
                                            int64_t target, bool valid, const RowScale<T>& scale) {
  using A = acc_t<T>;
  const RowStats<A> stats = row_stats(a, x_y, valid, scale);
  const A nan = stats.inv_sum;  // where the row is not finite
  // In double: what is near 1, or a difference, keeps the accuracy of the sums.
  const double sum = double(a.s) + double(a.n), t = scale.temperature.value;
  const double mean = a.u / (sum * t), second = a.w / (sum * t * t);
  out.logprob[row] = stats.logprob;
  out.entropy[row] = stats.entropy;
  out.lse[row] = a.m / scale.temperature.value + stats.log_sum;
  out.collision[row] = stats.finite ? A((double(a.q) + double(a.n)) / (sum * sum)) : nan;
  out.varentropy[row] = stats.finite ? A(second - mean * mean) : nan;
  out.max_prob[row] = stats.inv_sum;
  // A row of -inf is told from one with a NaN or +inf: a shard of a vocabulary may be all masked.
  const bool empty = valid && a.m == -kInfinity<A> && !std::isnan(a.s);
  out.row_max[row] = stats.finite || empty ? a.m : nan;
  out.is_top1[row] = stats.finite && a.argmax == target;
}

template <class T>
__global__ void __launch_bounds__(kGroup, sizeof(T) == 8 ? 1 : 4)
    stats_kernel(StatsParams<acc_t<T>> p, Tiling tiling) {
  using A = acc_t<T>;
  FullMoments<A>* parts = dynamic_shared<FullMoments<A>>();
  const int64_t vocab = p.rows.vocab;
  for (int64_t row = blockIdx.x; row < p.rows.rows; row += gridDim.x) {
    if (p.mask != nullptr && !p.mask[row]) {
      if (threadIdx.x == 0) write_inactive_stats(p.out, row);
      continue;
    }
    const T* logits = logits_row<T>(p.rows, row);
    const RowScale<T> scale = row_scale<T>(p.scale, row);
    sweep_moments<Reuse::last>(parts, logits, vocab, tiling, scale);
    __syncthreads();
    if (threadIdx.x < 32) {
      const auto total = merge_parts<FullMoments<A>>(tiling.slices * tiling.group / 32, scale,
                                                     [&](int i) { return parts[i]; });
      if (threadIdx.x == 0) {
        const int64_t y = p.rows.targets[row];
        const bool valid = y >= 0 && y < vocab;
        A x_y = valid ? to_acc(logits[y]) : A(0);
        if (scale.softcap.value != A(0)) x_y = soft_capped(x_y, scale.softcap);
        write_stats(p.out, row, total, x_y, y, valid, scale);
      }
    }
    __syncthreads();
  }
}

// ---- policy_loss: the objective between the two halves of a row, by one thread

// Thread 0 fills it while the row's first loads are under way.
template <class A>
struct RowScratch {
  GradCoefs<A> grad;
  RowInputs<A> in;
  Hyper<A> hyper;
  int64_t target;
  A x_y;
};
static_assert(sizeof(RowScratch<double>) <= 384, "kScratchBytes, sweep_shared_bytes");

template <class A>
__device__ __forceinline__ bool is_active(const LossParams<A>& p, int64_t row) {
  return p.weight[row] != A(0) || (p.entropy_weight != nullptr && p.entropy_weight[row] != A(0));
}

template <class A>
__device__ __forceinline__ void write_inactive_loss(const LossParams<A>& p, int64_t row) {
  p.row_loss[row] = p.token_loss[row] = p.logprob[row] = p.entropy[row] = A(0);
}

template <class T>
__device__ __forceinline__ void prepare_row(RowScratch<acc_t<T>>& s, const LossParams<acc_t<T>>& p,
                                            int64_t row, const T* logits,
                                            const RowScale<T>& scale) {
  using A = acc_t<T>;
  s.in = load_row_inputs(p, row);
  s.hyper = load_hyper(p, row);
  s.target = p.rows.targets[row];
  const bool valid = s.target >= 0 && s.target < p.rows.vocab;
  s.x_y = valid ? to_acc(logits[s.target]) : A(0);
  if (scale.softcap.value != A(0)) s.x_y = soft_capped(s.x_y, scale.softcap);
}

// Leaves the gradient's coefficients in s.grad; `writes`: this block writes the row's outputs.
template <class T>
__device__ __forceinline__ void decide_row(RowScratch<acc_t<T>>& s, const LossParams<acc_t<T>>& p,
                                           int64_t row, const Moments<acc_t<T>>& total,
                                           const RowScale<T>& scale, bool writes) {
  using A = acc_t<T>;
  const bool valid = s.target >= 0 && s.target < p.rows.vocab;
  const RowStats<A> stats = row_stats(total, s.x_y, valid, scale);
  const RowLoss<A> loss =
      objective_row(p.kind, p.kl_kind, p.kl_unbiased, stats.logprob, stats.entropy, s.in, s.hyper);
  if (writes) {
    p.row_loss[row] = loss.row_loss;
    p.token_loss[row] = loss.token_loss;
    p.logprob[row] = stats.logprob;
    p.entropy[row] = stats.entropy;
  }
  if (!loss.finite) {
    s.grad = zero_row<A>();
    return;
  }
  const A loss_scale = p.loss_scale != nullptr ? *p.loss_scale : A(1);
  const GradRow<A> g = grad_row(total.m, stats.inv_sum, stats.entropy, A(0), loss.dlogp,
                                loss.dentropy, A(0), A(0), loss_scale / scale.temperature.value);
  s.grad = fold<T>(g, total.m, scale.temperature.value, s.target);
}

// ---- policy_loss, rows that fit on chip: a cluster per row, one block per slice

constexpr int kStages = 4;  // tiles of a slice that are fetched ahead

// This thread's vectors of one tile, as one group of copies, empty past the end of the slice.
template <class T>
__device__ __forceinline__ void fetch_tile(T* shared, const T* p, int n, int tile) {
  constexpr int N = Vec<T>::size;
  const bool aligned = is_aligned(p);
  const int step = blockDim.x * N;
  int position = threadIdx.x * N + tile * kUnroll * step;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i, position += step) {
    if (position >= n) break;
    if (aligned && position + N <= n) {
      copy_async(shared + position, p + position);
    } else {
      store_shared(shared + position, load_elements(p, n, position));
    }
  }
  copy_commit();
}

template <class T>
__device__ __forceinline__ void load_tile(Vec<T> (&v)[kUnroll], const T* shared, int n,
                                          int position, int step) {
  const bool inside = position + (kUnroll - 1) * step < n;  // the last vector is padded with -inf
  if (inside) {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) v[i] = load_shared(shared + position + i * step);
  } else {
#pragma unroll
    for (int i = 0; i < kUnroll; ++i, position += step) {
      v[i] = position < n ? load_shared(shared + position) : load_elements(shared, 0, 0);
    }
  }
}

// The block's slice through shared memory into moments. Its first kStages tiles are under way, the
// others follow as tiles are read; every thread reads only what it fetched, so no barrier.
template <class T>
__device__ __forceinline__ Moments<acc_t<T>> fetch_moments(T* shared, const T* p, Slice slice,
                                                           const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size;
  const int step = blockDim.x * N, start = threadIdx.x * N;
  Moments<acc_t<T>> a;
  clear(a);
  for (int tile = 0; tile * kUnroll * step < slice.n; ++tile) {
    const int at = start + tile * kUnroll * step;
    copy_wait<kStages - 1>();
    Vec<T> v[kUnroll];
    load_tile(v, shared, slice.n, at, step);
    absorb(a, v, scale, slice.begin + at, step);
    fetch_tile(shared, p, slice.n, tile + kStages);
  }
  return warp_join(a);
}

// The slice's gradient, and behind it the first tiles of the next row's slice (null: no such row)
// into the shared memory that each thread has just read: loads go on while gradients are stored.
template <class T>
__device__ __forceinline__ void write_gradient_fetch_next(T* grad, T* shared, const T* next,
                                                          Slice slice, const GradCoefs<acc_t<T>>& c,
                                                          const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size;
  const bool aligned = is_aligned(grad);
  const Floor<T> floor = floor_below<T>(c.m, scale);
  const int step = blockDim.x * N, start = threadIdx.x * N;
  for (int tile = 0; tile < kStages || tile * kUnroll * step < slice.n; ++tile) {
    int at = start + tile * kUnroll * step;
#pragma unroll 2
    for (int i = 0; i < kUnroll; ++i, at += step) {
      if (at >= slice.n) break;
      store_vector(
          grad, slice.n, aligned, at,
          gradient_vector<false>(load_shared(shared + at), slice.begin + at, c, floor, scale));
    }
    if (tile < kStages) fetch_tile(shared, next, next != nullptr ? slice.n : 0, tile);
  }
}

// Zeros to the gradients of inactive rows from `row` on; returns the first active one.
template <class T>
__device__ __forceinline__ int64_t skip_inactive(const LossParams<acc_t<T>>& p, int64_t row,
                                                 Slice slice) {
  const unsigned size = cluster_size();
  for (; row < p.rows.rows && !is_active(p, row); row += gridDim.x / size) {
    write_zeros(grad_row_pointer<T>(p.rows, row) + slice.begin, slice.n, threadIdx.x, blockDim.x);
    if (cluster_rank() == 0 && threadIdx.x == 0) write_inactive_loss(p, row);
  }
  return row;
}

template <class T>
__global__ void __launch_bounds__(kGroup, 3)
    loss_cluster_kernel(LossParams<acc_t<T>> p, Tiling tiling) {
  using A = acc_t<T>;
  const unsigned rank = cluster_rank(), size = cluster_size();
  const int warps = blockDim.x / 32;
  T* shared = dynamic_shared<T>();
  auto* scratch = dynamic_shared<RowScratch<A>>(unsigned(tiling.slice_len * sizeof(T)));
  auto* parts = reinterpret_cast<Moments<A>*>(scratch + 1);
  const Slice slice = slice_of(tiling, p.rows.vocab, int(rank));
  const auto slice_of_row = [&](int64_t row) {
    return row < p.rows.rows ? logits_row<T>(p.rows, row) + slice.begin : nullptr;
  };
  int64_t row = skip_inactive<T>(p, blockIdx.x / size, slice);
  const T* logits = slice_of_row(row);
  for (int tile = 0; tile < kStages && logits != nullptr; ++tile) {
    fetch_tile(shared, logits, slice.n, tile);
  }
  while (row < p.rows.rows) {
    T* grad = grad_row_pointer<T>(p.rows, row) + slice.begin;
    const RowScale<T> scale = row_scale<T>(p.scale, row);
    if (threadIdx.x == 0) prepare_row(*scratch, p, row, logits - slice.begin, scale);
    const Moments<A> part = fetch_moments(shared, logits, slice, scale);
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = part;
    cluster_sync();
    if (threadIdx.x < 32) {
      const auto total = merge_parts<Moments<A>>(int(size) * warps, scale, [&](int i) {
        return *cluster_map(parts + i % warps, unsigned(i / warps));
      });
      if (threadIdx.x == 0) decide_row(*scratch, p, row, total, scale, rank == 0);
    }
    __syncthreads();
    const GradCoefs<A> c = scratch->grad;
    cluster_arrive();  // the partials were read and may change, or their block exit, after the wait
    row = skip_inactive<T>(p, row + gridDim.x / size, slice);
    logits = slice_of_row(row);
    if (c.live) {
      write_gradient_fetch_next(grad, shared, logits, slice, c, scale);
    } else {
      write_zeros(grad, slice.n, threadIdx.x, blockDim.x);
      for (int tile = 0; tile < kStages && logits != nullptr; ++tile) {
        fetch_tile(shared, logits, slice.n, tile);
      }
    }
    cluster_wait();
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
    if (threadIdx.x == 0) prepare_row(*scratch, p, row, logits, scale);
    sweep_moments<Reuse::again>(parts, logits, vocab, tiling, scale);
    __syncthreads();
    if (threadIdx.x < 32) {
      const auto total = merge_parts<Moments<A>>(tiling.slices * tiling.group / 32, scale,
                                                 [&](int i) { return parts[i]; });
      if (threadIdx.x == 0) decide_row(*scratch, p, row, total, scale, true);
    }
    __syncthreads();
    const GradCoefs<A> c = scratch->grad;
    if (grad != nullptr && c.live) {
      write_gradient<false>(grad, logits, vocab, 0, c, scale, threadIdx.x, blockDim.x);
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
  return fold<T>(g, p.row_max[row], scale.temperature.value, p.rows.targets[row]);
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
      write_gradient<true>(grad, logits_row<T>(p.rows, row) + slice.begin, slice.n, slice.begin, c,
                           scale, threadIdx.x, blockDim.x);
    } else {
      write_zeros(grad, slice.n, threadIdx.x, blockDim.x);
    }
  }
}

// ---- scale_rows_: a row whose factor is 1 is not touched

template <class T>
__global__ void __launch_bounds__(kGroup)
    scale_kernel(Rows rows, const acc_t<T>* factors, Tiling tiling) {
  constexpr int N = Vec<T>::size;
  const int64_t blocks = rows.rows * tiling.slices;
  for (int64_t i = blockIdx.x; i < blocks; i += gridDim.x) {
    const int64_t row = i / tiling.slices;
    const acc_t<T> factor = factors[row];
    if (factor == acc_t<T>(1)) continue;
    const Slice slice = slice_of(tiling, rows.vocab, int(i % tiling.slices));
    T* x = grad_row_pointer<T>(rows, row) + slice.begin;
    const bool aligned = is_aligned(x);
    for (int at = threadIdx.x * N; at < slice.n; at += blockDim.x * N) {
      const Vec<T> v =
          aligned && at + N <= slice.n ? load_global(x + at) : load_elements(x, slice.n, at);
      acc_t<T> y[N];
      unpack(v, y);
#pragma unroll
      for (int j = 0; j < N; ++j) y[j] *= factor;
      store_vector(x, slice.n, aligned, at, pack<T>(y));
    }
  }
}

}  // namespace reasonkern
