// What the GroupNorm chains share. A block of threads takes a tile of one sample, plan.width channels by plan.length
// positions, into shared memory. A thread keeps to V channels there and strides over the positions. A whole tile has
// all positions of its groups, so one launch does everything. Otherwise the tiles' sums meet in global memory, and a
// new launch starts wherever they are needed.
#pragma once
#include <algorithm>
#include <type_traits>

#include "common.cuh"

namespace ifr::cuda {

// Stands for a type that is known only when the kernel runs, whose numbers are taken one by one. It serves tensors
// that accesses of 16 bytes do not divide.
struct Any;

constexpr int MOST_THREADS = 256;  // in a block

// What a launch does: the whole chain, the sums of the first norm or of the second, or what follows the sums.
enum class Stage : int { whole, first, second, apply };

template <typename T>
constexpr int PER_WORD = 16 / sizeof(T);
template <>
constexpr int PER_WORD<Any> = 1;

// V consecutive numbers as floats; `type` is T's. Unlike `load` it can take 8 bytes.
template <typename T, int V>
__device__ __forceinline__ void read(const void *p, DType type, int64_t index, float (&x)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
    load<V>(p, type, index, x);
  } else if constexpr (V * sizeof(T) == 8) {
    const uint2 word = *reinterpret_cast<const uint2 *>(static_cast<const T *>(p) + index);
    Pair<T>::unpack(word.x, x[0], x[1]);
    Pair<T>::unpack(word.y, x[2], x[3]);
  } else {
    load<V>(static_cast<const T *>(p) + index, x);
  }
}

template <typename T, int V>
__device__ __forceinline__ void write(void *p, DType type, int64_t index, const float (&x)[V]) {
  if constexpr (std::is_same_v<T, Any>) {
    store<V>(p, type, index, x);
  } else if constexpr (V * sizeof(T) == 8) {
    const uint2 word = make_uint2(Pair<T>::pack(x[0], x[1]), Pair<T>::pack(x[2], x[3]));
    *reinterpret_cast<uint2 *>(static_cast<T *>(p) + index) = word;
  } else {
    store<V>(static_cast<T *>(p) + index, x);
  }
}

__device__ __forceinline__ float relu(float x) { return x < 0 ? 0 : x; }  // NaN stays

struct Tile {
  int64_t sample, base;  // base: of the tile's first number in an NHWC tensor
  int slice, strip;      // which of the sample's slices of positions and strips of channels
  int channel, width, length, groups;

  __device__ explicit Tile(const NormPlan &plan)
      : sample(int64_t(blockIdx.x) / plan.strips / plan.slices),
        slice(blockIdx.x / plan.strips % plan.slices),
        strip(blockIdx.x % plan.strips),
        channel(strip * plan.width),
        width(min(plan.width, plan.channels - channel)),
        length(min(plan.length, plan.positions - slice * plan.length)),
        groups(width / plan.per_group) {
    base = (sample * plan.positions + int64_t(slice) * plan.length) * plan.channels + channel;
  }
};

// A thread's part of a tile: V channels from `channel` on, at the positions begin, begin + rows, ... Threads left over
// after the last full row have no positions.
template <int V>
struct Lane {
  int rows, row, begin, channel;
  bool active;

  __device__ explicit Lane(const Tile &tile) {
    const int columns = tile.width / V;
    rows = blockDim.x / columns;
    row = threadIdx.x / columns;
    channel = threadIdx.x % columns * V;
    active = row < rows;
    begin = active ? row : tile.length;
  }
};

// The bytes of a full tile, a multiple of 16.
__host__ __device__ __forceinline__ int tile_bytes(const NormPlan &plan, DType type) {
  return (plan.width * plan.length * (type == DType::f32 ? 4 : 2) + 15) / 16 * 16;
}

__device__ __forceinline__ void copy_word(void *shared, const void *global) {
#ifdef __CUDA_ARCH__
  const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#else
  *static_cast<uint4 *>(shared) = *static_cast<const uint4 *>(global);
#endif
}

