// The vector-Jacobian products of the GroupNorm chains. With g the gradient of a norm's output, x̂ its normalised
// input and w its weight, the input's gradient is (g w - mean(g w) - x̂ mean(g w x̂)) rstd, with means over the group.
// The gradients of weight and bias are the sums of g x̂ and of g, one sum for each sample.
#include "norm.cuh"

namespace ifr::cuda {
namespace {

// A norm at a thread's channels.
template <int V>
struct Norm {
  float mean[V], rstd[V], weight[V], bias[V];

  __device__ __forceinline__ void set(const NormPlan &plan, const Tile &tile, const Lane<V> &lane, const Table &table,
                                      const float *weights, const float *biases) {
    table.get(plan, lane, mean, rstd);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      weight[j] = weights[tile.channel + lane.channel + j];
      bias[j] = biases[tile.channel + lane.channel + j];
    }
  }
  __device__ __forceinline__ float x_hat(float x, int j) const { return (x - mean[j]) * rstd[j]; }
  __device__ __forceinline__ float affine(float x_hat, int j) const { return x_hat * weight[j] + bias[j]; }
};

// Where a block's sums go. Of a whole tile: the means of its groups to `table`, the sums of its channels to grad_weight
// and grad_bias (n, channels) unless both are null. Else the channels' sums, to `partial` (n, slices, channels, 2).
struct Sink {
  Table table;
  const float *weight;
  float *grad_weight, *grad_bias, *partial;
};

// Sums of g and of g x̂ over the tile; values(position, g, x_hat) gives both. All threads of the block call it.
template <int V, typename Values>
__device__ __forceinline__ void take_sums(const NormPlan &plan, const Tile &tile, const Lane<V> &lane,
                                          const Scratch &scratch, const Sink &sink, Values values) {
  const int pitch = lane.rows | 1;
  float *sums = scratch.entries, *products = sums + tile.width * pitch;
  float sum[V] = {}, product[V] = {};
#pragma unroll 1
  for (int p = lane.begin; p < tile.length; p += lane.rows) {
    float g[V], x_hat[V];
    values(p, g, x_hat);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      sum[j] += g[j];
      product[j] += g[j] * x_hat[j];
    }
  }
  if (lane.active) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int at = (lane.channel + j) * pitch + lane.row;
      sums[at] = sum[j], products[at] = product[j];
    }
  }
  __syncthreads();

  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, own = threadIdx.x % 32;
  for (int c = warp; c < tile.width; c += warps) {
    float g = 0, gx = 0;
    for (int row = own; row < lane.rows; row += 32) {
      g += sums[c * pitch + row];
      gx += products[c * pitch + row];
    }
    g = warp_sum(g), gx = warp_sum(gx);
    if (own != 0) continue;
    if (plan.whole) {
      const int64_t channel = tile.sample * plan.channels + tile.channel + c;
      if (sink.grad_weight) sink.grad_weight[channel] = gx, sink.grad_bias[channel] = g;
      scratch.totals[c] = g, scratch.totals[plan.width + c] = gx;
    } else {
      const int64_t slice = tile.sample * plan.slices + tile.slice;
      float *out = sink.partial + 2 * (slice * plan.channels + tile.channel + c);
      out[0] = g, out[1] = gx;
    }
  }
  if (!plan.whole) return;
  __syncthreads();
  const float share = 1.0f / (float(plan.per_group) * float(plan.positions));
  for (int group = warp; group < tile.groups; group += warps) {
    float g = 0, gx = 0;
    for (int i = own; i < plan.per_group; i += 32) {
      const int c = group * plan.per_group + i;
      const float w = sink.weight[tile.channel + c];
      g += w * scratch.totals[c];
      gx += w * scratch.totals[plan.width + c];
    }
    g = warp_sum(g), gx = warp_sum(gx);
    if (own == 0) sink.table.a[group] = g * share, sink.table.b[group] = gx * share;
  }
  __syncthreads();
}

constexpr int FINALIZE_THREADS = 256;

