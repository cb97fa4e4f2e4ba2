"""What kernels.py times: every kernel on random tensors, with the bytes and the FLOP that it needs."""

import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from types import ModuleType
from unittest import mock

import torch
from torch import Tensor

from benchmarks.timing.measure import Call
from benchmarks.timing.traffic import traffic
from ifr_fast import Broyden, IFRHead, Implicit
from ifr_fast.engine.linearise import BlockMap
from ifr_fast.kernels import choose
from ifr_fast.kernels.contract import Norm, Step


@dataclass(frozen=True)
class Size:
    """n samples (channels, height, width) in GroupNorm's groups."""

    n: int
    channels: int
    height: int
    width: int
    groups: int

    @property
    def elements(self) -> int:
        return self.n * self.channels * self.height * self.width

    @property
    def convolution(self) -> int:
        """FLOP of one 3×3 convolution of all samples."""
        return 2 * 9 * self.channels * self.elements

    def __str__(self) -> str:
        return f"{self.n}×{self.channels}×{self.height}×{self.width}"


ONE, THREE = "one kernel", "three kernels"  # ways in which CUDA's kernels take a step
ROIS = [Size(n, 256, 14, 14, 32) for n in (100, 512, 8, 1)]


@dataclass(frozen=True)
class Case:
    """A kernel to time. make() gives a call on fresh tensors; traffic in bytes and flop of one; per_solve: launches in
    a forward solve."""

    family: str
    make: Callable[[], Call]
    backend: str
    variant: str = ""
    traffic: float = 0
    flop: float = 0
    per_solve: int = 0


@dataclass(frozen=True)
class Setting:
    """dtype: of the activations. history: of the stored residuals."""

    size: Size
    dtype: torch.dtype
    history: torch.dtype

    @property
    def narrow(self) -> bool:
        """Is the history in 8 bits?"""
        return self.history.itemsize == 1

    def __str__(self) -> str:
        return f"{self.size} {self.dtype}" + (", 8-bit history" if self.narrow else "")


