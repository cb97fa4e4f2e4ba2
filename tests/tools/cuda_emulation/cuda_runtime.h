// CUDA on the CPU, for tests: with this folder first on the include path g++ compiles csrc/cuda/*.cu unchanged
// (g++ -xc++ -std=c++17 -fno-extern-tls-init -I tests/tools/cuda_emulation -I csrc -fPIC), and a launch has run when it returns.
// Threads are fibers: each runs until it waits (barrier, shuffle, vote, cluster barrier). Blocks run one after another,
// those of a cluster together; every second block runs its threads in reverse, every second cluster its blocks, so that a
// missing barrier shows. A launch fails, and cudaGetErrorString says why, where threads wait for ever or exit before the
// others' barrier, lanes meet in different calls, or shared memory is too large or written past its end.
// Shared memory starts as NaN. __shared__ means thread_local: all of this library's thread-local memory is the running
// block's shared memory, exchanged when another block of the cluster runs. So kernels start with cudaLaunchKernelEx,
// dynamic shared memory is ifr::cuda::dynamic_shared<T>(), and a pybind11 module, which has thread-locals of its own, is a
// library apart. There are no atomics, streams or textures: add here what a kernel comes to need.
#pragma once
#include <math.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)
#define __shared__ thread_local

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <typename To, typename From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}
inline unsigned __float_as_uint(float x) { return bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return bit_cast<float>(x); }
inline int __float_as_int(float x) { return bit_cast<int>(x); }
inline float __int_as_float(int x) { return bit_cast<float>(x); }
inline float rsqrtf(float x) { return 1 / sqrtf(x); }
template <typename T>
T __ldg(const T *p) {
  return *p;
}
template <typename T>
T __ldcs(const T *p) {
  return *p;
}
template <typename T>
void __stcs(T *p, T value) {
  *p = value;
}
using std::max;
using std::min;

namespace emulation {
void block_barrier();
void cluster_arrive();
void cluster_wait();
unsigned cluster_rank();
unsigned cluster_size();
void *in_block(void *shared, unsigned rank);  // the same place in the shared memory of another block of the cluster
unsigned lane();
// All lanes of the mask meet in a call of the same name; each gives a value and gets all 32, all ones for those outside.
void meet(unsigned mask, const char *call, uint64_t value, uint64_t (&values)[32]);

template <typename T>
T shuffle(unsigned mask, const char *call, T value, unsigned source) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0, values[32];
  std::memcpy(&bits, &value, sizeof(T));
  meet(mask, call, bits, values);
  std::memcpy(&value, &values[source], sizeof(T));
  return value;
}
}  // namespace emulation

inline void __syncthreads() { emulation::block_barrier(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  uint64_t values[32];
  emulation::meet(mask, "__syncwarp", 0, values);
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const unsigned base = emulation::lane() & ~(width - 1u);
  return emulation::shuffle(mask, "__shfl_sync", value, base + (source & (width - 1)));
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane ^ bits;
  return emulation::shuffle(mask, "__shfl_xor_sync", value, source / width > lane / width ? lane : source);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane(), source = lane + delta;
  return emulation::shuffle(mask, "__shfl_down_sync", value, source / width != lane / width ? lane : source);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32) {
  const unsigned lane = emulation::lane();
  return emulation::shuffle(mask, "__shfl_up_sync", value, lane % width < delta ? lane : lane - delta);
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
  uint64_t values[32];
  emulation::meet(mask, "__ballot_sync", predicate != 0, values);
  unsigned bits = 0;
  for (int i = 0; i < 32; ++i) bits |= (mask >> i & 1u & unsigned(values[i])) << i;
  return bits;
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaLaunchAttributeID { cudaLaunchAttributeIgnore, cudaLaunchAttributeClusterDimension };
using cudaStream_t = struct CUstream_st *;
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    dim3 clusterDim;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute *attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulation {
cudaError_t allow_shared(const void *kernel, size_t bytes);
cudaError_t run(const cudaLaunchConfig_t &config, const void *kernel, const std::function<void()> &thread);
}  // namespace emulation

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int bytes) {
  return emulation::allow_shared(reinterpret_cast<const void *>(kernel), bytes);
}
template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Parameters...), Arguments... arguments) {
  return emulation::run(*config, reinterpret_cast<const void *>(kernel), [=] { kernel(arguments...); });
}
cudaError_t cudaGetLastError();
const char *cudaGetErrorString(cudaError_t);
