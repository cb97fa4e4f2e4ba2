"""How gradients pass through an equilibrium H* = F(H*; X).

The loss's gradient in the parameters θ and in X is wᵀ ∂F/∂(θ, X), where w solves wᵀ = wᵀ ∂F/∂H + ∂L/∂H (Eq. 8).
Implicit solves this equation for w. JacobianFree and Shine approximate w. Phantom and Unrolled backpropagate through
steps instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from .checks import check_int
from .config import build, choice
from .engine.linearise import BlockMap, Linearised
from .engine.loop import solve
from .engine.through import largest
from .kernels.contract import Kernels, is_channels_last, pick
from .kernels.gram import matvec
from .solvers import Broyden, Solver, Unroll, check_options

LEAST_STEPS = 15  # the smallest max_iter that Implicit takes by default


@dataclass(frozen=True)
class Memory:
    """What Shine needs of the forward solve.

    history (n, rows, size): the residuals as they are stored. p, q (n, rows, rows): the coefficients of Broyden's pairs
    (kernels/gram.py) over these rows.
    """

    history: Tensor
    p: Tensor
    q: Tensor


@dataclass(frozen=True)
class Equation:
    """Eq. 8 for n samples.

    affine: maps (w, constant, the solver's state) to wᵀ ∂F/∂H + constant. grad: ∂L/∂H (n, …). compute: the dtype of F's
    convolutions. memory: for Shine. select: maps indices of samples to F's linearisation at those samples alone.
    """

    affine: Callable[[Tensor, Tensor, Any], Any]
    grad: Tensor
    compute: torch.dtype
    kernels: Kernels
    memory: Memory | None = None
    select: Callable[[Tensor], Linearised] | None = None


class Cotangent(NamedTuple):
    """The vector w of Eq. 8 (n, …). For each sample (n,): the adjoint residual ‖wᵀ ∂F/∂H + ∂L/∂H - wᵀ‖ / ‖∂L/∂H‖, inf
    where no equation was solved, and the steps taken."""

    w: Tensor
    adjoint_residual: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Problem:
    """One backward pass for a chunk of samples: a block, its equilibrium `value` (n, …) and grad = ∂L/∂H (n, …)."""

    block: BlockMap
    value: Tensor
    grad: Tensor
    memory: Memory


class Gradients(NamedTuple):
    """The gradients in X and in each parameter; adjoint_residual and iterations as in Cotangent."""

    x: Tensor
    params: list[Tensor]
    adjoint_residual: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Adjoint:
    """Base class of the adjoints."""

    through: ClassVar[bool] = False  # whether autograd records the forward solve
    reuses: ClassVar[bool] = False  # whether the adjoint needs the forward solve's Memory
    solves: ClassVar[bool] = False  # whether the adjoint solves Eq. 8

    @property
    def backward_solver(self) -> Solver:
        """The solver of Eq. 8. Its workspace also bounds the memory of the backward pass."""
        return Broyden()

    @property
    def linearisations(self) -> int:
        """How many linearisations of F a backward pass holds at the same time."""
        return 1

    def check(self, solver: Solver | Unroll) -> None:
        """Raises ValueError if this forward solver leaves nothing that the adjoint can work on."""

    def fitted(self, solver: Solver, compute: torch.dtype) -> Adjoint:
        """This adjoint with its unset options taken from the forward solver of an F that computes in `compute`."""
        return self

    def end(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """The value that autograd differentiates, computed from f and its equilibrium z."""
        return f(z)

    def cotangent(self, equation: Equation) -> Cotangent:
        """The vector w with which to backpropagate through the result of `end`."""
        return _unsolved(equation.grad)

    def backward(self, problem: Problem) -> Gradients:
        linearised = problem.block.linearise(problem.value)
        block, select = problem.block, linearised.select
        equation = Equation(linearised.affine, problem.grad, block.dtype, block.kernels, problem.memory, select)
        w, *report = self.cotangent(equation)
        return Gradients(*linearised.vjp_params(w), *report)


@choice
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Solves Eq. 8 from w⁰ = 0, by Broyden's method or by another `solver`.

    Args:
        max_iter, rtol, history_dtype, workspace: options of Broyden's method, as for solvers.Solver. max_iter=None
            means the forward solver's max_iter, but at least 15. rtol=None means the forward solver's rtol if it is
            positive and tighter than the default, else the default.
        solver: a solver in place of these four options, given as for IFRHead. rtol=None has the same meaning there.

    Where F does not contract, the solver may find no w better than w = 0. Such a sample takes JacobianFree's w instead.
    Raises ValueError for options that do not fit, or that are given beside `solver`.
    """

    solves: ClassVar[bool] = True

    max_iter: int | None = None
    rtol: float | None = None
    history_dtype: torch.dtype | None = None
    workspace: int | None = None
    solver: Solver | str | Mapping[str, Any] | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        check_options(self)
        if self.solver is not None:
            options = {k: v for k, v in vars(self).items() if k != "solver" and v is not None}
            if options:
                raise ValueError(f"Implicit(solver=…, {', '.join(options)}=…): expected the options in the solver")
            object.__setattr__(self, "solver", build(self.solver, Solver, "solver"))

    @property
    def backward_solver(self) -> Solver:
        if isinstance(self.solver, Solver):
            return self.solver
        steps = LEAST_STEPS if self.max_iter is None else self.max_iter
        return Broyden(steps, self.rtol, self.history_dtype, self.workspace)

    def fitted(self, solver: Solver, compute: torch.dtype) -> Implicit:
        """The same adjoint with max_iter and rtol set, for a forward solve of an F that computes in `compute`."""
        return _fitted(self, solver, compute)

    def cotangent(self, equation: Equation) -> Cotangent:
        # The equation is linear, so each sample's gradient is scaled to a largest entry of 1: squares then neither
        # underflow nor overflow. A gradient that is not finite is returned unsolved, for loss scaling to see. For a
        # zero gradient the solution is zero.
        grad = equation.grad
        scale = largest(grad).view(-1, *[1] * (grad.dim() - 1))
        solvable = scale.isfinite() & (scale > 0)
        scaled = torch.where(solvable, grad / scale, 0)

        def selected(select: Callable[[Tensor], Linearised], index: Tensor) -> Callable[[Tensor, Any], Any]:
            linearised, constant = select(index), pick(scaled, index)
            return lambda w, state: linearised.affine(w, constant, state)

        # At w⁰ = 0 the map gives the right-hand side. Passing it as `first` saves one product with the Jacobian.
        state = solve(
            lambda w, state: equation.affine(w, scaled, state),
            torch.zeros_like(grad),
            self.backward_solver.resolve(equation.compute),
            equation.kernels,
            from_zero=True,
            first=scaled,
            affine=True,
            select=equation.select and partial(selected, equation.select),
        )
        # At an adjoint residual of 1, w is no better than w = 0, from which the block would learn nothing. Such a
        # sample takes w¹, which is the right-hand side.
        solved = state.residual < 1
        w = torch.where(solved.view(scale.shape), state.value, scaled)
        adjoint_residual = torch.where(solved, state.residual, state.trace[1])
        return Cotangent(torch.where(solvable, w * scale, grad), adjoint_residual, state.iterations)


@choice
@dataclass(frozen=True)
class JacobianFree(Adjoint):
    """Uses w = ∂L/∂H. This costs one product with the Jacobian in all (Fung et al., 2022)."""


@choice
@dataclass(frozen=True)
class Shine(Adjoint):
    """Computes w by the forward solve's own inverse Jacobian (Ramzi et al., 2022), without further evaluations of F.

    Needs a Broyden solver (ValueError otherwise). Its residuals stay in memory for all samples until the backward pass.
    """

    reuses: ClassVar[bool] = True

    def check(self, solver: Solver | Unroll) -> None:
        if not isinstance(solver, (Broyden, Unroll)):
            raise ValueError(f"adjoint=Shine() reuses Broyden's inverse Jacobian; solver={solver!r} has none")

    def cotangent(self, equation: Equation) -> Cotangent:
        # With J = ∂F/∂H - I, Eq. 8 reads -Jᵀ w = grad. Broyden's J⁻¹ = -I + U Vᵀ gives w = grad - V Uᵀ grad, where U =
        # G Pᵀ and V = G Qᵀ. Rows of the history that were never written have zero coefficients, but may hold values
        # that are not finite. The pairs' coefficients grow with the inverse square of the residuals, so products are
        # taken in the dtype of p and q.
        grad, memory = equation.grad, equation.memory
        if memory is None:
            raise ValueError("Shine needs the forward solve's memory: the solve kept none")
        flat, rows = _flatten(grad).to(memory.p.dtype), range(memory.history.shape[1])
        dots = torch.stack([(memory.history[:, j].to(flat.dtype) * flat).sum(1) for j in rows], 1).nan_to_num(0.0)
        coefficients = matvec(memory.q.mT, matvec(memory.p, dots))
        w = flat.clone()
        for j in rows:
            scale = coefficients[:, j : j + 1]
            w -= torch.where(scale != 0, scale * memory.history[:, j].to(flat.dtype), 0)
        w = w.to(grad.dtype)
        return _unsolved(_unflatten(w, grad))


@choice
@dataclass(frozen=True)
class Phantom(Adjoint):
    """Backpropagates through `steps` damped iterations z ← (1 - damping) z + damping F(z) from the equilibrium (Geng et
    al., 2021). The forward value stays the solver's. Raises ValueError unless steps ≥ 1 and 0 < damping ≤ 1."""

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_int("Phantom", "steps", self.steps, 1)
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"Phantom(damping={self.damping!r}): expected a number in (0, 1]")

    @property
    def linearisations(self) -> int:
        return self.steps

    def end(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        for _ in range(self.steps):
            z = torch.lerp(z, f(z), self.damping)
        return z

    def backward(self, problem: Problem) -> Gradients:
        z, grad = problem.value, problem.grad
        linearised: list[Linearised] = []
        for _ in range(self.steps):
            linearised.append(problem.block.linearise(z))
            z = torch.lerp(z, linearised[-1].value, self.damping)
        grad_x = torch.zeros_like(z)
        grad_params: list[Tensor] = []
        for step in reversed(linearised):
            grad_z, grads = step.vjp_params(self.damping * grad)
            grad_x += grad_z
            grad_params = [a + b for a, b in zip(grad_params, grads, strict=True)] if grad_params else grads
            grad = (1 - self.damping) * grad + grad_z
        return Gradients(grad_x, grad_params, *_unsolved(grad)[1:])


@choice
@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Backpropagates through every step of the solve; memory grows with the steps.

    A sample whose z⁰ is already a solution takes no step and gets no gradient: start elsewhere, or use Implicit.
    """

    through: ClassVar[bool] = True


@lru_cache(maxsize=256)
def _fitted(adjoint: Implicit, solver: Solver, compute: torch.dtype) -> Implicit:
    own = adjoint.backward_solver
    if adjoint.solver is None and adjoint.max_iter is None:
        own = replace(own, max_iter=max(LEAST_STEPS, solver.max_iter))
    if own.rtol is None:
        default, _ = own.resolve(compute).resolved()
        asked, _ = solver.resolve(compute).resolved()
        own = replace(own, rtol=min(default, asked or default))  # rtol=0 asks for all steps: no tolerance
    return Implicit(solver=own)


def _unsolved(w: Tensor) -> Cotangent:
    """w as the result of an adjoint that solves no equation."""
    return Cotangent(w, w.new_full((len(w),), torch.inf), w.new_zeros(len(w), dtype=torch.int64))


def _flatten(x: Tensor) -> Tensor:
    """(n, …) → (n, size) in the order of its memory, like the history's rows."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(len(x), math.prod(x.shape[1:]))


def _unflatten(flat: Tensor, like: Tensor) -> Tensor:
    if is_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)
