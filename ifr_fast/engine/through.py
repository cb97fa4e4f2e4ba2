"""The loop in differentiable operators: autograd records every step of a solve."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.contract import DIVERGENCE, Status
from ..kernels.eager import power_of_2, relative_residual
from ..kernels.gram import anderson_coefficients, broyden_coefficients
from ..solution import Solution
from ..solvers import Solver


def differentiable_solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> Solution:
    """engine.loop.solve in differentiable operators, with a resolved solver. Memory grows with the number of steps.

    Each sample's residuals are stored scaled to about 1, so that squares neither overflow nor underflow. The K×K
    algebra is done in float64, which autocast leaves alone.
    """
    shape = (-1,) + (1,) * (z0.dim() - 1)
    z, best = z0, z0
    residual = torch.full((len(z0),), torch.inf, dtype=z0.dtype, device=z0.device)
    status = torch.full((len(z0),), Status.MAX_ITER, dtype=torch.int64, device=z0.device)
    iterations = torch.zeros_like(status)
    trace: list[Tensor] = []
    history: list[Tensor] = []
    gram = z0.new_zeros(len(z0), solver.max_iter, solver.max_iter, dtype=torch.float64)
    rtol, _ = solver.resolved()
    next_step = METHODS[solver.method](solver)
    for k in range(solver.max_iter + 1):
        fz = f(z)
        if k == 0:
            scale = unit_scale(fz, z).unsqueeze(1)
        g = _rows(fz - z) * scale
        running = status == Status.MAX_ITER
        with torch.no_grad():
            norm = _norm(g)
            if k == 0:
                first_norm = norm
            relative = relative_residual(norm, _norm(_rows(fz) * scale), z0.dtype)
            improved = running & relative.isfinite() & (relative < residual)
            residual = torch.where(improved, relative, residual)
            trace.append(torch.where(running, relative, trace[-1] if trace else relative))
            iterations = torch.where(running, k, iterations)
            code = torch.where(norm > DIVERGENCE * first_norm, Status.DIVERGED, Status.MAX_ITER)
            code = torch.where(relative <= rtol, Status.CONVERGED, code)
            status = torch.where(running, torch.where(relative.isfinite(), code, Status.NONFINITE), status)
        best = torch.where(improved.view(shape), z, best)
        if k == solver.max_iter:
            break
        history.append(g)
        running = status == Status.MAX_ITER
        # The residuals of a stopped sample differ only by rounding. A Gram matrix of zeros keeps the algebra on it
        # finite. So its gradient is finite too, and the mask over z sets it to 0.
        row = torch.stack([(g * other).sum(1, dtype=gram.dtype) for other in history], 1)
        row = torch.nn.functional.pad(row, (0, solver.max_iter - k - 1))
        gram = _with_row(gram, row, k)
        step = next_step(torch.where(running.view(-1, 1, 1), gram, 0), k)
        step = step.to(z.dtype)
        update = sum(step[:, j : j + 1] * g for j, g in enumerate(history)) / scale
        z = torch.where(running.view(shape), z + update.view(z.shape), z)
    return Solution(best, residual, iterations, torch.stack(trace), status)


class _Broyden:
    """Called for k = 0, 1, … with the Gram matrix (n, K, K) of residuals 0 … k. Returns the step (n, K)."""

    def __init__(self, solver: Solver) -> None:
        pass

    def __call__(self, gram: Tensor, k: int) -> Tensor:
        if k == 0:
            self.p = self.q = gram.new_zeros(len(gram), 0, gram.shape[1])
            self.step = gram.new_zeros(gram.shape[:2])
        pair, self.step = broyden_coefficients(gram, self.p, self.q, self.step, k)
        if pair is not None:
            self.p, self.q = (
                torch.cat([old, new.unsqueeze(1)], 1) for old, new in zip((self.p, self.q), pair, strict=True)
            )
        return self.step


class _Anderson:
    """Called as _Broyden is."""

    def __init__(self, solver: Solver) -> None:
        self.m = solver.window

    def __call__(self, gram: Tensor, k: int) -> Tensor:
        if k == 0:
            self.steps = gram.new_zeros(len(gram), 0, gram.shape[1])
        step = anderson_coefficients(gram, self.steps, k, self.m)
        self.steps = torch.cat([self.steps, step.unsqueeze(1)], 1)
        return step


class _Picard:
    """Called as _Broyden is."""

    def __init__(self, solver: Solver) -> None:
        pass

    def __call__(self, gram: Tensor, k: int) -> Tensor:
        step = gram.new_zeros(gram.shape[:2])
        step[:, k] = 1
        return step


METHODS: dict[str, type[_Broyden] | type[_Anderson] | type[_Picard]] = {
    "broyden": _Broyden,
    "anderson": _Anderson,
    "picard": _Picard,
}


def _with_row(gram: Tensor, row: Tensor, k: int) -> Tensor:
    """A copy of gram (n, K, K) in which row and column k, so far zero, are row (n, K). Differentiable."""
    unit = torch.zeros_like(row)
    unit[:, k] = 1
    cross = row.unsqueeze(2) * unit.unsqueeze(1)
    return gram + cross + cross.mT - torch.diag_embed(row * unit)


def unit_scale(*tensors: Tensor) -> Tensor:
    """(n,) for each sample the power of two that brings the largest entry of the tensors (n, …) near 1; 1 if that entry
    is zero or not finite."""
    highest = torch.stack([largest(t) for t in tensors]).amax(0)
    scale = power_of_2(-torch.frexp(highest).exponent, highest.dtype)
    return torch.where(highest.isfinite() & (highest > 0), scale, 1)


def largest(x: Tensor) -> Tensor:
    """(n,) the largest magnitude in each sample of x (n, …); 0 in samples without elements."""
    rows = _rows(x.detach())
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _norm(rows: Tensor) -> Tensor:
    """(n,) the norms of rows (n, size), summed in float64."""
    return rows.square().sum(1, dtype=torch.float64).sqrt()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))
