"""Prints which variants of the Triton kernels a number of samples needs beyond those of 60 samples: none.

    python tests/tools/triton_variants.py

What compiles in a call is recorded, not compiled; convolutions give an empty result. Not under TRITON_INTERPRET.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from compile_triton import Recorder
from time_launches import convolution
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ifr_fast import Anderson, Broyden, Implicit, Picard
from ifr_fast.engine.call import Call
from ifr_fast.kernels import triton as kernels
from ifr_fast.ops import solve

NUMBERS = (60, 1, 2, 3, 57, 100, 104)
# channels, groups, height, width. The second map's samples begin at any even address; the third is split.
MAPS = {"aligned": (64, 32, 7, 7), "odd": (25, 5, 7, 7), "split": (16, 4, 70, 151)}
SOLVERS = {
    "broyden": Broyden(5),
    "anderson": Anderson(5, m=2),
    "picard": Picard(5),
    "in chunks": Broyden(5, workspace=200_000),  # bytes: a few samples of the small maps
}


class Variants(Recorder):
    """Variants that launches ask for, by the kernel's name and Triton's key."""

    def __init__(self) -> None:
        super().__init__(90)
        self.asked: set[tuple[str, str]] = set()

    def listen(self) -> None:
        driver.set_active(self)
        JITFunction._do_compile = lambda function, key, *_: self.asked.add((function.__name__, key))


def train(n: int, size: tuple[int, int, int, int], solver: Broyden, dtype: torch.dtype) -> None:
    """A solve of n samples out of a larger batch, and its gradient."""
    channels, groups, height, width = size

    def batch(dtype: torch.dtype) -> Tensor:
        return torch.zeros(n + 1, channels, height, width, dtype=dtype).to(memory_format=torch.channels_last)[1:]

    weight, pair = torch.zeros(channels, channels, 3, 3), [torch.ones(channels), torch.zeros(channels)]
    params, x = [weight, *pair, weight, *pair, *pair], batch(dtype)
    solver = solver.resolve(dtype)
    call = Call("released", groups, dtype, solver, Implicit(5, workspace=solver.workspace), "eager")
    value = solve._solve_batch(x, params, call)[0]
    empty = [torch.empty(n, 0)] * 3
    solve._backward_batch([batch(torch.float32), value, x, *empty], params, call)


def main() -> None:
    served = {name: getattr(kernels, name) for name in kernels.__all__}
    solve._kernels = lambda *_: SimpleNamespace(**{**served, "convolution": convolution})
    recorder = Variants()
    recorder.listen()
    for name, size in MAPS.items():
        for method, solver in SOLVERS.items():
            for dtype in (torch.bfloat16, torch.float32)[: 2 if method == "in chunks" else 1]:
                recorder.asked.clear()
                for n in NUMBERS if name != "split" else NUMBERS[1:4]:
                    before = set(recorder.asked)
                    train(n, size, solver, dtype)
                    new = [kernel for kernel, _ in recorder.asked - before]
                    print(f"{name}, {method}, {dtype}, n={n}: {len(new)} new", *(sorted(new) if before else ()))


if __name__ == "__main__":
    main()
