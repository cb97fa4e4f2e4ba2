"""The CUDA kernels (csrc/cuda), for float32, bfloat16 and float16 on NVIDIA GPUs: `eager`'s functions, NHWC.

Convolutions are cuDNN's. A sample's sums are formed in an order that its size alone decides. As Triton's, the kernels
are launched on the current device, which callers make the tensors'.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _native
from . import cuda_norm
from .contract import DIVERGENCE, Step, address, check_step, describe, optional, ridge
from .cuda_norm import (
    DTYPES,
    norm_relu,
    norm_relu_vjp,
    norm_tail,
    norm_tail_vjp,
    residual_tail,
)
from .eager import convolution
from .gpu import STATE, DeviceState, Tail, Total, shift, tail, total

__all__ = [
    "CHANNELS_LAST_ONLY", "combine", "convolution", "cuda_norm", "finish", "gram_row", "new_state", "norm_relu",
    "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "residual", "rule", "shift", "step", "tail", "total",
]  # fmt: skip

CHANNELS_LAST_ONLY = True

new_state = DeviceState


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def one_kernel(size: int, rows: int, window: int, history: torch.dtype, capability: tuple[int, int]) -> bool:
    """Is a step taken by one kernel, a cluster of blocks a sample, rather than by three?

    That needs a Hopper GPU, whose clusters' shared memory holds the window of a sample's history, and a sample that
    gives eight blocks enough to do. Estimated, not measured.
    """
    fits = _native.cuda.fits_cluster(size, rows, window, DTYPES[history])
    return capability == (9, 0) and size >= 16384 and fits


def step(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """f: (n, …) float32 laid out as z, or a pending result."""
    residual(state, f, z, step)
    if step.last:
        rule(state, z, step)
    elif one_kernel(state.size, state.rows, step.window, state.history.dtype, _capability(z.device)):
        _native.cuda.cluster_step(_solver(state, z, step), cuda_norm.current_stream(z.device))
    else:
        gram_row(state, z, step)
        rule(state, z, step)
        combine(state, z, step)


def residual(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """g = f - z into the history, but not in the last step, and the parts of ‖g‖² and ‖f‖² into norm_partials."""
    if isinstance(f, Tail):
        residual_tail(state, f, z, row=step.row(state))
        return
    state.reserve_norms(_native.cuda.splits(state.size))
    addends = [_laid_out(a, "f", z) for a in (f.addends if isinstance(f, Total) else (f,))]
    _native.cuda.residual(
        _solver(state, z, step), [_typed(a, "f", z) for a in addends], cuda_norm.current_stream(z.device)
    )


def gram_row(state: DeviceState, z: Tensor, step: Step) -> None:
    """The parts of the stored residual's inner products with the window's rows, into gram_partials."""
    _native.cuda.gram_row(_solver(state, z, step), cuda_norm.current_stream(z.device))


def rule(state: DeviceState, z: Tensor, step: Step) -> None:
    """Finishes the sums, judges the running samples (eager.assess) and, but in the last step, chooses their steps."""
    _native.cuda.rule(_solver(state, z, step), cuda_norm.current_stream(z.device))


def combine(state: DeviceState, z: Tensor, step: Step) -> None:
    """z of the running samples by its coefficients over the rows so far, and z + X for the next evaluation."""
    _native.cuda.combine(_solver(state, z, step), cuda_norm.current_stream(z.device))


def finish(state: DeviceState, z: Tensor) -> None:
    """state.value, the best iterate; z takes it where the history's coefficients give it."""
    _native.cuda.finish(_solver(state, z, Step("picard", 1, 1, True, 0.0)), cuda_norm.current_stream(z.device))


def _solver(state: DeviceState, z: Tensor, step: Step) -> _native.cuda.Solver:
    value, start, history, *algebra, residual, trace, status, iterations, improved = state.addresses(STATE)
    check_step(state, step)
    if state.gram_partials is None:
        shape = state.n, _native.cuda.splits(state.size), state.rows
        state.gram_partials = torch.empty(shape, dtype=torch.float32, device=state.device)
    if state.injection is not None and (laid_out := _laid_out(state.injection, "injection", z)) is not state.injection:
        state.injection = laid_out
    parts = 0 if state.norm_partials is None else state.norm_partials.shape[1]
    sums = {"norm_partials": 2 * parts, "gram_partials": _native.cuda.splits(state.size) * state.rows}
    norm_sums, gram_sums = (
        optional(getattr(state, name), f"state.{name}", torch.float32, state.n * count, state.device)
        for name, count in sums.items()
    )
    trace += step.evaluation * state.n * torch.float32.itemsize
    previous = trace - state.n * torch.float32.itemsize if step.evaluation else 0
    return _native.cuda.Solver(
        getattr(_native.cuda.Method, step.method), state.n, state.size, state.rows, step.row(state), step.window,
        step.evaluation, step.rtol, DIVERGENCE, ridge(state.gram.dtype), step.affine,
        address(z, "z", torch.float32, state.n * state.size, state.device),
        value, start, *_typed(state.injection, "injection", z), *_typed(state.r, "state.r", z), history,
        DTYPES[state.history.dtype], *algebra, residual, trace, previous, status, iterations, improved,
        norm_sums, parts, gram_sums,
    )  # fmt: skip


def _typed(tensor: Tensor | None, name: str, z: Tensor) -> tuple[int, _native.cuda.DType]:
    """The address of an array like z, and its numbers' type."""
    if tensor is None:
        return 0, DTYPES[torch.float32]
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} is {describe(tensor)}: expected {', '.join(map(str, DTYPES))}")
    return address(tensor, name, tensor.dtype, z.numel(), z.device), DTYPES[tensor.dtype]


def _laid_out(tensor: Tensor, name: str, z: Tensor) -> Tensor:
    """tensor with z's memory layout, from an address that 16 divides: a convolution, autograd or a caller may hand over
    another one."""
    if tensor.shape != z.shape or tensor.device != z.device:
        raise ValueError(f"{name} is {describe(tensor)}: expected z's shape {tuple(z.shape)} on {z.device}")
    if tensor.stride() == z.stride() and tensor.data_ptr() % 16 == 0:
        return tensor
    return torch.empty_like(z, dtype=tensor.dtype).copy_(tensor)
