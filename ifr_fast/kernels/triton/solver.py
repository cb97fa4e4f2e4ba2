"""The solver's step: residual, gram_row (not for Picard), rule, combine, one launch each; and `finish`.

Memory traffic bounds the step. gram_row and combine sweep the history once each, in blocks of a sample's elements (its
unknowns in memory order). Launch configurations depend on a sample's size and its rows, never on the number of samples,
so a sample's sums are formed in the same order in every batch.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..contract import DIVERGENCE, Method, Step, check_step, describe, ridge
from ..gpu import STATE, DeviceState, Tail, Total, aligned
from .launch import Launch, jit
from .norm import residual_tail
from .rules import first_scale_kernel, rule_kernel, rule_tile
from .tiles import RUNNING, begin, power_of_2, rounded

BLOCK = 1024  # elements of a block
RIDGE = ridge(torch.float32)
MAX_PARTS = 256  # parts of a sample's sums, which the kernel `rule` adds up
FIRST_SCALE = Launch(first_scale_kernel, PARTS=MAX_PARTS)


def blocks_per_part(size: int) -> int:
    """How many blocks a program sums: one, unless a sample would have more than MAX_PARTS parts. A power of two."""
    return power_of_2(-(-size // (BLOCK * MAX_PARTS)))


def alignment(size: int) -> int:
    """A divisor of the index of each row's first element: 8 allows loads of 16 bytes."""
    return 8 if size % 8 == 0 else 1


class Sweep(NamedTuple):
    """Launch configuration of a sweep over rows.

    BLOCK: elements of a block. GROUP: rows that a thread loads together, a power of two, so that a solve needs few
    variants of a kernel. maxnreg: registers for all those loads to be in flight at once. Left to itself, ptxas trades
    them for occupancy, or spills.
    """

    BLOCK: int
    GROUP: int
    num_warps: int
    maxnreg: int


def gram_sweep(count: int, itemsize: int, align: int, blocks: int) -> Sweep:
    """A thread reads 32 bytes per row if rows are aligned: half the shuffles and sums of 16."""
    registers = 128 if align > 1 and blocks == 1 else 224  # a loop over blocks is unrolled
    return Sweep(BLOCK, min(power_of_2(count), 8), itemsize if align > 1 else 4, registers)


