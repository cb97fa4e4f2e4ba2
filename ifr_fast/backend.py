"""Which kernels serve which call, and why, in words that a user can read.

reference: PyTorch's own operators, any device. native: the compiled CPU kernels. triton, cuda: not in this version.
"""

from __future__ import annotations

import importlib
import logging
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import torch

from .kernels import plain

logger = logging.getLogger("ifr_fast")

NAMES = ("auto", "reference", "native", "triton", "cuda")


class Backend(NamedTuple):
    """available: can it serve a call here? reason: what it serves, or why it cannot and how to get it."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{'available' if self.available else 'not available'}: {self.reason}"


@lru_cache(maxsize=1)
def _native() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module(".kernels.native", __package__)
        binary = importlib.import_module("._native", __package__)
    except ImportError as error:
        advice = "pip install . with a C++17 compiler, and run outside of the source tree, or pip install -e ."
        return None, f"the compiled extension does not import from {__package__} ({error}); {advice}"
    threads = "OpenMP" if binary.openmp else "one thread, the compiler has no OpenMP"
    return module, f"CPU tensors in float32, float64, bfloat16 ({binary.isa()} kernels, {threads})"


def backends() -> dict[str, Backend]:
    """The implementations of the kernels, and for each whether it can serve here and the reason.

    >>> for name, backend in ifr_fast.backends().items():
    ...     print(name, backend)
    """
    module, reason = _native()
    gpu = "this version has no GPU kernels; CUDA tensors are served by 'reference', in PyTorch's own operators"
    return {
        "reference": Backend(True, "PyTorch's own operators on any device, in any floating dtype"),
        "native": Backend(module is not None, reason),
        "triton": Backend(False, gpu),
        "cuda": Backend(False, gpu),
    }


def check(name: str) -> str:
    """`name` if it can be asked for here; ValueError otherwise."""
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected one of {', '.join(NAMES)}")
    if name != "auto" and not backends()[name].available:
        raise ValueError(f"backend={name!r} is not available: {backends()[name].reason}")
    return name


@lru_cache(maxsize=64)
def kernels(name: str, device: str, dtype: torch.dtype) -> ModuleType:
    """The module that serves tensors of `dtype` on devices of type `device`. ValueError where `name` cannot."""
    check(name)
    module, reason = _native()
    serves = module is not None and device == "cpu" and dtype in module.DTYPES
    if name == "native" and not serves:
        raise ValueError(f"backend='native' serves {reason}; got {dtype} on {device}")
    chosen = "native" if name in ("auto", "native") and serves else "reference"
    logger.info("%s on %s (backend=%r): %s kernels, %s", dtype, device, name, chosen, backends()[chosen].reason)
    if module is None and device == "cpu":
        logger.warning("running without the compiled kernels, several times slower: %s", reason)
    return module if chosen == "native" else plain
