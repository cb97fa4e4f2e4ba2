"""Random calls of IFRHead and fixed_point for tests/tools/fuzz.py: a case's seed decides everything about it.

A case knows how to run itself on some of its samples by a backend, and how to evaluate its map F in float64.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from fuzz_inputs import FLOATS, LAYOUTS, Draw, laid_out, perturb, random_adjoint, random_features, random_solver
from torch import Tensor

from ifr_fast import Broyden, IFRHead, Implicit, Solution, Unroll, fixed_point


@dataclass
class Result:
    """What one run gave: grads of x and of the case's parameters (none without a backward pass), and of fixed_point
    what f was called with and what it returned, evaluation after evaluation."""

    output: Tensor
    solution: Solution | None
    grads: list[Tensor | None] = field(default_factory=list)
    calls: list[tuple[Tensor, Tensor]] = field(default_factory=list)


class Case:
    """x (N, …): the input. compute: the dtype that F is computed in. mode: "grad", "no_grad" or "inference".

    isolated: is F itself bit for bit the same for a sample alone? words: what was drawn, for the report.
    """

    def __init__(self, draw: Draw) -> None:
        self.precise = draw.chance(0.08)  # float64, solved far: its gradients are compared with a dense solve
        self.dtype = torch.float64 if self.precise else draw.choice(FLOATS)
        self.autocast = None if self.precise else draw.choice((None, None, torch.bfloat16, torch.float16))
        self.mode = "grad" if self.precise else draw.choice(("grad", "grad", "no_grad", "inference"))
        self.solver = Broyden(60, rtol=1e-11) if self.precise else random_solver(draw)
        self.adjoint = Implicit(60, rtol=1e-11) if self.precise else random_adjoint(draw, self.solver)
        self.backend = draw.choice(("auto", "eager") if self.narrow else ("auto", "cpu", "eager"))
        self.needs_x, self.needs_params = draw.choice(((True, True), (True, False), (False, True)))
        self.needs_x |= self.precise

    @property
    def narrow(self) -> bool:
        """Is a history in 8 bits? The cpu kernels refuse one."""
        return torch.float8_e5m2 in [getattr(of, "history_dtype", None) for of in (self.solver, self.adjoint)]

    @property
    def rule(self):
        """The solver with its defaults filled in; None where F is unrolled."""
        return None if isinstance(self.solver, Unroll) else self.solver.resolve(self.rule_dtype)

    @property
    def words(self) -> dict[str, Any]:
        names = "dtype", "autocast", "mode", "backend", "solver", "adjoint", "needs_x", "needs_params", "layout"
        shape = dict(shape=tuple(self.x.shape), samples=self.kinds)
        return {**{name: getattr(self, name) for name in names}, **shape, **self.own_words}

    def run(self, index: Tensor | None = None, backend: str | None = None, backward: bool = True) -> Result:
        """The case, or its samples `index`, forward and where something requires a gradient backward."""
        x, upstream = self.pick(self.x, index), self.upstream if index is None else self.upstream[index]
        x = x.detach().requires_grad_(self.needs_x and self.mode == "grad")
        with ExitStack() as stack:
            if self.mode != "grad":
                stack.enter_context(torch.no_grad() if self.mode == "no_grad" else torch.inference_mode())
            if self.autocast:
                stack.enter_context(torch.autocast("cpu", dtype=self.autocast))
            result = self.call(x, index, backend or self.backend)
        if backward and result.output.requires_grad:
            wanted = [t for t in (x, *self.params()) if t.requires_grad]
            grads = torch.autograd.grad(result.output, wanted, upstream, allow_unused=True)
            result.grads = list(grads) if x.requires_grad else [None, *grads]
        return result

    def pick(self, tensor: Tensor, index: Tensor | None) -> Tensor:
        """Samples in the layout of all: a sample's sums follow the order of its memory."""
        return tensor if index is None else laid_out(tensor[index].contiguous(), self.layout)

    def params(self) -> list[Tensor]:
        raise NotImplementedError

    def call(self, x: Tensor, index: Tensor | None, backend: str) -> Result:
        raise NotImplementedError

    def exact(self, noise: float = 0.0) -> tuple[Callable[[Tensor, Tensor], Tensor], Tensor]:
        """F(z, x) in float64, and its x; x and the parameters are off by up to `noise`, relative, element by element:
        so much rounding does to F, whatever the order in which it is computed."""
        raise NotImplementedError

    def perturbed(self, noise: float) -> Case:
        """The same case with x and parameters so far off."""
        other = copy.deepcopy(self)
        with torch.no_grad():
            other.x = perturb(self.x.double(), noise).to(self.dtype)
            for p in other.params():
                p.data = perturb(p.data.double(), noise)  # a narrow dtype would round it back
        return other