// Starts to bring a tile of a tensor into shared memory; await_tiles makes all of them visible to the block.
template <typename T>
__device__ __forceinline__ void fetch(void *shared, const void *tensor, DType type, const NormPlan &plan,
                                      const Tile &tile) {
  constexpr int V = PER_WORD<T>;
  const Lane<V> lane(tile);
  for (int p = lane.begin; p < tile.length; p += lane.rows) {
    const int to = p * tile.width + lane.channel;
    const int64_t from = tile.base + int64_t(p) * plan.channels + lane.channel;
    if constexpr (!std::is_same_v<T, Any>) {
      copy_word(static_cast<T *>(shared) + to, static_cast<const T *>(tensor) + from);
    } else if (type == DType::f32) {
      static_cast<uint32_t *>(shared)[to] = static_cast<const uint32_t *>(tensor)[from];
    } else {
      static_cast<uint16_t *>(shared)[to] = static_cast<const uint16_t *>(tensor)[from];
    }
  }
}

__device__ __forceinline__ void await_tiles() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
  __syncthreads();
}

// Asks the second level cache for a tile of float32 numbers, which the block reads later.
__device__ __forceinline__ void prefetch(const float *tensor, const NormPlan &plan, const Tile &tile) {
#ifdef __CUDA_ARCH__
  constexpr int SECTOR = 8;  // numbers that come together
  const int sectors = (tile.width + SECTOR - 1) / SECTOR;
  for (int i = threadIdx.x; i < tile.length * sectors; i += blockDim.x) {
    const float *from = tensor + tile.base + int64_t(i / sectors) * plan.channels + i % sectors * SECTOR;
    asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
  }
#endif
}

// The block's scratch memory behind its tiles, in floats. A thread has two sums for each of `columns` columns.
struct Scratch {
  float *entries, *totals, *tables;  // the threads' sums; 2 a channel; 2 a group and norm

  __device__ Scratch(void *start, const NormPlan &plan, int columns)
      : entries(static_cast<float *>(start)),
        totals(entries + 2 * (int(blockDim.x) * columns + plan.width)),
        tables(totals + 2 * plan.width) {}

  // A column has (rows | 1) entries, so consecutive rows and columns fall into different banks of shared memory.
  static int64_t bytes(const NormPlan &plan, int threads, int columns) {
    return sizeof(float) * (2 * (int64_t(threads) * columns + plan.width) + 6 * int64_t(plan.width));
  }
};

// Two numbers for each group: of the tile's own groups in shared memory, or of all groups in global memory.
struct Table {
  float *a, *b;
  int channel;  // the tile's first channel, counted from the table's first

  static __device__ __forceinline__ Table shared(float *start, const Tile &tile) {
    return {start, start + tile.width, 0};
  }
  static __device__ __forceinline__ Table global(const float *a, const float *b, const NormPlan &plan,
                                                 const Tile &tile) {
    const int64_t at = tile.sample * plan.groups;
    return {const_cast<float *>(a) + at, const_cast<float *>(b) + at, tile.channel};
  }
  template <int V>
  __device__ __forceinline__ void get(const NormPlan &plan, const Lane<V> &lane, float (&x)[V], float (&y)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      const int group = (channel + lane.channel + j) / plan.per_group;
      x[j] = a[group], y[j] = b[group];
    }
  }
};

// Can the tensors of one launch be accessed 16 bytes at a time?
template <typename... Pointers>
inline bool in_words(DType type, const NormPlan &plan, Pointers... pointers) {
  const int word = type == DType::f32 ? 4 : 8;
  return plan.channels % word == 0 && plan.width % word == 0 && (aligned(pointers) && ...);
}

// The threads of a block: at least one for each column of the tile.
inline int threads_for(const NormPlan &plan, int v) {
  return int(std::max<int64_t>(plan.threads, ceil_div(plan.width / v, 32) * 32));
}

inline int64_t blocks_of(const NormPlan &plan) { return plan.n * plan.slices * plan.strips; }

}  // namespace ifr::cuda
