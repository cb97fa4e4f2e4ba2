"""Tiles of NHWC activations, [groups, positions, channels of a group], as the norm kernels hold them in registers.

A group's channels are padded to a power of two. If their number is one already, loads are contiguous vectors. Nothing
here depends on the number of samples, so a sample's sums are formed in the same order in every batch.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

from ..contract import RUNNING as _RUNNING

RUNNING = tl.constexpr(_RUNNING)

SPLIT = 8192  # elements of a tile of the split path (norm.py)
REGISTERS = 65536  # per multiprocessor


class Budget(NamedTuple):
    """Limits of a kernel's tiles: elements, warps, and the registers that a thread holds per element."""

    elements: int
    warps: int
    registers: int


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
    """A tile of all positions and some whole groups. It has at least 64 bytes a position and 4096 elements, if the map
    has as many.

    None if even one group exceeds the budget.
    """
    size, count = power_of_2(channels // groups), power_of_2(groups)
    side = power_of_2(positions)
    if side * size > budget.elements:
        return None
    block = 1
    while block < count and (block * size * itemsize < 64 or side * block * size < 4096):
        block *= 2
    while side * block * size > budget.elements:
        block //= 2
    return Tile(side, block, size, -(-groups // block), *_threads(side * block * size, budget))


def split_tile(positions: int, channels: int, groups: int, registers: int = 4) -> Tile:
    """A tile of consecutive positions with all their channels. registers: as in Budget."""
    size, count = power_of_2(channels // groups), power_of_2(groups)
    side = min(max(1, SPLIT // (count * size)), power_of_2(positions))
    threads = _threads(side * count * size, Budget(SPLIT, 16, registers))
    return Tile(side, count, size, -(-positions // side), *threads)


def _threads(elements: int, budget: Budget) -> tuple[int, int]:
    """The number of warps, and the limit of registers per thread. A thread takes 16 elements: with more, too few warps
    fit a multiprocessor to hide the latency of its memory. Without a limit ptxas spills registers to fit more warps."""
    warps = min(max(elements // 512, 1), budget.warps)
    threads = 32 * warps
    return warps, min(REGISTERS // threads, max(64, budget.registers * elements // threads), 255)


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
def relu(x):
    """max(x, 0) that keeps NaN."""
    return tl.where(x < 0, 0.0, x)
