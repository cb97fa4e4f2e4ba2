// The pieces of the solver's kernels: a whole block takes inner products and sums over the history, and one warp does
// the methods' small algebra in shared memory.
#pragma once
#include <cfloat>
#include <cmath>

#include "common.cuh"

namespace ifr::cuda {

// Numbers that a thread takes at a time where this divides a sample's size. Other sizes take one at a time.
constexpr int VECTOR = 8;
// Rows that a thread reads at a time: as many as fit its registers.
template <typename H>
constexpr int TILE = sizeof(H) == 4 ? 4 : 8;

// The scale of a residual in 8 bits, by the sum of its predecessor's squares: the power of two below the root mean
// square, as row_scale in kernels/eager.py.
__device__ __forceinline__ float scale_of(float squares, int64_t size) {
  const float rms = sqrtf(squares / size);
  return rms > 0 && isfinite(rms) ? __uint_as_float(__float_as_uint(rms) & 0x7f800000u) : 1;
}

__device__ __forceinline__ bool runs(const Solver &a, int64_t sample) {
  return a.evaluation == 0 || a.status[sample] == MAX_ITER;
}

// The first residual of which inner products are taken.
__host__ __device__ __forceinline__ int window_start(const Solver &a) {
  return a.row - a.window + 1 > 0 ? a.row - a.window + 1 : 0;
}

// The sums of R values over a warp: lane l gets that of value l / (32 / R). It takes half of the shuffles of R calls of
// warp_sum.
template <int R>
__device__ __forceinline__ float warp_sums(float (&x)[R]) {
  const int lane = threadIdx.x % 32;
  int offset = 16;
#pragma unroll
  for (int half = R / 2; half >= 1; half /= 2, offset /= 2) {
    const bool upper = lane & offset;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float sent = upper ? x[i] : x[i + half], kept = upper ? x[i + half] : x[i];
      x[i] = kept + __shfl_xor_sync(ALL_LANES, sent, offset);
    }
  }
#pragma unroll
  for (; offset >= 1; offset /= 2) x[0] += __shfl_xor_sync(ALL_LANES, x[0], offset);
  return x[0];
}

// Inner products of `own` with R rows over the numbers [begin, end), by a block of THREADS. Those of a warp go to
// sums[0 .. R-1]. KEEP: the numbers of row r stay in shared memory too, at kept + r * pitch.
template <typename H, int V, int THREADS, bool KEEP, int R>
__device__ __forceinline__ void dot_tile(const H *own, const H *rows, int64_t stride, int begin, int end, float *sums,
                                         H *kept, int pitch) {
  constexpr int UNROLL = 16 / int(sizeof(H)) / R;
  float products[R] = {};
#pragma unroll UNROLL
  for (int e = begin + threadIdx.x * V; e < end; e += THREADS * V) {
    float g[V], x[R][V];
    load_constant<V>(own + e, g);
#pragma unroll
    for (int r = 0; r < R; ++r) load_constant<V>(rows + r * stride + e, x[r]);
#pragma unroll
    for (int r = 0; r < R; ++r) {
#pragma unroll
      for (int v = 0; v < V; ++v) products[r] = fmaf(g[v], x[r][v], products[r]);
      if constexpr (KEEP) store<V>(kept + r * pitch + e - begin, x[r]);
    }
  }
  const float sum = warp_sums<R>(products);
  const int lane = threadIdx.x % 32;
  if (lane % (32 / R) == 0) sums[lane / (32 / R)] = sum;
}

// The same for any number of rows. sums: MOST_ROWS numbers of shared memory for each of the THREADS / 32 warps.
template <typename H, int V, int THREADS, bool KEEP>
__device__ __forceinline__ void dots(const H *own, const H *rows, int64_t stride, int count, int begin, int end,
                                     float *sums, H *kept = nullptr, int pitch = 0) {
  sums += threadIdx.x / 32 * MOST_ROWS;
  int done = 0;
  auto tile = [&](auto size) {
    constexpr int R = decltype(size)::value;
    dot_tile<H, V, THREADS, KEEP, R>(own, rows + done * stride, stride, begin, end, sums + done,
                                     KEEP ? kept + int64_t(done) * pitch : nullptr, pitch);
    done += R;
  };
  while (count - done >= TILE<H>) tile(std::integral_constant<int, TILE<H>>());
  if (TILE<H> > 4 && count - done >= 4) tile(std::integral_constant<int, 4>());
  if (count - done >= 2) tile(std::integral_constant<int, 2>());
  if (count - done >= 1) tile(std::integral_constant<int, 1>());
}

