// Clusters of blocks, as far as kernels use them.
#pragma once
#include "cuda_runtime.h"

namespace cooperative_groups {

struct cluster_group {
  void sync() const { barrier_arrive(), barrier_wait(); }
  void barrier_arrive() const { emulation::cluster_arrive(); }
  void barrier_wait() const { emulation::cluster_wait(); }
  unsigned block_rank() const { return emulation::cluster_rank(); }
  unsigned num_blocks() const { return emulation::cluster_size(); }
  template <typename T>
  T *map_shared_rank(T *address, int rank) const {
    return static_cast<T *>(emulation::in_block(address, rank));
  }
};

inline cluster_group this_cluster() { return {}; }

}  // namespace cooperative_groups
