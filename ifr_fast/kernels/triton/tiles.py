"""Tiles of NHWC activations, [groups, positions, channels of a group], as the norm kernels hold them in registers.

A group's channels are padded to a power of two. If their number is one already, loads are contiguous vectors. Nothing
here depends on the number of samples, so a sample's sums are formed in the same order in every batch.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import triton
import triton.language as tl

from ..contract import RUNNING as _RUNNING

RUNNING = tl.constexpr(_RUNNING)

SPLIT = 4096  # elements of a tile of the split path (norm.py)
REGISTERS, THREADS, BLOCKS = 65536, 2048, 32  # that a multiprocessor has room for


class Budget(NamedTuple):
    """Of a kernel: the most elements of its tiles; the registers that a thread needs, some fixed and some for each
    element it holds; how many blocks shall share a multiprocessor, so that some load while others compute.
    tests/tools/compile_triton.py tells what a kernel takes, and whether it spills."""

    elements: int
    fixed: int
    each: int
    blocks: int = 3

    def narrow(self, size: int) -> Budget:
        """For groups of `size` channels: where accesses take less than four numbers, each has an address to keep."""
        more = 2 // math.gcd(size, 4)
        return self._replace(elements=self.elements // (2 if more else 1), each=self.each + more)


class Tile(NamedTuple):
    """Launch configuration: the tile's sides (powers of two), tiles in a sample, warps, and registers per thread."""

    positions: int
    groups: int
    size: int
    blocks: int
    warps: int
    registers: int

    def constants(self, channels: int, groups: int) -> dict[str, int]:
        sides = {"BLOCK_P": self.positions, "BLOCK_G": self.groups, "BLOCK_S": self.size}
        return {"CHANNELS": channels, "GROUPS": groups, **sides, "num_warps": self.warps, "maxnreg": self.registers}


def power_of_2(n: int) -> int:
    """The least power of two that is not below n ≥ 1. (Triton's own takes microseconds.)"""
    return 1 << (n - 1).bit_length()