// Where the rows to be added are: in global memory; in global memory, where rows of coefficient zero are not read, as
// they may hold anything; or in shared memory.
enum class Rows { global, sparse, shared };

// sum += Σ_r coefficients[r] * row r, R rows.
template <typename H, int V, Rows WHERE, int R>
__device__ __forceinline__ void add_tile(const H *rows, int64_t stride, const float *coefficients, float (&sum)[V]) {
  float x[R][V], c[R];
#pragma unroll
  for (int r = 0; r < R; ++r) {
    c[r] = coefficients[r];
    if constexpr (WHERE == Rows::shared) {
      load<V>(rows + r * stride, x[r]);
    } else if (WHERE == Rows::global || c[r] != 0) {
      load_constant<V>(rows + r * stride, x[r]);
    } else {
#pragma unroll
      for (int v = 0; v < V; ++v) x[r][v] = 0;
    }
  }
#pragma unroll
  for (int r = 0; r < R; ++r)
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = fmaf(c[r], x[r][v], sum[v]);
}

template <typename H, int V, Rows WHERE>
__device__ __forceinline__ void add_rows(const H *rows, int64_t stride, const float *coefficients, int count,
                                         float (&sum)[V]) {
  int done = 0;
  auto tile = [&](auto size) {
    add_tile<H, V, WHERE, decltype(size)::value>(rows + done * stride, stride, coefficients + done, sum);
    done += decltype(size)::value;
  };
  while (count - done >= TILE<H>) tile(std::integral_constant<int, TILE<H>>());
  if (TILE<H> > 4 && count - done >= 4) tile(std::integral_constant<int, 4>());
  while (count - done >= 1) tile(std::integral_constant<int, 1>());
}

// The iterate at numbers `at` (counted over all samples), and the next evaluation's r.
template <int V>
__device__ __forceinline__ void place(const Solver &a, int64_t at, const float (&z)[V]) {
  store<V>(a.z + at, z);
  if (a.r == nullptr) return;
  float x[V];
  load<V>(a.injection, a.injection_type, at, x);
#pragma unroll
  for (int v = 0; v < V; ++v) x[v] += z[v];
  store<V>(a.r, a.r_type, at, x);
}

// One sample's small numbers in shared memory while a warp works on them.
struct Small {
  float row[MOST_ROWS];  // ⟨g_k, g_j⟩
  float step[MOST_ROWS], total[MOST_ROWS], scales[MOST_ROWS];
  float norms[2], first_norm, residual;  // |g|^2, |f|^2; |g_0|, best relative residual so far
  bool running, improved;                // after the judgement
  float gram_step[MOST_ROWS], gram_y[MOST_ROWS], a[MOST_ROWS], b[MOST_ROWS], c[MOST_ROWS];
};

// The matrices beside it, of the rows and columns 0 .. row. Rows are `pitch` numbers apart, an odd count, so that
// neighbouring rows start in different banks of shared memory.
struct Matrices {
  float *gram, *p, *q;
  int pitch;
};

__host__ __device__ __forceinline__ int matrix_pitch(int row) { return (row + 1) | 1; }
__host__ __device__ __forceinline__ int matrices_floats(int row) { return 3 * (row + 1) * matrix_pitch(row); }

__device__ __forceinline__ Matrices matrices_at(float *memory, int row) {
  const int pitch = matrix_pitch(row), square = (row + 1) * pitch;
  return {memory, memory + square, memory + 2 * square, pitch};
}

// Loads what the step takes from the state, by the whole block. The caller puts a barrier after it.
__device__ __forceinline__ void load_small(const Solver &a, int64_t sample, Small &s, const Matrices &m) {
  const bool fresh = a.evaluation == 0;
  if (threadIdx.x == 0) {
    s.first_norm = fresh ? 0 : a.norms[sample * 3 + 2];
    s.residual = fresh ? INFINITY : a.residual[sample];
  }
  for (int j = threadIdx.x; j < a.rows; j += blockDim.x) {
    s.total[j] = fresh ? 0 : a.total[sample * a.rows + j];
    s.step[j] = fresh ? 0 : a.step[sample * a.rows + j];
    s.scales[j] = a.scales == nullptr ? 1 : j == a.row ? a.next_scale[sample] : a.scales[sample * a.rows + j];
  }
  if (a.row < 0 || a.method == Method::picard) return;
  // The products of the rows before this one are complete, and so are the pairs before the one that this step forms.
  for (int at = threadIdx.x; at < a.row * a.row; at += blockDim.x) {
    const int i = at / a.row, j = at % a.row, to = i * m.pitch + j;
    const int64_t from = (sample * a.rows + i) * a.rows + j;
    m.gram[to] = a.gram[from];
    m.p[to] = i < a.row - 1 ? a.p[from] : 0;
    if (a.method == Method::broyden) m.q[to] = i < a.row - 1 ? a.q[from] : 0;
  }
  for (int i = threadIdx.x; i < a.row; i += blockDim.x) m.p[i * m.pitch + a.row] = m.q[i * m.pitch + a.row] = 0;
}

