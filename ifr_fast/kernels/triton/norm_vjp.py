"""The vjps of norm.py's functions on NHWC activations; `eager` is their specification.

Let x̂ = (x - mean) / σ, w the weight of a GroupNorm and g the gradient of its output. The gradient of x is (g·w - ⟨g·w⟩
- x̂ ⟨g·w·x̂⟩) / σ, where ⟨·⟩ is the mean over the group. As in norm.py, small maps take the whole path (sums and result
from registers) and larger ones the split path (partial sums, their addition, a second reading). The gradients of
weights and biases are summed over positions here, and over samples by torch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import Norm
from ..gpu import DeviceState, checked, like, status_of
from .launch import Launch, jit
from .tiles import (
    RUNNING,
    Budget,
    affine,
    begin,
    group_sums,
    groups_at,
    normalised,
    relu,
    split_tile,
    spread,
    tile_at,
    whole_tile,
)

# Budgets of the whole path's tiles. Within them no register is spilled.
NORM = Budget(elements=16384, fixed=0, each=4)
TAIL = Budget(elements=8192, fixed=0, each=8, blocks=2)
TAIL_PARAMS = TAIL._replace(each=9)


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: DeviceState | None = None
) -> tuple[Tensor, list[Tensor]]:
    """With params no sample is skipped: the gradients of weight and bias are sums over all samples."""
    y = checked(y, norm, None, state, statistics)
    return _norm_vjp(like(grad, "grad", y), y, norm, statistics, params, _status(state, params), relu=True)


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
    """With params no sample is skipped, as in norm_relu_vjp."""
    y, status = checked(y, first, second, state, statistics), _status(state, params)
    grad, shortcut = like(grad, "grad", y), None if shortcut is None else like(shortcut, "shortcut", y)
    if second is None:
        grad_y, grads = _norm_vjp(grad, y, first, statistics, params, status, relu=False)
        return grad_y, None if shortcut is None else grad, grads
    n, channels, height, width = y.shape
    plan = _plan("tail params" if params else "tail", channels, height * width, first.groups, y.itemsize)
    if plan.whole is None:
        return _split_tail_vjp(plan, grad, y, shortcut, (first, second), statistics, params, status)
    grad_y, grad_shortcut = torch.empty_like(y), None if shortcut is None else torch.empty_like(grad)
    sums = torch.empty((n, 4, channels), dtype=torch.float32, device=y.device) if params else None
    inputs = (grad, y, shortcut, *first[:2], *second[:2], *statistics)
    plan.whole(n * plan.blocks, (*inputs, grad_y, grad_shortcut, sums, status), (height * width,))
    return grad_y, grad_shortcut, _over_samples(sums)


class Plan(NamedTuple):
    """The launches of a norm's vjp, for maps of one size. blocks: tiles in a sample. whole: the whole path's only one.
    The split path's: sums, add, apply; for two norms sums, add, middle, add, apply."""

    blocks: int
    whole: Launch | None
    sums: Launch
    middle: Launch
    apply: Launch
    add: Launch


@lru_cache(maxsize=1024)
def _plan(
    kind: Literal["norm", "relu", "tail", "tail params"], channels: int, positions: int, groups: int, itemsize: int
) -> Plan:
    tail = kind.startswith("tail")
    budget = TAIL_PARAMS if kind == "tail params" else TAIL if tail else NORM
    tile = whole_tile(positions, channels, groups, itemsize, budget)
    is_whole = tile is not None
    tile = tile or split_tile(positions, channels, groups, TAIL if tail else NORM)
    constants = tile.constants(channels, groups)
    one = constants | {"RELU": kind == "relu"}
    whole = Launch(norm_tail_vjp_whole, **constants) if tail else Launch(norm_vjp_whole, **one)
    return Plan(
        tile.blocks,
        whole if is_whole else None,
        Launch(second_vjp_sums, **constants) if tail else Launch(norm_vjp_sums, **one),
        Launch(second_vjp_apply, **constants),
        Launch(norm_vjp_apply, **one),
        Launch(add_sums, GROUPS=groups, BLOCK_N=1024, num_warps=4),
    )


