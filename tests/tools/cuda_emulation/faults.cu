// Kernels with one fault each, which the emulation must find, and one that is right.
#include <cooperative_groups.h>

#include "cuda/common.cuh"

namespace ifr::cuda {
namespace {

// The sum of 0 .. 127 by way of everything a block has; out[block] = that of the neighbour in the cluster.
__global__ void fine(float *out) {
  __shared__ float scratch[4], total;
  float sum[1] = {float(threadIdx.x)};
  block_sum<128>(sum, scratch);
  if (threadIdx.x == 0) total = sum[0] + blockIdx.x;
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  if (threadIdx.x == 0) out[blockIdx.x] = *cluster.map_shared_rank(&total, (cluster.block_rank() + 1) % 2);
  cluster.sync();
}

__global__ void exits_before_the_barrier(float *) {
  if (threadIdx.x != 77) __syncthreads();
}

__global__ void lanes_meet_in_different_calls(float *) {
  if (threadIdx.x % 2)
    __syncwarp();
  else
    __shfl_xor_sync(ALL_LANES, 1.0f, 1);
}

__global__ void lane_is_missing(float *) {
  if (threadIdx.x % 32 != 5) __syncwarp();
}

__global__ void writes_past_shared_memory(float *) { dynamic_shared<float>()[threadIdx.x] = 1; }

__global__ void reads_shared_memory_of_a_block_that_left(float *out) {
  __shared__ float own;
  own = 1;
  const auto cluster = cooperative_groups::this_cluster();
  cluster.sync();
  if (cluster.block_rank() == 0) return;
  __syncthreads();
  out[blockIdx.x] = *cluster.map_shared_rank(&own, 0);
}

__global__ void reads_before_the_barrier(float *out) {
  __shared__ float values[128];
  values[threadIdx.x] = 1;
  out[blockIdx.x * 128 + threadIdx.x] = values[127 - threadIdx.x];
}

}  // namespace

void run_fault(const std::string &name, float *out, Stream stream) {
#define KERNEL(kernel, bytes) \
  if (name == #kernel) return launch(#kernel, kernel, 4, 128, bytes, 2, stream, out)
  KERNEL(fine, 0);
  KERNEL(exits_before_the_barrier, 0);
  KERNEL(lanes_meet_in_different_calls, 0);
  KERNEL(lane_is_missing, 0);
  KERNEL(writes_past_shared_memory, 4 * 127);
  KERNEL(reads_shared_memory_of_a_block_that_left, 0);
  KERNEL(reads_before_the_barrier, 0);
#undef KERNEL
  throw std::invalid_argument(name);
}

}  // namespace ifr::cuda
