"""The 3×3 convolution as an implicit matrix product whose epilogue sums for GroupNorm. Opt-in until it is measured.

Rows of the product are positions, columns output channels, and the depth runs over the 9 taps of each block of input
channels. In NHWC memory a tap of position m is the row m + dy·W + dx, so a tile's rows are gathered by pointers, masked
at the borders (asynchronous copies that fill with zero). A zero-padded layout would save the masks, but every kernel
around the convolution would have to read and write it, and tensor descriptors fetch boxes whose sides are powers of
two: 14×14 positions in a 16×16 box waste 23 % of the products, flat rows none. Hopper's loop is 130 instructions beside
a thousand cycles of matrix products, so there is little for descriptors to save. The taps are the inner loop, for they
read nearly the same rows, which L2 still holds.

A sample's positions are cut into segments, the same ones for every tile and batch (`Rows`). A segment lies in one tile,
belongs to one sample, and is summed in one order, so neither results nor sums depend on batch mates. Tiles are not kept
resident: a tile whose samples have all stopped costs a few loads, and the next takes its place, which a fixed
assignment of tiles to multiprocessors could not offer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..gpu import DeviceState, status_of
from .tiles import RUNNING, nhwc

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
INTERPRETED = triton.knobs.runtime.interpret


class Rows(NamedTuple):
    """How a map's positions become rows: `count` segments of `segment` positions, and a shorter one of `rest`, which is
    0 or a power of two. The last segment may be partly empty."""

    segment: int
    count: int
    rest: int

    @property
    def parts(self) -> int:
        return self.count + (self.rest > 0)

    def tiles(self, n: int, height: int) -> tuple[int, int]:
        """Tiles of `height` rows for n samples: of segments, and of rests."""
        return triton.cdiv(n * self.count * self.segment, height), triton.cdiv(n * self.rest, height)


@lru_cache(maxsize=256)
def rows_of(positions: int) -> Rows:
    """The longest segments that leave at most a tenth of the rows empty, else those that leave the fewest."""
    choices = []
    for segment in (64, 32, 16):
        count, left = divmod(positions, segment)
        rest = triton.next_power_of_2(left) if left else 0
        choices.append(Rows(segment, count, rest) if rest < segment else Rows(segment, count + 1, 0))
    used = [rows.count * rows.segment + rows.rest for rows in choices]
    good = [rows for rows, total in zip(choices, used, strict=True) if total <= 1.1 * positions]
    return good[0] if good else choices[used.index(min(used))]


class Config(NamedTuple):
    """A tile of `height` positions by `width` output channels, `depth` input channels at a time."""

    height: int
    width: int
    depth: int
    warps: int
    stages: int

    def shared(self, itemsize: int) -> int:
        """Bytes of shared memory that the operands in flight take."""
        return self.stages * (self.height + self.width) * self.depth * itemsize


class Chip(NamedTuple):
    """A device as the choice of a tile sees it; shared: bytes that one block may have."""

    major: int
    multiprocessors: int
    shared: int


# height, width, warps, stages. Large tiles need Hopper's or later matrix products: before, they spill.
LARGE = [(256, 128, 8, 3), (128, 256, 8, 3), (256, 128, 8, 4), (128, 256, 8, 4), (128, 128, 4, 3)]
SMALL = [(128, 128, 8, 3), (128, 64, 4, 4), (64, 128, 4, 4), (64, 64, 4, 4)]
EXACT = [(64, 64, 4, 3), (64, 32, 4, 3)]  # float32 without TF32: no matrix unit


def candidates(channels: int, dtype: torch.dtype, precision: str, chip: Chip) -> list[Config]:
    """Tiles worth trying on `channels` input channels. The depth is the same in all of them, and with it the rounding
    of a result."""
    if precision == "ieee":
        shapes, depth = EXACT, 16
    else:
        shapes = LARGE + SMALL if chip.major >= 9 and dtype != torch.float32 else SMALL
        depth = _depth(channels, 128 // dtype.itemsize)
    configs = [Config(height, width, depth, warps, stages) for height, width, warps, stages in shapes]
    return [config for config in configs if config.shared(dtype.itemsize) + 1024 <= chip.shared]


def _depth(channels: int, most: int) -> int:
    """The longest block that pads the channels by at most an eighth, else the shortest."""
    depth = most
    while depth > 16 and triton.cdiv(channels, depth) * depth > 1.125 * channels:
        depth //= 2
    return depth


RIM = 48  # what fetching a row or column of a tile costs, counted in products. A guess until measured


@lru_cache(maxsize=1024)
def choose(n: int, positions: int, channels: int, out: int, dtype: torch.dtype, precision: str, chip: Chip) -> Config:
    """The candidate that should finish first: by the busiest multiprocessor's tiles, a tile by its area and rim."""
    rows = rows_of(positions)

    def cost(config: Config) -> int:
        tiles = sum(rows.tiles(n, config.height)) * triton.cdiv(out, config.width)
        area, rim = config.height * config.width, config.height + config.width
        return triton.cdiv(tiles, chip.multiprocessors) * (area + RIM * rim)

    return min(candidates(channels, dtype, precision, chip), key=cost)


