// Small kernels for tests/test_cuda_sim.py. All take the same arguments, so that one binding starts
// any of them: `in` and `out` hold n elements of whatever type the kernel says.
#include <pybind11/pybind11.h>

#include <map>

#include "common/mailbox.cuh"
#include "common/reduce.cuh"
#include "cuda_sim.h"

using namespace reasonkern;

namespace {

using Kernel = void (*)(const void* in, void* out, int n);

__device__ unsigned global_thread() { return blockIdx.x * blockDim.x + threadIdx.x; }

// Block `rank`'s copy of `p`, a pointer into shared memory: mapa.
template <class T>
__device__ T* cluster_map(T* p, unsigned rank) {
  return static_cast<T*>(cuda_sim::cluster_map(p, rank));
}

// x → scale·x + shift modulo 2³²: composition is associative and does not commute.
struct Affine {
  std::uint32_t scale, shift;
};
struct Compose {
  __device__ Affine operator()(Affine a, Affine b) const {
    return {b.scale * a.scale, b.scale * a.shift + b.shift};
  }
};

// Each cluster composes its own n maps, by warp and then over the warps of all blocks; every thread
// writes the result it got.
__global__ void compose(const void* in, void* out, int n) {
  Affine* parts = dynamic_shared<Affine>();
  const int warps = blockDim.x / 32, threads = blockDim.x * cluster_size();
  const int count = (n + threads - 1) / threads;
  const int first = (cluster_rank() * blockDim.x + threadIdx.x) * count;
  const Affine* maps =
      static_cast<const Affine*>(in) + std::size_t{blockIdx.x / cluster_size()} * n;
  Affine a{1, 0};
  for (int i = first; i < min(first + count, n); ++i) a = Compose()(a, maps[i]);
  a = warp_reduce(a, Compose());
  if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = a;
  cluster_size() > 1 ? cluster_sync() : __syncthreads();
  a = {1, 0};
  for (int i = 0; i < warps * int(cluster_size()); ++i) {
    a = Compose()(a, *cluster_map(parts + i % warps, i / warps));
  }
  cluster_sync();
  static_cast<Affine*>(out)[global_thread()] = a;
}

__global__ void shuffles(const void* in, void* out, int n) {
  const int lane = threadIdx.x;
  const double v = static_cast<const double*>(in)[lane];
  double* row = static_cast<double*>(out) + lane;
  row[0 * n] = __shfl_sync(~0u, v, lane * 7 % 40);
  row[1 * n] = __shfl_up_sync(~0u, v, 3);
  row[2 * n] = __shfl_down_sync(~0u, v, 5, 16);
  row[3 * n] = __shfl_xor_sync(~0u, v, 9);
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;  // two meetings at once
  row[4 * n] = __shfl_sync(half, v, lane < 16 ? 2 : 20);
}

__global__ void votes(const void* in, void* out, int n) {
  const int lane = threadIdx.x, v = static_cast<const int*>(in)[lane];
  unsigned* row = static_cast<unsigned*>(out) + lane;
  row[0 * n] = __ballot_sync(~0u, v > 1);
  row[1 * n] = __match_any_sync(~0u, v);
  row[2 * n] = __any_sync(~0u, v == 3) * 2 + __all_sync(~0u, v >= 0);
  row[3 * n] = __reduce_add_sync(~0u, v);
  row[4 * n] = __reduce_min_sync(~0u, v) * 100 + __reduce_max_sync(~0u, v);
  const unsigned odd = 0xaaaaaaaau;
  if (lane % 2 == 1) row[5 * n] = __ballot_sync(odd, v > 1) | __popc(odd) << 8;
}

__global__ void atomics(const void* in, void* out, int n) {
  int* cell = static_cast<int*>(out);
  const unsigned t = global_thread();
  if (static_cast<int>(t) >= n) return;
  const int v = static_cast<const int*>(in)[t];
  atomicAdd(&cell[0], v);
  atomicMax(&cell[1], v);
  atomicMin(&cell[2], v);
  for (int old = cell[3]; atomicCAS(&cell[3], old, old + v) != old;) old = cell[3];
  if (atomicExch(&cell[4], 1) == 0) atomicAdd(&cell[5], 1);
}

// Threads take a lock in turn: the one that holds it must get to run while the others spin.
__global__ void spinlock(const void*, void* out, int) {
  int* cell = static_cast<int*>(out);
  while (atomicCAS(&cell[0], 0, 1) != 0) {
  }
  const int count = cell[1];
  __nanosleep(1);
  cell[1] = count + 1;
  atomicExch(&cell[0], 0);
}

__global__ void spin_forever(const void*, void* out, int) {
  while (atomicAdd(static_cast<int*>(out), 0) == 0) {
  }
}

// Every block reads a word of its right neighbour's shared memory. n: 1 forgets the first barrier,
// 2 the last.
__global__ void neighbours(const void*, void* out, int n) {
  float* mine = dynamic_shared<float>();
  mine[threadIdx.x] = static_cast<float>(global_thread());
  if (n != 1) cluster_sync();
  const unsigned right = (cluster_rank() + 1) % cluster_size();
  const float* theirs = cluster_map(mine, right);
  if (n == 2 && cluster_rank() == 0) __nanosleep(1), __nanosleep(1);
  static_cast<float*>(out)[global_thread()] = theirs[threadIdx.x];
  if (n != 2) cluster_sync();
}

__global__ void read_unwritten(const void*, void* out, int) {
  static_cast<float*>(out)[global_thread()] = dynamic_shared<float>()[threadIdx.x];
  dynamic_shared<float>()[threadIdx.x] = 1.0f;  // must not survive into the next block
}

__global__ void barrier_after_exit(const void*, void*, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
}

__global__ void two_barriers(const void*, void*, int n) {
  if (static_cast<int>(threadIdx.x) < n) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

__global__ void missing_lane(const void*, void* out, int n) {
  if (threadIdx.x % 32 != 5) static_cast<int*>(out)[0] = __shfl_xor_sync(~0u, n, 1);
}

__global__ void absent_block(const void*, void*, int) {
  if (cluster_rank() != 1) cluster_sync();
}

__global__ void last_writer(const void*, void* out, int) {
  *static_cast<unsigned*>(out) = global_thread();
}

// Adds 1 to n bf16 numbers in 16-byte tiles, behind a head of 7; without it if n is negative.
__global__ void tiles(const void* in, void* out, int n) {
  const bf16* x = static_cast<const bf16*>(in);
  bf16* y = static_cast<bf16*>(out);
  const int head = n > 0 ? 7 : 0;
  for (int i = threadIdx.x; i < min(head, n); i += blockDim.x) {
    y[i] = from_acc<bf16>(to_acc(x[i]) + 1.0f);
  }
  for (int i = head + threadIdx.x * 8; i + 8 <= std::abs(n); i += blockDim.x * 8) {
    float v[8];
    unpack(load_global(x + i), v);
    for (float& e : v) e += 1.0f;
    store_global(y + i, pack<bf16>(v));
  }
}

// Blocks send each other their numbers, in each of three turns, over two mailboxes used in turn;
// thread t of a block writes what came from block t. n: 1 reads without waiting, 2 waits for more
// than comes, 3 does not wait for the last turn, 4 waits for the turn after the one under way.
struct alignas(16) Number {
  float value, padding[3];
};
__global__ void mail(const void*, void* out, int n) {
  auto* numbers = dynamic_shared<Number>();
  auto* boxes = dynamic_shared<Mailbox>(2 * 8 * sizeof(Number));
  const unsigned size = cluster_size(), t = threadIdx.x;
  if (t < 2) open_mailbox(boxes + t);
  cluster_sync();
  for (unsigned turn = 0; turn < 3; ++turn) {
    Number* from = numbers + turn % 2 * 8;
    Mailbox* box = boxes + turn % 2;
    if (t == 0) expect_bytes(box, (size + (n == 2)) * sizeof(Number));
    const Number mine{static_cast<float>(blockIdx.x * 10 + turn), {}};
    if (t < size) send(from + cluster_rank(), box, t, mine);
    if (n != 1 && !(n == 3 && turn == 2)) wait_for_turn<Sender::peers>(box, turn / 2 + (n == 4));
    static_cast<float*>(out)[turn * gridDim.x * blockDim.x + global_thread()] = from[t % 8].value;
  }
  cluster_sync();
}

// Two rows of a float per thread come in bulk, one after the other to the same place. n: 1 starts
// the second copy before all threads have read the first row.
__global__ void copies(const void* in, void* out, int n) {
  auto* row = dynamic_shared<float>();
  auto* box = dynamic_shared<Mailbox>(blockDim.x * sizeof(float));
  const unsigned t = threadIdx.x, bytes = blockDim.x * sizeof(float);
  if (t == 0) open_mailbox(box);
  __syncthreads();
  const auto fetch = [&](unsigned turn) {
    if (t != 0) return;
    expect_bytes(box, bytes);
    copy_bulk(row, static_cast<const float*>(in) + turn * blockDim.x, bytes, box);
  };
  fetch(0);
  wait_for_turn<Sender::self>(box, 0);
  __syncthreads();
  if (n == 1) fetch(1);
  static_cast<float*>(out)[t] = row[t];
  __syncthreads();
  if (n != 1) fetch(1);
  wait_for_turn<Sender::self>(box, 1);
  static_cast<float*>(out)[blockDim.x + t] = row[t];
}

// Each thread copies four floats; n: 1 reads them before it waits.
__global__ void vectors(const void* in, void* out, int n) {
  const unsigned at = 4 * threadIdx.x;
  float* room = dynamic_shared<float>() + at;
  copy_async(room, static_cast<const float*>(in) + at);
  if (n != 1) wait_for_copies();
  for (unsigned i = 0; i < 4; ++i) static_cast<float*>(out)[at + i] = room[i];
  wait_for_copies();
}

// Each of two warps makes n steps; of every step it writes how many the other one has made.
__global__ void steps(const void*, void* out, int n) {
  int* made = dynamic_shared<int>();
  const int warp = threadIdx.x / 32;
  if (threadIdx.x % 32 == 0) made[warp] = 0;
  __syncthreads();
  for (int step = 0; step < n; ++step) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) ++made[warp];
    __syncwarp();
    if (threadIdx.x % 32 == 0) static_cast<int*>(out)[warp * n + step] = made[1 - warp];
  }
}

