// The emulated kernels for Python, by the package's own bindings, and those that have faults.
#include <string>

#include "cuda/bindings.h"

namespace ifr::cuda {
void run_fault(const std::string &name, float *out, Stream);
}

PYBIND11_MODULE(emulated_kernels, m) {
  ifr::cuda::bind(m);
  m.def("run_fault", [](const std::string &name, ifr::cuda::Address out) {
    ifr::cuda::run_fault(name, reinterpret_cast<float *>(out), nullptr);
  });
}
