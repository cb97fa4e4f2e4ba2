"""GroupNorm with ReLU, and the block's tail, on NHWC activations; `eager` is their specification.

A map small enough for a program to hold all positions of some groups in registers is read once and written once (the
whole path). Larger ones are split into runs of positions: partial moments, their combination, and a second reading.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm, address, optional
from ..gpu import DeviceState, Tail, activation, like, moments, status_of
from ..gpu import affine as affine_of
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

# Of the whole path's tiles; within them no register is spilled.
RELU = Budget(elements=32768, warps=32, registers=4)
TAIL = Budget(elements=16384, warps=32, registers=4)


def norm_relu(
    y: Tensor,
    norm: Norm,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: DeviceState | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """eager.norm_relu. partial: the convolution's moments of y, (n, parts, channels, 3) = (count, mean, M2)."""
    y, status = _checked(y, groups, norm, None, partial, state), status_of(state)
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    out = y if consume else torch.empty_like(y)
    mean, rstd = torch.empty((2, n, groups), dtype=torch.float32, device=y.device)
    tile = whole_tile(positions, channels, groups, y.itemsize, RELU)
    if tile is not None:
        norm_relu_whole[(n * tile.blocks,)](
            y, *norm, out, mean, rstd, status, positions, eps, **tile.constants(channels, groups)
        )
        return out, mean, rstd
    tile = split_tile(positions, channels, groups)
    _split_statistics(tile, y, None, (None, None), [mean, rstd], None, groups, eps, partial, status)
    norm_relu_apply[(n * tile.blocks,)](
        y, *norm, mean, rstd, out, status, positions, tile.blocks, **tile.constants(channels, groups)
    )
    return out, mean, rstd


