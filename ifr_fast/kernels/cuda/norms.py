"""The CUDA kernels of the GroupNorm chains (csrc/cuda/norm*.cu), for NHWC activations.

ValueError for tensors that do not fit each other. A sample's shape and the GPU alone decide how it is cut into tiles,
and sums are formed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _native
from ..contract import EPS, Norm, address, describe, optional
from ..fields import GRADS, STATISTICS, given, made, new_statistics, parameters
from ..gpu import DeviceState, Tail, activation, like, status_of
from . import device
from .device import DTYPES, HISTORIES

TILE = 8192  # the elements that a block of threads is meant to hold
MOST_WHOLE = 32768  # the most, where these are all positions of whole groups
MOST_THREADS = 256  # in a block: as csrc/cuda/norm.cuh
BLOCKS = 3  # that shall share a multiprocessor, so that some load while others compute
RESERVED = 1024  # bytes of shared memory that a multiprocessor keeps for each block
# The fields of a result that is stored, and not turned into the solver's residual.
STORED = {
    "z": 0, "history": 0, "history_type": DTYPES[torch.float32], "history_stride": 0, "next_scale": 0, "norms": 0,
}  # fmt: skip


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = activation(y, norm.groups)
    out = y if consume else torch.empty_like(y)
    ending = {"out": out.data_ptr(), **STORED}
    return out, _forward(_native.cuda.norm_relu, Tail(y, None, norm, None), state, ending)


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = activation(y, norm.groups)
    grad, tail = like(grad, "grad", y, y.dtype), Tail(y, None, norm, None)
    status = 0 if params else _status(y, state)
    grad_y, _, grads = _vjp(_native.cuda.norm_relu_vjp, grad, tail, statistics, params, status)
    return grad_y, grads


def norm_tail(
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    *,
    consume: bool = False,
    state: DeviceState | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y = activation(y, first.groups)
    out = y if consume and y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    ending = {"out": out.data_ptr(), **STORED}
    return out, _forward(_native.cuda.norm_tail, Tail(y, shortcut, first, second), state, ending)


def norm_tail_vjp(
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    *,
    params: bool,
    state: DeviceState | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    y = activation(y, first.groups)
    grad = like(grad, "grad", y, torch.float32)
    shortcut = None if shortcut is None else like(shortcut, "shortcut", y, y.dtype)
    status = 0 if params else _status(y, state)
    return _vjp(_native.cuda.norm_tail_vjp, grad, Tail(y, shortcut, first, second), statistics, params, status)


def residual_tail(state: DeviceState, tail: Tail, z: Tensor, *, row: int) -> None:
    """g = F(z) - z, where `tail` is F's end, of the running samples: stored as the history's row `row` (row < 0: not
    stored), with partial sums of g² and F(z)² in state.norm_partials. z (n, C, H, W): float32 NHWC."""
    y = activation(tail.y, tail.first.groups)
    if z.shape != y.shape or not z.is_contiguous(memory_format=torch.channels_last) or row >= state.rows:
        raise ValueError(
            f"z is {describe(z)}: expected y's shape {tuple(y.shape)} in channels_last, row={row} a history's"
        )
    blocks = _forward_plan(y, tail.shortcut, tail.first.groups).blocks
    norms = state.reserve_norms(blocks)
    (history, next_scale), dtype = state.addresses(("history", "next_scale")), state.history.dtype
    ending = {
        "out": 0,
        "z": address(z, "z", torch.float32, state.n * state.size, y.device),
        "history": 0 if row < 0 else history + row * state.size * dtype.itemsize,
        "history_type": HISTORIES[dtype],
        "history_stride": state.rows * state.size,
        "next_scale": next_scale,
        "norms": address(norms, "state.norm_partials", torch.float32, 2 * state.n * blocks, y.device),
    }
    _forward(_native.cuda.norm_tail, tail._replace(y=y), state, ending)


def _forward(
    kernel: Callable[..., None], tail: Tail, state: DeviceState | None, ending: dict[str, Any]
) -> list[Tensor]:
    """Runs the kernel, told by `ending` where the result goes, and returns the statistics."""
    y, shortcut, first, second = tail
    shortcut = None if shortcut is None else like(shortcut, "shortcut", y, y.dtype)
    plan = _forward_plan(y, shortcut, first.groups)
    workspace = _workspace(plan, y)
    statistics = new_statistics(y, first, second)
    kernel(DTYPES[y.dtype], plan, device.stream(y.device), {
        "y": y.data_ptr(), "shortcut": 0 if shortcut is None else shortcut.data_ptr(),
        **parameters(y, first, second), **made(STATISTICS, statistics), **ending,
        "workspace": 0 if workspace is None else workspace.data_ptr(), "status": _status(y, state),
    })  # fmt: skip
    return statistics


def _vjp(
    kernel: Callable[..., None], grad: Tensor, tail: Tail, statistics: list[Tensor], params: bool, status: int
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    y, shortcut, first, second = tail
    staged = grad.element_size() + (_tail_bytes(y, shortcut) if second else y.element_size())
    plan = _plan(y, first.groups, staged=staged, columns=4 if second else 16 // y.element_size())
    workspace = _workspace(plan, y)
    grad_y, grad_shortcut = torch.empty_like(y), torch.empty_like(grad) if second else grad
    count = (4 if second else 2) if params else 0
    grads = list(torch.empty(count, *y.shape[:2], dtype=torch.float32, device=y.device))  # of every sample apart
    kernel(DTYPES[y.dtype], plan, device.stream(y.device), {
        "grad": grad.data_ptr(), "y": y.data_ptr(), "shortcut": 0 if shortcut is None else shortcut.data_ptr(),
        **parameters(y, first, second), **given(y, first, second, statistics), "grad_y": grad_y.data_ptr(),
        "grad_shortcut": grad_shortcut.data_ptr() if second else 0, **made(GRADS, grads),
        "workspace": 0 if workspace is None else workspace.data_ptr(), "status": status,
    })  # fmt: skip
    return grad_y, None if shortcut is None else grad_shortcut, [g.sum(0) for g in grads]


class Tiling(NamedTuple):
    """A tile's channels and positions, a block's threads, and whether a tile has all positions of its groups."""

    width: int
    length: int
    threads: int
    whole: bool


def tiling(
    channels: int, positions: int, groups: int, itemsize: int, staged: int, shared: int, columns: int = 8
) -> Tiling:
    """How a sample is cut. staged: bytes an element that a block keeps; shared: bytes that it can have; columns: for
    which a thread keeps sums, as in csrc/cuda/norm.cuh's Scratch."""
    per_group, word = channels // groups, 16 // itemsize
    unit = math.lcm(per_group, word) if channels % word == 0 else per_group

    def threads(width: int, length: int) -> int:
        return min(MOST_THREADS, max(128, math.ceil(width * length / 4096) * 128))

    def resident(width: int) -> int:
        scratch = 8 * columns * max(threads(width, positions), width) + 32 * width
        taken = width * positions * staged + scratch + 3 * 16  # three tiles, rounded up to 16 bytes
        return (shared + RESERVED) // (taken + RESERVED)

    def fits(width: int) -> bool:
        # Rows of less than 32 bytes waste half of every access.
        wide = width * itemsize >= 32 or width == channels
        return wide and width * positions <= MOST_WHOLE and resident(width) > 0

    most = min(channels, MOST_THREADS)
    widths = [w for w in range(unit, most + 1, unit) if channels % w == 0 and fits(w)]
    if widths:
        width = max((w for w in widths if w * positions <= TILE and resident(w) >= BLOCKS), default=widths[0])
        return Tiling(width, positions, threads(width, positions), True)
    width = min(channels, 64)
    slices = math.ceil(positions / max(1, min(TILE, 6 * TILE // staged) // width))
    length = math.ceil(positions / slices)
    return Tiling(width, length, threads(width, length), False)


@lru_cache(maxsize=1024)
def _cut(
    n: int, channels: int, positions: int, groups: int, itemsize: int, staged: int, shared: int, columns: int
) -> _native.cuda.NormPlan:
    cut = tiling(channels, positions, groups, itemsize, staged, shared, columns)
    shape = {"n": n, "channels": channels, "positions": positions, "groups": groups}
    return _native.cuda.NormPlan({**shape, "eps": EPS, **cut._asdict()})


def _plan(y: Tensor, groups: int, *, staged: int, columns: int) -> _native.cuda.NormPlan:
    n, channels, height, width = y.shape
    shared = device.shared_memory(y.device)
    return _cut(n, channels, height * width, groups, y.element_size(), staged, shared, columns)


def _forward_plan(y: Tensor, shortcut: Tensor | None, groups: int) -> _native.cuda.NormPlan:
    word = 16 // y.element_size()
    columns = word if y.shape[1] // groups % word else 1  # a group's channels are summed together
    return _plan(y, groups, staged=_tail_bytes(y, shortcut), columns=columns)


def _workspace(plan: _native.cuda.NormPlan, y: Tensor) -> Tensor | None:
    return torch.empty(plan.workspace, dtype=torch.float32, device=y.device) if plan.workspace else None


def _tail_bytes(y: Tensor, shortcut: Tensor | None) -> int:
    return y.element_size() * (1 if shortcut is None else 2)


def _status(y: Tensor, state: DeviceState | None) -> int:
    return optional(status_of(state), "state.status", torch.int64, y.shape[0], y.device)
