"""The engine: evaluate F, store the residual, judge every sample, let the rule choose the step.

No decision looks at more than one sample, and nothing waits for a device: on a CPU the loop ends when every sample has
stopped, elsewhere finished samples keep their iterate until the last step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from types import ModuleType

import torch
from torch import Tensor

from .kernels import RUNNING, State, memory_order, pick
from .kernels.plain import relative_residual
from .rules import Rule

WORTHWHILE = 3 / 4  # of the samples still run: to gather them takes the time of a fraction of F
DIVERGENCE = 1e3  # a sample whose residual norm has grown by this factor is given up


class Status(IntEnum):
    """Why a sample stopped."""

    CONVERGED = 0  # ‖F(z) - z‖ ≤ rtol·‖F(z)‖
    MAX_ITER = 1  # not within max_iter steps
    DIVERGED = 2  # ‖F(z) - z‖ grew a thousandfold
    NONFINITE = 3  # F(z) or z overflowed or was NaN


@dataclass(frozen=True)
class Solution:
    """What a solve reached, sample by sample; tensors on the solve's device, detached.

    value: (N, …) the best iterate of each sample: the one of the smallest relative residual, z⁰ where none is finite.
    residual: (N,) ‖F(z) - z‖ / ‖F(z)‖ there (inf where none is finite). iterations: (N,) int64 steps taken.
    trace: (max_iter + 1, N) the relative residual of every evaluation, NaN of one that was not finite; a stopped
    sample's last one repeats. status: (N,) int64, codes of `Status`.
    adjoint: of fixed_point, (N,) the relative residual of the gradient's own equation (Eq. 8) in the latest backward
    pass; NaN before one, inf where the adjoint solves no equation. None elsewhere: diagnostics.adjoint_residual.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    trace: Tensor
    status: Tensor
    adjoint: Tensor | None = None

    def detach(self) -> Solution:
        tensors = (getattr(self, name) for name in self.__dataclass_fields__)
        return Solution(*(None if t is None else t.detach() for t in tensors))

    def __str__(self) -> str:
        """One line that a person reads; waits for the device."""
        counts = {s.name: int((self.status == s).sum()) for s in Status}
        states = ", ".join(f"{n} {name.lower()}" for name, n in counts.items() if n)
        worst = f"{float(self.residual.max()):.1e}" if len(self.residual) else "none"
        return f"{len(self.status)} samples ({states}), worst relative residual {worst}"


def solve(
    f: Callable[[Tensor, State], Tensor],
    z: Tensor,
    rule: Rule,
    kernels: ModuleType,
    *,
    from_zero: bool = False,
    first: Tensor | None = None,
    affine: bool = False,
    select: Callable[[Tensor], Callable[[Tensor, State | None], Tensor]] | None = None,
) -> State:
    """The equilibrium of f from z (n, …), float32 or float64 and dense in kernels.memory_format(z); z is overwritten.

    f maps an iterate and the solve's state to a tensor of the iterate's shape, or to what kernels.tail or kernels.total
    give. rule must be resolved. from_zero: z is zero everywhere. first: f(z) where it is known. affine: residuals are
    relative to that of z, as ‖f‖ of an affine f grows with the error and would make the wildest iterate the best.
    select: f of some samples, given their indices; on a CPU those that have stopped are not evaluated any more.
    Returns the solver's state; its value, residual, iterations, trace and status are a Solution's fields.
    """
    state = kernels.new_state(
        z, rows=rule.rows, evaluations=rule.max_iter + 1, history_dtype=rule.history_dtype, from_zero=from_zero
    )
    index = None  # of the samples that are evaluated, None for all
    for k in range(rule.max_iter + 1):
        if k == 0 and first is not None:
            fz = first
        elif index is None:
            fz = f(z, state)
        else:
            order = memory_order(z)
            fz = torch.empty_like(z)
            fz.permute(order).index_copy_(0, index, f(pick(z, index), None).permute(order))
        if isinstance(fz, Tensor) and (fz.stride() != z.stride() or fz.dtype != z.dtype):
            fz = torch.empty_like(z).copy_(fz)
        running = kernels.step(
            state,
            fz,
            z,
            method=rule.method,
            window=rule.window,
            evaluation=k,
            last=k == rule.max_iter,
            rtol=rule.rtol,
            divergence=DIVERGENCE,
            affine=affine,
        )
        if running == 0:
            state.trace[k + 1 :] = state.trace[k]
            break
        if select and running is not None and running <= WORTHWHILE * (len(z) if index is None else len(index)):
            index = (state.status == RUNNING).nonzero().squeeze(1)
            f = select(index)
    kernels.finish(state, z)
    return state


