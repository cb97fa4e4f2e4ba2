// GroupNorm chains of the residual block, forward: relu(gn(y)), the block's tail, and the tail that ends in the
// solver's residual. A thread sums squares about its own mean; Chan's formula combines the threads' variances.
#include "norm.cuh"

namespace ifr::cuda {
namespace {

struct Moments {
  float count, mean, m2;
};

// The moments of everything that `total` entries describe. `step` threads share the work, and all get the result; this
// is number `start` of them, and `sum` adds up over them. Entries of count 0 are ignored.
template <typename Entry, typename Sum>
__device__ __forceinline__ Moments combine(int total, int start, int step, Entry entry, Sum sum) {
  float count = 0, mean = 0, m2 = 0;
  for (int i = start; i < total; i += step) {
    const Moments e = entry(i);
    count += e.count;
    mean += e.count * e.mean;
  }
  count = sum(count);
  mean = sum(mean) / count;
  for (int i = start; i < total; i += step) {
    const Moments e = entry(i);
    const float off = e.mean - mean;
    m2 += e.count > 0 ? e.m2 + e.count * off * off : 0;
  }
  return {count, mean, sum(m2)};
}

__device__ __forceinline__ float rstd_of(const Moments &m, float eps) { return 1.0f / sqrtf(m.m2 / m.count + eps); }

// A norm at a thread's channels.
template <int V>
struct Norm {
  float mean[V], scale[V], bias[V];

  __device__ __forceinline__ void set(const NormPlan &plan, const Tile &tile, const Lane<V> &lane, const Table &table,
                                      const float *weights, const float *biases) {
    table.get(plan, lane, mean, scale);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      scale[j] *= weights[tile.channel + lane.channel + j];
      bias[j] = biases[tile.channel + lane.channel + j];
    }
  }
  __device__ __forceinline__ float operator()(float x, int j) const { return (x - mean[j]) * scale[j] + bias[j]; }
};

// Where a block's moments go. Of a whole tile: those of its groups, to `table` and to mean and rstd (n, groups). Else
// those of its columns, to `partial` (n, slices, columns, 3). A column is V channels if V divides a group, else one.
struct Sink {
  Table table;
  float *mean, *rstd, *partial;
};

// How many of its V channels a thread sums together.
template <int V>
__host__ __device__ __forceinline__ int together_of(const NormPlan &plan) {
  return plan.per_group % V == 0 ? V : 1;
}

// The moments over the tile of the numbers that values(position, x) gives. All threads of the block call it.
template <int V, typename Values>
__device__ __forceinline__ void take_moments(const NormPlan &plan, const Tile &tile, const Lane<V> &lane,
                                             const Scratch &scratch, const Sink &sink, Values values) {
  const int together = together_of<V>(plan);
  const int columns = tile.width / together, pitch = lane.rows | 1;
  float *means = scratch.entries, *m2s = means + columns * pitch;
  const auto positions_of = [&](int row) { return row < tile.length ? (tile.length - 1 - row) / lane.rows + 1 : 0; };

  float mean[V] = {}, m2[V] = {};
#pragma unroll 1
  for (int p = lane.begin; p < tile.length; p += lane.rows) {
    float x[V];
    values(p, x);
#pragma unroll
    for (int j = 0; j < V; ++j) mean[j] += x[j];
  }
  const float share = 1.0f / max(1, positions_of(lane.row));
#pragma unroll
  for (int j = 0; j < V; ++j) mean[j] *= share;
  if (together > 1) {
    float all = 0;
#pragma unroll
    for (int j = 0; j < V; ++j) all += mean[j];
#pragma unroll
    for (int j = 0; j < V; ++j) mean[j] = all / V;
  }
#pragma unroll 1
  for (int p = lane.begin; p < tile.length; p += lane.rows) {
    float x[V];
    values(p, x);
#pragma unroll
    for (int j = 0; j < V; ++j) m2[j] += (x[j] - mean[j]) * (x[j] - mean[j]);
  }
  if (lane.active) {
    if (together > 1) {
#pragma unroll
      for (int j = 1; j < V; ++j) m2[0] += m2[j];
      const int at = lane.channel / V * pitch + lane.row;
      means[at] = mean[0], m2s[at] = m2[0];
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) {
        const int at = (lane.channel + j) * pitch + lane.row;
        means[at] = mean[j], m2s[at] = m2[j];
      }
    }
  }
  __syncthreads();

