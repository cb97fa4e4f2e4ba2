// A CUDA runtime that launches nothing and writes down what it was asked to launch, and csrc/cuda's bindings on top of
// it. So the host code chooses blocks, threads and shared memory as it does on a GPU, and none is needed.
#include <cuda_runtime.h>

#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/bindings.h"

namespace {

std::map<const void *, std::string> &kernels() {
  static std::map<const void *, std::string> found;
  return found;
}

// The kernel's name in the cubin, its blocks, threads a block, bytes of dynamic shared memory.
std::vector<std::tuple<std::string, int64_t, int, size_t>> launches;

}  // namespace

// nvcc's objects call these when they are loaded, and where they launch.
extern "C" {
void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterFunction(void **, const char *host, char *, const char *device, int, uint3 *, uint3 *, dim3 *,
                            dim3 *, int *) {
  kernels()[host] = device;
}
cudaError_t __cudaGetKernel(cudaKernel_t *, const void *) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void **, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, CUstream_st *) { return 1; }
cudaError_t __cudaPopCallConfiguration(dim3 *, dim3 *, size_t *, void *) { return cudaErrorNotSupported; }

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *config, const void *function, void **) {
  const dim3 grid = config->gridDim, block = config->blockDim;
  launches.emplace_back(kernels().at(function), int64_t(grid.x) * grid.y * grid.z, int(block.x * block.y * block.z),
                        config->dynamicSmemBytes);
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaGetLastError() { return cudaSuccess; }
const char *cudaGetErrorString(cudaError_t) { return "not launched"; }
}

PYBIND11_MODULE(recorded_kernels, m) {
  ifr::cuda::bind(m);
  m.def("take_launches", [] { return std::exchange(launches, {}); });
}