def norm_tail(
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: DeviceState | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """eager.norm_tail. partial: as norm_relu's."""
    y = _checked(y, groups, first, second, partial, state)
    out = y if consume and y.dtype == torch.float32 else torch.empty_like(y, dtype=torch.float32)
    shape = (2 if second is None else 4, y.shape[0], groups)
    statistics = list(torch.empty(shape, dtype=torch.float32, device=y.device))
    _tail(Tail(y, r, first, second, groups, eps, partial), statistics, out, None, None, status_of(state), 0, 0)
    return out, statistics


def residual_tail(state: DeviceState, tail: Tail, z: Tensor, row: int) -> None:
    """Finishes f = norm_tail(tail) and takes the residual g = f - z: g, rounded, is the history's row `row` (none if
    row < 0); sums of g² and f² go to state.norm_partials. f itself is never in memory."""
    y = _checked(tail.y, tail.groups, tail.first, tail.second, tail.partial, state)
    address(state.history, "state.history", state.history.dtype, state.rows * y.numel(), y.device)
    _tail(tail._replace(y=y), None, None, like(z, "z", y), state, state.status, state.rows, row)


def _checked(
    y: Tensor, groups: int, first: Norm, second: Norm | None, partial: Tensor | None, state: DeviceState | None
) -> Tensor:
    """y as the kernels read it; ValueError where what belongs to it would not fit."""
    y = activation(y, groups)
    affine_of(y, first, "first " if second else "")
    affine_of(y, second, "second ")
    moments(y, partial)
    optional(status_of(state), "state.status", torch.int64, y.shape[0], y.device)
    return y


def _tail(
    tail: Tail,
    statistics: list[Tensor] | None,
    out: Tensor | None,
    z: Tensor | None,
    state: DeviceState | None,
    status: Tensor | None,
    rows: int,
    row: int,
) -> None:
    y, r, first, second, groups, eps, partial = tail
    r = None if r is None else like(r, "r", y)
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    affines = (*first, *(second or (None, None)))
    tile = whole_tile(positions, channels, groups, y.itemsize, TAIL)
    whole = tile is not None
    if not whole:
        tile = split_tile(positions, channels, groups)
        if statistics is None:
            shape = (2 if second is None else 4, n, groups)
            statistics = list(torch.empty(shape, dtype=torch.float32, device=y.device))
        _split_statistics(tile, y, r, first, statistics, second, groups, eps, partial, status)
    history = norm_partials = None
    if state is not None:
        history = state.history
        state.reserve_norms(tile.blocks)
        norm_partials = state.norm_partials
    statistics = [*(statistics or []), None, None, None, None][:4]
    sink = (out, z, history, norm_partials, status, positions, rows, row)
    constants = tile.constants(channels, groups)
    if whole:
        norm_tail_whole[(n * tile.blocks,)](y, r, *affines, *statistics, *sink, eps, **constants)
    else:
        norm_tail_apply[(n * tile.blocks,)](y, r, *affines, *statistics, *sink, tile.blocks, **constants)


def _split_statistics(
    tile: Tile,
    y: Tensor,
    r: Tensor | None,
    first: Norm | tuple[None, None],
    statistics: list[Tensor],
    second: Norm | None,
    groups: int,
    eps: float,
    partial: Tensor | None,
    status: Tensor | None,
) -> None:
    """Fills statistics: y's mean and 1/σ, and with a second norm those of relu(gn_first(y) + r)."""
    n, channels, positions = y.shape[0], y.shape[1], y.shape[2] * y.shape[3]
    own = torch.empty((n, tile.blocks, groups, 3), dtype=torch.float32, device=y.device)
    arguments = (own, status, positions, tile.blocks)
    constants = tile.constants(channels, groups)
    if partial is None:
        partial_moments[(n * tile.blocks,)](y, None, None, None, None, None, *arguments, **constants)
        partial = own
    _combine(partial, *statistics[:2], groups, eps, status)
    if second is not None:
        partial_moments[(n * tile.blocks,)](y, r, *first, *statistics[:2], *arguments, **constants)
        _combine(own, *statistics[2:], groups, eps, status)


def _combine(partial: Tensor, mean: Tensor, rstd: Tensor, groups: int, eps: float, status: Tensor | None) -> None:
    n, parts, columns, _ = partial.shape
    combine_moments[(n * groups,)](partial, mean, rstd, status, parts, eps, **combination(columns, groups))


def combination(columns: int, groups: int) -> dict[str, int]:
    """Launch configuration of combine_moments, for partials of `columns` channels or groups."""
    columns //= groups
    block = triton.next_power_of_2(columns)
    return {"GROUPS": groups, "COLUMNS": columns, "BLOCK_N": max(1024 // block, 1), "BLOCK_S": block, "num_warps": 4}


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
    """Statistics are written where there is a place for them; the result as `_emit` says."""
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
    """(count, mean, M2) of every group over a run of positions: of y, or where y's statistics are given, of
    relu(gn(y) + r). partials (n, splits, groups, 3)."""
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
def combine_moments(
    partials, mean, rstd, status, parts, eps,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A group's mean and 1/σ from partials (n, parts, groups · COLUMNS, 3), by Chan's formula; parts of count 0 do not
    count, whatever they hold."""
    n, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    if status is not None and tl.load(status + n) != RUNNING:
        return
    first = partials + (n * parts * GROUPS + group) * (COLUMNS * 3)
    part, column = tl.arange(0, BLOCK_N)[:, None], tl.arange(0, BLOCK_S)[None, :]
    offset = (part * (GROUPS * COLUMNS) + column) * 3
    counts, sums = tl.zeros((BLOCK_N, BLOCK_S), tl.float32), tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    start = 0
    while start < parts:
        at, there = first + start * (GROUPS * COLUMNS * 3) + offset, (start + part < parts) & (column < COLUMNS)
        count = tl.load(at, there, other=0.0)
        counts += count
        sums += tl.where(count > 0, count * tl.load(at + 1, there, other=0.0), 0.0)
        start += BLOCK_N
    total = tl.sum(counts)
    center = tl.sum(sums) / total
    squares = tl.zeros((BLOCK_N, BLOCK_S), tl.float32)
    start = 0
    while start < parts:
        at, there = first + start * (GROUPS * COLUMNS * 3) + offset, (start + part < parts) & (column < COLUMNS)
        count = tl.load(at, there, other=0.0)
        away = tl.load(at + 1, there, other=0.0) - center
        squares += tl.where(count > 0, tl.load(at + 2, there, other=0.0) + count * away * away, 0.0)
        start += BLOCK_N
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
    """Stores f to out; or where there is z, f - z to the history's row, and the sums of its squares and of f's."""
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
