"""The CUDA kernels (csrc/cuda), for float32, bfloat16 and float16 on NVIDIA GPUs, NHWC; `eager` is their specification.

Convolutions are cuDNN's. The size of a sample alone decides in which order its sums are formed. As Triton's, the
kernels are launched on the current device, which callers make the tensors'.
"""

from ..eager import BUFFERS, convolution
from ..gpu import DeviceState as new_state
from ..gpu import shift, tail, total
from .norms import norm_relu, norm_relu_vjp, norm_tail, norm_tail_vjp
from .solver import combine, finish, gram_row, residual, rule, step

__all__ = [
    "BUFFERS", "CHANNELS_LAST_ONLY", "SKIPS_STOPPED", "combine", "convolution", "finish", "gram_row", "new_state",
    "norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "residual", "rule", "shift", "step", "tail", "total",
]  # fmt: skip

CHANNELS_LAST_ONLY = True
SKIPS_STOPPED = False  # cuDNN convolves them all
