// policy_loss for rows that fit on chip: a cluster per row, one block per slice. A block's slice
// stays in shared memory between its moments and its gradient; the blocks meet once a row, by
// sending each other what they found.
#pragma once

#include "../common/mailbox.cuh"
#include "row_objective.cuh"
#include "row_sweep.cuh"

namespace reasonkern {

constexpr int kChunks = 2;  // pieces of a warp's share that are fetched one by one

// Behind the slice.
template <class A>
struct ClusterScratch {
  RowScratch<A> row;
  Moments<A> warps[kGroup / 32];                 // of this block
  alignas(16) Moments<A> slices[2][kMaxSlices];  // from all blocks of the cluster, of two rows
  Mailbox arrived[2], fetched[kGroup / 32][kChunks];
};
static_assert(sizeof(ClusterScratch<float>) <= kScratchBytes, "cluster_shared_bytes");

// A warp's share of the slice in shared memory, chunk by chunk of whole tiles.
template <class T>
struct Stage {
  T* shared;
  Mailbox* fetched;
  Slice share;
  int chunk;  // elements

  __device__ __forceinline__ Stage(T* shared, Mailbox* fetched, Slice share)
      : shared(shared), fetched(fetched), share(share) {
    constexpr int tile = kUnroll * 32 * Vec<T>::size;
    chunk = (share.n + kChunks * tile - 1) / (kChunks * tile) * tile;
    if (threadIdx.x % 32 == 0) {
      for (int i = 0; i < kChunks; ++i) open_mailbox(fetched + i);
    }
  }
  __device__ __forceinline__ int begin(int i) const { return min(i * chunk, share.n); }

  // Starts the copy of chunk i of the row at p; the lanes have read what it replaces. Vectors that
  // are misaligned or not whole are read element by element, each by the lane that uses it.
  __device__ __forceinline__ void fetch(const T* p, int i) const {
    constexpr int N = Vec<T>::size;
    const int from = begin(i), to = begin(i + 1), lane = threadIdx.x % 32;
    const int whole = is_aligned(p) ? to - to % N : from;
    if (from == to) return;
    __syncwarp();
    if (lane == 0) {
      const unsigned bytes = unsigned(whole - from) * unsigned(sizeof(T));
      expect_bytes(fetched + i, bytes);
      if (bytes > 0) copy_bulk(shared + from, p + from, bytes, fetched + i);
    }
    if (whole < to) read_rest(p, whole, to, lane);
  }