  const int units = plan.whole ? tile.groups : columns, per_unit = columns / units;
  for (int unit = threadIdx.x / 32; unit < units; unit += blockDim.x / 32) {
    const auto entry = [&](int i) {
      const int row = i % lane.rows, at = (unit * per_unit + i / lane.rows) * pitch + row;
      return Moments{float(together * positions_of(row)), means[at], m2s[at]};
    };
    const Moments m = combine(per_unit * lane.rows, threadIdx.x % 32, 32, entry, warp_sum);
    if (threadIdx.x % 32 != 0) continue;
    if (plan.whole) {
      const int64_t group = tile.sample * plan.groups + tile.channel / plan.per_group + unit;
      sink.mean[group] = sink.table.a[unit] = m.mean;
      sink.rstd[group] = sink.table.b[unit] = rstd_of(m, plan.eps);
    } else {
      const int64_t column = (tile.sample * plan.slices + tile.slice) * (plan.channels / together) +
                             tile.channel / together + unit;
      float *out = sink.partial + 3 * column;
      out[0] = m.count, out[1] = m.mean, out[2] = m.m2;
    }
  }
  __syncthreads();
}

constexpr int FINALIZE_THREADS = 256;

// Mean and rstd from partial (n, slices, columns, 3), a block for each group of a sample.
__global__ void __launch_bounds__(FINALIZE_THREADS)
    finalize_moments(const float *partial, int slices, int columns, int groups, float eps, float *mean, float *rstd,
                     const int64_t *status) {
  const int64_t sample = blockIdx.x / groups;
  if (status && status[sample] != MAX_ITER) return;
  const int group = blockIdx.x % groups, per_group = columns / groups;
  const float *first = partial + 3 * (sample * slices * columns + group * per_group);
  __shared__ float scratch[2][FINALIZE_THREADS / 32];
  int turn = 0;
  const auto sum = [&](float x) {
    float all[1] = {x};
    block_sum<FINALIZE_THREADS>(all, scratch[turn++ % 2]);
    return all[0];
  };
  const auto entry = [&](int i) {
    const float *e = first + 3 * (int64_t(i / per_group) * columns + i % per_group);
    return Moments{e[0], e[1], e[2]};
  };
  const Moments m = combine(slices * per_group, threadIdx.x, FINALIZE_THREADS, entry, sum);
  if (threadIdx.x == 0) mean[blockIdx.x] = m.mean, rstd[blockIdx.x] = rstd_of(m, eps);
}

// The sum over the block, in its first thread, which adds the warps' sums in order.
__device__ __forceinline__ float sum_to_first(float x, float *scratch) {
  x = warp_sum(x);
  if (threadIdx.x % 32 == 0) scratch[threadIdx.x / 32] = x;
  __syncthreads();
  x = 0;
  if (threadIdx.x == 0)
    for (int w = 0; w < int(blockDim.x) / 32; ++w) x += scratch[w];
  return x;
}