def solution(state: State) -> Solution:
    return Solution(state.value, state.residual, state.iterations, state.trace, state.status)


def differentiable_solve(f: Callable[[Tensor], Tensor], z0: Tensor, rule: Rule) -> Solution:
    """The same solve in differentiable operators: autograd sees every step; memory grows with them. rule: resolved.

    Residuals are kept scaled, each sample to the size of 1, so that squares neither overflow nor underflow. The K×K
    algebra is done in float64, which autocast leaves alone.
    """
    shape = (-1,) + (1,) * (z0.dim() - 1)
    z, best = z0, z0
    residual = torch.full((len(z0),), torch.inf, dtype=z0.dtype, device=z0.device)
    status = torch.full((len(z0),), Status.MAX_ITER, dtype=torch.int64, device=z0.device)
    iterations = torch.zeros_like(status)
    trace: list[Tensor] = []
    history: list[Tensor] = []
    gram = z0.new_zeros(len(z0), rule.max_iter, rule.max_iter, dtype=torch.float64)
    next_step = rule.differentiable()
    for k in range(rule.max_iter + 1):
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
            code = torch.where(relative <= rule.rtol, Status.CONVERGED, code)
            status = torch.where(running, torch.where(relative.isfinite(), code, Status.NONFINITE), status)
        best = torch.where(improved.view(shape), z, best)
        if k == rule.max_iter:
            break
        history.append(g)
        running = status == Status.MAX_ITER
        # A stopped sample's residuals no longer differ but in rounding. A Gram matrix of zeros makes the rules' algebra
        # on it finite, and with it the gradient, of which the mask over z takes the value 0.
        row = torch.stack([(g * other).sum(1, dtype=gram.dtype) for other in history], 1)
        row = torch.nn.functional.pad(row, (0, rule.max_iter - k - 1))
        gram = _with_row(gram, row, k)
        step = next_step(torch.where(running.view(-1, 1, 1), gram, 0), k)
        step = step.to(z.dtype)
        update = sum(step[:, j : j + 1] * g for j, g in enumerate(history)) / scale
        z = torch.where(running.view(shape), z + update.view(z.shape), z)
    return Solution(best, residual, iterations, torch.stack(trace), status)


def _with_row(gram: Tensor, row: Tensor, k: int) -> Tensor:
    """gram (n, K, K) with row and column k, zero so far, set to row (n, K). Functional."""
    unit = torch.zeros_like(row)
    unit[:, k] = 1
    cross = row.unsqueeze(2) * unit.unsqueeze(1)
    return gram + cross + cross.mT - torch.diag_embed(row * unit)


def unit_scale(*tensors: Tensor) -> Tensor:
    """(n,) per sample the power of two that brings the largest entry of the tensors (n, …) near 1; 1 where that is zero
    or not finite."""
    highest = torch.stack([largest(t) for t in tensors]).amax(0)
    limit = int(math.log2(torch.finfo(highest.dtype).max)) - 1
    exponent = torch.frexp(highest).exponent.clamp(-limit, limit)
    scale = torch.ldexp(torch.ones_like(highest), -exponent)
    return torch.where(highest.isfinite() & (highest > 0), scale, 1)


def largest(x: Tensor) -> Tensor:
    """(n,) the largest magnitude in each sample of x (n, …); 0 in samples without elements."""
    rows = _rows(x.detach())
    return rows.abs().amax(1) if rows.shape[1] else rows.new_zeros(len(rows))


def _norm(rows: Tensor) -> Tensor:
    """(n,) of rows (n, size), summed in float64."""
    return rows.square().sum(1, dtype=torch.float64).sqrt()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(len(x), math.prod(x.shape[1:]))
