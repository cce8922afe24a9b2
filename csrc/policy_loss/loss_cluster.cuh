// policy_loss for rows that fit on chip: a cluster per row, one block per slice. A block's slice
// stays in shared memory between its moments and its gradient; the blocks meet once a row, by
// sending each other what they found.
#pragma once

#include "../common/mailbox.cuh"
#include "row_objective.cuh"

namespace reasonkern {

constexpr int kStages = 4;  // tiles of a share that are fetched ahead

// Behind the slice.
template <class A>
struct ClusterScratch {
  RowScratch<A> row;
  Moments<A> warps[kGroup / 32];                 // of this block
  alignas(16) Moments<A> slices[2][kMaxSlices];  // from all blocks of the cluster, of two rows
  Mailbox arrived[2];
};
static_assert(sizeof(ClusterScratch<float>) <= kScratchBytes, "cluster_shared_bytes");

// One tile of the calling warp's share of a slice, as one group of copies, empty past the end.
// Every lane reads only what it fetched, so no barrier.
template <class T>
__device__ __forceinline__ void fetch_tile(T* shared, const T* p, int n, int tile) {
  constexpr int N = Vec<T>::size, step = 32 * N;
  const bool aligned = is_aligned(p);
  int at = tile * kUnroll * step + threadIdx.x % 32 * N;
#pragma unroll
  for (int i = 0; i < kUnroll; ++i, at += step) {
    if (at >= n) break;
    if (aligned && at + N <= n) {
      copy_async(shared + at, p + at);
    } else {
      store_shared(shared + at, load_elements(p, n, at));
    }
  }
  copy_commit();
}

// The first kStages tiles; null: there is no such row.
template <class T>
__device__ __forceinline__ void fetch_first(T* shared, const T* p, int n) {
  for (int tile = 0; tile < kStages; ++tile) fetch_tile(shared, p, p != nullptr ? n : 0, tile);
}

// The share through shared memory into moments. Its first kStages tiles are under way, the others
// follow as tiles are read.
template <class T>
__device__ __forceinline__ Moments<acc_t<T>> fetch_moments(T* shared, const T* p, Slice share,
                                                           const RowScale<T>& scale) {
  int ahead = kStages;
  return share_moments<Moments<acc_t<T>>>(
      share, scale,
      [&](Vec<T>(&v)[kUnroll], int at, int step) {  // the last vector is padded with -inf
        copy_wait<kStages - 1>();
#pragma unroll
        for (int i = 0; i < kUnroll; ++i, at += step) {
          v[i] = at < share.n ? load_shared(shared + at) : padding<T>();
        }
      },
      [&] { fetch_tile(shared, p, share.n, ahead++); });
}

// The share's gradient, and behind it the first tiles of the next row's into the shared memory that
// each lane has just read: loads go on while gradients are stored.
template <class T>
__device__ __forceinline__ void write_gradient_fetch_next(T* grad, T* shared, const T* next,
                                                          Slice share, const GradCoefs<acc_t<T>>& c,
                                                          const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size, step = 32 * N;
  const bool aligned = is_aligned(grad);
  const Floor<T> floor = floor_below<T>(c.m, scale);
  for (int tile = 0; tile < kStages || tile * kUnroll * step < share.n; ++tile) {
    int at = tile * kUnroll * step + threadIdx.x % 32 * N;
#pragma unroll 2
    for (int i = 0; i < kUnroll; ++i, at += step) {
      if (at >= share.n) break;
      store_vector(
          grad, share.n, aligned, at,
          gradient_vector<false>(load_shared(shared + at), share.begin + at, c, floor, scale));
    }
    if (tile < kStages) fetch_tile(shared, next, next != nullptr ? share.n : 0, tile);
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

// The row's moments in every lane of the first warp of each block, whose warps have left theirs in
// s.warps. A block that is ahead waits for the others' slices of this row before it sends any of
// the next, so two sets of mailboxes are enough.
template <class T>
__device__ __forceinline__ Moments<acc_t<T>> exchange(ClusterScratch<acc_t<T>>& s, unsigned turn,
                                                      int warps, const RowScale<T>& scale) {
  const auto mine = merge_lanes(lane_part(s.warps, warps), scale);
  const unsigned size = cluster_size(), lane = threadIdx.x % 32;
  if (size == 1) return mine;
  auto* slices = s.slices[turn % 2];
  Mailbox* arrived = &s.arrived[turn % 2];
  if (lane == 0) expect_bytes(arrived, size * sizeof(mine));
  if (lane < size) send(slices + cluster_rank(), arrived, lane, mine);
  wait_for_turn(arrived, turn / 2);
  return merge_lanes(lane_part(slices, int(size)), scale);
}

template <class T>
__global__ void __launch_bounds__(kGroup, 3)
    loss_cluster_kernel(LossParams<acc_t<T>> p, Tiling tiling) {
  using A = acc_t<T>;
  const unsigned rank = cluster_rank(), clusters = gridDim.x / cluster_size();
  const int warp = threadIdx.x / 32;
  auto& s = *dynamic_shared<ClusterScratch<A>>(unsigned(tiling.slice_len * sizeof(T)));
  const Slice slice = slice_of(tiling, p.rows.vocab, int(rank));
  const Slice share = share_of(slice, tiling, warp);
  T* shared = dynamic_shared<T>() + warp * tiling.share_len;
  if (threadIdx.x == 0) {
    open_mailbox(&s.arrived[0]);
    open_mailbox(&s.arrived[1]);
  }
  cluster_sync();
  const auto share_of_row = [&](int64_t row) {
    return row < p.rows.rows ? logits_row<T>(p.rows, row) + share.begin : nullptr;
  };
  int64_t row = skip_inactive<T>(p, blockIdx.x / cluster_size(), slice);
  const T* logits = share_of_row(row);
  fetch_first(shared, logits, share.n);
  RowTask<A> task;  // thread 0's, of the row whose logits are being fetched
  if (threadIdx.x == 0 && logits != nullptr) task = load_task(p, row);
  for (unsigned turn = 0; logits != nullptr; ++turn) {
    T* grad = grad_row_pointer<T>(p.rows, row) + share.begin;
    const RowScale<T> scale = row_scale<T>(p.scale, row);
    A x_y = A(0);
    if (threadIdx.x == 0) {
      s.row.task = task;
      x_y = target_logit(logits - share.begin, task.target, p.rows.vocab);
    }
    const Moments<A> part = fetch_moments(shared, logits, share, scale);
    if (threadIdx.x % 32 == 0) s.warps[warp] = part;
    __syncthreads();
    if (warp == 0) {
      const auto total = exchange(s, turn, int(blockDim.x) / 32, scale);
      if (threadIdx.x == 0) {
        s.row.x_y = x_y;
        decide_row(s.row, p, row, total, scale, rank == 0);
      }
    }
    __syncthreads();
    const GradCoefs<A> c = s.row.grad;
    row = skip_inactive<T>(p, row + clusters, slice);
    logits = share_of_row(row);
    if (threadIdx.x == 0 && logits != nullptr) task = load_task(p, row);
    if (c.live) {
      write_gradient_fetch_next(grad, shared, logits, share, c, scale);
    } else {
      write_zeros(grad, share.n, threadIdx.x % 32, 32);
      fetch_first(shared, logits, share.n);
    }
  }
}

}  // namespace reasonkern