template <typename T, int V, bool TAIL>
__global__ void __launch_bounds__(MOST_THREADS, 4)
    forward(const NormPlan plan, DType type, Stage stage, const NormForward a, const float *__restrict__ z) {
  const Tile tile(plan);
  const Lane<V> lane(tile);
  const int bytes = tile_bytes(plan, type);
  unsigned char *y = dynamic_shared<unsigned char>(), *shortcut = y + bytes;
  const Scratch scratch(TAIL && a.shortcut ? shortcut + bytes : shortcut, plan, V / together_of<V>(plan));
  const bool add_shortcut = TAIL && a.shortcut && stage != Stage::first;
  fetch<T>(y, a.y, type, plan, tile);
  if (add_shortcut) fetch<T>(shortcut, a.shortcut, type, plan, tile);
  // The status arrives while the tiles do. A block does not leave before they are there.
  const bool runs = !a.status || a.status[tile.sample] == MAX_ITER;
  await_tiles();
  if (!runs) return;
  if (TAIL && !a.out && (stage == Stage::whole || stage == Stage::apply)) prefetch(z, plan, tile);

  const auto input = [&](int p, float(&x)[V]) { read<T>(y, type, p * tile.width + lane.channel, x); };
  Table table = Table::global(a.first_mean, a.first_rstd, plan, tile);
  if (stage == Stage::whole || stage == Stage::first) {
    if (plan.whole) table = Table::shared(scratch.tables, tile);
    take_moments(plan, tile, lane, scratch, {table, a.first_mean, a.first_rstd, a.workspace}, input);
    if (stage == Stage::first) return;
  }
  Norm<V> first;
  first.set(plan, tile, lane, table, a.first_weight, a.first_bias);
  const auto hidden = [&](int p, float(&x)[V]) {
    input(p, x);
#pragma unroll
    for (int j = 0; j < V; ++j) x[j] = first(x[j], j);
    if (add_shortcut) {
      float added[V];
      read<T>(shortcut, type, p * tile.width + lane.channel, added);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] += added[j];
    }
  };
  const int64_t start = tile.base + lane.channel;

  if constexpr (!TAIL) {
#pragma unroll 1
    for (int p = lane.begin; p < tile.length; p += lane.rows) {
      float x[V];
      hidden(p, x);
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = relu(x[j]);
      write<T>(a.out, type, start + int64_t(p) * plan.channels, x);
    }
  } else {
    Norm<V> second{};
    if (a.second_weight) {
      const auto rectified = [&](int p, float(&x)[V]) {
        hidden(p, x);
#pragma unroll
        for (int j = 0; j < V; ++j) x[j] = relu(x[j]);
      };
      table = Table::global(a.second_mean, a.second_rstd, plan, tile);
      if (stage == Stage::whole || stage == Stage::second) {
        if (plan.whole) table = Table::shared(scratch.tables + 2 * plan.width, tile);
        take_moments(plan, tile, lane, scratch, {table, a.second_mean, a.second_rstd, a.workspace}, rectified);
        if (stage == Stage::second) return;
      }
      second.set(plan, tile, lane, table, a.second_weight, a.second_bias);
    }
    const auto output = [&](int p, float(&x)[V]) {
      hidden(p, x);
      if (!a.second_weight) return;
#pragma unroll
      for (int j = 0; j < V; ++j) x[j] = second(relu(x[j]), j);
    };
    if (a.out) {
#pragma unroll 1
      for (int p = lane.begin; p < tile.length; p += lane.rows) {
        float x[V];
        output(p, x);
        store<V>(static_cast<float *>(a.out) + start + int64_t(p) * plan.channels, x);
      }
      return;
    }
    const int64_t row = tile.sample * (a.history_stride - int64_t(plan.positions) * plan.channels) + start;
    const float inverse = a.next_scale ? 1 / a.next_scale[tile.sample] : 1;
    float gg = 0, ff = 0, ahead[V];
    if (lane.begin < tile.length) load<V>(z + start + int64_t(lane.begin) * plan.channels, ahead);
#pragma unroll 1
    for (int p = lane.begin; p < tile.length; p += lane.rows) {
      const int64_t offset = int64_t(p) * plan.channels;
      float f[V], g[V];
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = ahead[j];
      // The next numbers are loaded before these are used: z alone is not in shared memory.
      if (p + lane.rows < tile.length) load<V>(z + start + offset + int64_t(lane.rows) * plan.channels, ahead);
      output(p, f);
#pragma unroll
      for (int j = 0; j < V; ++j) {
        g[j] = f[j] - g[j];
        gg += g[j] * g[j];
        ff += f[j] * f[j];
      }
      if (!a.history) continue;
      if (a.history_type == DType::f32)
        write<std::conditional_t<V == 1, Any, float>>(a.history, DType::f32, row + offset, g);
      else if (a.history_type == DType::bf16)
        write<std::conditional_t<V == 1, Any, __nv_bfloat16>>(a.history, DType::bf16, row + offset, g);
      else if (a.history_type == DType::e5m2) {
#pragma unroll
        for (int j = 0; j < V; ++j) g[j] *= inverse;
        write<std::conditional_t<V == 1, Any, E5M2>>(a.history, DType::e5m2, row + offset, g);
      } else
        write<std::conditional_t<V == 1, Any, __half>>(a.history, DType::f16, row + offset, g);
    }
    gg = sum_to_first(gg, scratch.entries);
    ff = sum_to_first(ff, scratch.entries + 32);
    float *norms = a.norms + 2 * int64_t(blockIdx.x);
    if (threadIdx.x == 0) norms[0] = gg, norms[1] = ff;
  }
}