def whole_tile(positions: int, channels: int, groups: int, itemsize: int, budget: Budget) -> Tile | None:
    """A tile of all positions and some whole groups. It has at least 32 bytes a position, which are read at once, and
    4096 elements, if the map has as many; less where otherwise too few blocks would share a multiprocessor.

    None if even one group exceeds the budget.
    """
    budget = budget.narrow(channels // groups)
    size, count = power_of_2(channels // groups), power_of_2(groups)
    side = power_of_2(positions)
    if side * size > budget.elements:
        return None
    block = 1
    while block < count and (block * size * itemsize < 32 or side * block * size < 4096):
        block *= 2
    while side * block * size > budget.elements:
        block //= 2
    smaller = [block >> i for i in range(block.bit_length())]
    block = max(
        smaller, key=lambda b: min(_occupancy(side * b * size, budget)[0], budget.blocks)
    )  # the first of equals
    return Tile(side, block, size, -(-groups // block), *_threads(side * block * size, budget))


def split_tile(positions: int, channels: int, groups: int, budget: Budget) -> Tile:
    """A tile of consecutive positions with all their channels."""
    budget = budget.narrow(channels // groups)
    size, count = power_of_2(channels // groups), power_of_2(groups)
    side = min(max(1, SPLIT // (count * size)), power_of_2(positions))
    return Tile(side, count, size, -(-positions // side), *_threads(side * count * size, budget))


def _occupancy(elements: int, budget: Budget) -> tuple[int, int]:
    """How many blocks share a multiprocessor, and the threads of each. A thread holds 16 or 32 elements, so that most
    blocks fit, and of equal ones most threads; 64 only where too few blocks would fit."""

    def choice(held: int) -> tuple[int, int]:
        threads = 32 * min(max(elements // (32 * held), 1), 32)
        needed = budget.fixed + budget.each * max(elements // threads, 1)
        return min(REGISTERS // (threads * needed), THREADS // threads, BLOCKS) if needed < 256 else 0, threads

    best = max(choice(16), choice(32))
    return best if best[0] >= budget.blocks else max(best, choice(64))


def _threads(elements: int, budget: Budget) -> tuple[int, int]:
    """The number of warps, and the limit of registers per thread at which the blocks fit. Without a limit ptxas takes
    more, or spills some to fit more warps."""
    blocks, threads = _occupancy(elements, budget)
    return threads // 32, min(REGISTERS // (threads * max(blocks, 1)) // 8 * 8, 255)


@triton.jit
def begin():
    """Every kernel's first line. It lets the next kernel be started while this one runs, and waits until those before
    have ended (programmatic dependent launch: launch.py)."""
    if tl.target_info.cuda_capability_geq(9, 0):
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def tile_at(position, group, positions, CHANNELS: tl.constexpr, GROUPS: tl.constexpr,
            BLOCK_P: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_S: tl.constexpr):  # fmt: skip
    """The tile that begins at (position, group): offsets in its sample, with mask; channels [G, 1, S], with mask."""
    SIZE: tl.constexpr = CHANNELS // GROUPS
    p = position + tl.arange(0, BLOCK_P)[None, :, None]
    g = group + tl.arange(0, BLOCK_G)[:, None, None]
    s = tl.arange(0, BLOCK_S)[None, None, :]
    channel = g * SIZE + s
    real = (g < GROUPS) & (s < SIZE)
    return p * CHANNELS + channel, (p < positions) & real, channel, real


@triton.jit
def groups_at(n, group, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr):
    """Offsets [G] of a sample's groups in its statistics, and their mask."""
    g = group + tl.arange(0, BLOCK_G)
    return n * GROUPS + g, g < GROUPS


@triton.jit
def stopped(status, n):
    """Has the sample stopped? A kernel asks this after its loads, so that it waits for them and the status at once."""
    if status is None:
        return False
    else:
        code = tl.load(status + n)
        tl.debug_barrier()  # or the assembler moves loads behind the branch
        return code != RUNNING


@triton.jit
def spread(x):
    """Values of groups, [G] → [G, 1, 1], to combine with a tile."""
    return x[:, None, None]


@triton.jit
def group_sums(x):
    """[G, P, S] → [G], in one reduction: each thread adds up what it holds before threads exchange sums."""
    G: tl.constexpr = x.shape[0]
    REST: tl.constexpr = x.shape[1] * x.shape[2]
    return tl.sum(tl.reshape(x, (G, REST)), axis=1)


@triton.jit
def group_moments(x, mask, count):
    """Mean [G] and sum of squares about it, in two passes: a difference of large sums would cancel."""
    mean = group_sums(tl.where(mask, x, 0.0)) / count
    centred = tl.where(mask, x - spread(mean), 0.0)
    return mean, group_sums(centred * centred)


@triton.jit
def normalised(x, mean, rstd):
    """(x - mean) / σ, with mean and rstd = 1/σ [G]."""
    return (x - spread(mean)) * spread(rstd)


@triton.jit
def affine(x_hat, weight, bias, channel, real):
    """The end of a norm. weight and bias are loaded here, late, because they would occupy registers until now."""
    return x_hat * tl.load(weight + channel, real, other=0.0) + tl.load(bias + channel, real, other=0.0)


@triton.jit
def rounded(g, history, next_scale, sample):
    """g as the history stores it: in 8 bits, over its scale."""
    if next_scale is None:
        return g.to(history.dtype.element_ty)
    else:
        g *= 1.0 / tl.load(next_scale + sample)  # a power of two: exact
        return to_e5m2(g)


@triton.jit
def to_e5m2(x):
    """To the nearest float8e5, ties to even; beyond the largest to the largest. NaN stays."""
    if tl.target_info.cuda_capability_geq(8, 9):
        return x.to(tl.float8e5)  # one instruction; before it, and under the interpreter, this would cut off digits
    else:
        bits = x.to(tl.int32, bitcast=True)
        size = bits & 0x7FFFFFFF
        kept = tl.minimum(size, 0x47600000)  # 57344, the largest
        normal = ((kept + 0xFFFFF + ((kept >> 21) & 1)) >> 21) - (112 << 2)
        # Below 2⁻¹⁴ numbers are 2⁻¹⁶ apart, and so are floats from 128 on.
        small = (tl.abs(x) + 128.0).to(tl.int32, bitcast=True) - 0x43000000
        code = tl.where(size < 0x38800000, small, normal)
        code = tl.where(size > 0x7F800000, 0x7F, code) | ((bits >> 24) & 0x80)
        return code.to(tl.uint8).to(tl.float8e5, bitcast=True)


@triton.jit
def relu(x):
    """max(x, 0) that keeps NaN."""
    return tl.where(x < 0, 0.0, x)
