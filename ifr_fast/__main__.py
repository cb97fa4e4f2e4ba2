"""`python -m ifr_fast`: versions, backends, processor, threads and GPUs, then a self-test. Made for bug reports.

The self-test solves a small block on every available backend, forward and backward, and compares the results with the
specification (reference.py). The exit status is 1 if a backend fails.
"""

from __future__ import annotations

import importlib
import os
import platform
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

import ifr_fast
from ifr_fast import Broyden, IFRHead, Implicit, backends, reference

# Largest error, relative to the largest entry of a result. A GPU may convolve float32 in TF32; a wrong kernel is wrong
# by far more.
TOLERANCE = 1e-2


def main() -> int:
    """Prints the report. Returns the exit status."""
    facts = {
        "ifr_fast": f"{ifr_fast.__version__}, {Path(ifr_fast.__file__).parent}",
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "triton": _version("triton"),
        "processor": _processor(),
        "instructions": f"{_compiled_for()} (compiled kernels), {torch.backends.cpu.get_cpu_capability()} (torch)",
        "threads": f"{torch.get_num_threads()}, of {os.cpu_count()} processors",
        "GPUs": ", ".join(map(torch.cuda.get_device_name, range(torch.cuda.device_count()))) or "none",
    }
    for name, fact in [*facts.items(), *((f"backend {name}", str(found)) for name, found in backends().items())]:
        print(f"{name:14}  {fact}")
    failed = [name for name, found in backends().items() if found.available and not _passes(name)]
    return 1 if failed else 0


def _passes(name: str) -> bool:
    """Prints one line of the self-test. Returns whether this backend's equilibrium and gradient are the
    specification's."""
    start = time.perf_counter()
    try:
        errors = _errors(name)
        good = max(errors) <= TOLERANCE
        words = f"errors {errors[0]:.0e} forward, {errors[1]:.0e} backward"
    except Exception as error:  # of any kind: the report goes on to the next backend
        good, words = False, f"{type(error).__name__}: {error}"
    seconds = time.perf_counter() - start
    print(f"{f'test {name}':14}  {'ok' if good else 'FAILED'}, {seconds:.2f} s, {words}")
    return good


def _errors(backend: str) -> tuple[float, float]:
    """The relative errors of the equilibrium and of its gradient in X."""
    torch.manual_seed(0)
    solver = Broyden(max_iter=30, rtol=1e-5)
    head = IFRHead(8, groups=2, post_gain=0.3, solver=solver, adjoint=Implicit(solver=solver), backend=backend)
    x, grad = torch.randn(2, 2, 8, 4, 4)
    # The triton backend serves a CPU under its interpreter only.
    device = torch.device("cuda" if backend in ("triton", "cuda") and torch.cuda.is_available() else "cpu")
    head, here = head.to(device), x.to(device).requires_grad_()
    z = head(here)
    z.backward(grad.to(device))
    params = [t.detach().double().cpu() for t in head.block.tensors()]
    expected, expected_grad = _specified(x.double(), grad.double(), params, groups=2)
    assert here.grad is not None
    return _error(z, expected), _error(here.grad, expected_grad)


def _specified(x: Tensor, grad: Tensor, params: list[Tensor], groups: int) -> tuple[Tensor, Tensor]:
    """The equilibrium and its gradient in X, computed by the specification."""
    x = x.requires_grad_()

    def block(z: Tensor) -> Tensor:
        return reference.residual_block(z, x, params, groups=groups)

    with torch.no_grad():
        z = reference.broyden(block, torch.zeros_like(x), steps=40)[0]
    w = reference.implicit_gradient(block, z, grad)
    return z, torch.autograd.grad(block(z), x, w)[0]


def _error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().cpu() - expected).abs().max() / expected.abs().max())


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _compiled_for() -> str:
    """The instruction set of the compiled CPU kernels, as IFR_FAST_ISA names it."""
    try:
        return str(importlib.import_module("ifr_fast._native").isa())
    except ImportError:
        return "none"


def _processor() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