class Bench:
    """The cases of one backend in one setting. With a history in 8 bits these are what reads or writes it; all others
    are as with a wider one. states: of the calls made, to be looked at after the timing.

    Raises ValueError where the backend does not serve the setting.
    """

    def __init__(self, backend: str, setting: Setting, steps: int, device: torch.device) -> None:
        self.backend, self.steps, self.device = backend, steps, device
        self.setting, self.size, self.dtype, self.history = setting, setting.size, setting.dtype, setting.history
        self.kernels = choose.kernels(backend, device.type, self.dtype, self.history)
        self.states: list = []

    def draw(self, dtype: torch.dtype | None = None) -> Tensor:
        s = self.size
        x = torch.randn(s.n, s.channels, s.height, s.width, device=self.device)
        return x.to(dtype or self.dtype, memory_format=torch.channels_last)

    def norm(self) -> Norm:
        weight, bias = torch.randn(2, self.size.channels, device=self.device)
        return Norm(1 + weight / 10, bias / 10, self.size.groups)

    def cases(self) -> Iterator[Case]:
        evaluations, mean = self.steps + 1, (self.steps + 1) // 2  # the mean number of rows
        whole = not self.setting.narrow
        if whole:
            yield self.case("norm_relu", self.norm_relu, per_solve=evaluations)
            yield self.case("norm_tail", self.norm_tail)
            yield self.case("norm_relu_vjp", self.norm_relu_vjp)
            yield self.case("norm_tail_vjp", self.norm_tail_vjp)
        if self.backend != "eager":
            steps = 0 if self.one_kernel else self.steps  # of a solve, that launch these kernels
            yield self.case("tail + residual", self.residual_of_tail, per_solve=evaluations)
            yield self.case("residual of total", self.residual_of_total)
            for k in sorted({evaluations // 4, mean, self.steps}):
                times = steps if k == mean else 0
                yield self.case("gram_row", partial(self.gram_row, k), k, per_solve=times)
                yield self.case("combine", partial(self.combine, k), k, per_solve=times)
            yield self.case("rule", self.rule, self.steps, per_solve=steps + 1)
        for k in (mean, self.steps):
            for way, make in self.ways(partial(self.step, k)):
                yield Case("step, and a reset", make, self.backend, self.variant(k, way), self.swept(k, way))
        flop = self.size.convolution
        # Two convolutions linearise F, two make each of the steps' vjps, and four give the gradients at the end.
        solves = {
            "forward": (self.forward_solve, 2 * evaluations),
            "backward": (self.backward_solve, 2 * self.steps + 6),
        }
        if whole:
            yield Case("F", self.f, self.backend, flop=2 * flop)
            yield Case("vjp of F", self.vjp, self.backend, flop=2 * flop)
        for name, (solve, convolutions) in solves.items():
            for way, make in self.ways(solve):
                own = int(name == "forward" and way != THREE)
                work = {"flop": convolutions * flop, "per_solve": own}
                yield Case(f"{name} solve", make, self.backend, self.variant(way=way), **work)

    def case(self, family: str, make: Callable[[], Call], rows: int = 0, per_solve: int = 0) -> Case:
        moved = self.bytes(family, rows)
        return Case(family, make, self.backend, self.variant(rows), moved, per_solve=per_solve)

    def variant(self, rows: int = 0, way: str = "") -> str:
        words = "8-bit history" if self.setting.narrow else "", way, f"K = {rows}" if rows else ""
        return ", ".join(filter(None, words))

    def bytes(self, family: str, rows: int) -> int:
        """What a kernel moves that sweeps so many rows."""
        found = traffic(self.size.elements, self.dtype.itemsize, self.history.itemsize, rows)
        return sum(found[family].values())

    def swept(self, rows: int, way: str) -> int:
        """What a step moves."""
        sweeps = ("cluster_step",) if way == ONE else ("gram_row", "combine")
        return sum(self.bytes(family, rows) for family in ("tail + residual", *sweeps))

    @property
    def solver(self) -> ModuleType:
        """The backend's module that has its step."""
        return importlib.import_module(self.kernels.step.__module__)

    @cached_property
    def one_kernel(self) -> bool:
        """Does the backend take a step by one kernel here? CUDA's alone has such a kernel."""
        if self.backend != "cuda":
            return False
        unknowns, capability = self.size.elements // self.size.n, self.solver.device.capability(self.device)
        return self.solver.one_kernel(unknowns, self.steps, self.steps, self.history, capability)

    def ways(self, make: Callable[[], Call]) -> Iterator[tuple[str, Callable[[], Call]]]:
        """Both ways to take steps, side by side, where the backend has two."""
        yield ONE if self.one_kernel else "", make
        if self.one_kernel:
            yield THREE, lambda: self.in_three_kernels(make())

    def in_three_kernels(self, call: Call) -> Call:
        """The call, with steps by three kernels though the backend would take one."""

        def other() -> object:
            with mock.patch.object(self.solver, "one_kernel", return_value=False) as asked:
                result = call()
            if not asked.called:
                raise RuntimeError("nothing asked whether a step is one kernel")
            return result

        return other

    def norm_relu(self) -> Call:
        return partial(self.kernels.norm_relu, self.draw(), self.norm())

    def norm_tail(self) -> Call:
        return partial(self.kernels.norm_tail, self.draw(), self.draw(), self.norm(), self.norm())

    def norm_relu_vjp(self) -> Call:
        y, norm = self.draw(), self.norm()
        _, statistics = self.kernels.norm_relu(y, norm)
        return partial(self.kernels.norm_relu_vjp, self.draw(), y, norm, statistics, params=False)

    def norm_tail_vjp(self) -> Call:
        inputs = self.draw(), self.draw(), self.norm(), self.norm()
        _, statistics = self.kernels.norm_tail(*inputs)
        return partial(self.kernels.norm_tail_vjp, self.draw(torch.float32), *inputs, statistics, params=False)

    def state(self) -> tuple:
        """A solve's state full of random residuals, its iterate, and F's pending tail."""
        z = self.draw(torch.float32)
        options = dict(rows=self.steps, evaluations=self.steps + 1, history_dtype=self.history)
        state = self.kernels.new_state(z, from_zero=True, **options)
        state.history.copy_(torch.randn(state.history.shape, device=self.device))
        state.norms[:, 2] = 1e20  # the first residual: none has grown
        self.kernels.shift(z, self.draw(), self.dtype, state)
        tail = self.kernels.tail(self.draw(), self.draw(), self.norm(), self.norm(), state=state)
        self.states.append(state)
        return state, z, tail

    def told(self, k: int) -> Step:
        """A step with k residuals, in which no sample stops."""
        return Step("broyden", self.steps, k - 1, last=False, rtol=-1.0)

    def residual_of_tail(self) -> Call:
        state, z, tail = self.state()
        return partial(self.kernels.residual, state, tail, z, self.told(self.steps))

    def residual_of_total(self) -> Call:
        state, z, _ = self.state()
        total = self.kernels.total(self.draw(torch.float32), self.draw(), self.draw(torch.float32))
        return partial(self.kernels.residual, state, total, z, self.told(self.steps))

    def summed(self, k: int) -> tuple:
        """What a step with k residuals has after their sums."""
        state, z, tail = self.state()
        self.kernels.residual(state, tail, z, self.told(k))
        self.kernels.gram_row(state, z, self.told(k))
        return state, z, self.told(k)

    def gram_row(self, k: int) -> Call:
        return partial(self.kernels.gram_row, *self.summed(k))

    def combine(self, k: int) -> Call:
        state, *others = self.summed(k)
        state.total.normal_()
        return partial(self.kernels.combine, state, *others)

    def rule(self) -> Call:
        return partial(self.kernels.rule, *self.summed(self.steps))

    def step(self, k: int) -> Call:
        """Coefficients are reset before every step: steps added upon steps would overflow."""
        state, z, tail = self.state()
        coefficients = [t for name in ("p", "q", "step", "total") if (t := getattr(state, name, None)) is not None]

        def call() -> None:
            torch._foreach_zero_(coefficients)
            self.kernels.step(state, tail, z, self.told(k))

        return call

    def block(self) -> BlockMap:
        s = self.size
        params = [t.detach() for t in IFRHead(s.channels, groups=s.groups).to(self.device).block.tensors()]
        return BlockMap(self.draw(), params, "released", s.groups, self.kernels, self.dtype)

    def f(self) -> Call:
        block, z = self.block(), self.draw(torch.float32)
        return lambda: block.linearise(z).value

    def vjp(self) -> Call:
        linearised, w = self.block().linearise(self.draw(torch.float32)), self.draw(torch.float32)
        return partial(linearised.vjp, w)

    def head(self) -> IFRHead:
        exact = dict(max_iter=self.steps, rtol=0, history_dtype=self.history)
        options = dict(solver=Broyden(**exact), adjoint=Implicit(**exact), backend=self.backend)
        return IFRHead(self.size.channels, groups=self.size.groups, **options).to(self.device)

    def forward_solve(self) -> Call:
        return partial(self.head(), self.draw())

    def backward_solve(self) -> Call:
        """By the op itself: autograd would launch on the stream of the forward pass, outside of the graph."""
        head, x = self.head(), self.draw()
        params = [t.detach() for t in head.block.tensors()]
        memory = [x.new_empty(len(x), 0) for _ in range(3)]
        return partial(
            torch.ops.ifr_fast.solve_backward, self.draw(), head(x), x, params, memory, head.call(self.dtype)
        )


def convolution_cases(setting: Setting, steps: int, device: torch.device) -> Iterator[Case]:
    """cuDNN's convolution (on a CPU, oneDNN's), and the weight's gradient."""
    size, dtype = setting.size, setting.dtype
    channels = size.channels
    deviation = (9 * channels) ** -0.5

    def operands() -> tuple[Tensor, Tensor]:
        x = torch.randn(size.n, channels, size.height, size.width, device=device)
        weight = deviation * torch.randn(channels, channels, 3, 3, device=device)
        return tuple(t.to(dtype, memory_format=torch.channels_last) for t in (x, weight))

    def library() -> Call:
        return partial(torch.conv2d, *operands(), padding=1)

    def searched() -> Call:
        convolve = library()

        def call() -> Tensor:
            # TF32, which means nothing in 16 bits, makes this another entry of torch's cache than the guessed one.
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
                return convolve()

        return call

    def weight_gradient() -> Call:
        (x, weight), grad = operands(), operands()[0]
        options = [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
        return partial(torch.ops.aten.convolution_backward, grad, x, weight, None, *options)

    traffic = (2 * size.elements + 9 * channels**2) * dtype.itemsize
    case = partial(Case, "convolution", traffic=traffic, flop=size.convolution)
    yield case(library, "cudnn", per_solve=2 * (steps + 1))
    if dtype != torch.float32:
        yield case(searched, "cudnn", "searched")
    yield Case("weight gradient", weight_gradient, "cudnn", traffic=traffic, flop=size.convolution)