def combine_sweep(count: int, itemsize: int, align: int) -> Sweep:
    """Half a block, so that one RoI's 50176 elements keep 98 programs busy. A thread reads 256 bytes at a time."""
    return Sweep(BLOCK // 2, min(power_of_2(count), 32 // itemsize), 2, 128 if align > 1 else 224)


def step(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """contract.Kernels.step. f: (n, …) float32 laid out as z, or a Tail or Total that is still to be computed."""
    check(state, z)
    check_step(state, step)
    residual(state, f, z, step)
    if not step.last and step.method != "picard":
        gram_row(state, z, step)
    rule(state, z, step)
    if not step.last:
        combine(state, z, step)


def check(state: DeviceState, z: Tensor) -> None:
    """Raises ValueError if a tensor of the solve has a wrong size: the kernels would read past its end."""
    state.addresses(STATE)
    state.check_size(z, "z", torch.float32)
    if (x := state.injection) is not None and state.fitting.get("injection") is not x:
        state.injection = state.fitting["injection"] = _laid_out(x, "injection", z)
    if state.r is not None:
        state.check_size(state.r, "state.r", state.r.dtype)


def residual(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, step: Step) -> None:
    """Stores g = f - z in the history, except in the last step, and partial sums of ‖g‖² and ‖f‖² in norm_partials."""
    row = step.row(state)
    if state.scales is not None and step.evaluation == 0 and row >= 0:
        # The first row has none before it to take its scale from.
        _residual(state, f, z, -1)
        parts = 0 if state.norm_partials is None else state.norm_partials.shape[1]
        FIRST_SCALE(state.n, (state.norm_partials, state.next_scale), (state.size, parts))
    _residual(state, f, z, row)


def _residual(state: DeviceState, f: Tensor | Tail | Total, z: Tensor, row: int) -> None:
    if isinstance(f, Tail):
        residual_tail(state, f, z, row)
        return
    addends = f.addends if isinstance(f, Total) else (f,)
    three = [*(_laid_out(a, "f", z) for a in addends), None, None][:3]
    parts, launch = _residual_launch(state.size)
    tensors = (*three, z, state.history, state.next_scale, state.reserve_norms(parts), state.status)
    launch(state.n * parts, tensors, (state.size, state.rows, row))


@lru_cache(maxsize=1024)
def _residual_launch(size: int) -> tuple[int, Launch]:
    """Parts of a sample, one a program."""
    blocks = blocks_per_part(size)
    constants = {"ALIGN": alignment(size), "BLOCK": BLOCK, "BLOCKS": blocks, "num_warps": 4}
    return -(-size // (blocks * BLOCK)), Launch(residual_kernel, **constants)


def gram_row(state: DeviceState, z: Tensor, step: Step) -> None:
    """Stores in gram_partials the partial inner products of the newest stored residual with the window's rows."""
    row, history = step.row(state), state.history
    first = max(0, row - step.window + 1)
    splits, groups, launch = _gram_launch(state.size, row - first + 1, history.itemsize)
    if state.gram_partials is None:
        state.gram_partials = torch.empty(state.n, splits, state.rows, dtype=torch.float32, device=history.device)
    tensors = (history, state.gram_partials, state.status)
    launch(state.n * splits * groups, tensors, (state.size, state.rows, row, first))


@lru_cache(maxsize=1024)
def _gram_launch(size: int, count: int, itemsize: int) -> tuple[int, int, Launch]:
    """Splits of a sample, and groups of rows. A program serves one of each."""
    blocks, align = blocks_per_part(size), alignment(size)
    sweep = gram_sweep(count, itemsize, align, blocks)
    launch = Launch(gram_row_kernel, ALIGN=align, BLOCKS=blocks, **sweep._asdict())
    return -(-size // (blocks * BLOCK)), -(-count // sweep.GROUP), launch


def rule(state: DeviceState, z: Tensor, step: Step) -> None:
    """Finishes the sums, judges the running samples (eager.assess) and, but in the last step, chooses their steps."""
    splits, parts = (0 if t is None else t.shape[1] for t in (state.gram_partials, state.norm_partials))
    tensors = (
        state.norm_partials, state.gram_partials, state.gram, state.p, state.q, state.step, state.total, state.best,
        state.norms, state.residual, state.trace, state.status, state.iterations, state.improved,
        state.scales, state.next_scale,
    )  # fmt: skip
    numbers = (
        state.n, state.size, state.rows, parts, splits, step.evaluation, step.row(state), step.window,
        int(step.affine), float(step.rtol), DIVERGENCE, RIDGE,
    )  # fmt: skip
    _rule_launch(step.method, state.rows, step.window)(state.n, tensors, numbers)


@lru_cache(maxsize=1024)
def _rule_launch(method: Method, rows: int, window: int) -> Launch:
    return Launch(rule_kernel, METHOD=method, maxnreg=255, **rule_tile(method, rows, window)._asdict())


def combine(state: DeviceState, z: Tensor, step: Step) -> None:
    """Moves the running samples: z from its coefficients over the rows so far, and z + X for the next evaluation."""
    if state.value is z:
        _combine(state, z, step.row(state) + 1, best=False)
    else:
        blocks, launch = _advance_launch(state.size)
        kept = (state.value, state.history, state.scales, state.status, state.improved)
        launch(state.n * blocks, (z, *kept, state.injection, state.r), (state.size,))


@lru_cache(maxsize=1024)
def _advance_launch(size: int) -> tuple[int, Launch]:
    """Blocks of a sample, one a program."""
    return -(-size // BLOCK), Launch(advance_kernel, ALIGN=alignment(size), BLOCK=BLOCK, num_warps=4)


def finish(state: DeviceState, z: Tensor) -> None:
    """Sets state.value, the best iterate. It is in z's memory if the history's coefficients give it."""
    check(state, z)
    if state.value is not z:
        state.value = torch.where(state.improved.view(-1, *[1] * (z.dim() - 1)), z, state.value)
    else:
        _combine(state, z, state.rows, best=True)


def _combine(state: DeviceState, z: Tensor, count: int, *, best: bool) -> None:
    """Computes z from the first `count` rows, with the best iterate's coefficients or the current one's."""
    coefficients, flags = (state.best, state.improved) if best else (state.total, state.status)
    injection, r = (None, None) if best else (state.injection, state.r)
    blocks, launch = _combine_launch(state.size, count, state.history.itemsize, best)
    tensors = (z, state.start, state.history, coefficients, flags, injection, r)
    launch(state.n * blocks, tensors, (state.size, state.rows, count))


@lru_cache(maxsize=1024)
def _combine_launch(size: int, count: int, itemsize: int, best: bool) -> tuple[int, Launch]:
    """Blocks of a sample, one a program."""
    align = alignment(size)
    sweep = combine_sweep(count, itemsize, align)
    groups = power_of_2(-(-count // sweep.GROUP))
    return -(-size // sweep.BLOCK), Launch(combine_kernel, ALIGN=align, GROUPS=groups, BEST=best, **sweep._asdict())


def _laid_out(tensor: Tensor, name: str, z: Tensor) -> Tensor:
    """tensor in z's memory layout, checked. Convolutions and autograd may return another one."""
    if tensor.shape != z.shape or tensor.device != z.device:
        raise ValueError(f"{name} is {describe(tensor)}: expected z's shape {tuple(z.shape)} on {z.device}")
    if tensor.stride() != z.stride():
        tensor = torch.empty_like(z, dtype=tensor.dtype).copy_(tensor)
    return aligned(tensor, name, z)


@jit(wide=["a", "b", "c", "z", "history"])
def residual_kernel(a, b, c, z, history, next_scale, partials, status, size, rows, row,
                    ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):  # fmt: skip
    """One program per part of a sample. partials (n, parts, 2): its ‖g‖² and ‖f‖², with f = a + b + c not rounded."""
    begin()
    size = size // ALIGN * ALIGN  # tells the compiler that ALIGN divides it
    parts = tl.cdiv(size, BLOCK * BLOCKS)
    sample = (tl.program_id(0) // parts).to(tl.int64)
    part = tl.program_id(0) % parts
    if tl.load(status + sample) != RUNNING:
        return
    g2 = tl.zeros([BLOCK], tl.float32)
    f2 = tl.zeros([BLOCK], tl.float32)
    for i in range(BLOCKS):
        at = (part * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        here = sample * size + at
        f = tl.load(a + here, inside, other=0.0).to(tl.float32)
        if b is not None:
            f += tl.load(b + here, inside, other=0.0).to(tl.float32)
        if c is not None:
            f += tl.load(c + here, inside, other=0.0).to(tl.float32)
        g = f - tl.load(z + here, inside, other=0.0)
        if row >= 0:
            tl.store(history + (sample * rows + row) * size + at, rounded(g, history, next_scale, sample), inside)
        g2 += g * g
        f2 += f * f
    tl.store(partials + (sample * parts + part) * 2, tl.sum(g2, 0))
    tl.store(partials + (sample * parts + part) * 2 + 1, tl.sum(f2, 0))


@jit(wide=["history"])
def gram_row_kernel(history, partials, status, size, rows, row, first,
                    ALIGN: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, GROUP: tl.constexpr):  # fmt: skip
    """One program per split of a sample and group of rows. Fills columns first … row of partials (n, splits, rows)."""
    begin()
    VECTOR: tl.constexpr = 8
    size = size // ALIGN * ALIGN  # tells the compiler that ALIGN divides it
    splits = tl.cdiv(size, BLOCK * BLOCKS)
    groups = tl.cdiv(row - first + 1, GROUP)
    program = tl.program_id(0) // groups
    sample = (program // splits).to(tl.int64)
    split = program % splits
    if tl.load(status + sample) != RUNNING:
        return
    j = first + tl.program_id(0) % groups * GROUP + tl.arange(0, GROUP)
    history += sample * rows * size
    # A thread adds up at once what it loads as one vector. This takes few registers, and threads exchange sums only at
    # the end.
    total = tl.zeros([GROUP, BLOCK // VECTOR], tl.float32)
    for i in range(BLOCKS):
        at = (split * BLOCKS + i) * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        g = tl.load(history + row.to(tl.int64) * size + at, inside, other=0.0)
        there = (j <= row)[:, None] & inside[None, :]
        tile = tl.load(history + j.to(tl.int64)[:, None] * size + at[None, :], there, other=0.0)
        product = tile.to(tl.float32) * g.to(tl.float32)[None, :]
        total += tl.sum(tl.reshape(product, (GROUP, BLOCK // VECTOR, VECTOR)), 2)
    tl.store(partials + (sample * splits + split) * rows + j, tl.sum(total, 1), j <= row)


@jit(wide=["z", "start", "history", "injection", "r"])
def combine_kernel(z, start, history, coefficients, flags, injection, r, size, rows, count, ALIGN: tl.constexpr,
                   BLOCK: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, BEST: tl.constexpr):  # fmt: skip
    """A program per block: z = start + Σ_{j < count} coefficient_j g_j for running samples (flags: status); r = z + X.

    BEST: for samples whose last iterate was not their best (flags: improved). Reads only rows with nonzero
    coefficients: others may never have been written.
    """
    begin()
    size = size // ALIGN * ALIGN  # tells the compiler that ALIGN divides it
    blocks = tl.cdiv(size, BLOCK)
    # In reverse order, because what gram_row read last is still in the cache.
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    flag = tl.load(flags + sample)
    skipped = flag if BEST else flag != RUNNING
    if skipped:
        return
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = sample * size + at
    history += sample * rows * size
    total = tl.zeros([BLOCK], tl.float32)
    if start is not None:
        total += tl.load(start + here, inside, other=0.0)
    for i in range(GROUPS):
        j = i * GROUP + tl.arange(0, GROUP)
        coefficient = tl.load(coefficients + sample * rows + j, j < count, other=0.0)
        read = (coefficient != 0) if BEST else (j < count)
        there = read[:, None] & inside[None, :]
        tile = tl.load(history + j.to(tl.int64)[:, None] * size + at[None, :], there, other=0.0)
        total += tl.sum(tile.to(tl.float32) * coefficient[:, None], 0)
    tl.store(z + here, total, inside)
    if r is not None:
        _store_shifted(total, injection, r, here, inside)


@jit(wide=["z", "value", "history", "injection", "r"])
def advance_kernel(z, value, history, scales, status, improved, injection, r, size,
                   ALIGN: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """A program per block: z += g for running samples. If z is its sample's best, value keeps it. r = z + X."""
    begin()
    size = size // ALIGN * ALIGN  # tells the compiler that ALIGN divides it
    blocks = tl.cdiv(size, BLOCK)
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    sample = (program // blocks).to(tl.int64)
    if tl.load(status + sample) != RUNNING:
        return
    at = program % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    here = sample * size + at
    old = tl.load(z + here, inside, other=0.0)
    if tl.load(improved + sample):
        tl.store(value + here, old, inside)
    g = tl.load(history + here, inside, other=0.0).to(tl.float32)
    if scales is not None:
        g *= tl.load(scales + sample)
    new = old + g
    tl.store(z + here, new, inside)
    if r is not None:
        _store_shifted(new, injection, r, here, inside)


@triton.jit
def _store_shifted(z, injection, r, here, inside):
    """Stores z + X in r, the input of F's first convolution."""
    x = tl.load(injection + here, inside, other=0.0).to(tl.float32)
    tl.store(r + here, (z + x).to(r.dtype.element_ty), inside)
