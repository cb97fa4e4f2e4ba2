// As much of CUDA's driver as Triton's launcher calls. A launch notes its grid, stream, kernel and parameters.
#include <cuda.h>
#include <stdint.h>

static uint64_t noted[64];
static int count, launches;

void expect(int parameters) { count = parameters; }
int launched(void) { return launches; }
uint64_t note(int index) { return noted[index]; }

CUresult cuLaunchKernelEx(const CUlaunchConfig *config, CUfunction kernel, void **parameters, void **extra) {
    uint64_t *to = noted;
    for (int i = 0; i < count; i++) *to++ = *(uint64_t *)parameters[i];  // 4 bytes of some: the caller knows of which
    *to++ = config->gridDimX;
    *to++ = config->gridDimY;
    *to++ = config->gridDimZ;
    *to++ = config->blockDimX;
    *to++ = config->sharedMemBytes;
    *to++ = config->numAttrs;
    *to++ = (uintptr_t)config->hStream;
    *to++ = (uintptr_t)kernel;
    launches++;
    return CUDA_SUCCESS;
}

CUresult cuPointerGetAttribute(void *data, CUpointer_attribute attribute, CUdeviceptr pointer) {
    *(CUdeviceptr *)data = pointer;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext *context) {
    *context = (CUcontext)1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorString(CUresult result, const char **text) {
    *text = "an error";
    return CUDA_SUCCESS;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { return CUDA_SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) { return CUDA_SUCCESS; }
CUresult cuCtxSetCurrent(CUcontext context) { return CUDA_SUCCESS; }
CUresult cuFuncSetAttribute(CUfunction kernel, CUfunction_attribute attribute, int value) { return CUDA_SUCCESS; }
