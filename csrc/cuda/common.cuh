// What every CUDA kernel file shares: loads and stores of 16 bytes, warp and block sums, launches.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "kernels.h"

namespace ifr::cuda {

constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// A number of 8 bits: the upper half of a binary16.
struct E5M2 {
  uint8_t bits;
};
__device__ __forceinline__ float to_float(E5M2 x) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(x.bits << 8)));
}

// The nearest number of 8 bits, ties to even; the largest beyond it. NaN stays.
__device__ __forceinline__ unsigned e5m2_bits(float x) {
  const unsigned bits = __float_as_uint(x), size = bits & 0x7fffffffu;
  const unsigned kept = min(size, 0x47600000u);  // 57344, the largest
  unsigned code = ((kept + 0xfffffu + (kept >> 21 & 1u)) >> 21) - (112u << 2);
  // Below 2^-14 numbers are 2^-16 apart, and so are floats from 128 on.
  if (size < 0x38800000u) code = __float_as_uint(__uint_as_float(size) + 128.0f) - 0x43000000u;
  if (size > 0x7f800000u) code = 0x7f;
  return code | (bits >> 24 & 0x80u);
}

// Two of them; `first` in the lower byte.
__device__ __forceinline__ unsigned e5m2_pair(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
  unsigned short pair;
  asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(second), "f"(first));
  return pair;
#else
  return e5m2_bits(first) | e5m2_bits(second) << 8;
#endif
}

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) { return x; }
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) { return __float2bfloat16_rn(x); }
template <>
__device__ __forceinline__ __half from_float<__half>(float x) { return __float2half_rn(x); }
template <>
__device__ __forceinline__ E5M2 from_float<E5M2>(float x) { return {static_cast<uint8_t>(e5m2_pair(x, 0))}; }

// Two 16-bit numbers to and from a register; the one of the lower address comes first.
template <typename T>
struct Pair;
template <>
struct Pair<__nv_bfloat16> {
  static __device__ __forceinline__ void unpack(unsigned word, float &first, float &second) {
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
  }
  static __device__ __forceinline__ unsigned pack(float first, float second) {
    return __bfloat16_as_ushort(__float2bfloat16_rn(first)) |
           unsigned(__bfloat16_as_ushort(__float2bfloat16_rn(second))) << 16;
  }
};
template <>
struct Pair<__half> {
  static __device__ __forceinline__ void unpack(unsigned word, float &first, float &second) {
    first = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
    second = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
  }
  static __device__ __forceinline__ unsigned pack(float first, float second) {
    return __half_as_ushort(__float2half_rn(first)) | unsigned(__half_as_ushort(__float2half_rn(second))) << 16;
  }
};

// The numbers in 16 bytes of memory.
template <typename T>
__device__ __forceinline__ void unpack(const uint4 &word, float *x) {
  Pair<T>::unpack(word.x, x[0], x[1]);
  Pair<T>::unpack(word.y, x[2], x[3]);
  Pair<T>::unpack(word.z, x[4], x[5]);
  Pair<T>::unpack(word.w, x[6], x[7]);
}
template <>
__device__ __forceinline__ void unpack<float>(const uint4 &word, float *x) {
  x[0] = __uint_as_float(word.x), x[1] = __uint_as_float(word.y);
  x[2] = __uint_as_float(word.z), x[3] = __uint_as_float(word.w);
}

template <typename T>
__device__ __forceinline__ uint4 pack(const float *x) {
  return make_uint4(Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]), Pair<T>::pack(x[4], x[5]),
                    Pair<T>::pack(x[6], x[7]));
}
template <>
__device__ __forceinline__ uint4 pack<float>(const float *x) {
  return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
}

// Four or eight numbers of 8 bits.
__device__ __forceinline__ void unpack_bytes(unsigned word, float *x) {
  Pair<__half>::unpack((word & 0xffu) << 8 | (word & 0xff00u) << 16, x[0], x[1]);
  Pair<__half>::unpack((word >> 8 & 0xff00u) | (word & 0xff000000u), x[2], x[3]);
}
__device__ __forceinline__ void unpack_bytes(const uint2 &words, float *x) {
  unpack_bytes(words.x, x);
  unpack_bytes(words.y, x + 4);
}
__device__ __forceinline__ void pack_bytes(const float *x, unsigned &word) {
  word = e5m2_pair(x[0], x[1]) | e5m2_pair(x[2], x[3]) << 16;
}
__device__ __forceinline__ void pack_bytes(const float *x, uint2 &words) {
  pack_bytes(x, words.x);
  pack_bytes(x + 4, words.y);
}
template <int V>
using Bytes = std::conditional_t<V == 8, uint2, unsigned>;

