"""The Triton kernels, for float32, bfloat16 and float16 on NVIDIA GPUs: `eager`'s functions, NHWC."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import eager
from ..contract import Convolution, wide
from ..gpu import DeviceState, shift, tail, total
from .conv import chip, implicit_gemm
from .norm import norm_relu, norm_tail
from .norm_vjp import norm_relu_vjp, norm_tail_vjp
from .solver import finish, step

__all__ = [
    "convolution", "finish", "new_state", "norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "shift", "step",
    "tail", "total", "wide",
]  # fmt: skip

CHANNELS_LAST_ONLY = True
# (compute capability's major, dtype) where the implicit GEMM was measured to beat cuDNN: nothing has been measured yet.
IMPLICIT_GEMM: set[tuple[int, torch.dtype]] = set()
# From so many positions on a norm reads its input in pieces, and is glad of sums that the convolution made.
LARGE_MAP = 1024

new_state = DeviceState


def convolution(weight: Tensor, x: Tensor) -> Convolution:
    """cuDNN's by way of torch, or the implicit GEMM where that is faster."""
    if (chip(weight.device).major, weight.dtype) not in IMPLICIT_GEMM:
        return eager.convolution(weight, x)
    return implicit_gemm(weight, x, statistics=x.shape[2] * x.shape[3] > LARGE_MAP)
