"""The CUDA kernels (csrc/cuda), for float32, bfloat16 and float16 on NVIDIA GPUs: `plain`'s functions, NHWC.

Convolutions are cuDNN's. A sample's sums are formed in an order that its size alone decides.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch
from torch import Tensor

from .. import _native
from . import cuda_norm, ridge
from .device import DeviceState, Tail, Total, shift, tail, total
from .plain import convolution, wide

__all__ = [
    "convolution", "finish", "new_state", "norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "shift", "step",
    "tail", "total", "wide",
]  # fmt: skip

CHANNELS_LAST_ONLY = True

new_state = DeviceState


def _guard(device: torch.device) -> torch.cuda.device:
    """Kernels are launched on the current device: makes `device` that."""
    return torch.cuda.device(device)


def _stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


@cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _on_device(function: Callable) -> Callable:
    """The function, whose first argument is a tensor, on that tensor's device."""

    @wraps(function)
    def guarded(first: Tensor, *args, **kwargs):
        with _guard(first.device):
            return function(first, *args, **kwargs)

    return guarded


norm_relu = _on_device(cuda_norm.norm_relu)
norm_relu_vjp = _on_device(cuda_norm.norm_relu_vjp)
norm_tail = _on_device(cuda_norm.norm_tail)
norm_tail_vjp = _on_device(cuda_norm.norm_tail_vjp)


def one_kernel(size: int, rows: int, window: int, history: torch.dtype, capability: tuple[int, int]) -> bool:
    """Is a step taken by one kernel, a cluster of blocks a sample, rather than by three?

    That needs a Hopper GPU, whose clusters' shared memory holds the window of a sample's history, and a sample that
    gives eight blocks enough to do. Estimated, not measured.
    """
    fits = _native.cuda.fits_cluster(size, rows, window, cuda_norm.DTYPES[history])
    return capability == (9, 0) and size >= 16384 and fits


def step(
    state: DeviceState,
    f: Tensor | Tail | Total,
    z: Tensor,
    *,
    method: str,
    window: int,
    evaluation: int,
    last: bool,
    rtol: float,
    divergence: float,
) -> None:
    """plain.step without its result. f: (n, …) float32 laid out as z, or a pending result."""
    row = -1 if last else evaluation % state.rows
    kernels = _native.cuda
    with _guard(z.device):
        if isinstance(f, Tail):
            cuda_norm.residual_tail(state, f, z, row=row)
        else:
            splits = kernels.splits(state.size)
            if state.norm_partials is None or state.norm_partials.shape[1] != splits:
                state.norm_partials = torch.empty(state.n, splits, 2, device=z.device)
        if state.gram_partials is None:
            state.gram_partials = torch.empty(state.n, kernels.splits(state.size), state.rows, device=z.device)
        injection = None if state.injection is None else _laid_out(state.injection, z)
        solver = _solver(state, z, injection, method, row, window, evaluation, rtol, divergence)
        stream = _stream(z.device)
        if not isinstance(f, Tail):
            addends = [_laid_out(a, z) for a in (f.addends if isinstance(f, Total) else (f,))]
            kernels.residual(solver, [(a.data_ptr(), cuda_norm.DTYPES[a.dtype]) for a in addends], stream)
        if last:
            kernels.rule(solver, stream)
        elif one_kernel(state.size, state.rows, window, state.history.dtype, _capability(z.device)):
            kernels.cluster_step(solver, stream)
        else:
            kernels.gram_row(solver, stream)
            kernels.rule(solver, stream)
            kernels.combine(solver, stream)


def finish(state: DeviceState, z: Tensor) -> None:
    """state.value, the best iterate; z takes it where the history's coefficients give it."""
    with _guard(z.device):
        _native.cuda.finish(_solver(state, z, None, "picard", -1, 1, 1, 0.0, 0.0), _stream(z.device))


def _solver(
    state: DeviceState,
    z: Tensor,
    injection: Tensor | None,
    method: str,
    row: int,
    window: int,
    evaluation: int,
    rtol: float,
    divergence: float,
) -> _native.cuda.Solver:
    def at(tensor: Tensor | None) -> int:
        return 0 if tensor is None else tensor.data_ptr()

    def dtype(tensor: Tensor | None) -> _native.cuda.DType:
        return cuda_norm.DTYPES[torch.float32 if tensor is None else tensor.dtype]

    return _native.cuda.Solver(
        getattr(_native.cuda.Method, method), state.n, state.size, state.rows, row, window, evaluation, rtol,
        divergence, ridge(state.gram.dtype), at(z), at(state.value), at(state.start), at(injection), dtype(injection),
        at(state.r), dtype(state.r), at(state.history), dtype(state.history), at(state.gram), at(state.p), at(state.q),
        at(state.step), at(state.total), at(state.best), at(state.norms), at(state.residual),
        at(state.trace[evaluation]), at(state.trace[evaluation - 1]) if evaluation else 0, at(state.status),
        at(state.iterations), at(state.improved), at(state.norm_partials),
        0 if state.norm_partials is None else state.norm_partials.shape[1], at(state.gram_partials),
    )  # fmt: skip


def _laid_out(tensor: Tensor, z: Tensor) -> Tensor:
    """tensor with z's memory layout, from an address that 16 divides: a convolution, autograd or a caller may hand over
    another one."""
    if tensor.stride() == z.stride() and tensor.data_ptr() % 16 == 0:
        return tensor
    return torch.empty_like(z, dtype=tensor.dtype).copy_(tensor)
