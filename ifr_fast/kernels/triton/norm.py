"""GroupNorm with ReLU, and the block's tail, on NHWC activations; `eager` is their specification.

The whole path is for maps so small that a program can hold all positions of some groups in registers: it reads and
writes them once. The split path divides larger maps into runs of positions. It computes partial moments, combines them,
and reads the map a second time.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import EPS, Norm, address
from ..gpu import DeviceState, Tail, checked, like, status_of
from .tiles import (
    RUNNING,
    Budget,
    Tile,
    affine,
    group_moments,
    groups_at,
    normalised,
    relu,
    split_tile,
    tile_at,
    whole_tile,
)

# Budgets of the whole path's tiles. Within them no register is spilled.
RELU = Budget(elements=32768, warps=32, registers=4)
TAIL = Budget(elements=16384, warps=32, registers=4)


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    y, status = checked(y, norm, None, state), status_of(state)
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    out, statistics = y if consume else torch.empty_like(y), _statistics(y, norm, None)
    tile = whole_tile(positions, channels, norm.groups, y.itemsize, RELU)
    if tile is not None:
        norm_relu_whole[(n * tile.blocks,)](
            y, norm.weight, norm.bias, out, *statistics, status, positions, EPS,
            **tile.constants(channels, norm.groups),
        )  # fmt: skip
        return out, statistics
    tile = split_tile(positions, channels, norm.groups)
    _split_statistics(tile, y, None, norm, None, statistics, status)
    norm_relu_apply[(n * tile.blocks,)](
        y, norm.weight, norm.bias, *statistics, out, status, positions, tile.blocks,
        **tile.constants(channels, norm.groups),
    )  # fmt: skip
    return out, statistics


def norm_tail(
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    *,
    consume: bool = False,
    state: DeviceState | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y = checked(y, first, second, state)
    out = y if consume and y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    statistics = _statistics(y, first, second)
    _tail(Tail(y, shortcut, first, second), statistics, Sink(out, None, None, status_of(state), 0))
    return out, statistics


def residual_tail(state: DeviceState, tail: Tail, z: Tensor, row: int) -> None:
    """Computes f = norm_tail(tail) and its residual g = f - z. Stores g, rounded, as the history's row `row` (unless
    row < 0), and sums of g² and f² in state.norm_partials. f itself is never in memory."""
    y = checked(tail.y, tail.first, tail.second, state)
    address(state.history, "state.history", state.history.dtype, state.rows * y.numel(), y.device)
    _tail(tail._replace(y=y), None, Sink(None, like(z, "z", y), state, state.status, row))


class Sink(NamedTuple):
    """Where a tail's result f goes: to `out`, or as the residual f - z to the state's history."""

    out: Tensor | None
    z: Tensor | None
    state: DeviceState | None
    status: Tensor | None
    row: int


def _tail(tail: Tail, statistics: list[Tensor] | None, sink: Sink) -> None:
    """Computes the tail into the sink. statistics: tensors to fill, or None."""
    y, shortcut, first, second = tail
    out, z, state, status, row = sink
    shortcut = None if shortcut is None else like(shortcut, "shortcut", y)
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    affines = (first.weight, first.bias, *((None, None) if second is None else second[:2]))
    tile = whole_tile(positions, channels, first.groups, y.itemsize, TAIL)
    whole = tile is not None
    if tile is None:
        tile = split_tile(positions, channels, first.groups)
        statistics = _statistics(y, first, second) if statistics is None else statistics
        _split_statistics(tile, y, shortcut, first, second, statistics, status)
    history, norm_partials, rows = None, None, 0
    if state is not None:
        state.reserve_norms(tile.blocks)
        history, norm_partials, rows = state.history, state.norm_partials, state.rows
    four = [*(statistics or []), None, None, None, None][:4]
    written = (out, z, history, norm_partials, status, positions, rows, row)
    constants = tile.constants(channels, first.groups)
    if whole:
        norm_tail_whole[(n * tile.blocks,)](y, shortcut, *affines, *four, *written, EPS, **constants)
    else:
        norm_tail_apply[(n * tile.blocks,)](y, shortcut, *affines, *four, *written, tile.blocks, **constants)


def _statistics(y: Tensor, first: Norm, second: Norm | None) -> list[Tensor]:
    shape = (2 if second is None else 4, y.shape[0], first.groups)
    return list(torch.empty(shape, dtype=torch.float32, device=y.device))


def _split_statistics(
    tile: Tile,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    status: Tensor | None,
) -> None:
    """Fills statistics: mean and 1/σ of y and, if there is a second norm, of relu(gn_first(y) + shortcut)."""
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    partials = torch.empty((n, tile.blocks, first.groups, 3), dtype=torch.float32, device=y.device)
    arguments = (partials, status, positions, tile.blocks)
    constants = tile.constants(channels, first.groups)
    partial_moments[(n * tile.blocks,)](y, None, None, None, None, None, *arguments, **constants)
    _combine(partials, statistics[:2], status)
    if second is not None:
        partial_moments[(n * tile.blocks,)](
            y, shortcut, first.weight, first.bias, *statistics[:2], *arguments, **constants
        )
        _combine(partials, statistics[2:], status)


def _combine(partials: Tensor, statistics: list[Tensor], status: Tensor | None) -> None:
    n, parts, groups, _ = partials.shape
    combine_moments[(n * groups,)](partials, *statistics, status, parts, EPS, GROUPS=groups, BLOCK=1024, num_warps=4)


@triton.jit(do_not_specialize=["positions"])
def norm_relu_whole(
    y, weight, bias, out, mean, rstd, status, positions, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    count = positions * (CHANNELS // GROUPS)
    center, m2 = group_moments(x, mask, count)
    scale = tl.rsqrt(m2 / count + eps)
    at, there = groups_at(n, group, GROUPS, BLOCK_G)
    tl.store(mean + at, center, there)
    tl.store(rstd + at, scale, there)
    x = relu(affine(normalised(x, center, scale), weight, bias, channel, real))
    tl.store(out + base + offset, x.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["positions", "rows", "row"])
def norm_tail_whole(
    y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, out, z, history, norm_partials, status,
    positions, rows, row, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores those statistics that are not None. `_emit` stores the result."""
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    u = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if r is not None:
        shortcut = tl.load(r + base + offset, mask, other=0.0)
    at, there = groups_at(n, group, GROUPS, BLOCK_G)
    count = positions * (CHANNELS // GROUPS)
    center, m2 = group_moments(u, mask, count)
    scale = tl.rsqrt(m2 / count + eps)
    if mean is not None:
        tl.store(mean + at, center, there)
        tl.store(rstd + at, scale, there)
    u = affine(normalised(u, center, scale), weight, bias, channel, real)
    if r is not None:
        u += shortcut.to(tl.float32)
    if weight2 is not None:
        u = relu(u)
        center, m2 = group_moments(u, mask, count)
        scale = tl.rsqrt(m2 / count + eps)
        if mean2 is not None:
            tl.store(mean2 + at, center, there)
            tl.store(rstd2 + at, scale, there)
        u = affine(normalised(u, center, scale), weight2, bias2, channel, real)
    _emit(u, offset, mask, n, positions * CHANNELS, out, z, history, norm_partials, rows, row)


@triton.jit(do_not_specialize=["positions", "splits"])
def partial_moments(
    y, r, weight, bias, mean, rstd, partials, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores the moments (count, mean, M2) of every group over a run of positions in partials (n, splits, groups, 3).
    M2 is the sum of squares about the mean. If y's statistics are given, the moments are those of relu(gn(y) + r), else
    of y."""
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if mean is not None:
        at, there = groups_at(n, 0, GROUPS, BLOCK_G)
        center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
        x = affine(normalised(x, center, scale), weight, bias, channel, real)
        if r is not None:
            x += tl.load(r + base + offset, mask, other=0.0).to(tl.float32)
        x = relu(x)
    count = tl.minimum(BLOCK_P, positions - position) * (CHANNELS // GROUPS)
    center, m2 = group_moments(x, mask, count)
    at, there = groups_at(tl.program_id(0).to(tl.int64), 0, GROUPS, BLOCK_G)
    tl.store(partials + at * 3, tl.zeros_like(center) + count, there)
    tl.store(partials + at * 3 + 1, center, there)
    tl.store(partials + at * 3 + 2, m2, there)


@triton.jit(do_not_specialize=["parts"])
def combine_moments(partials, mean, rstd, status, parts, eps, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """A group's mean and 1/σ from partials (n, parts, groups, 3), by Chan's formula."""
    n, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    if status is not None and tl.load(status + n) != RUNNING:
        return
    first = partials + (n * parts * GROUPS + group) * 3
    part = tl.arange(0, BLOCK)
    counts, sums = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < parts:
        at, there = first + (start + part) * (GROUPS * 3), start + part < parts
        count = tl.load(at, there, other=0.0)
        counts += count
        sums += count * tl.load(at + 1, there, other=0.0)
        start += BLOCK
    total = tl.sum(counts)
    center = tl.sum(sums) / total
    squares = tl.zeros((BLOCK,), tl.float32)
    start = 0
    while start < parts:
        at, there = first + (start + part) * (GROUPS * 3), start + part < parts
        count = tl.load(at, there, other=0.0)
        away = tl.load(at + 1, there, other=0.0) - center
        squares += tl.load(at + 2, there, other=0.0) + count * away * away
        start += BLOCK
    at = n * GROUPS + group
    tl.store(mean + at, center)
    tl.store(rstd + at, tl.rsqrt(tl.sum(squares) / total + eps))


@triton.jit(do_not_specialize=["positions", "splits"])
def norm_relu_apply(
    y, weight, bias, mean, rstd, out, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    at, there = groups_at(n, 0, GROUPS, BLOCK_G)
    center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
    x = relu(affine(normalised(x, center, scale), weight, bias, channel, real))
    tl.store(out + base + offset, x.to(out.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["positions", "rows", "row", "splits"])
def norm_tail_apply(
    y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, out, z, history, norm_partials, status,
    positions, rows, row, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    u = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    at, there = groups_at(n, 0, GROUPS, BLOCK_G)
    center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
    u = affine(normalised(u, center, scale), weight, bias, channel, real)
    if r is not None:
        u += tl.load(r + base + offset, mask, other=0.0).to(tl.float32)
    if weight2 is not None:
        center, scale = tl.load(mean2 + at, there, other=0.0), tl.load(rstd2 + at, there, other=0.0)
        u = affine(normalised(relu(u), center, scale), weight2, bias2, channel, real)
    _emit(u, offset, mask, n, positions * CHANNELS, out, z, history, norm_partials, rows, row)


@triton.jit
def _emit(f, offset, mask, n, size, out, z, history, norm_partials, rows, row):
    """Stores f to out. If z is given, stores f - z in the history's row instead, and sums of its and f's squares."""
    base = n * size
    if z is None:
        tl.store(out + base + offset, f, mask)
    else:
        g = f - tl.load(z + base + offset, mask, other=0.0)
        if row >= 0:
            tl.store(history + (n * rows + row) * size + offset, g.to(history.dtype.element_ty), mask)
        sums = norm_partials + tl.program_id(0).to(tl.int64) * 2
        tl.store(sums, tl.sum(tl.where(mask, g * g, 0.0)))
        tl.store(sums + 1, tl.sum(tl.where(mask, f * f, 0.0)))
