"""Chooses the kernels that serve a call, and gives the reason in words.

eager: PyTorch's own operators, on any device. cpu: the compiled CPU kernels. triton: NVIDIA GPUs (and, for tests, any
machine under Triton's interpreter). cuda: the extension's CUDA kernels in place of Triton's.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

import torch

PACKAGE = __package__.split(".")[0]
logger = logging.getLogger(PACKAGE)

# "auto" takes the first of these that can serve, by the type of device.
AUTO = {"cpu": ("cpu", "eager"), "cuda": ("triton", "cuda", "eager")}
NAMES = ("auto", "eager", "cpu", "triton", "cuda")
ALIASES = {"reference": "eager", "native": "cpu"}  # the names of release 0.1
GPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OLDEST = (8, 0)  # the lowest compute capability served


class Backend(NamedTuple):
    """available: whether it can serve a call here. reason: what it serves, or why it cannot and how to get it."""

    available: bool
    reason: str

    def __str__(self) -> str:
        return f"{'available' if self.available else 'not available'}: {self.reason}"


class _Backends(dict[str, Backend]):
    """Accepts the aliases as keys too."""

    def __missing__(self, name: str) -> Backend:
        return self[ALIASES[name]]

    def __contains__(self, name: object) -> bool:
        return super().__contains__(ALIASES.get(name, name) if isinstance(name, str) else name)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default  # noqa: SIM401  (it is get itself)


@lru_cache(maxsize=1)
def _binary() -> tuple[ModuleType | None, str]:
    """The compiled extension, or None and the reason."""
    try:
        return importlib.import_module(f"{PACKAGE}._native"), ""
    except ImportError as error:
        advice = "pip install . with a C++17 compiler, and run outside of the source tree, or pip install -e ."
        return None, f"the compiled extension does not import from {PACKAGE} ({error}); {advice}"


def _cpu() -> Backend:
    binary, problem = _binary()
    if binary is None:
        return Backend(False, problem)
    threads = "OpenMP" if binary.openmp else "one thread, the compiler has no OpenMP"
    fast = "" if binary.isa() == "generic" else "Winograd's in a float32 solve where they pay, else "
    kinds = "CPU tensors in float32, float64, bfloat16"
    return Backend(True, f"{kinds} ({binary.isa()} kernels, {threads}; convolutions: {fast}oneDNN's)")


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=1)
def _gpu() -> Backend:
    """Whether the kernels can serve the GPUs that this process sees."""
    if not torch.cuda.is_available():
        return Backend(False, "torch sees no NVIDIA GPU here")
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        name = torch.cuda.get_device_name(index)
        if torch.version.cuda is None:
            return Backend(False, f"{name} is no NVIDIA GPU")
        if capability < OLDEST:
            return Backend(False, f"{name} has compute capability {capability}: {OLDEST} is the oldest served")
    return Backend(True, f"CUDA tensors in float32, bfloat16, float16 ({torch.cuda.get_device_name()})")


def _triton() -> Backend:
    if importlib.util.find_spec("triton") is None:
        return Backend(False, "triton is not installed; pip install triton (torch's builds for Linux bring it)")
    if _interpreted():
        return Backend(True, "under Triton's interpreter (TRITON_INTERPRET=1): for tests, thousands of times slower")
    return _gpu()


def _cuda() -> Backend:
    binary, problem = _binary()
    if binary is None:
        return Backend(False, problem)
    if not binary.cuda_archs:
        advice = "pip install . where nvcc is found (README, Install)"
        return Backend(False, f"the extension was built without CUDA kernels; {advice}")
    gpu = _gpu()
    if not gpu.available:
        return gpu
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not built_for(capability, binary.cuda_archs):
            problem = f"built for {binary.cuda_archs}, not for {torch.cuda.get_device_name(index)}'s {capability}"
            return Backend(False, f"{problem}; pip install . with IFR_FAST_ARCHS unset")
    return gpu._replace(reason=f"{gpu.reason}; built for {binary.cuda_archs}")


def built_for(capability: tuple[int, int], archs: str) -> bool:
    """Whether code for `archs`, in IFR_FAST_ARCHS's notation, runs on a GPU of this compute capability.

    A plain number's code runs on GPUs of the same major version that are no older. The largest number's portable code
    runs on all newer ones. 90a's code runs on 9.0 alone.
    """
    numbers = [int(arch.rstrip("af")) for arch in archs.split()]
    here = 10 * capability[0] + capability[1]
    same = any(
        number == here or (arch.isdigit() and number // 10 == capability[0] and number <= here)
        for arch, number in zip(archs.split(), numbers, strict=True)
    )
    return same or here >= max(numbers)


def backends() -> dict[str, Backend]:
    """The implementations of the kernels, by name. `available`: whether it can serve here. `reason`: why, in words.

    >>> for name, backend in ifr_fast.backends().items():
    ...     print(name, backend)
    """
    return _Backends({
        "eager": Backend(True, "PyTorch's own operators on any device, in any floating dtype"),
        "cpu": _cpu(),
        "triton": _triton(),
        "cuda": _cuda(),
    })  # fmt: skip


def check(name: str) -> str:
    """The backend's name, with an alias resolved. Raises ValueError if it is unknown or not available here."""
    name = ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in NAMES:
        raise ValueError(f"backend={name!r}: expected one of {', '.join(NAMES)}")
    if name != "auto" and not backends()[name].available:
        raise ValueError(f"backend={name!r} is not available: {backends()[name].reason}")
    return name


def _serves(name: str, device: str, dtype: torch.dtype, history: torch.dtype) -> bool:
    """Whether an available backend serves tensors of this dtype on this type of device, with a history of that."""
    if name == "eager":
        return True
    if name == "cpu":
        served = (torch.float32, torch.float64, torch.bfloat16)
        return device == "cpu" and dtype in served and history in served
    here = _gpu().available if device == "cuda" else name == "triton" and device == "cpu" and _interpreted()
    return here and dtype in GPU_DTYPES


@lru_cache(maxsize=64)
def kernels(name: str, device: str, dtype: torch.dtype, history: torch.dtype = torch.float32) -> ModuleType:
    """The module that serves tensors of `dtype` on devices of type `device`, and solves with a history of that dtype.
    Raises ValueError if `name` cannot."""
    name = check(name)
    found = backends()
    if name != "auto" and not _serves(name, device, dtype, history):
        narrow = " with a history in 8 bits, which backend='eager' serves here" if history.itemsize == 1 else ""
        raise ValueError(f"backend={name!r} serves {found[name].reason}; got {dtype} on {device}{narrow}")
    candidates = AUTO.get(device, ("eager",)) if name == "auto" else (name,)
    chosen = next(c for c in candidates if found[c].available and _serves(c, device, dtype, history))
    logger.info("%s on %s (backend=%r): %s kernels, %s", dtype, device, name, chosen, found[chosen].reason)
    first = candidates[0]
    unserved = chosen != first and history.itemsize == 1
    if not found[first].available or unserved:
        reason = "they keep no history in 8 bits" if found[first].available else found[first].reason
        logger.warning("running without the %s kernels, several times slower: %s", first, reason)
    return importlib.import_module(f".{chosen}", __package__)
