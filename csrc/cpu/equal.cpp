// Comparing memory, by which weight_cache.py finds out whether weights have changed.
#include <algorithm>
#include <cstring>

#include "kernels.h"

namespace ifr::IFR_ISA {

bool equal(const Pair &p) {
  constexpr int64_t PIECE = 1 << 14;
  bool same = true;
#pragma omp parallel for schedule(static) num_threads(p.threads) reduction(&& : same)
  for (int64_t at = 0; at < p.count; at += PIECE)
    same = same && std::memcmp(p.a + at, p.b + at, std::min(PIECE, p.count - at) * sizeof(float)) == 0;
  return same;
}

}  // namespace ifr::IFR_ISA
