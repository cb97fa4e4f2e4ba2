"""Times the Python of a Triton step: what happens before a GPU is asked for anything. Needs no GPU.

    python tests/tools/time_launches.py

Launches are replaced by nothing, convolutions by an empty result. Tensors are on the CPU, so their addresses are
checked as in a solve. The second column has Triton's own `kernel[grid](…)` for every launch.

Not under TRITON_INTERPRET: a process of its own.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from compile_triton import Recorder
from torch import Tensor
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ifr_fast.engine.linearise import BlockMap
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import triton as kernels
from ifr_fast.kernels.contract import Step
from ifr_fast.kernels.triton import launch
from ifr_fast.solvers import Broyden

CHANNELS, SIZE, GROUPS, N = 64, 7, 32, 1  # small: the CPU does what little is left of a solve
BF16 = torch.bfloat16


class Nothing:
    """A compiled kernel that does nothing when launched."""

    function, packed_metadata = 1, (1, 1, 0)

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *_: Any) -> None:
        pass


def launch_nothing() -> None:
    def keep(function, key, signature, device, *_):
        found = function.device_caches[device][0][key] = Nothing()
        return found

    driver.set_active(Recorder(90))
    JITFunction._do_compile = keep


def convolution(weight: Tensor, x: Tensor, *, transposed: bool = False) -> Callable[[Tensor], Tensor]:
    return torch.empty_like


def microseconds(call: Callable[[], Any], runs: int = 20) -> float:
    """Of this thread's own time, the least of several means: what else runs on the machine only adds."""
    call()
    means = []
    for _ in range(15):
        start = time.thread_time()
        for _ in range(runs):
            call()
        means.append((time.thread_time() - start) / runs)
    return min(means) * 1e6


class Solve:
    """A mask head's solve and its adjoint, ready to be timed in parts."""

    def __init__(self) -> None:
        served = {name: getattr(kernels, name) for name in kernels.__all__}
        self.kernels = SimpleNamespace(**{**served, "convolution": convolution})
        x = self.activation(BF16)
        pair, weight = [torch.ones(CHANNELS), torch.zeros(CHANNELS)], torch.ones(CHANNELS, CHANNELS, 3, 3)
        self.block = BlockMap(x, [weight, *pair, weight, *pair, *pair], "released", GROUPS, self.kernels, BF16)
        self.solver = Broyden().resolve(BF16)
        self.linearised = self.block.linearise(self.activation(torch.float32))

    def activation(self, dtype: torch.dtype) -> Tensor:
        return torch.zeros(N, CHANNELS, SIZE, SIZE, dtype=dtype).contiguous(memory_format=torch.channels_last)

    def forward(self) -> None:
        solve(self.block, self.activation(torch.float32), self.solver, self.kernels, from_zero=True)

    def adjoint(self) -> None:
        grad = self.activation(torch.float32)
        f = lambda w, state: self.linearised.affine(w, grad, state)  # noqa: E731
        solve(f, torch.zeros_like(grad), self.solver, self.kernels, from_zero=True, first=grad, affine=True)

    def parts(self) -> dict[str, float]:
        """Microseconds of each part of a step in the middle of a solve."""
        k, z, block = self.kernels, self.activation(torch.float32), self.block
        rows = self.solver.rows
        state = k.new_state(z, rows=rows, evaluations=rows + 1, history_dtype=BF16, from_zero=True)
        step = Step("broyden", self.solver.window, rows // 2, False, 0.0)
        y, saved = self.activation(BF16), self.linearised.saved
        tail = block(z, state)
        k.step(state, tail, z, step)
        (_, y1, statistics1, _), (y2, shortcut, statistics2) = saved
        adjoint = {"params": False, "state": state}
        total = k.total(z, y, z)
        calls = {
            "F": lambda: block(z, state),
            "of it norm_relu": lambda: k.norm_relu(y, block.norm1, consume=True, state=state),
            "step": lambda: k.step(state, tail, z, step),
            "of it residual, of F's tail": lambda: k.residual(state, tail, z, step),
            "of it gram_row": lambda: k.gram_row(state, z, step),
            "of it rule": lambda: k.rule(state, z, step),
            "of it combine": lambda: k.combine(state, z, step),
            "norm_tail_vjp": lambda: k.norm_tail_vjp(z, y2, shortcut, block.norm2, block.norm3, statistics2, **adjoint),
            "norm_relu_vjp": lambda: k.norm_relu_vjp(y, y1, block.norm1, statistics1, **adjoint),
            "residual, of a total": lambda: k.residual(state, total, z, step),
            "an empty result": lambda: torch.empty_like(y),
        }
        return {name: microseconds(call, 200) for name, call in calls.items()}

    def times(self) -> dict[str, float]:
        steps = self.solver.max_iter + 1
        whole = {"a step of the solve": self.forward, "a step of the adjoint": self.adjoint}
        return {name: microseconds(call) / steps for name, call in whole.items()} | self.parts()


def main() -> None:
    launch_nothing()
    timed = Solve()
    direct = timed.times()
    launch.hooked = lambda: True  # as with a profiler
    own = timed.times()
    print("µs: ours, with Triton's launch")
    for name, taken in direct.items():
        print(f"{taken:7.1f} {own[name]:7.1f}  {name}")


if __name__ == "__main__":
    main()