// x: a positive float per thread; the results of each function lie n apart.
__global__ void functions(const void* in, void* out, int n) {
  const unsigned t = global_thread();
  const float x = static_cast<const float*>(in)[t];
  double* row = static_cast<double*>(out) + t;
  row[0 * n] = __expf(x);
  row[1 * n] = __logf(x);
  row[2 * n] = rsqrtf(x);
  row[3 * n] = __fdividef(3.0f, x);
  row[4 * n] = __fmaf_rn(x, x, -__fmul_rn(x, x));
  row[5 * n] = min(max(x, 1.0f), 2.0f);
  const int bits = __float_as_int(x);
  row[6 * n] = __popc(bits) + 100 * __ffs(bits) + 10000 * __clz(bits);
  row[7 * n] = __umulhi(__float_as_uint(x), 0x80000001u);
  row[8 * n] = x - __uint_as_float(bits) - __int_as_float(0);
}

template <class T>
__global__ void round_trip(const void* in, void* out, int n) {
  const unsigned t = global_thread();
  if (static_cast<int>(t) >= n) return;
  const T rounded = from_acc<T>(static_cast<const float*>(in)[t]);
  static_cast<float*>(out)[t] = to_acc(rounded);
}

__global__ void past_shared(const void*, void*, int n) { dynamic_shared<char>()[n] = 1; }
__global__ void overflow(const void*, void* out, int n) { *static_cast<int*>(out) = n + n; }