@lru_cache(maxsize=32)
def chip(device: torch.device) -> Chip:
    """The device's properties; for a CPU, where the kernel is interpreted, an H100's."""
    if device.type == "cpu":
        return Chip(9, 132, 232_448)
    p = torch.cuda.get_device_properties(device)
    return Chip(p.major, p.multi_processor_count, p.shared_memory_per_block_optin)


class ImplicitGemm:
    """The convolution by one weight. Calling it: x (N, Ci, H, W) -> y (N, Co, H, W) in x's dtype, channels_last, and
    with `statistics` the partial sums (N, parts, Co, 3) float32 of y: count, mean, sum of squares about that mean."""

    def __init__(self, weight: Tensor, *, statistics: bool, precision: str) -> None:
        self.out, self.channels = weight.shape[:2]
        self.dtype, self.statistics, self.precision = weight.dtype, statistics, precision
        self.chip = chip(weight.device)
        depth = candidates(self.channels, self.dtype, precision, self.chip)[0].depth
        self.weight = _pack(weight, depth)

    def __call__(self, x: Tensor, state: DeviceState | None = None) -> tuple[Tensor, Tensor | None]:
        if x.shape[1] != self.channels or x.dtype != self.dtype:
            raise ValueError(f"x: expected {self.channels} channels in {self.dtype}, got {x.shape[1]} in {x.dtype}")
        n, _, height, width = x.shape
        config = choose(n, height * width, self.channels, self.out, self.dtype, self.precision, self.chip)
        return self.launch(config, x, state)

    def launch(self, config: Config, x: Tensor, state: DeviceState | None = None) -> tuple[Tensor, Tensor | None]:
        """The convolution by a given tile."""
        x = nhwc(x)
        n, _, height, width = x.shape
        y = torch.empty((n, self.out, height, width), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        rows = rows_of(height * width)
        partial = None
        if self.statistics:
            partial = torch.empty((n, rows.parts, self.out, 3), dtype=torch.float32, device=x.device)
        if n == 0:
            return y, partial
        whole, rests = rows.tiles(n, config.height)
        columns = triton.cdiv(self.out, config.width)
        convolve[((whole + rests) * columns,)](
            x, self.weight, y, partial, status_of(state), n, height, width, rows.count, whole,
            SEGMENT=rows.segment, REST=rows.rest, CHANNELS=self.channels, OUT=self.out, HEIGHT=config.height,
            WIDTH=config.width, DEPTH=config.depth, PRECISION=self.precision, UPCAST=INTERPRETED,
            num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
        )  # fmt: skip
        return y, partial


def implicit_gemm(weight: Tensor, x: Tensor, *, statistics: bool = False) -> ImplicitGemm:
    """The 3×3 convolution of stride and padding 1 by `weight` (Co, Ci, 3, 3), for many tensors like x (N, Ci, H, W).

    bfloat16, float16 or float32, summed in float32. float32 products are formed in TF32 where torch allows it for
    convolutions now (torch.backends.cudnn.conv.fp32_precision), else in float32.
    """
    if weight.dim() != 4 or weight.shape[2:] != (3, 3) or weight.dtype not in DTYPES:
        raise ValueError(
            f"weight: expected (Co, Ci, 3, 3) in one of {DTYPES}, got {tuple(weight.shape)} in {weight.dtype}"
        )
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32"
    precision = "tf32" if tf32 or weight.dtype != torch.float32 else "ieee"
    return ImplicitGemm(weight, statistics=statistics, precision=precision)


def _pack(weight: Tensor, depth: int) -> Tensor:
    """(Co, Ci, 3, 3) as (Co, blocks of input channels, taps, depth): a column's operands in the order of the loop.
    Channels are padded with zeros, so that the kernel never masks a weight's depth."""
    weight = torch.nn.functional.pad(weight.flatten(2), (0, 0, 0, -weight.shape[1] % depth))
    return weight.unflatten(1, (-1, depth)).transpose(2, 3).contiguous()


@triton.jit(do_not_specialize=["n", "height", "width", "count", "whole"])
def convolve(
    x, weight, y, partial, status, n, height, width, count, whole,
    SEGMENT: tl.constexpr, REST: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr, HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A tile (HEIGHT, WIDTH) of y (n, height, width, OUT). Tiles of the same rows are neighbours and meet in L2, which
    holds all weights. UPCAST: the interpreter's product of 16-bit operands is wrong."""
    COLUMNS: tl.constexpr = (OUT + WIDTH - 1) // WIDTH
    BLOCKS: tl.constexpr = (CHANNELS + DEPTH - 1) // DEPTH
    positions = height * width
    tile = tl.program_id(0) // COLUMNS
    rests = tile >= whole
    # Per sample, `each` rows from `start` on.
    each = tl.where(rests, REST, count * SEGMENT)
    start = tl.where(rests, count * SEGMENT, 0)
    tile = tl.where(rests, tile - whole, tile)

    row = tile * HEIGHT + tl.arange(0, HEIGHT)
    sample = row // each
    position = start + row % each
    inside = (sample < n) & (position < positions)
    running = inside
    if status is not None:
        running = tl.load(status + sample, mask=inside, other=RUNNING + 1) == RUNNING
    if tl.max(running.to(tl.int32), 0) == 0:
        return

    h, w = position // width, position % width
    taps = tl.zeros((HEIGHT,), tl.int32)
    for t in tl.static_range(9):
        up, left = h + t // 3 - 1, w + t % 3 - 1
        read = inside & (up >= 0) & (up < height) & (left >= 0) & (left < width)
        taps |= read.to(tl.int32) << t

    base = sample.to(tl.int64) * positions + position
    channel = tl.arange(0, DEPTH)
    column = (tl.program_id(0) % COLUMNS) * WIDTH + tl.arange(0, WIDTH)
    x_rows = x + base[:, None] * CHANNELS + channel[None, :]
    weight_columns = weight + column[None, :] * (BLOCKS * 9 * DEPTH) + channel[:, None]
    total = tl.zeros((HEIGHT, WIDTH), tl.float32)
    for i in range(BLOCKS * 9):
        block, tap = i // 9, i % 9
        shift = ((tap // 3 - 1) * width + tap % 3 - 1) * CHANNELS + block * DEPTH
        there = ((taps >> tap) & 1)[:, None] != 0
        if CHANNELS % DEPTH != 0:
            there = there & (block * DEPTH + channel < CHANNELS)[None, :]
        a = tl.load(x_rows + shift, mask=there, other=0.0)
        if OUT % WIDTH == 0:
            b = tl.load(weight_columns + i * DEPTH)
        else:
            b = tl.load(weight_columns + i * DEPTH, mask=column[None, :] < OUT, other=0.0)
        if UPCAST:
            a, b = a.to(tl.float32), b.to(tl.float32)
        total = tl.dot(a, b, total, input_precision=PRECISION)

    rounded = total.to(y.dtype.element_ty)
    tl.store(y + base[:, None] * OUT + column[None, :], rounded, mask=inside[:, None] & (column < OUT)[None, :])
    if partial is not None:
        # The sums are of what is stored, read again: as the product left it, a column lies across 8 threads of every
        # warp, and its sums would take hundreds of shuffles and spill.
        tl.debug_barrier()
        if REST > 0:
            if rests:
                _summarise(
                    y, partial, tile, column, n, 1, count, count * SEGMENT, positions, count + 1, OUT, REST, HEIGHT
                )
            else:
                _summarise(y, partial, tile, column, n, count, 0, 0, positions, count + 1, OUT, SEGMENT, HEIGHT)
        else:
            _summarise(y, partial, tile, column, n, count, 0, 0, positions, count, OUT, SEGMENT, HEIGHT)


@triton.jit
def _summarise(
    y, partial, tile, column, n, each, first, start, positions, parts,
    OUT: tl.constexpr, LENGTH: tl.constexpr, HEIGHT: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squares about it of every segment of LENGTH rows of a tile: a sample has `each` of them
    here, parts `first` on of all its `parts`, from position `start` on."""
    SEGMENTS: tl.constexpr = HEIGHT // LENGTH
    segment = tile * SEGMENTS + tl.arange(0, SEGMENTS)
    sample, index = segment // each, segment % each
    position = (start + index * LENGTH)[:, None] + tl.arange(0, LENGTH)[None, :]
    size = tl.minimum(positions - start - index * LENGTH, LENGTH)
    mask = (sample < n)[:, None] & (column < OUT)[None, :]
    held = (position < positions)[:, :, None] & mask[:, None, :]
    at = y + (sample.to(tl.int64)[:, None] * positions + position)[:, :, None] * OUT + column[None, None, :]
    values = tl.load(at, mask=held, other=0.0, cache_modifier=".cg").to(tl.float32)
    mean = _sum_rows(values) / size[:, None]
    deviation = tl.where(held, values - mean[:, None, :], 0.0)
    squares = _sum_rows(deviation * deviation)
    at = partial + ((sample.to(tl.int64) * parts + first + index)[:, None] * OUT + column[None, :]) * 3
    tl.store(at, tl.zeros_like(mean) + size[:, None], mask=mask)
    tl.store(at + 1, mean, mask=mask)
    tl.store(at + 2, squares, mask=mask)


@triton.jit
def _sum_rows(values):
    """[segments, rows, columns] → [segments, columns], half upon half: in one order, whatever tile the rows are in."""
    SEGMENTS: tl.constexpr = values.shape[0]
    WIDTH: tl.constexpr = values.shape[2]
    for _ in tl.static_range(6):  # 64 rows at most
        if values.shape[1] > 1:
            values = tl.sum(tl.reshape(values, (SEGMENTS, 2, values.shape[1] // 2, WIDTH)), 1)
    return tl.reshape(values, (SEGMENTS, WIDTH))
