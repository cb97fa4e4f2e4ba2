"""The solver's step by the CUDA kernels (csrc/cuda/solver.cu): its launches, one by one and together; and `finish`."""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..contract import DIVERGENCE, Step, address, check_step, describe, optional, ridge
from ..gpu import STATE, DeviceState, Tail, Total
from . import device
from .device import DTYPES, HISTORIES
from .norms import residual_tail


def one_kernel(size: int, rows: int, window: int, history: torch.dtype, capability: tuple[int, int]) -> bool:
    """Is a step taken by one kernel, a cluster of blocks a sample, rather than by three?

    That needs a Hopper GPU, whose clusters' shared memory holds the window of a sample's history, and a sample that
    gives eight blocks enough to do. Estimated, not measured.
    """
    fits = _native.cuda.fits_cluster(size=size, rows=rows, window=window, history_type=HISTORIES[history])
    return capability == (9, 0) and size >= 16384 and fits


def step(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """f: (n, …) float32 laid out as z, or a pending result."""
    solver = _residual(state, f, z, step)
    stream, kernels = device.stream(z.device), _native.cuda
    if step.last:
        kernels.rule(solver, stream)
    elif one_kernel(state.size, state.rows, step.window, state.history.dtype, device.capability(z.device)):
        kernels.cluster_step(solver, stream)
    else:
        kernels.gram_row(solver, stream)
        kernels.rule(solver, stream)
        kernels.combine(solver, stream)


def residual(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """g = f - z into the history, but not in the last step, and the parts of ‖g‖² and ‖f‖² into norm_partials."""
    _residual(state, f, z, step)


def gram_row(state: DeviceState, z: Tensor, step: Step) -> None:
    """The parts of the stored residual's inner products with the window's rows, into gram_partials."""
    _native.cuda.gram_row(_solver(state, z, step), device.stream(z.device))


def rule(state: DeviceState, z: Tensor, step: Step) -> None:
    """Finishes the sums, judges the running samples (eager.assess) and, but in the last step, chooses their steps."""
    _native.cuda.rule(_solver(state, z, step), device.stream(z.device))


def combine(state: DeviceState, z: Tensor, step: Step) -> None:
    """z of the running samples by its coefficients over the rows so far, and z + X for the next evaluation."""
    _native.cuda.combine(_solver(state, z, step), device.stream(z.device))


def finish(state: DeviceState, z: Tensor) -> None:
    """state.value, the best iterate; z takes it where the history's coefficients give it."""
    _native.cuda.finish(_solver(state, z, Step("picard", 1, 1, True, 0.0)), device.stream(z.device))


def _residual(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> _native.cuda.Solver:
    """Launches residual's kernel, and returns what the step's other kernels are told."""
    if state.scales is not None and step.evaluation == 0 and not step.last:
        # The first row has none before it to take its scale from.
        norms_alone = _residual(state, f, z, step._replace(last=True))
        _native.cuda.first_scale(norms_alone, device.stream(z.device))
    if isinstance(f, Tail):
        residual_tail(state, f, z, row=step.row(state))
        return _solver(state, z, step)
    state.reserve_norms(_native.cuda.splits(state.size))
    solver = _solver(state, z, step)
    addends = [_laid_out(a, "f", z) for a in (f.addends if isinstance(f, Total) else (f,))]
    _native.cuda.residual(solver, [_typed(a, "f", z) for a in addends], device.stream(z.device))
    return solver


def _solver(state: DeviceState, z: Tensor, step: Step) -> _native.cuda.Solver:
    """What every kernel of the step is told: fields of csrc/cuda/kernels.h by name."""
    places = dict(zip(STATE, state.addresses(STATE), strict=True))
    check_step(state, step)
    n, size, rows = state.n, state.size, state.rows
    splits, parts = _native.cuda.splits(size), 0 if state.norm_partials is None else state.norm_partials.shape[1]
    if state.gram_partials is None:
        state.gram_partials = torch.empty(n, splits, rows, dtype=torch.float32, device=state.device)
    if state.injection is not None and (x := _laid_out(state.injection, "injection", z)) is not state.injection:
        state.injection = x
    injection, injection_type = _typed(state.injection, "injection", z)
    r, r_type = _typed(state.r, "state.r", z)
    evaluation = n * torch.float32.itemsize  # bytes of the trace
    places["trace"] += step.evaluation * evaluation
    for name, count in (("norm_partials", parts * 2), ("gram_partials", splits * rows)):
        places[name] = optional(getattr(state, name), f"state.{name}", torch.float32, n * count, state.device)
    return _native.cuda.Solver({
        "method": getattr(_native.Method, step.method), "history_type": HISTORIES[state.history.dtype],
        "injection_type": injection_type, "r_type": r_type, "n": n, "size": size, "rows": rows,
        "row": step.row(state), "window": step.window, "evaluation": step.evaluation, "rtol": step.rtol,
        "divergence": DIVERGENCE, "ridge": ridge(state.gram.dtype), "affine": step.affine,
        "z": address(z, "z", torch.float32, n * size, state.device), "injection": injection, "r": r, **places,
        "previous": places["trace"] - (evaluation if step.evaluation else 0), "parts": parts,
    })  # fmt: skip


def _typed(tensor: Tensor | None, name: str, z: Tensor) -> tuple[int, _native.DType]:
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