class HeadCase(Case):
    target = "head"

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        groups = draw.choice((1, 1, 2, 3, 4))
        channels, mid = (groups * draw.randint(1, 16 // groups) for _ in range(2))
        sizes = (1, 2, 3) if self.precise else (1, 2, 3, 4, 5, 7, 9)
        if self.precise:
            channels = groups
        n, h, w = draw.choice((0, 1, 2, 3, 4, 5)), draw.choice(sizes), draw.choice(sizes)
        options = dict(
            form=draw.choices(("released", "plain", "paper"), (6, 3, 0 if self.precise else 1.5))[0],
            groups=groups, mid_channels=draw.choice((None, mid)), weight_norm=draw.chance(0.5),
            post_gain=draw.choice((1.0, 0.3, draw.uniform(0.05, 2), 0.3 if self.precise else 0.0)),
        )  # fmt: skip
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="form='paper'")
            head = IFRHead(channels, solver=self.solver, adjoint=self.adjoint, **options)
        trained, self.param_layout = draw.chance(0.7), draw.choice(LAYOUTS)
        self.param_dtype = self.dtype if self.precise else draw.choice((self.dtype, torch.float32))
        head.to(self.param_dtype).train(draw.chance(0.5)).requires_grad_(self.needs_params)
        for name, p in head.block.named_parameters():
            if "gn" in name and trained:
                p.data = p.data + 0.1 * torch.randn_like(p)
            p.data = laid_out(p.data, self.param_layout)
        self.head, self.own_words = head, dict(**options, params=(self.param_dtype, self.param_layout), trained=trained)
        self.x, self.kinds, self.layout = random_features(draw, (n, channels, h, w), self.dtype, self.precise)
        self.upstream = torch.randn(self.x.shape).to(self.dtype)
        compute = self.dtype if self.dtype == torch.float64 else self.autocast or self.dtype
        self.compute = self.rule_dtype = torch.float32 if compute == torch.float16 else compute  # on a CPU
        self.isolated = True

    def params(self) -> list[Tensor]:
        return list(self.head.parameters())

    def call(self, x, index, backend):
        self.head.block.backend = backend
        return Result(self.head(x), self.head.last_solution)

    def exact(self, noise=0.0):
        params = [perturb(p.detach().double(), noise) for p in self.head.block.tensors()]
        options = dict(form=self.head.block.form, groups=self.head.block.groups, noise=noise)
        return lambda z, x: exact_block(z, x, params, **options)[0], perturb(self.x.double(), noise)

    def peak(self) -> Tensor:
        """(N,) The largest magnitude that F(0) meets on its way, in float64."""
        params = [p.detach().double() for p in self.head.block.tensors()]
        x, options = self.x.double(), dict(form=self.head.block.form, groups=self.head.block.groups)
        return exact_block(torch.zeros_like(x), x, params, **options)[1]

    def scale(self) -> Tensor:
        """The norm of a sample that the block's last GroupNorm made: of its weight and bias."""
        last = torch.stack([p.detach().double() for p in self.head.block.tensors()[-2:]])
        return last.norm() * (self.x.shape[2] * self.x.shape[3]) ** 0.5


def exact_block(
    z: Tensor, x: Tensor, params: list[Tensor], *, form: str, groups: int, noise: float = 0.0
) -> tuple[Tensor, Tensor]:
    """reference.residual_block in float64, and (N,) the largest magnitude on the way. Its norms subtract an element of
    the group before anything else: a group of equal values is zero then, whatever they are. noise: of the group's mean,
    relative, for a float32 mean far above the group's spread is as far off."""
    conv1, weight1, bias1, conv2, *affine = params

    def norm(y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        group = y.unflatten(1, (groups, -1)).flatten(2)
        first = group[:, :, :1]
        group = group - first
        size = group.abs().amax(2, keepdim=True).clamp_min(1)  # squares of what is left may overflow
        group = (group - group.mean(2, keepdim=True) + perturb(first, noise) - first) / size
        group = group / (group.square().mean(2, keepdim=True) + 1e-5 / size / size).sqrt()
        return group.view_as(y) * weight[:, None, None] + bias[:, None, None]

    r = z + x
    y1 = torch.conv2d(r, conv1, padding=1)
    y2 = torch.conv2d(norm(y1, weight1, bias1).relu(), conv2, padding=1)
    y = norm(y2, *affine[:2])
    u = y if form == "plain" else y + r
    peak = torch.stack([t.abs().amax((1, 2, 3)) for t in (r, y1, y2, u)]).amax(0)
    return u if form == "paper" else norm(u.relu(), *affine[2:]), peak


def shifted(z: Tensor) -> Tensor:
    """Every number's neighbour, in the sample's last dimension. (roll takes no mixture of 16-bit dtypes.)"""
    return z[..., torch.arange(-1, z.shape[-1] - 1)] if z.dim() > 1 else z


def softsign(u: Tensor) -> Tensor:
    return u / (1 + u.abs())


def averages(z: Tensor, weight: Tensor) -> Tensor:
    return (weight.to(z.dtype) / 9).expand(z.shape[1], z.shape[1], 3, 3)


# Maps of (z, x, a, b), |a| + |b| < 0.8. But for "convolution" they are made of operations that IEEE rounds correctly,
# so that a sample's result depends neither on its batch mates nor on the layout.
MAPS = {
    "linear": lambda z, x, a, b: a * z + b * shifted(z) + x,
    "contracting": lambda z, x, a, b: softsign(a * z + b * shifted(z)) + x,
    "identity": lambda z, x, a, b: z,
    "zero": lambda z, x, a, b: torch.zeros_like(z),
    "constant": lambda z, x, a, b: x,
    "expanding": lambda z, x, a, b: x - 3 * z,
    "convolution": lambda z, x, a, b: x + torch.conv2d(z, averages(z, a * b), padding=1),
}


class MapCase(Case):
    target = "fixed_point"

    def __init__(self, draw: Draw) -> None:
        super().__init__(draw)
        shapes = [(), (draw.randint(1, 40),), (2, 3), (draw.randint(1, 4), draw.randint(1, 5), draw.randint(1, 5))]
        size = (3, 2) if self.precise else draw.choices([*shapes, (0,), (2, 0, 3)], (1, 4, 1, 6, 0.3, 0.2))[0]
        names = (
            ["linear", "contracting"]
            if self.precise
            else [m for m in MAPS if m != "convolution" or (len(size) == 3 and 0 not in size)]
        )
        self.map = draw.choice([*names, "linear", "contracting"])
        self.isolated = self.map != "convolution"
        self.closed_over = draw.chance(0.5)  # are a and b, or named as params?
        coefficients = torch.tensor([draw.uniform(-0.5, 0.5), draw.uniform(-0.3, 0.3)]).to(self.dtype)
        self.coefficients = [c.clone().requires_grad_(self.needs_params) for c in coefficients]
        shape = (draw.choice((0, 1, 2, 3, 5)), *size)
        self.x, self.kinds, self.layout = random_features(draw, shape, self.dtype, self.precise)
        self.start = draw.choice(("zero", "zero", "random", "x"))
        z0 = dict(zero=torch.zeros_like(self.x), random=torch.randn_like(self.x), x=self.x.nan_to_num())[self.start]
        self.z0 = laid_out(z0, self.layout)
        self.upstream = torch.randn(shape).to(self.dtype)
        self.rule_dtype = self.dtype
        self.compute = self.autocast if self.autocast and self.map == "convolution" else self.dtype
        self.own_words = dict(map=self.map, start=self.start, closed_over=self.closed_over)

    def params(self) -> list[Tensor]:
        return self.coefficients

    def call(self, x, index, backend):
        calls = []

        def f(z: Tensor, *params: Tensor) -> Tensor:
            out = MAPS[self.map](z, x, *(params or self.coefficients))
            calls.append((z.detach().clone(), out.detach().clone()))
            return out

        z0 = self.pick(self.z0, index)
        params = () if self.closed_over else tuple(self.coefficients)
        options = dict(params=params, solver=self.solver, adjoint=self.adjoint, backend=backend)
        return Result(*fixed_point(f, z0, **options), calls=calls)

    def exact(self, noise=0.0):
        params = [perturb(p.detach().double(), noise) for p in self.coefficients]
        return lambda z, x: MAPS[self.map](z, x, *params), perturb(self.x.double(), noise)


def random_case(seed: int) -> Case:
    """Draws from torch's global generator too, which it seeds."""
    torch.manual_seed(seed)
    draw = Draw(seed)
    return draw.choice((HeadCase, HeadCase, MapCase))(draw)
