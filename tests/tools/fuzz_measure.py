"""What the fuzzer's properties are measured by: a case with its runs, and how far rounding may take its numbers."""

from __future__ import annotations

from functools import cached_property

import torch
from fuzz_cases import Case, MapCase, Result
from torch import Tensor

from ifr_fast import Solution, Unrolled


class Checked:
    """A case and what it gave."""

    def __init__(self, case: Case) -> None:
        self.case, self.x, self.rule = case, case.x, case.rule
        self.n, tensors = len(case.x), [case.x, *case.params(), *([case.z0] if isinstance(case, MapCase) else [])]
        before = [(t.detach().clone(), t._version) for t in tensors]
        self.result = case.run()
        self.solution = self.result.solution
        self.modified = [
            not same(old, t) or t._version != version or t.grad is not None
            for t, (old, version) in zip(tensors, before, strict=True)
        ]

    @property
    def solves(self) -> bool:
        """Is the gradient an adjoint's, and not that of an unroll?"""
        return bool(self.rule) and not isinstance(self.case.adjoint, Unrolled)

    @cached_property
    def other(self) -> Result:
        """The run by the other backend; "auto" is cpu here, but for a history in 8 bits, which eager alone keeps."""
        return self.case.run(backend="auto" if self.case.backend == "eager" else "eager", backward=False)

    @cached_property
    def ordinary(self) -> Tensor:
        """(N,) Does the sample have an rms in 1e-3 … 1e3? Elements are then finite, too."""
        rms = self.x.double().reshape(self.n, -1).square().mean(1).sqrt() if self.x[:1].numel() else torch.ones(self.n)
        return (rms >= 1e-3) & (rms <= 1e3)

    def floor(self, solution: Solution) -> tuple[Tensor, Tensor]:
        """(N,) The relative residual of the solution's value in float64, and how much of it may be rounding."""
        case, value = self.case, solution.value.double()
        f, x = case.exact()
        g = f(value, x) - value
        noise = []
        stored = max(rounding(t) for t in (case.compute, solution.value.dtype))
        for _ in range(3):
            f, x = case.exact(rounding(case.compute))
            z = value * (1 + stored * (2 * torch.rand_like(value) - 1))
            noise.append(norms(f(z, x) - z - g))
        size = norms(value + g)
        # A norm's result is of its weight's size, and so is what rounding does to it, even where it cancels.
        terms = size.maximum(norms(value)).maximum(case.scale().expand_as(size))
        return norms(g) / size, (20 * torch.stack(noise).amax(0) + 4 * stored * terms) / size


def rounding(dtype: torch.dtype) -> float:
    """Of float64 more than its eps: its sums are in no wider dtype."""
    return 100 * torch.finfo(dtype).eps if dtype == torch.float64 else torch.finfo(dtype).eps


def norms(x: Tensor) -> Tensor:
    """‖x‖ of every sample of x (N, …) in float64; squares neither under- nor overflow."""
    flat = x.double().reshape(len(x), x[:1].numel() if len(x) else 0)
    if not flat.shape[1]:
        return flat.new_zeros(len(flat))
    scale = flat.abs().amax(1, keepdim=True)
    unit = torch.where(scale == 0, 1, scale)
    return ((flat / unit).norm(dim=1, keepdim=True) * scale).squeeze(1)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit, NaN like NaN."""
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=0.5), b.nan_to_num(nan=0.5)) and (
        not a.is_floating_point() or torch.equal(a.isnan(), b.isnan())
    )  # fmt: skip


def strides(x: Tensor) -> list[int]:
    """Of the dimensions that have more than one element: the others' mean nothing."""
    return [s for s, n in zip(x.stride(), x.shape, strict=True) if n > 1] if x.numel() else []