const std::map<std::string, Kernel> kernels = {
    {"compose", compose},
    {"shuffles", shuffles},
    {"votes", votes},
    {"atomics", atomics},
    {"spinlock", spinlock},
    {"spin_forever", spin_forever},
    {"neighbours", neighbours},
    {"read_unwritten", read_unwritten},
    {"barrier_after_exit", barrier_after_exit},
    {"two_barriers", two_barriers},
    {"missing_lane", missing_lane},
    {"absent_block", absent_block},
    {"last_writer", last_writer},
    {"tiles", tiles},
    {"mail", mail},
    {"copies", copies},
    {"vectors", vectors},
    {"steps", steps},
    {"functions", functions},
    {"round_bf16", round_trip<bf16>},
    {"round_fp16", round_trip<fp16>},
    {"past_shared", past_shared},
    {"overflow", overflow},
};

void run(const std::string& kernel, unsigned grid, unsigned block, unsigned cluster,
         std::size_t shared_bytes, int order, std::uint64_t seed, std::uintptr_t in,
         std::uintptr_t out, int n) {
  cuda_sim::launch(kernels.at(kernel), grid, block, cluster, shared_bytes,
                   static_cast<cuda_sim::Order>(order), seed, reinterpret_cast<const void*>(in),
                   reinterpret_cast<void*>(out), n);
}

}  // namespace

PYBIND11_MODULE(cuda_sim_selftest, m) { m.def("run", &run); }