  // By lanes, as they use it.
  __device__ __forceinline__ void read_rest(const T* p, int from, int to, int lane) const {
    constexpr int N = Vec<T>::size;
#pragma unroll 1
    for (int at = from + (lane - from / N % 32 + 32) % 32 * N; at < to; at += 32 * N) {
      store_shared(shared + at, load_vector<Reuse::last>(p, to, false, at));
    }
    fence_for_bulk();
  }
};

// The moments of the share's lanes, as its chunks come in.
template <class T>
__device__ __forceinline__ Moments<acc_t<T>> staged_moments(const Stage<T>& stage, unsigned turn,
                                                            const RowScale<T>& scale, bool& free) {
  int chunk = 0;
  return share_moments<Moments<acc_t<T>>>(
      stage.share, scale, Target<T>{}, free, [&](Vec<T>(&v)[kUnroll], int at, int step) {
        if (at - int(threadIdx.x % 32) * Vec<T>::size == stage.begin(chunk)) {
          wait_for_turn<Sender::self>(stage.fetched + chunk++, turn);
        }
        const T* end = stage.shared + stage.share.n;  // the last vector is padded with -inf
        load_whole_vectors(v, stage.shared + at, end + (-stage.share.n & (Vec<T>::size - 1)), step,
                           load_shared<T>);
      });
}

// The share's gradient, and behind each chunk the next row's (null: no such row), into the shared
// memory that was just read: loads go on while gradients are stored.
template <bool kFloor, class T>
__device__ __forceinline__ void write_gradient_fetch_next(T* grad, const Stage<T>& stage,
                                                          const T* next,
                                                          const GradCoefs<acc_t<T>>& c,
                                                          const RowScale<T>& scale) {
  constexpr int N = Vec<T>::size, step = 32 * N;
  const int lane = threadIdx.x % 32;
  const bool aligned = is_aligned(grad);
  const Floor<T> floor = floor_below<T>(c.m, scale);
  const auto target = target_element<false>(stage.shared, stage.share, c, scale, lane, 32);
  const auto vector = [&](int at) {
    return gradient_vector<false, kFloor>(load_shared(stage.shared + at), c, floor, scale);
  };
  for (int i = 0; i < kChunks; ++i) {
    int at = stage.begin(i) + lane * N;
    const int end = stage.begin(i + 1);
    if (aligned && (!kFloor || floor.usable)) {
      constexpr int U = 3;
      for (; at + (U - 1) * step + N <= end; at += U * step) {
#pragma unroll
        for (int k = 0; k < U; ++k) store_global(grad + at + k * step, vector(at + k * step));
      }
#pragma unroll 1
      for (; at + N <= end; at += step) store_global(grad + at, vector(at));
    }
#pragma unroll 1
    for (; at < end; at += step) store_vector(grad, end, aligned, at, vector(at));
    if (next != nullptr) stage.fetch(next, i);
  }
  if (target.at >= 0) grad[target.at] = target.gradient;
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
  wait_for_turn<Sender::peers>(arrived, turn / 2);
  return merge_lanes(lane_part(slices, int(size)), scale);
}

// Empty below sm_90, where no launch configuration asks for it.
template <class T>
__global__ void __launch_bounds__(kGroup, 3)
    loss_cluster_kernel(LossParams<acc_t<T>> p, Tiling tiling) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  using A = acc_t<T>;
  const unsigned rank = cluster_rank(), clusters = gridDim.x / cluster_size();
  const int warp = threadIdx.x / 32;
  auto& s = *dynamic_shared<ClusterScratch<A>>(unsigned(tiling.slice_len * sizeof(T)));
  const Slice slice = slice_of(tiling, p.rows.vocab, int(rank));
  const Slice share = share_of(slice, tiling, warp);
  const Stage<T> stage(dynamic_shared<T>() + warp * tiling.share_len, s.fetched[warp], share);
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
  for (int i = 0; i < kChunks && logits != nullptr; ++i) stage.fetch(logits, i);
  RowScale<T> scale = row_scale<T>(p.scale, row < p.rows.rows ? row : 0);
  RowTask<A> task;  // thread 0's, of the row whose logits are being fetched
  if (threadIdx.x == 0 && logits != nullptr) task = load_task(p, row);
  for (unsigned turn = 0; logits != nullptr; ++turn) {
    T* grad = grad_row_pointer<T>(p.rows, row) + share.begin;
    if (turn > 0 && p.scale.row_temperature != nullptr) scale = row_scale<T>(p.scale, row);
    const int64_t next = row + clusters;  // its weight is on the way while it is not yet needed
    const A next_weight = next < p.rows.rows ? p.weight[next] : A(0);
    A x_y = A(0);
    if (threadIdx.x == 0) {
      s.row.task = task;
      x_y = target_logit(logits - share.begin, task.target, p.rows.vocab);
    }
    bool free;
    store_joined(s.warps + warp, staged_moments(stage, turn, scale, free));
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
    row = next_weight != A(0) ? next : skip_inactive<T>(p, next, slice);
    logits = share_of_row(row);
    if (threadIdx.x == 0 && logits != nullptr) task = load_task(p, row);
    if (c.live && free && std::fabs(c.slope) < A(1) && !needs_floor(c.origin, scale)) {
      write_gradient_fetch_next<false>(grad, stage, logits, c, scale);
    } else if (c.live) {
      write_gradient_fetch_next<true>(grad, stage, logits, c, scale);
    } else {
      write_zeros(grad, share.n, threadIdx.x % 32, 32);
      for (int i = 0; i < kChunks && logits != nullptr; ++i) stage.fetch(logits, i);
    }
  }
#endif
}

}  // namespace reasonkern