template <typename T, int V, bool TAIL>
void launch_forward(const char *name, DType type, const NormPlan &plan, Stage stage, const NormForward &a,
                    Stream stream) {
  const int threads = threads_for(plan, V);
  const int64_t tiles = tile_bytes(plan, type) * (TAIL && a.shortcut ? 2 : 1);
  launch(name, forward<T, V, TAIL>, blocks_of(plan), threads,
         tiles + Scratch::bytes(plan, threads, V / together_of<V>(plan)), 1, stream, plan, type, stage, a, a.z);
}

// Returns how many channels a column of the moments stands for.
template <bool TAIL>
int run_stage(const char *name, DType type, const NormPlan &plan, Stage stage, const NormForward &a, Stream stream) {
  constexpr int V = TAIL ? 4 : 8;  // float32 tensors beside 16-bit ones: 16 bytes of the former
  int v = 1;
  if (!in_words(type, plan, a.y, a.shortcut, a.out, a.z))
    launch_forward<Any, 1, TAIL>(name, type, plan, stage, a, stream);
  else if (type == DType::f32)
    v = 4, launch_forward<float, 4, TAIL>(name, type, plan, stage, a, stream);
  else if (type == DType::bf16)
    v = V, launch_forward<__nv_bfloat16, V, TAIL>(name, type, plan, stage, a, stream);
  else
    v = V, launch_forward<__half, V, TAIL>(name, type, plan, stage, a, stream);
  return plan.per_group % v == 0 ? v : 1;
}

template <bool TAIL>
void run(const char *name, DType type, const NormPlan &plan, const NormForward &a, Stream stream) {
  if (plan.whole) {
    run_stage<TAIL>(name, type, plan, Stage::whole, a, stream);
    return;
  }
  const auto measure = [&](Stage stage, float *mean, float *rstd) {
    const int together = run_stage<TAIL>(name, type, plan, stage, a, stream);
    launch(name, finalize_moments, plan.n * plan.groups, FINALIZE_THREADS, 0, 1, stream, a.workspace, plan.slices,
           plan.channels / together, plan.groups, plan.eps, mean, rstd, a.status);
  };
  measure(Stage::first, a.first_mean, a.first_rstd);
  if (TAIL && a.second_weight) measure(Stage::second, a.second_mean, a.second_rstd);
  run_stage<TAIL>(name, type, plan, Stage::apply, a, stream);
}

}  // namespace

void norm_relu(DType type, const NormPlan &plan, const NormForward &a, Stream stream) {
  run<false>("norm_relu", type, plan, a, stream);
}

void norm_tail(DType type, const NormPlan &plan, const NormForward &a, Stream stream) {
  run<true>("norm_tail", type, plan, a, stream);
}

}  // namespace ifr::cuda
