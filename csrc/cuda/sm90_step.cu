// gram_row, rule and combine as one kernel. A cluster of eight blocks holds a sample, and a block an eighth of its
// unknowns. The block keeps in shared memory what it read of the history, adds up the partial inner products of all
// eight blocks, and moves its eighth. The history is read from memory once, not twice, by one launch, not three.
#include <cooperative_groups.h>

#include <algorithm>

#include "solver.cuh"

namespace ifr::cuda {
namespace {

constexpr int CLUSTER = 8;
// Two blocks run on a multiprocessor where shared memory allows it: one reads while the other computes.
constexpr int THREADS = 384;
constexpr size_t MOST_SHARED = 227 * 1024 - 8 * 1024;  // what a block can have, less what the kernel declares

// The unknowns that a block takes. The last blocks take fewer, or none.
__host__ __device__ __forceinline__ int share_of(int64_t size) {
  return int((size + CLUSTER * VECTOR - 1) / (CLUSTER * VECTOR) * VECTOR);
}

#if !defined(__CUDA_ARCH__) || defined(__CUDA_ARCH_FEAT_SM90_ALL)

template <typename H>
__global__ void __launch_bounds__(THREADS, 2) cluster_kernel(Solver a) {
  constexpr int V = VECTOR, WARPS = THREADS / 32;
  __shared__ Small s;
  __shared__ float sums[WARPS * MOST_ROWS], scratch[2 * WARPS], partial[MOST_ROWS];
  const auto cluster = cooperative_groups::this_cluster();
  const int rank = int(cluster.block_rank());
  const int64_t sample = blockIdx.x / CLUSTER;
  if (!runs(a, sample)) {  // all blocks of the cluster leave together
    if (rank == 0 && threadIdx.x == 0) a.trace[sample] = a.previous[sample];
    return;
  }
  const int first = window_start(a), count = a.row - first + 1, pitch = share_of(a.size);
  const int begin = min(int64_t(rank) * pitch, a.size), end = min(int64_t(begin) + pitch, a.size);
  H *kept = dynamic_shared<H>();
  const Matrices m = matrices_at(reinterpret_cast<float *>(kept + int64_t(count) * pitch), a.row);
  const H *history = static_cast<const H *>(a.history) + sample * a.rows * a.size, *rows = history + first * a.size;

  load_small(a, sample, s, m);
  float norms[2] = {};
  for (int i = threadIdx.x; i < a.parts; i += THREADS) {
    const float *pair = a.norm_partials + (sample * a.parts + i) * 2;
    norms[0] += pair[0], norms[1] += pair[1];
  }
  dots<H, V, THREADS, true>(rows + (count - 1) * a.size, rows, a.size, count, begin, end, sums, kept, pitch);
  block_sum<THREADS>(norms, scratch);  // its barrier also completes `sums`
  if (threadIdx.x == 0) s.norms[0] = norms[0], s.norms[1] = norms[1];
  if (threadIdx.x < count) {
    float sum = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += sums[w * MOST_ROWS + threadIdx.x];
    partial[threadIdx.x] = sum;
  }
  cluster.sync();  // every block has its sums, and has read what the first one is about to change in the state
  if (threadIdx.x < count) {
    float sum = 0;
#pragma unroll
    for (int r = 0; r < CLUSTER; ++r) sum += cluster.map_shared_rank(partial, r)[threadIdx.x];
    s.row[first + threadIdx.x] = sum;
  }
  cluster.barrier_arrive();
  __syncthreads();
  if (threadIdx.x < 32) judge(a, sample, s, m, rank == 0);
  __syncthreads();

  for (int e = begin + threadIdx.x * V; s.running && e < end; e += THREADS * V) {
    const int64_t at = sample * a.size + e;
    float z[V] = {};
    if (a.value != a.z) {
      float g[V];
      load<V>(a.z + at, z);
      load<V>(kept + (count - 1) * pitch + e - begin, g);
      if (s.improved) store<V>(a.value + at, z);
#pragma unroll
      for (int v = 0; v < V; ++v) z[v] = fmaf(s.scales[a.row], g[v], z[v]);
    } else {
      if (a.start != nullptr) load<V>(a.start + at, z);
      add_rows<H, V, Rows::global>(history + e, a.size, s.total, first, z);
      add_rows<H, V, Rows::shared>(kept + e - begin, pitch, s.total + first, count, z);
    }
    place<V>(a, at, z);
  }
  cluster.barrier_wait();  // a block that left would take its shared memory along
}

#else

template <typename H>
__global__ void cluster_kernel(Solver) {}

#endif

// Of the rows that a block keeps, and of the matrices behind them.
size_t shared_bytes(int64_t size, int count, int row, DType history_type) {
  const size_t bytes = history_type == DType::e5m2 ? 1 : history_type == DType::bf16 ? 2 : 4;
  return bytes * count * share_of(size) + matrices_floats(row) * sizeof(float);
}

}  // namespace

bool fits_cluster(int64_t size, int rows, int window, DType history_type) {
  return size % VECTOR == 0 && size < INT32_MAX / 2 && rows <= MOST_ROWS &&
         shared_bytes(size, std::min(rows, window), rows - 1, history_type) <= MOST_SHARED;
}

void cluster_step(const Solver &a, Stream stream) {
  if (a.row < 0 || !fits_cluster(a.size, a.rows, a.window, a.history_type))
    throw std::runtime_error("cluster_step: the rows do not fit a cluster's shared memory");
  const size_t shared = shared_bytes(a.size, a.row - window_start(a) + 1, a.row, a.history_type);
  const auto kernel = a.history_type == DType::e5m2   ? cluster_kernel<E5M2>
                      : a.history_type == DType::bf16 ? cluster_kernel<__nv_bfloat16>
                                                      : cluster_kernel<float>;
  launch("cluster_step", kernel, a.n * CLUSTER, THREADS, shared, CLUSTER, stream, a);
}

}  // namespace ifr::cuda
