"""Chooses how a solve on a CPU convolves: directly, by oneDNN, or by Winograd's algorithm (winograd.py).

The choice looks at one sample, never at their number, so that a batch gives what its samples alone give.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .contract import Kernels

PACKAGE = __package__.split(".")[0]
logger = logging.getLogger(PACKAGE)

NAMES = ("auto", "direct", "winograd")
MULTIPLE = 32  # what csrc/cpu/winograd.cpp needs of both numbers of channels

# Times of oneDNN's convolution over Winograd's, one Intel Xeon core, AVX-512, maps of S×S, 1 / 16 samples (with AVX2 on
# both sides the picture is the same, 0.7 / 3.0 to 2.7 / 2.3):
#   channels   4×4 (1 tile)   7×7 (4)      14×14 (16)   28×28 (49)
#        256   0.7 / 3.5      1.0 / 2.3    2.3 / 2.6    2.9 / 2.6
#        128   1.0 / 2.0      1.3 / 2.1    2.0 / 2.4    2.6 / 2.5
#         64   1.6 / 1.9      1.7 / 1.8    1.9 / 2.1    2.1 / 2.3
#         32   2.1 / 1.9      1.8 / 1.6    1.9 / 1.7    2.0 / 1.9
# Few tiles do not fill the rows of the products: the 36 matrices of weights are then read for little work.
LEAST_TILES = 4
# To transform the weights takes as long as some 5 convolutions gain at 14×14 with 256 channels and one sample, and less
# than one gains with 16. Weights that are kept cost nothing.
LEAST_EVALUATIONS = 4


class Size(NamedTuple):
    """channels, mid_channels: the block's. height, width: of a map. evaluations: how often F may be evaluated."""

    channels: int
    mid_channels: int
    height: int
    width: int
    evaluations: int

    @property
    def tiles(self) -> int:
        """of 4×4 pixels"""
        return -(-self.height // 4) * -(-self.width // 4)


def check(name: str) -> str:
    """The name. Raises ValueError if it is unknown."""
    if name not in NAMES:
        raise ValueError(f"convolution={name!r}: expected one of {', '.join(NAMES)}")
    return name


def chosen(kernels: Kernels, name: str, x: Tensor, weight: Tensor, dtype: torch.dtype, evaluations: int) -> Kernels:
    """The kernels of a solve: `kernels`, which convolve directly, or those of winograd.py.

    weight: of the block's first convolution. dtype: what it computes in. Raises ValueError if Winograd's algorithm is
    asked for and cannot serve.
    """
    if name == "direct":
        return kernels
    backend = getattr(kernels, "__name__", "").rpartition(".")[2]
    size = Size(x.shape[1], weight.shape[0], x.shape[2], x.shape[3], evaluations)
    why = _obstacle(backend, dtype, size)
    if why and name == "winograd":
        raise ValueError(
            "convolution='winograd' is for the cpu kernels in float32, with channels in 32s and a history of 16 bits "
            f"at least: {why}"
        )
    if name == "auto" and not _pays(backend, dtype, size):
        return kernels
    return importlib.import_module(".winograd", __package__).Winograd()


def _obstacle(backend: str, dtype: torch.dtype, size: Size) -> str:
    """Why Winograd's algorithm cannot serve; "" if it can."""
    if backend != "cpu":
        return f"the {backend} kernels run"
    if dtype != torch.float32:
        return f"F computes in {dtype}"
    if size.channels % MULTIPLE or size.mid_channels % MULTIPLE:
        return f"the block has {size.channels} channels and {size.mid_channels} between its convolutions"
    return ""


@lru_cache(maxsize=256)
def _pays(backend: str, dtype: torch.dtype, size: Size) -> bool:
    """Whether Winograd's algorithm serves and is the faster one."""
    why = _obstacle(backend, dtype, size) or _drawback(size)
    if backend == "cpu":
        logger.info("%s: convolutions by %s", size, f"oneDNN, directly: {why}" if why else "Winograd's algorithm")
    return not why


def _drawback(size: Size) -> str:
    """Why direct convolutions are the faster ones; "" if they are not."""
    from .. import _native  # which only the cpu kernels need

    if _native.isa() == "generic":
        return "Winograd's are measured with AVX2 and AVX-512 only"
    if min(size.height, size.width) < 2:
        return "most of each tile of a map of one row or column is padding"
    if size.tiles < LEAST_TILES:
        return f"{size.tiles} tiles of 4×4 pixels a map do not fill a product of matrices, {LEAST_TILES} do"
    if size.evaluations < LEAST_EVALUATIONS:
        return f"{size.evaluations} evaluations do not repay the transform of the weights, {LEAST_EVALUATIONS} do"
    return ""
