"""GroupNorm with ReLU, and the block's tail, on NHWC activations; `eager` is their specification.

The whole path is for maps so small that a program can hold all positions of some groups in registers: it reads and
writes them once. The split path divides larger maps into runs of positions. It computes partial moments, combines them,
and reads the map a second time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import EPS, Norm, describe
from ..fields import new_statistics
from ..gpu import DeviceState, Tail, checked, like, status_of
from .launch import Launch, jit
from .tiles import (
    RUNNING,
    Budget,
    affine,
    begin,
    group_moments,
    groups_at,
    normalised,
    relu,
    rounded,
    split_tile,
    stopped,
    tile_at,
    whole_tile,
)

# Budgets of the whole path's tiles. Within them no register is spilled.
RELU = Budget(elements=32768, fixed=16, each=2)
TAIL = Budget(elements=16384, fixed=48, each=2)
RESIDUAL = TAIL._replace(fixed=32)  # the tail of a step, which stores no statistics


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    """With a state the statistics are the step's: the next one writes over them."""
    y, status = checked(y, norm, None, state), status_of(state)
    n, channels, height, width = y.shape
    out = y if consume else torch.empty_like(y)
    statistics = new_statistics(y, norm, None) if state is None else state.reserve_statistics(y, norm)
    plan = _plan("relu", channels, height * width, norm.groups, y.itemsize)
    if plan.whole:
        tensors = (y, norm.weight, norm.bias, out, *statistics, status)
        plan.end(n * plan.blocks, tensors, (height * width, EPS))
    else:
        _split_statistics(plan, y, None, norm, None, statistics, status)
        tensors = (y, norm.weight, norm.bias, *statistics, out, status)
        plan.end(n * plan.blocks, tensors, (height * width, plan.blocks))
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
    statistics = new_statistics(y, first, second)
    _tail(Tail(y, shortcut, first, second), statistics, Sink(out, None, None, status_of(state), 0))
    return out, statistics


def residual_tail(state: DeviceState, tail: Tail, z: Tensor, row: int) -> None:
    """Computes f = norm_tail(tail) and its residual g = f - z. Stores g, rounded, as the history's row `row` (unless
    row < 0), and sums of g² and f² in state.norm_partials. f itself is never in memory."""
    y = checked(tail.y, tail.first, tail.second, state)
    if y.numel() != state.n * state.size:
        raise ValueError(f"y is {describe(y)}: expected {state.n} samples of {state.size} numbers")
    _tail(Tail(y, *tail[1:]), None, Sink(None, state.like(z, "z", y), state, state.status, row))


class Plan(NamedTuple):
    """The launches of a norm, for maps of one size. blocks: tiles in a sample. end: stores the result. moments,
    combine: on the split path, what comes before it."""

    blocks: int
    whole: bool
    end: Launch
    moments: Launch
    combine: Launch


@lru_cache(maxsize=1024)
def _plan(end: Literal["relu", "tail", "residual"], channels: int, positions: int, groups: int, itemsize: int) -> Plan:
    budget, whole, apply = {
        "relu": (RELU, norm_relu_whole, norm_relu_apply),
        "tail": (TAIL, norm_tail_whole, norm_tail_apply),
        "residual": (RESIDUAL, norm_tail_whole, norm_tail_apply),
    }[end]
    tile = whole_tile(positions, channels, groups, itemsize, budget)
    is_whole = tile is not None
    tile = tile or split_tile(positions, channels, groups, TAIL)
    constants = tile.constants(channels, groups)
    return Plan(
        tile.blocks,
        is_whole,
        Launch(whole if is_whole else apply, **constants),
        Launch(partial_moments, **constants),
        Launch(combine_moments, GROUPS=groups, BLOCK=1024, num_warps=4),
    )


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
    if shortcut is not None:
        shortcut = like(shortcut, "shortcut", y) if state is None else state.like(shortcut, "shortcut", y)
    n, channels, height, width = y.shape
    # To round to 8 bits takes registers of its own.
    end: Literal["tail", "residual"] = "tail" if state is None or state.scales is not None else "residual"
    plan = _plan(end, channels, height * width, first.groups, y.itemsize)
    if not plan.whole:
        statistics = new_statistics(y, first, second) if statistics is None else statistics
        _split_statistics(plan, y, shortcut, first, second, statistics, status)
    history, next_scale, norm_partials, rows = None, None, None, 0
    if state is not None:
        norm_partials = state.reserve_norms(plan.blocks)
        history, next_scale, rows = state.history, state.next_scale, state.rows
    affines = (first.weight, first.bias, *((None, None) if second is None else second[:2]))
    four = [*(statistics or []), None, None, None, None][:4]
    tensors = (y, shortcut, *affines, *four, out, z, history, next_scale, norm_partials, status)
    plan.end(n * plan.blocks, tensors, (height * width, rows, row, EPS if plan.whole else plan.blocks))


def _split_statistics(
    plan: Plan,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    status: Tensor | None,
) -> None:
    """Fills statistics: mean and 1/σ of y and, if there is a second norm, of relu(gn_first(y) + shortcut)."""
    n, programs, sizes = y.shape[0], y.shape[0] * plan.blocks, (y.shape[2] * y.shape[3], plan.blocks)
    partials = torch.empty((n, plan.blocks, first.groups, 3), dtype=torch.float32, device=y.device)
    plan.moments(programs, (y, None, None, None, None, None, partials, status), sizes)
    plan.combine(n * first.groups, (partials, *statistics[:2], status), (plan.blocks, EPS))
    if second is not None:
        affine = (first.weight, first.bias, *statistics[:2])
        plan.moments(programs, (y, shortcut, *affine, partials, status), sizes)
        plan.combine(n * first.groups, (partials, *statistics[2:], status), (plan.blocks, EPS))


