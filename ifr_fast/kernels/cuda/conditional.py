"""Parts of a CUDA graph that a replay runs only while samples of a solve still run (csrc/cuda/conditional.cu).

The device decides, at a conditional node of the graph (CUDA 12.4). A part is recorded on a stream of its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ... import _native
from ..contract import address
from . import device


def available() -> bool:
    """Whether the extension was built with them and the driver knows them."""
    return _native.cuda.has_parts()


def begin(status: Tensor, least: int, most: int, inner: torch.cuda.Stream) -> None:
    """Begins a part of the graph that the current stream records. It runs if of the samples of this status (n,) at
    least `least` run, and at most `most`. It is recorded on `inner`."""
    n = status.numel()
    at = address(status, "status", torch.int64, n, status.device)
    _native.cuda.begin_part(at, n, least, most, device.stream(status.device), inner.cuda_stream)


def end(inner: torch.cuda.Stream) -> None:
    """Ends the part that `inner` records."""
    _native.cuda.end_part(inner.cuda_stream)