def _norm_vjp(
    grad: Tensor,
    y: Tensor,
    norm: Norm,
    statistics: list[Tensor],
    params: bool,
    status: Tensor | None,
    *,
    relu: bool,
) -> tuple[Tensor, list[Tensor]]:
    n, channels, height, width = y.shape
    grad_y = torch.empty_like(y)
    plan = _plan("relu" if relu else "norm", channels, height * width, norm.groups, y.itemsize)
    programs = n * plan.blocks
    parts = n if plan.whole else programs
    grads = torch.empty((parts, 2, channels), dtype=torch.float32, device=y.device) if params else None
    inputs = (grad, y, norm.weight, norm.bias, *statistics)
    if plan.whole:
        plan.whole(programs, (*inputs, grad_y, grads, status), (height * width,))
        return grad_y, _over_samples(grads)
    partials = torch.empty((n, plan.blocks, norm.groups, 2), dtype=torch.float32, device=y.device)
    sizes = (height * width, plan.blocks)
    plan.sums(programs, (*inputs, partials, grads, status), sizes)
    sums = _add(plan, partials, status)
    plan.apply(programs, (*inputs, sums, grad_y, status), sizes)
    return grad_y, _over_samples(grads)


def _split_tail_vjp(
    plan: Plan,
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    norms: tuple[Norm, Norm],
    statistics: list[Tensor],
    params: bool,
    status: Tensor | None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    first, second = norms
    n, channels, height, width = y.shape
    programs, sizes = n * plan.blocks, (height * width, plan.blocks)
    grad_y, grad_u = torch.empty_like(y), torch.empty_like(grad)
    partials = torch.empty((n, plan.blocks, first.groups, 2), dtype=torch.float32, device=y.device)
    grads = torch.empty((programs, 4, channels), dtype=torch.float32, device=y.device) if params else None
    inputs = (grad, y, shortcut, *first[:2], *second[:2], *statistics)
    plan.sums(programs, (*inputs, partials, grads, status), sizes)
    sums = _add(plan, partials, status)
    plan.middle(programs, (*inputs, sums, grad_u, partials, grads, status), sizes)
    sums = _add(plan, partials, status)
    plan.apply(programs, (grad_u, y, *first[:2], *statistics[:2], sums, grad_y, status), sizes)
    return grad_y, None if shortcut is None else grad_u, _over_samples(grads)


def _status(state: DeviceState | None, params: bool) -> Tensor | None:
    return None if params else status_of(state)


def _over_samples(grads: Tensor | None) -> list[Tensor]:
    return [] if grads is None else list(grads.sum(0))


def _add(plan: Plan, partials: Tensor, status: Tensor | None) -> Tensor:
    n, parts, groups, _ = partials.shape
    sums = torch.empty((n, groups, 2), dtype=torch.float32, device=partials.device)
    plan.add(n * groups, (partials, sums, status), (parts,))
    return sums


@jit(wide=["grad", "y", "weight", "bias", "grad_y", "grads"])
def norm_vjp_whole(
    grad, y, weight, bias, mean, rstd, grad_y, grads, status, positions,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """The vjp of gn(y) or, with RELU, of relu(gn(y)). grads (n, 2, channels): those of weight and bias."""
    begin()
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    g = tl.load(grad + base + offset, mask, other=0.0).to(tl.float32)
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    center, scale = _load_groups(mean, rstd, n, group, GROUPS, BLOCK_G)
    x = normalised(x, center, scale)
    if RELU:
        g = tl.where(affine(x, weight, bias, channel, real) > 0, g, 0.0)
    if grads is not None:
        _store_channel_sums(g, x, grads + n * (2 * CHANNELS), channel, real, CHANNELS)
    g *= tl.load(weight + channel, real, other=0.0)
    count = positions * (CHANNELS // GROUPS)
    g = _project(g, x, scale, group_sums(g), group_sums(g * x), count)
    tl.store(grad_y + base + offset, g.to(grad_y.dtype.element_ty), mask)


@jit(wide=["grad", "y", "r", "weight", "bias", "weight2", "bias2", "grad_y", "grad_r", "grads"])
def norm_tail_vjp_whole(
    grad, y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, grad_y, grad_r, grads, status, positions,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The vjp of the tail. grads (n, 4, channels): those of the first norm's weight and bias, then of the second's."""
    begin()
    BLOCKS: tl.constexpr = (GROUPS + BLOCK_G - 1) // BLOCK_G
    n, group = (tl.program_id(0) // BLOCKS).to(tl.int64), tl.program_id(0) % BLOCKS * BLOCK_G
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(0, group, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    count = positions * (CHANNELS // GROUPS)
    center, scale = _load_groups(mean, rstd, n, group, GROUPS, BLOCK_G)
    center2, scale2 = _load_groups(mean2, rstd2, n, group, GROUPS, BLOCK_G)
    g = tl.load(grad + base + offset, mask, other=0.0)
    x, u = _before_second(y, r, weight, bias, center, scale, base + offset, mask, channel, real)
    v = normalised(relu(u), center2, scale2)
    if grads is not None:
        _store_channel_sums(g, v, grads + n * (4 * CHANNELS) + 2 * CHANNELS, channel, real, CHANNELS)
    g *= tl.load(weight2 + channel, real, other=0.0)
    g = _project(g, v, scale2, group_sums(g), group_sums(g * v), count)
    g = tl.where((u > 0) & mask, g, 0.0)
    if grad_r is not None:
        tl.store(grad_r + base + offset, g, mask)
    if grads is not None:
        _store_channel_sums(g, x, grads + n * (4 * CHANNELS), channel, real, CHANNELS)
    g *= tl.load(weight + channel, real, other=0.0)
    g = _project(g, x, scale, group_sums(g), group_sums(g * x), count)
    tl.store(grad_y + base + offset, g.to(grad_y.dtype.element_ty), mask)


@jit(wide=["grad", "y", "weight", "bias", "grads"])
def norm_vjp_sums(
    grad, y, weight, bias, mean, rstd, partials, grads, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    """Sums of g·w and g·w·x̂ over a run of positions. partials (n, splits, groups, 2); grads (n · splits, 2, C)."""
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    g = tl.load(grad + base + offset, mask, other=0.0).to(tl.float32)
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    center, scale = _load_groups(mean, rstd, n, 0, GROUPS, BLOCK_G)
    x = normalised(x, center, scale)
    if RELU:
        g = tl.where(affine(x, weight, bias, channel, real) > 0, g, 0.0)
    slot = tl.program_id(0).to(tl.int64)
    if grads is not None:
        _store_channel_sums(g, x, grads + slot * (2 * CHANNELS), channel, real, CHANNELS)
    g *= tl.load(weight + channel, real, other=0.0)
    _store_group_sums(g, x, partials, slot, GROUPS, BLOCK_G)


@jit(wide=["grad", "y", "weight", "bias", "grad_y"])
def norm_vjp_apply(
    grad, y, weight, bias, mean, rstd, sums, grad_y, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
    RELU: tl.constexpr,
):  # fmt: skip
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    g = tl.load(grad + base + offset, mask, other=0.0).to(tl.float32)
    x = tl.load(y + base + offset, mask, other=0.0).to(tl.float32)
    center, scale = _load_groups(mean, rstd, n, 0, GROUPS, BLOCK_G)
    average, slope = _load_sums(sums, n, GROUPS, BLOCK_G)
    x = normalised(x, center, scale)
    if RELU:
        g = tl.where(affine(x, weight, bias, channel, real) > 0, g, 0.0)
    g *= tl.load(weight + channel, real, other=0.0)
    g = _project(g, x, scale, average, slope, positions * (CHANNELS // GROUPS))
    tl.store(grad_y + base + offset, g.to(grad_y.dtype.element_ty), mask)


@jit(wide=["grad", "y", "r", "weight", "bias", "weight2", "bias2", "grads"])
def second_vjp_sums(
    grad, y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, partials, grads, status, positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """As norm_vjp_sums, for the tail's second norm. grads (n · splits, 4, channels): fills the last two of the four."""
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    g = tl.load(grad + base + offset, mask, other=0.0)
    center, scale = _load_groups(mean, rstd, n, 0, GROUPS, BLOCK_G)
    _, u = _before_second(y, r, weight, bias, center, scale, base + offset, mask, channel, real)
    center, scale = _load_groups(mean2, rstd2, n, 0, GROUPS, BLOCK_G)
    v = normalised(relu(u), center, scale)
    slot = tl.program_id(0).to(tl.int64)
    if grads is not None:
        _store_channel_sums(g, v, grads + slot * (4 * CHANNELS) + 2 * CHANNELS, channel, real, CHANNELS)
    g *= tl.load(weight2 + channel, real, other=0.0)
    _store_group_sums(g, v, partials, slot, GROUPS, BLOCK_G)


@jit(wide=["grad", "y", "r", "weight", "bias", "weight2", "bias2", "grad_u", "grads"])
def second_vjp_apply(
    grad, y, r, weight, bias, weight2, bias2, mean, rstd, mean2, rstd2, sums, grad_u, partials, grads, status,
    positions, splits,
    CHANNELS: tl.constexpr, GROUPS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The gradient of u = gn_first(y) + shortcut, and the sums of the first norm's vjp. grads (n · splits, 4,
    channels): fills the first two of the four."""
    begin()
    n, position = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits * BLOCK_P
    if status is not None and tl.load(status + n) != RUNNING:
        return
    offset, mask, channel, real = tile_at(position, 0, positions, CHANNELS, GROUPS, BLOCK_P, BLOCK_G, BLOCK_S)
    base = n * positions * CHANNELS
    g = tl.load(grad + base + offset, mask, other=0.0)
    center, scale = _load_groups(mean, rstd, n, 0, GROUPS, BLOCK_G)
    x, u = _before_second(y, r, weight, bias, center, scale, base + offset, mask, channel, real)
    center, scale = _load_groups(mean2, rstd2, n, 0, GROUPS, BLOCK_G)
    average, slope = _load_sums(sums, n, GROUPS, BLOCK_G)
    g *= tl.load(weight2 + channel, real, other=0.0)
    g = _project(g, normalised(relu(u), center, scale), scale, average, slope, positions * (CHANNELS // GROUPS))
    g = tl.where((u > 0) & mask, g, 0.0)
    tl.store(grad_u + base + offset, g, mask)
    slot = tl.program_id(0).to(tl.int64)
    if grads is not None:
        _store_channel_sums(g, x, grads + slot * (4 * CHANNELS), channel, real, CHANNELS)
    g *= tl.load(weight + channel, real, other=0.0)
    _store_group_sums(g, x, partials, slot, GROUPS, BLOCK_G)


@jit(wide=())
def add_sums(partials, sums, status, parts, GROUPS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums over the parts: (n, parts, groups, 2) → (n, groups, 2)."""
    begin()
    n, group = (tl.program_id(0) // GROUPS).to(tl.int64), tl.program_id(0) % GROUPS
    if status is not None and tl.load(status + n) != RUNNING:
        return
    part = tl.arange(0, BLOCK_N)
    first, second = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    start = 0
    while start < parts:
        at = partials + ((n * parts + start + part) * GROUPS + group) * 2
        first += tl.load(at, start + part < parts, other=0.0)
        second += tl.load(at + 1, start + part < parts, other=0.0)
        start += BLOCK_N
    at = sums + (n * GROUPS + group) * 2
    tl.store(at, tl.sum(first, axis=0))
    tl.store(at + 1, tl.sum(second, axis=0))


@triton.jit
def _before_second(y, r, weight, bias, mean, rstd, at, mask, channel, real):
    """x̂ of the tail's first norm, and u = gn_first(y) + r, the input of ReLU and the second norm."""
    x_hat = normalised(tl.load(y + at, mask, other=0.0).to(tl.float32), mean, rstd)
    if r is not None:
        shortcut = tl.load(r + at, mask, other=0.0).to(tl.float32)
        return x_hat, affine(x_hat, weight, bias, channel, real) + shortcut
    else:
        return x_hat, affine(x_hat, weight, bias, channel, real)


@triton.jit
def _project(g, x_hat, rstd, total, weighted, count):
    """The vjp of a norm's centring and scaling, given the sums of g and g·x̂."""
    return (g - spread(total / count) - x_hat * spread(weighted / count)) * spread(rstd)


@triton.jit
def _load_groups(a, b, n, group, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    at, there = groups_at(n, group, GROUPS, BLOCK_G)
    return tl.load(a + at, there, other=0.0), tl.load(b + at, there, other=0.0)


@triton.jit
def _load_sums(sums, n, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    at, there = groups_at(n, 0, GROUPS, BLOCK_G)
    return tl.load(sums + at * 2, there, other=0.0), tl.load(sums + at * 2 + 1, there, other=0.0)


@triton.jit
def _store_group_sums(g, x_hat, partials, slot, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    at, there = groups_at(slot, 0, GROUPS, BLOCK_G)
    tl.store(partials + at * 2, group_sums(g), there)
    tl.store(partials + at * 2 + 1, group_sums(g * x_hat), there)


@triton.jit
def _store_channel_sums(g, x_hat, grads, channel, real, CHANNELS: tl.constexpr):
    """The gradients of a norm's weight and then bias, [channels] each, from these positions."""
    tl.store(grads + channel, tl.sum(g * x_hat, axis=1, keep_dims=True), real)
    tl.store(grads + CHANNELS + channel, tl.sum(g, axis=1, keep_dims=True), real)