// As broyden_coefficients in kernels/gram.py. s.step becomes the new step; the new pair joins m.p and m.q as row k - 1.
__device__ __forceinline__ void broyden(int k, Small &s, const Matrices &m) {
  const int lane = threadIdx.x % 32, count = k + 1, pitch = m.pitch;
  if (k == 0) {
    if (lane == 0) s.step[0] = 1;
    __syncwarp();
    return;
  }
  const float *right = m.gram + k * pitch;
  for (int j = lane; j < count; j += 32) {
    float sum = 0;
    for (int i = 0; i < k; ++i) sum = fmaf(m.gram[i * pitch + j], s.step[i], sum);
    s.gram_step[j] = sum;
    s.gram_y[j] = right[j] - m.gram[(k - 1) * pitch + j];
  }
  __syncwarp();
  for (int i = lane; i < k - 1; i += 32) {
    float a = 0, b = 0, c = 0;
    for (int j = 0; j < count; ++j) {
      const float q = m.q[i * pitch + j];
      a = fmaf(m.p[i * pitch + j], s.gram_step[j], a);
      b = fmaf(q, s.gram_y[j], b);
      c = fmaf(q, right[j], c);
    }
    s.a[i] = a, s.b[i] = b, s.c[i] = c;
  }
  __syncwarp();
  float scale = 0, along = 0;
  float *p_new = m.p + (k - 1) * pitch, *q_new = m.q + (k - 1) * pitch;
  for (int j = lane; j < count; j += 32) {
    const float step = j < k ? s.step[j] : 0;
    float q = -step, p = step + (j == k ? 1 : j == k - 1 ? -1 : 0), next = j == k;
    for (int i = 0; i < k - 1; ++i) {
      const float past = m.p[i * pitch + j];
      q = fmaf(m.q[i * pitch + j], s.a[i], q);
      p = fmaf(-past, s.b[i], p);
      next = fmaf(-past, s.c[i], next);
    }
    p_new[j] = p, q_new[j] = q;
    s.step[j] = next;
    scale = fmaf(q, s.gram_y[j], scale);
    along = fmaf(q, right[j], along);
  }
  scale = warp_sum(scale), along = warp_sum(along);
  bool usable = scale != 0;
  for (int j = lane; j < count; j += 32) {
    if (scale != 0) p_new[j] /= scale;
    usable = usable && isfinite(p_new[j]) && isfinite(q_new[j]);
  }
  usable = __all_sync(ALL_LANES, usable);
  for (int j = lane; j < count; j += 32) {
    if (usable)
      s.step[j] -= p_new[j] * along;
    else
      p_new[j] = q_new[j] = 0;
  }
  __syncwarp();
}

// As anderson_coefficients in kernels/gram.py. m.p holds the past steps, m.q is workspace. s.step becomes the new step.
__device__ __forceinline__ void anderson(int k, int first, float ridge, Small &s, const Matrices &m) {
  const int lane = threadIdx.x % 32, size = k - first, pitch = m.pitch, width = (size + 1) | 1;
  float *system = m.q;  // (size, width): the normal equations, their right side in column `size`
  if (k > 0)
    for (int j = lane; j < k; j += 32) m.p[(k - 1) * pitch + j] = s.step[j];
  auto difference = [&](int i, int j) { return m.gram[(first + i + 1) * pitch + j] - m.gram[(first + i) * pitch + j]; };
  float trace = 0;
  for (int i = lane; i < size; i += 32) {
    for (int j = 0; j < size; ++j) system[i * width + j] = difference(i, first + j + 1) - difference(i, first + j);
    system[i * width + size] = difference(i, k);
    trace += system[i * width + i];
  }
  trace = warp_sum(trace);
  for (int i = lane; i < size; i += 32) system[i * width + i] += trace > 0 ? ridge * trace : 1;
  __syncwarp();
  // Gauss and Jordan's elimination; the matrix is positive definite, so the diagonal serves as pivots.
  for (int pivot = 0; pivot < size; ++pivot) {
    for (int i = lane; i < size; i += 32) {
      if (i == pivot) continue;
      const float factor = system[i * width + pivot] / system[pivot * width + pivot];
      for (int j = pivot + 1; j <= size; ++j)
        system[i * width + j] = fmaf(-factor, system[pivot * width + j], system[i * width + j]);
    }
    __syncwarp();
  }
  bool finite = true;
  for (int i = lane; i < size; i += 32) {
    s.a[i] = system[i * width + size] / system[i * width + i];
    finite = finite && isfinite(s.a[i]);
  }
  finite = __all_sync(ALL_LANES, finite);
  __syncwarp();
  for (int j = lane; j <= k; j += 32) {
    float next = j == k;
    for (int i = 0; finite && i < size; ++i) {
      const int at = first + i;
      const float past = j < k ? m.p[at * pitch + j] : 0;
      next = fmaf(-s.a[i], past + (j == at + 1) - (j == at), next);
    }
    s.step[j] = next;
  }
  __syncwarp();
}

