"""The CUDA kernels of the GroupNorm chains (csrc/cuda/norm*.cu): `eager`'s functions, addresses passed on.

NHWC activations in float32, bfloat16 or float16; ValueError for tensors that do not fit each other. How a sample is cut
into tiles depends on its shape and the GPU alone, never on the batch, and sums are formed in a fixed order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache, lru_cache

import torch
from torch import Tensor

from .. import _native
from .contract import EPS, Norm, address, describe, optional
from .gpu import DeviceState, Tail, activation, affine, given, like, status_of

DTYPES = {
    torch.float32: _native.cuda.DType.f32,
    torch.bfloat16: _native.cuda.DType.bf16,
    torch.float16: _native.cuda.DType.f16,
}
TILE = 8192  # the elements that a block of threads is meant to hold
MOST_WHOLE = 32768  # the most, where these are all positions of whole groups
MOST_THREADS = 256  # in a block: as csrc/cuda/norm.cuh


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = activation(y, norm.groups)
    plan = _plan(y, norm.groups, staged=y.element_size())
    workspace = _workspace(plan, y)
    statistics = _statistics(y, norm.groups, 2)
    out = y if consume else torch.empty_like(y)
    _native.cuda.norm_relu(
        DTYPES[y.dtype], plan, y.data_ptr(), *affine(y, norm), *_made([*statistics, out], 3), 0, 0,
        *_made([workspace], 1), _status(y, state), current_stream(y.device),
    )  # fmt: skip
    return out, statistics


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = activation(y, norm.groups)
    grad, grad_y = like(grad, "grad", y, y.dtype), torch.empty_like(y)
    plan = _plan(y, norm.groups, staged=2 * y.element_size())
    workspace = _workspace(plan, y)
    grads = _affine_grads(y, 2 if params else 0)
    _native.cuda.norm_relu_vjp(
        DTYPES[y.dtype], plan, grad.data_ptr(), y.data_ptr(), *affine(y, norm), *given(y, norm.groups, statistics, 1),
        grad_y.data_ptr(), *_made(grads, 2), *_made([workspace], 1), 0 if params else _status(y, state),
        current_stream(y.device),
    )  # fmt: skip
    return grad_y, [g.sum(0) for g in grads]


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
    ending = [out.data_ptr(), 0, 0, DTYPES[torch.float32], 0, 0]
    return out, _tail(Tail(y, shortcut, first, second), state, ending)


def residual_tail(state: DeviceState, tail: Tail, z: Tensor, *, row: int) -> None:
    """g = F(z) - z, where `tail` is F's end, of the running samples: stored as the history's row `row` (row < 0: not
    stored), with partial sums of g² and F(z)² in state.norm_partials. z (n, C, H, W): float32 NHWC."""
    y = activation(tail.y, tail.first.groups)
    if z.shape != y.shape or not z.is_contiguous(memory_format=torch.channels_last) or row >= state.rows:
        raise ValueError(
            f"z is {describe(z)}: expected y's shape {tuple(y.shape)} in channels_last, row={row} a history's"
        )
    plan = _plan(y, tail.first.groups, staged=_tail_bytes(y, tail.shortcut))
    state.reserve_norms(plan.blocks)
    (history,), dtype = state.addresses(("history",)), state.history.dtype
    ending = [
        0, address(z, "z", torch.float32, state.n * state.size, y.device),
        0 if row < 0 else history + row * state.size * dtype.itemsize, DTYPES[dtype], state.rows * state.size,
        address(state.norm_partials, "state.norm_partials", torch.float32, 2 * state.n * plan.blocks, y.device),
    ]  # fmt: skip
    _tail(tail._replace(y=y), state, ending)


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
    grad, two = like(grad, "grad", y, torch.float32), second is not None
    shortcut = None if shortcut is None else like(shortcut, "shortcut", y, y.dtype)
    staged = grad.element_size() + (_tail_bytes(y, shortcut) if two else y.element_size())
    plan = _plan(y, first.groups, staged=staged)
    workspace = _workspace(plan, y)
    grad_y, grad_shortcut = torch.empty_like(y), torch.empty_like(grad) if two else grad
    grads = _affine_grads(y, (4 if two else 2) if params else 0)
    _native.cuda.norm_tail_vjp(
        DTYPES[y.dtype], plan, *_made([grad, y, shortcut], 3), *affine(y, first, "first "),
        *affine(y, second, "second "), *given(y, first.groups, statistics, 1 + two), *([] if two else [0, 0]),
        *_made([grad_y, grad_shortcut if two else None], 2), *_made(grads, 4), *_made([workspace], 1),
        0 if params else _status(y, state), current_stream(y.device),
    )  # fmt: skip
    return grad_y, None if shortcut is None else grad_shortcut, [g.sum(0) for g in grads]


def _tail(tail: Tail, state: DeviceState | None, ending: list) -> list[Tensor]:
    """Runs norm_tail's kernel, told by `ending` where the result goes, and returns the statistics."""
    y, shortcut, first, second = tail
    shortcut = None if shortcut is None else like(shortcut, "shortcut", y, y.dtype)
    plan = _plan(y, first.groups, staged=_tail_bytes(y, shortcut))
    workspace = _workspace(plan, y)
    statistics = _statistics(y, first.groups, 2 if second is None else 4)
    _native.cuda.norm_tail(
        DTYPES[y.dtype], plan, *_made([y, shortcut], 2), *affine(y, first, "first "), *affine(y, second, "second "),
        *_made(statistics, 4), *ending, 0, 0, *_made([workspace], 1), _status(y, state), current_stream(y.device),
    )  # fmt: skip
    return statistics


