// One step of the solver after an evaluation of F: residual, gram_row, rule and combine, and finish at a solve's end.
#include <algorithm>
#include <initializer_list>

#include "solver.cuh"

namespace ifr::cuda {
namespace {

// gram_row and residual: a block takes at least 2048 numbers of a sample, two loads of 16 bytes per thread.
constexpr int THREADS = 128;
constexpr int PART = 2048, MOST_PARTS = 512;
constexpr int RULE_THREADS = 256;
constexpr int COMBINE_THREADS = 256;
// Threads on a multiprocessor: few enough to leave each 80 registers, which hold eight loads of 16 bytes. Without this
// bound ptxas takes fewer registers, and loads one after another.
constexpr int THREADS_A_SM = 768;

// Numbers a part holds (the last ones fewer, or none).
int part_size(int64_t size) {
  const int64_t even = ceil_div(size, splits(size));
  return int(ceil_div(even, THREADS * VECTOR) * THREADS * VECTOR);
}

template <int V>
__global__ void __launch_bounds__(THREADS) residual_kernel(Solver a, Sum f, int part) {
  __shared__ float scratch[2 * THREADS / 32];
  const int64_t sample = blockIdx.x / a.parts, base = sample * a.size;
  const int index = blockIdx.x % a.parts;
  if (!runs(a, sample)) return;
  const int64_t begin = int64_t(index) * part, end = min(begin + part, a.size);
  const int64_t row = (sample * a.rows + a.row) * a.size;
  const float inverse = a.scales == nullptr ? 1 : 1 / a.next_scale[sample];
  float sums[2] = {};
  for (int64_t e = begin + threadIdx.x * V; e < end; e += THREADS * V) {
    float g[V], z[V], x[V];
    load<V>(f.addends[0], f.types[0], base + e, g);
    load<V>(a.z + base + e, z);
#pragma unroll
    for (int i = 1; i < 3; ++i) {
      if (i >= f.count) break;
      load<V>(f.addends[i], f.types[i], base + e, x);
#pragma unroll
      for (int v = 0; v < V; ++v) g[v] += x[v];
    }
#pragma unroll
    for (int v = 0; v < V; ++v) {
      sums[1] = fmaf(g[v], g[v], sums[1]);
      g[v] -= z[v];
      sums[0] = fmaf(g[v], g[v], sums[0]);
    }
    if (a.row < 0) continue;
#pragma unroll
    for (int v = 0; v < V; ++v) g[v] *= inverse;
    store<V>(a.history, a.history_type, row + e, g);
  }
  block_sum<THREADS>(sums, scratch);
  if (threadIdx.x < 2) a.norm_partials[int64_t(blockIdx.x) * 2 + threadIdx.x] = sums[threadIdx.x];
}

__global__ void __launch_bounds__(THREADS) first_scale_kernel(Solver a) {
  __shared__ float scratch[THREADS / 32];
  const int64_t sample = blockIdx.x;
  float squares[1] = {};
  for (int i = threadIdx.x; i < a.parts; i += THREADS) squares[0] += a.norm_partials[(sample * a.parts + i) * 2];
  block_sum<THREADS>(squares, scratch);
  if (threadIdx.x == 0) a.next_scale[sample] = scale_of(squares[0], a.size);
}

template <typename H, int V>
__global__ void __launch_bounds__(THREADS, THREADS_A_SM / THREADS) gram_kernel(Solver a, int parts, int part) {
  __shared__ float sums[THREADS / 32 * MOST_ROWS];
  const int64_t sample = blockIdx.x / parts;
  if (!runs(a, sample)) return;
  const int first = window_start(a), count = a.row - first + 1;
  const int64_t begin = int64_t(blockIdx.x % parts) * part, end = min(begin + part, a.size);
  const H *rows = static_cast<const H *>(a.history) + (sample * a.rows + first) * a.size;
  dots<H, V, THREADS, false>(rows + (count - 1) * a.size, rows, a.size, count, int(begin), int(end), sums);
  __syncthreads();
  if (threadIdx.x >= count) return;
  float sum = 0;
#pragma unroll
  for (int w = 0; w < THREADS / 32; ++w) sum += sums[w * MOST_ROWS + threadIdx.x];
  a.gram_partials[int64_t(blockIdx.x) * a.rows + first + threadIdx.x] = sum;
}

// One block a multiprocessor is enough; left to itself, ptxas spills a register for more.
__global__ void __launch_bounds__(RULE_THREADS, 1) rule_kernel(Solver a, int parts) {
  __shared__ Small s;
  __shared__ float scratch[2 * RULE_THREADS / 32], sums[RULE_THREADS / 32][32];
  const int64_t sample = blockIdx.x;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (!runs(a, sample)) {
    if (threadIdx.x == 0) a.trace[sample] = a.previous[sample];
    return;
  }
  const Matrices m = matrices_at(dynamic_shared<float>(), a.row);
  load_small(a, sample, s, m);
  float norms[2] = {};
  for (int i = threadIdx.x; i < a.parts; i += RULE_THREADS) {
    const float *pair = a.norm_partials + (sample * a.parts + i) * 2;
    norms[0] += pair[0], norms[1] += pair[1];
  }
  block_sum<RULE_THREADS>(norms, scratch);
  if (threadIdx.x == 0) s.norms[0] = norms[0], s.norms[1] = norms[1];
  if (a.row >= 0)
    for (int first = window_start(a); first <= a.row; first += 32) {
      const int j = first + lane;
      const float *partial = a.gram_partials + sample * parts * a.rows + j;
      float sum = 0;
      if (j <= a.row) {
#pragma unroll 8
        for (int i = warp; i < parts; i += RULE_THREADS / 32) sum += partial[int64_t(i) * a.rows];
      }
      sums[warp][lane] = sum;
      __syncthreads();
      if (warp == 0 && j <= a.row) {
        sum = 0;
#pragma unroll
        for (int w = 0; w < RULE_THREADS / 32; ++w) sum += sums[w][lane];
        s.row[j] = sum;
      }
      __syncthreads();
    }
  __syncthreads();
  if (warp == 0) judge(a, sample, s, m, true);
}

// The samples are taken in reverse: those that gram_row read last are still in the L2 cache.
template <typename H, int V>
__global__ void __launch_bounds__(COMBINE_THREADS, THREADS_A_SM / COMBINE_THREADS)
    combine_kernel(Solver a, int blocks) {
  const int64_t block = gridDim.x - 1 - blockIdx.x, sample = block / blocks;
  const int64_t e = (block % blocks * COMBINE_THREADS + threadIdx.x) * V, at = sample * a.size + e;
  if (e >= a.size || a.status[sample] != MAX_ITER) return;
  const H *history = static_cast<const H *>(a.history) + sample * a.rows * a.size + e;
  float z[V] = {};
  if (a.value != a.z) {
    const float scale = a.scales == nullptr ? 1 : a.scales[sample * a.rows + a.row];
    float g[V];
    load<V>(a.z + at, z);
    load<V>(history + a.row * a.size, g);
    if (a.improved[sample]) store<V>(a.value + at, z);
#pragma unroll
    for (int v = 0; v < V; ++v) z[v] = fmaf(scale, g[v], z[v]);
  } else {
    if (a.start != nullptr) load<V>(a.start + at, z);
    add_rows<H, V, Rows::global>(history, a.size, a.total + sample * a.rows, a.row + 1, z);
  }
  place<V>(a, at, z);
}

template <typename H, int V>
__global__ void __launch_bounds__(COMBINE_THREADS, 2) finish_kernel(Solver a, int blocks) {
  const int64_t sample = blockIdx.x / blocks;
  const int64_t e = (int64_t(blockIdx.x % blocks) * COMBINE_THREADS + threadIdx.x) * V, at = sample * a.size + e;
  if (e >= a.size) return;
  float z[V] = {};
  if (a.improved[sample]) {
    if (a.value == a.z) return;
    load<V>(a.z + at, z);
  } else {
    if (a.value != a.z) return;
    if (a.start != nullptr) load<V>(a.start + at, z);
    const H *history = static_cast<const H *>(a.history) + sample * a.rows * a.size + e;
    add_rows<H, V, Rows::sparse>(history, a.size, a.best + sample * a.rows, a.rows, z);
  }
  store<V>(a.value + at, z);
}

// Calls function(history's type, V) for the instantiation that serves the solve.
template <typename Function>
void choose(const Solver &a, Function function) {
  auto by_size = [&](auto type) {
    if (a.size % VECTOR == 0)
      function(type, std::integral_constant<int, VECTOR>());
    else
      function(type, std::integral_constant<int, 1>());
  };
  if (a.history_type == DType::bf16)
    by_size(__nv_bfloat16());
  else if (a.history_type == DType::e5m2)
    by_size(E5M2());
  else
    by_size(float());
}

void check_solver(const Solver &a) {
  if (a.rows > MOST_ROWS) throw std::runtime_error("more than 64 rows of history");
  if (a.size > INT32_MAX - PART * VECTOR) throw std::runtime_error("samples of more than 2^31 unknowns");
  if (a.size % VECTOR != 0) return;
  for (const void *p : std::initializer_list<const void *>{a.z, a.value, a.start, a.injection, a.r, a.history})
    if (!aligned(p)) throw std::runtime_error("an array of unknowns is not aligned to 16 bytes");
}

}  // namespace

int splits(int64_t size) { return int(std::clamp<int64_t>(ceil_div(size, PART), 1, MOST_PARTS)); }

void residual(const Solver &a, const Sum &f, Stream stream) {
  check_solver(a);
  if (a.parts != splits(a.size)) throw std::runtime_error("residual makes splits(size) partial sums");
  bool vector = a.size % VECTOR == 0;
  for (int i = 0; i < f.count; ++i)
    if (vector && !aligned(f.addends[i])) throw std::runtime_error("an addend is not aligned to 16 bytes");
  launch("residual", vector ? residual_kernel<VECTOR> : residual_kernel<1>, a.n * a.parts, THREADS, 0, 1, stream, a, f,
         part_size(a.size));
}

void first_scale(const Solver &a, Stream stream) {
  launch("first_scale", first_scale_kernel, a.n, THREADS, 0, 1, stream, a);
}

void gram_row(const Solver &a, Stream stream) {
  check_solver(a);
  choose(a, [&](auto type, auto v) {
    launch("gram_row", gram_kernel<decltype(type), decltype(v)::value>, a.n * splits(a.size), THREADS, 0, 1, stream, a,
           splits(a.size), part_size(a.size));
  });
}

void rule(const Solver &a, Stream stream) {
  check_solver(a);
  launch("rule", rule_kernel, a.n, RULE_THREADS, matrices_floats(a.row) * sizeof(float), 1, stream, a, splits(a.size));
}

void combine(const Solver &a, Stream stream) {
  check_solver(a);
  choose(a, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    const int blocks = int(ceil_div(a.size, COMBINE_THREADS * V));
    launch("combine", combine_kernel<decltype(type), V>, a.n * blocks, COMBINE_THREADS, 0, 1, stream, a, blocks);
  });
}

void finish(const Solver &a, Stream stream) {
  check_solver(a);
  choose(a, [&](auto type, auto v) {
    constexpr int V = decltype(v)::value;
    const int blocks = int(ceil_div(a.size, COMBINE_THREADS * V));
    launch("finish", finish_kernel<decltype(type), V>, a.n * blocks, COMBINE_THREADS, 0, 1, stream, a, blocks);
  });
}

}  // namespace ifr::cuda