// What follows from s.norms and s.row, by one warp: the judgement (as assess in kernels/eager.py), the method's step,
// and the iterate's coefficients in s.total. write: this block of the sample also stores the results in the state.
__device__ __forceinline__ void judge(const Solver &a, int64_t sample, Small &s, const Matrices &m, bool write) {
  const int lane = threadIdx.x % 32, k = a.row;
  const float g = sqrtf(s.norms[0]), f = sqrtf(s.norms[1]), first_norm = a.evaluation == 0 ? g : s.first_norm;
  const float scale = a.affine ? first_norm : f;
  const bool finite = isfinite(g) && isfinite(scale);
  const float relative = !finite ? NAN : g > 0 ? fminf(g / scale, FLT_MAX) : 0.0f;
  const bool improved = finite && relative < s.residual;
  int64_t status = MAX_ITER;
  if (!finite)
    status = NONFINITE;
  else if (relative <= a.rtol)
    status = CONVERGED;
  else if (g > a.divergence * first_norm)
    status = DIVERGED;
  if (lane == 0) s.running = status == MAX_ITER, s.improved = improved;
  if (write && lane == 0) {
    a.trace[sample] = relative;
    a.iterations[sample] = a.evaluation;
    a.status[sample] = status;
    a.improved[sample] = improved;
    a.norms[sample * 3] = s.norms[0], a.norms[sample * 3 + 1] = s.norms[1], a.norms[sample * 3 + 2] = first_norm;
    if (improved || a.evaluation == 0) a.residual[sample] = improved ? relative : INFINITY;
  }
  if (write && (improved || a.evaluation == 0))
    for (int j = lane; j < a.rows; j += 32) a.best[sample * a.rows + j] = s.total[j];
  if (write && a.evaluation == 0)
    for (int j = lane; j < a.rows; j += 32) a.total[sample * a.rows + j] = 0;
  __syncwarp();
  if (k < 0) return;

  const int first = window_start(a);
  float *gram = a.gram + sample * a.rows * a.rows;
  for (int j = first + lane; j <= k; j += 32) {
    const float product = s.row[j] * s.scales[j] * s.scales[k];
    if (a.method != Method::picard) m.gram[k * m.pitch + j] = m.gram[j * m.pitch + k] = product;
    if (write) gram[k * a.rows + j] = gram[j * a.rows + k] = product;
  }
  __syncwarp();
  const bool running = status == MAX_ITER;
  if (running) {
    if (a.method == Method::broyden)
      broyden(k, s, m);
    else if (a.method == Method::anderson)
      anderson(k, first, a.ridge, s, m);
    else if (lane == 0)
      for (int j = 0; j < a.rows; ++j) s.step[j] = j == k;
    __syncwarp();
  }
  const int64_t at = sample * a.rows, pair = (at + k - 1) * a.rows;
  if (write && a.scales && lane == 0) {
    a.scales[at + k] = s.scales[k];
    a.next_scale[sample] = scale_of(s.norms[0], a.size);
  }
  for (int j = lane; j < a.rows; j += 32) {
    const bool known = running && j <= k;
    if (write && k > 0 && a.method != Method::picard) a.p[pair + j] = known ? m.p[(k - 1) * m.pitch + j] : 0;
    if (write && k > 0 && a.method == Method::broyden) a.q[pair + j] = known ? m.q[(k - 1) * m.pitch + j] : 0;
    if (!running) continue;
    s.total[j] += known ? s.step[j] * s.scales[j] : 0;
    if (!write) continue;
    a.step[at + j] = known ? s.step[j] : 0;
    a.total[at + j] = s.total[j];
  }
}

}  // namespace ifr::cuda