def tiling(
    channels: int, positions: int, groups: int, itemsize: int, staged: int, shared: int
) -> tuple[int, int, int, bool]:
    """How a sample is cut: the channels and positions of a tile, a block's threads, and whether a tile is whole, that
    is, has all positions of its groups. staged: bytes an element that a block keeps; shared: bytes that it can have."""
    per_group, word = channels // groups, 16 // itemsize
    unit = math.lcm(per_group, word) if channels % word == 0 else per_group

    def threads(width: int, length: int) -> int:
        return min(MOST_THREADS, max(128, math.ceil(width * length / 4096) * 128))

    def fits(width: int) -> bool:
        # Rows of less than 32 bytes waste half of every access.
        wide = width * itemsize >= 32 or width == channels
        scratch = 64 * threads(width, positions) + 32 * width
        return wide and width * positions <= MOST_WHOLE and width * positions * staged + scratch <= shared

    most = min(channels, MOST_THREADS)
    widths = [w for w in range(unit, most + 1, unit) if channels % w == 0 and fits(w)]
    if widths:
        width = max((w for w in widths if w * positions <= TILE), default=widths[0])
        return width, positions, threads(width, positions), True
    width = min(channels, 64)
    slices = math.ceil(positions / max(1, min(TILE, 6 * TILE // staged) // width))
    length = math.ceil(positions / slices)
    return width, length, threads(width, length), False


@lru_cache(maxsize=1024)
def _cut(
    n: int, channels: int, positions: int, groups: int, itemsize: int, staged: int, shared: int
) -> _native.cuda.NormPlan:
    cut = tiling(channels, positions, groups, itemsize, staged, shared)
    return _native.cuda.NormPlan(n, channels, positions, groups, EPS, *cut)


def _plan(y: Tensor, groups: int, *, staged: int) -> _native.cuda.NormPlan:
    n, channels, height, width = y.shape
    return _cut(n, channels, height * width, groups, y.element_size(), staged, _shared_memory(y.device))


def _workspace(plan: _native.cuda.NormPlan, y: Tensor) -> Tensor | None:
    return torch.empty(plan.workspace, dtype=torch.float32, device=y.device) if plan.workspace else None


@cache
def _shared_memory(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def current_stream(device: torch.device) -> int:
    return torch.cuda.current_stream(device).cuda_stream


def _tail_bytes(y: Tensor, r: Tensor | None) -> int:
    return y.element_size() * (1 if r is None else 2)


def _statistics(y: Tensor, groups: int, count: int) -> list[Tensor]:
    return list(torch.empty(count, y.shape[0], groups, dtype=torch.float32, device=y.device))


def _affine_grads(y: Tensor, count: int) -> list[Tensor]:
    """Sums of every sample apart; the batch's are these in order."""
    return list(torch.empty(count, *y.shape[:2], dtype=torch.float32, device=y.device))


def _made(tensors: Sequence[Tensor | None], fill: int) -> list[int]:
    """Addresses of what was checked or allocated here, 0 for None, padded with zeros to `fill`."""
    return [0 if t is None else t.data_ptr() for t in tensors] + [0] * (fill - len(tensors))


def _status(y: Tensor, state: DeviceState | None) -> int:
    return optional(status_of(state), "state.status", torch.int64, y.shape[0], y.device)