@jit(wide=["y", "weight", "bias", "out"])
def norm_relu_whole(
    y, weight, bias, out, mean, rstd, status, positions, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    begin()
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if stopped(status, n):
        return
    count = positions * (CHANNELS // GROUPS)
    center, m2 = group_moments(x, mask, count)
    scale = tl.rsqrt(m2 / count + eps)
    at, there = groups_at(n, group, GROUPS, BLOCK_G)
    tl.store(mean + at, center, there)
    tl.store(rstd + at, scale, there)
    x = relu(affine(normalised(x, center, scale), weight, bias, channel, real))
    tl.store(out + base + offset, x.to(out.dtype.element_ty), mask)


@jit(wide=["y", "r", "weight", "bias", "weight2", "bias2", "out", "z", "history"])
def norm_tail_whole(
    y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, out, z, history, next_scale, norm_partials, status,
    positions, rows, row, eps,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores those statistics that are not None. `_emit` stores the result."""
    begin()
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    u = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if r is not None:
        shortcut = tl.load(r + base + offset, mask, other=0.0)
    if stopped(status, n):
        return
    at, there = groups_at(n, group, GROUPS, BLOCK_G)
    count = positions * (CHANNELS // GROUPS)
    center, m2 = group_moments(u, mask, count)
    scale = tl.rsqrt(m2 / count + eps)
    if mean is not None:
        tl.store(mean + at, center, there)
        tl.store(rstd + at, scale, there)
    u = normalised(u, center, scale) * tl.load(weight + channel, real, other=0.0)
    if r is not None:
        u += shortcut.to(tl.float32)
    u += tl.load(bias + channel, real, other=0.0)
    if weight2 is not None:
        u = relu(u)
        center, m2 = group_moments(u, mask, count)
        scale = tl.rsqrt(m2 / count + eps)
        if mean2 is not None:
            tl.store(mean2 + at, center, there)
            tl.store(rstd2 + at, scale, there)
        u = affine(normalised(u, center, scale), weight2, bias2, channel, real)
    _emit(u, offset, mask, n, positions * CHANNELS, out, z, history, next_scale, norm_partials, rows, row)


@jit(wide=["y", "r", "weight", "bias"])
def partial_moments(
    y, r, weight, bias, mean, rstd, partials, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Stores the moments (count, mean, M2) of every group over a run of positions in partials (n, splits, groups, 3).
    M2 is the sum of squares about the mean. If y's statistics are given, the moments are those of relu(gn(y) + r), else
    of y."""
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if r is not None:
        shortcut = tl.load(r + base + offset, mask, other=0.0)
    if stopped(status, n):
        return
    if mean is not None:
        at, there = groups_at(n, 0, GROUPS, BLOCK_G)
        center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
        x = affine(normalised(x, center, scale), weight, bias, channel, real)
        if r is not None:
            x += shortcut.to(tl.float32)
        x = relu(x)
    count = tl.minimum(BLOCK_P, positions - position) * (CHANNELS // GROUPS)
    center, m2 = group_moments(x, mask, count)
    at, there = groups_at(tl.program_id(0).to(tl.int64), 0, GROUPS, BLOCK_G)
    tl.store(partials + at * 3, tl.zeros_like(center) + count, there)
    tl.store(partials + at * 3 + 1, center, there)
    tl.store(partials + at * 3 + 2, m2, there)


@jit(wide=())
def combine_moments(partials, mean, rstd, status, parts, eps, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    """A group's mean and 1/σ from partials (n, parts, groups, 3), by Chan's formula."""
    begin()
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


@jit(wide=["y", "weight", "bias", "out"])
def norm_relu_apply(
    y, weight, bias, mean, rstd, out, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if stopped(status, n):
        return
    at, there = groups_at(n, 0, GROUPS, BLOCK_G)
    center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
    x = relu(affine(normalised(x, center, scale), weight, bias, channel, real))
    tl.store(out + base + offset, x.to(out.dtype.element_ty), mask)


@jit(wide=["y", "r", "weight", "bias", "weight2", "bias2", "out", "z", "history"])
def norm_tail_apply(
    y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, out, z, history, next_scale, norm_partials, status,
    positions, rows, row, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    u = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    if r is not None:
        shortcut = tl.load(r + base + offset, mask, other=0.0)
    if stopped(status, n):
        return
    at, there = groups_at(n, 0, GROUPS, BLOCK_G)
    center, scale = tl.load(mean + at, there, other=0.0), tl.load(rstd + at, there, other=0.0)
    u = affine(normalised(u, center, scale), weight, bias, channel, real)
    if r is not None:
        u += shortcut.to(tl.float32)
    if weight2 is not None:
        center, scale = tl.load(mean2 + at, there, other=0.0), tl.load(rstd2 + at, there, other=0.0)
        u = affine(normalised(relu(u), center, scale), weight2, bias2, channel, real)
    _emit(u, offset, mask, n, positions * CHANNELS, out, z, history, next_scale, norm_partials, rows, row)


@triton.jit
def _emit(f, offset, mask, n, size, out, z, history, next_scale, norm_partials, rows, row):
    """Stores f to out. If z is given, stores f - z in the history's row instead, and sums of its and f's squares."""
    base = n * size
    if z is None:
        tl.store(out + base + offset, f, mask)
    else:
        sums = norm_partials + tl.program_id(0).to(tl.int64) * 2
        at = tl.load(z + base + offset, mask, other=0.0)
        f = tl.where(mask, f, 0.0)
        tl.store(sums + 1, tl.sum(f * f))
        g = f - at
        if row >= 0:
            tl.store(history + (n * rows + row) * size + offset, rounded(g, history, next_scale, n), mask)
        tl.store(sums, tl.sum(g * g))