// Finishes the sums in partial (n, slices, channels, 2), a block for each group of a sample: the channels' sums go to
// grad_weight and grad_bias (n, channels) unless these are null, the group's two means to means (2, n, groups).
__global__ void __launch_bounds__(FINALIZE_THREADS)
    finalize_sums(const float *partial, int slices, int channels, int groups, int positions, const float *weight,
                  float *grad_weight, float *grad_bias, float *means, const int64_t *status) {
  const int64_t sample = blockIdx.x / groups;
  if (status && status[sample] != MAX_ITER) return;
  constexpr int WARPS = FINALIZE_THREADS / 32;
  const int group = blockIdx.x % groups, per_group = channels / groups, own = threadIdx.x % 32;
  float sums[2] = {};
  for (int i = threadIdx.x / 32; i < per_group; i += WARPS) {
    const int channel = group * per_group + i;
    float g = 0, gx = 0;
    for (int slice = own; slice < slices; slice += 32) {
      const float *e = partial + 2 * ((sample * slices + slice) * channels + channel);
      g += e[0], gx += e[1];
    }
    g = warp_sum(g), gx = warp_sum(gx);
    sums[0] += weight[channel] * g, sums[1] += weight[channel] * gx;
    if (own == 0 && grad_weight)
      grad_weight[sample * channels + channel] = gx, grad_bias[sample * channels + channel] = g;
  }
  __shared__ float warps[2][WARPS];
  if (own == 0) warps[0][threadIdx.x / 32] = sums[0], warps[1][threadIdx.x / 32] = sums[1];
  __syncthreads();
  if (threadIdx.x >= 2) return;
  float all = 0;
  for (int w = 0; w < WARPS; ++w) all += warps[threadIdx.x][w];
  means[int64_t(threadIdx.x) * gridDim.x + blockIdx.x] = all / (float(per_group) * float(positions));
}

template <typename T, int V, bool RELU>
__global__ void __launch_bounds__(MOST_THREADS, 3)
    backward(const NormPlan plan, DType type, Stage stage, const NormBackward a, float *means) {
  using G = std::conditional_t<RELU || std::is_same_v<T, Any>, T, float>;
  const Tile tile(plan);
  if (a.status && a.status[tile.sample] != MAX_ITER) return;
  const Lane<V> lane(tile);
  const DType grad_type = RELU ? type : DType::f32;
  const bool two = !RELU && a.second_weight, add_shortcut = two && a.shortcut;
  unsigned char *y = dynamic_shared<unsigned char>(), *grad = y + tile_bytes(plan, type);
  unsigned char *shortcut = grad + tile_bytes(plan, grad_type);
  const Scratch scratch(add_shortcut ? shortcut + tile_bytes(plan, type) : shortcut, plan, V);
  fetch<T>(y, a.y, type, plan, tile);
  fetch<G>(grad, a.grad, grad_type, plan, tile);
  if (add_shortcut) fetch<T>(shortcut, a.shortcut, type, plan, tile);
  await_tiles();

  const int64_t start = tile.base + lane.channel;
  Norm<V> first;
  first.set(plan, tile, lane, Table::global(a.first_mean, a.first_rstd, plan, tile), a.first_weight, a.first_bias);
  const auto normalised = [&](int p, float(&x_hat)[V]) {
    read<T>(y, type, p * tile.width + lane.channel, x_hat);
#pragma unroll
    for (int j = 0; j < V; ++j) x_hat[j] = first.x_hat(x_hat[j], j);
  };
  const auto gradient = [&](int p, float(&g)[V], const float(&x_hat)[V]) {
    read<G>(grad, grad_type, p * tile.width + lane.channel, g);
    if constexpr (RELU) {
#pragma unroll
      for (int j = 0; j < V; ++j) g[j] = first.affine(x_hat[j], j) > 0 ? g[j] : 0;
    }
  };

  if constexpr (!RELU) {
    if (two && stage != Stage::apply) {
      Norm<V> second;
      second.set(plan, tile, lane, Table::global(a.second_mean, a.second_rstd, plan, tile), a.second_weight,
                 a.second_bias);
      // x̂ of the first norm; u, which the ReLU takes; x̂ of the second norm
      const auto forward = [&](int p, float(&x_hat)[V], float(&u)[V], float(&v_hat)[V]) {
        normalised(p, x_hat);
        float added[V] = {};
        if (add_shortcut) read<T>(shortcut, type, p * tile.width + lane.channel, added);
#pragma unroll
        for (int j = 0; j < V; ++j) {
          u[j] = first.affine(x_hat[j], j) + added[j];
          v_hat[j] = second.x_hat(relu(u[j]), j);
        }
      };
      Table table = Table::global(means, means + plan.n * plan.groups, plan, tile);
      if (stage == Stage::whole || stage == Stage::second) {
        if (plan.whole) table = Table::shared(scratch.tables, tile);
        take_sums(plan, tile, lane, scratch,
                  {table, a.second_weight, a.second_grad_weight, a.second_grad_bias, a.workspace},
                  [&](int p, float(&g)[V], float(&v_hat)[V]) {
                    float x_hat[V], u[V];
                    forward(p, x_hat, u, v_hat);
                    read<G>(grad, grad_type, p * tile.width + lane.channel, g);
                  });
        if (stage == Stage::second) return;
      }
      float mean[V], slope[V];
      table.get(plan, lane, mean, slope);
      // The gradient of u overwrites the output's gradient in shared memory, each number by the thread that read it.
      table = Table::shared(scratch.tables + 2 * plan.width, tile);
      take_sums(plan, tile, lane, scratch, {table, a.first_weight, a.first_grad_weight, a.first_grad_bias, a.workspace},
                [&](int p, float(&g)[V], float(&x_hat)[V]) {
                  const int at = p * tile.width + lane.channel;
                  float u[V], v_hat[V];
                  forward(p, x_hat, u, v_hat);
                  read<G>(grad, grad_type, at, g);
#pragma unroll
                  for (int j = 0; j < V; ++j) {
                    g[j] = (g[j] * second.weight[j] - mean[j] - v_hat[j] * slope[j]) * second.rstd[j];
                    g[j] = u[j] > 0 ? g[j] : 0;
                  }
                  write<G>(grad, grad_type, at, g);
                  if (a.grad_shortcut) write<G>(a.grad_shortcut, grad_type, start + int64_t(p) * plan.channels, g);
                });
      if (stage == Stage::first) return;
    }
  }
  Table table = Table::global(means, means + plan.n * plan.groups, plan, tile);
  if (stage != Stage::apply && plan.whole) table = Table::shared(scratch.tables + 2 * plan.width, tile);
  if (!two && stage != Stage::apply) {
    take_sums(plan, tile, lane, scratch, {table, a.first_weight, a.first_grad_weight, a.first_grad_bias, a.workspace},
              [&](int p, float(&g)[V], float(&x_hat)[V]) {
                normalised(p, x_hat);
                gradient(p, g, x_hat);
              });
    if (stage == Stage::first) return;
  }
  float mean[V], slope[V];
  table.get(plan, lane, mean, slope);
#pragma unroll 1
  for (int p = lane.begin; p < tile.length; p += lane.rows) {
    float x_hat[V], g[V];
    normalised(p, x_hat);
    gradient(p, g, x_hat);
#pragma unroll
    for (int j = 0; j < V; ++j) g[j] = (g[j] * first.weight[j] - mean[j] - x_hat[j] * slope[j]) * first.rstd[j];
    write<T>(a.grad_y, type, start + int64_t(p) * plan.channels, g);
  }
}

