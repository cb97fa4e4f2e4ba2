// Which samples a kernel works at, and with how many threads.
#pragma once
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace ifr::IFR_ISA {

// The samples that have not stopped. status (n), or null: none has.
inline std::vector<int64_t> running_samples(int64_t n, const int64_t *status) {
  std::vector<int64_t> list;
  list.reserve(n);
  for (int64_t i = 0; i < n; ++i)
    if (status == nullptr || status[i] == MAX_ITER) list.push_back(i);
  return list;
}

// All threads or one: OpenMP ends the threads that a smaller team leaves over, and must start them anew for the next.
inline int team(int64_t items, int threads) { return items > 1 ? threads : 1; }

}  // namespace ifr::IFR_ISA
