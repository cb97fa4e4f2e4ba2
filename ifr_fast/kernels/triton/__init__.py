"""The Triton kernels, for float32, bfloat16 and float16 on NVIDIA GPUs, in NHWC; `eager` is their specification.

The convolutions are cuDNN's.
"""

from ..eager import BUFFERS, convolution
from ..gpu import DeviceState as new_state
from ..gpu import shift, tail, total
from .norm import norm_relu, norm_tail
from .norm_vjp import norm_relu_vjp, norm_tail_vjp
from .solver import combine, finish, gram_row, residual, rule, step

__all__ = [
    "BUFFERS", "CHANNELS_LAST_ONLY", "SKIPS_STOPPED", "combine", "convolution", "finish", "gram_row", "new_state",
    "norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "residual", "rule", "shift", "step", "tail", "total",
]  # fmt: skip

CHANNELS_LAST_ONLY = True
SKIPS_STOPPED = False  # cuDNN convolves them all