// V consecutive numbers, as floats. p is aligned to 16 bytes, in which memory is accessed; or V = 1. Numbers of 8 bits
// are accessed V at a time.
template <int V, typename T>
__device__ __forceinline__ void load(const T *p, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = to_float(p[0]);
  } else if constexpr (sizeof(T) == 1) {
    static_assert(V == 4 || V == 8);
    unpack_bytes(*reinterpret_cast<const Bytes<V> *>(p), x);
  } else {
    constexpr int PER_WORD = 16 / sizeof(T);
    static_assert(V % PER_WORD == 0);
#pragma unroll
    for (int i = 0; i < V; i += PER_WORD) unpack<T>(*reinterpret_cast<const uint4 *>(p + i), x + i);
  }
}

// The same, of memory that nobody writes while the kernel runs. The compiler never splits these accesses.
template <int V, typename T>
__device__ __forceinline__ void load_constant(const T *p, float (&x)[V]) {
  if constexpr (V == 1) {
    x[0] = to_float(p[0]);
  } else if constexpr (sizeof(T) == 1) {
    static_assert(V == 4 || V == 8);
    unpack_bytes(__ldg(reinterpret_cast<const Bytes<V> *>(p)), x);
  } else {
    constexpr int PER_WORD = 16 / sizeof(T);
    static_assert(V % PER_WORD == 0);
#pragma unroll
    for (int i = 0; i < V; i += PER_WORD) unpack<T>(__ldg(reinterpret_cast<const uint4 *>(p + i)), x + i);
  }
}

template <int V, typename T>
__device__ __forceinline__ void store(T *p, const float (&x)[V]) {
  if constexpr (V == 1) {
    p[0] = from_float<T>(x[0]);
  } else if constexpr (sizeof(T) == 1) {
    static_assert(V == 4 || V == 8);
    pack_bytes(x, *reinterpret_cast<Bytes<V> *>(p));
  } else {
    constexpr int PER_WORD = 16 / sizeof(T);
    static_assert(V % PER_WORD == 0);
#pragma unroll
    for (int i = 0; i < V; i += PER_WORD) *reinterpret_cast<uint4 *>(p + i) = pack<T>(x + i);
  }
}

// The same for an array whose type is known only when the kernel runs; `index` counts its numbers. All threads take
// the same branch, which costs nothing beside the access; an instantiation for every combination of types would cost
// build time. Numbers of 8 bits are only stored so.
template <int V>
__device__ __forceinline__ void load(const void *p, DType type, int64_t index, float (&x)[V]) {
  if (type == DType::f32)
    load<V>(static_cast<const float *>(p) + index, x);
  else if (type == DType::bf16)
    load<V>(static_cast<const __nv_bfloat16 *>(p) + index, x);
  else
    load<V>(static_cast<const __half *>(p) + index, x);
}

template <int V>
__device__ __forceinline__ void store(void *p, DType type, int64_t index, const float (&x)[V]) {
  if (type == DType::f32)
    store<V>(static_cast<float *>(p) + index, x);
  else if (type == DType::bf16)
    store<V>(static_cast<__nv_bfloat16 *>(p) + index, x);
  else if (type == DType::e5m2)
    store<V>(static_cast<E5M2 *>(p) + index, x);
  else
    store<V>(static_cast<__half *>(p) + index, x);
}

// Every lane gets the sum, formed in one order.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x += __shfl_xor_sync(ALL_LANES, x, offset);
  return x;
}

// The sums over a block of THREADS threads, in every thread. `scratch`: COUNT * THREADS / 32 floats of shared memory,
// free again after the next __syncthreads.
template <int THREADS, int COUNT>
__device__ __forceinline__ void block_sum(float (&x)[COUNT], float *scratch) {
  constexpr int WARPS = THREADS / 32;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = warp_sum(x[i]);
    if (lane == 0) scratch[i * WARPS + warp] = x[i];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < COUNT; ++i) {
    x[i] = 0;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) x[i] += scratch[i * WARPS + w];
  }
}

// The block's dynamic shared memory.
template <typename T>
__device__ __forceinline__ T *dynamic_shared() {
  extern __shared__ uint4 dynamic_shared_memory[];
  return reinterpret_cast<T *>(dynamic_shared_memory);
}

inline void check(cudaError_t status, const char *what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(status));
}

// Starts `blocks` blocks of a kernel; zero blocks are no error. `shared`: bytes of dynamic shared memory. `cluster`:
// blocks per cluster. `name` stands in the message of the exception where the launch fails.
template <typename... Parameters, typename... Arguments>
void launch(const char *name, void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared, int cluster,
            cudaStream_t stream, Arguments... arguments) {
  if (blocks == 0) return;
  if (blocks > INT32_MAX) throw std::runtime_error(std::string(name) + ": more than 2^31 - 1 blocks");
  // A kernel gets 48 KiB without asking, less what it declares itself; no kernel here declares as much as 16 KiB.
  if (shared > 32 * 1024)
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)), name);
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = stream;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = unsigned(cluster);
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  const cudaError_t status = cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
  const cudaError_t last = cudaGetLastError();  // fetched in any case, or the next user of the device would get it
  check(status != cudaSuccess ? status : last, name);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool aligned(const void *p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace ifr::cuda