template <typename T, int V, bool RELU>
void launch_backward(const char *name, DType type, const NormPlan &plan, Stage stage, const NormBackward &a,
                     Stream stream) {
  const int threads = threads_for(plan, V);
  int64_t tiles = tile_bytes(plan, type) + tile_bytes(plan, RELU ? type : DType::f32);
  if (a.second_weight && a.shortcut) tiles += tile_bytes(plan, type);
  launch(name, backward<T, V, RELU>, blocks_of(plan), threads, tiles + Scratch::bytes(plan, threads, V), 1, stream,
         plan, type, stage, a, a.workspace + plan.sums());
}

template <bool RELU>
void run_stage(const char *name, DType type, const NormPlan &plan, Stage stage, const NormBackward &a,
               Stream stream) {
  constexpr int V = RELU ? 8 : 4;  // float32 tensors beside 16-bit ones: 16 bytes of the former
  if (!in_words(type, plan, a.y, a.shortcut, a.grad, a.grad_y, a.grad_shortcut))
    launch_backward<Any, 1, RELU>(name, type, plan, stage, a, stream);
  else if (type == DType::f32)
    launch_backward<float, 4, RELU>(name, type, plan, stage, a, stream);
  else if (type == DType::bf16)
    launch_backward<__nv_bfloat16, V, RELU>(name, type, plan, stage, a, stream);
  else
    launch_backward<__half, V, RELU>(name, type, plan, stage, a, stream);
}

template <bool RELU>
void run(const char *name, DType type, const NormPlan &plan, NormBackward a, Stream stream) {
  if (plan.whole) {
    run_stage<RELU>(name, type, plan, Stage::whole, a, stream);
    return;
  }
  const auto finalize = [&](const float *weight, float *grad_weight, float *grad_bias) {
    launch(name, finalize_sums, plan.n * plan.groups, FINALIZE_THREADS, 0, 1, stream, a.workspace, plan.slices,
           plan.channels, plan.groups, plan.positions, weight, grad_weight, grad_bias, a.workspace + plan.sums(),
           a.status);
  };
  if (a.second_weight) {
    run_stage<RELU>(name, type, plan, Stage::second, a, stream);
    finalize(a.second_weight, a.second_grad_weight, a.second_grad_bias);
  }
  run_stage<RELU>(name, type, plan, Stage::first, a, stream);
  finalize(a.first_weight, a.first_grad_weight, a.first_grad_bias);
  // What is left concerns the first norm alone.
  if (a.second_weight) a.grad = a.grad_shortcut, a.second_weight = nullptr;
  run_stage<RELU>(name, type, plan, Stage::apply, a, stream);
}

}  // namespace

void norm_relu_vjp(DType type, const NormPlan &plan, const NormBackward &a, Stream stream) {
  run<true>("norm_relu_vjp", type, plan, a, stream);
}

void norm_tail_vjp(DType type, const NormPlan &plan, const NormBackward &a, Stream stream) {
  run<false>("norm_tail_vjp", type, plan, a, stream);
}

}  // namespace ifr::cuda
