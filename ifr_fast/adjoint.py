"""How gradients pass through an equilibrium H* = F(H*; X).

The loss's gradient in parameters and X is wᵀ ∂F/∂(θ, X) with wᵀ = wᵀ ∂F/∂H + ∂L/∂H (Eq. 8). The adjoints differ in w:
Implicit solves for it, JacobianFree and Shine guess it, Phantom and Unrolled backpropagate through steps instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .config import check_int, choice
from .kernels import State, is_channels_last, pick
from .kernels.plain import matvec
from .residual import Block, Linearised
from .rules import Broyden, Rule, Unroll, check_solver
from .solve import largest, solve

LEAST_STEPS = 15  # that Implicit may take


@dataclass(frozen=True)
class Memory:
    """What Shine needs of the forward solve: residuals (n, rows, size) and the pairs' coefficients (n, rows, rows)."""

    history: Tensor
    p: Tensor
    q: Tensor


@dataclass(frozen=True)
class Equation:
    """Eq. 8 for samples whose ∂L/∂H is grad (n, …).

    affine: maps (w, constant, the solve's state) to wᵀ ∂F/∂H + constant. compute: the dtype of F's convolutions.
    select: what has the map of some of the samples, given their indices, as `affine`.
    """

    affine: Callable[[Tensor, Tensor, State | None], Tensor]
    grad: Tensor
    compute: torch.dtype
    kernels: ModuleType
    memory: Memory | None = None
    select: Callable[[Tensor], Linearised] | None = None


@dataclass(frozen=True)
class Adjoint:
    """Base of the adjoints."""

    @property
    def rule(self) -> Rule:
        """The solver of the adjoint's equation, and what bounds the workspace of the backward pass."""
        return Broyden()

    def fitted(self, solver: Rule, compute: torch.dtype) -> Adjoint:
        """The adjoint with what it takes from the forward solver filled in."""
        return self

    def cotangent(self, equation: Equation) -> tuple[Tensor, Tensor, Tensor]:
        """w, like grad (n, …), and per sample (n,) ‖wᵀ ∂F/∂H + ∂L/∂H - wᵀ‖ / ‖∂L/∂H‖, inf where nothing is solved, and
        the steps taken."""
        raise NotImplementedError


@choice
@dataclass(frozen=True)
class Implicit(Adjoint):
    """Solves Eq. 8 by Broyden's method, from w⁰ = 0; options as the solvers' (rules.Rule), but what is None follows the
    forward solve: max_iter is its, and at least 15; rtol is its where that is tighter than the default.

    Where F does not contract all w may be worse than none: a sample whose w all are takes JacobianFree's.
    """

    max_iter: int | None = None
    rtol: float | None = None
    history_dtype: torch.dtype | None = None
    workspace: int | None = None

    def __post_init__(self) -> None:
        check_solver(self)

    @property
    def rule(self) -> Broyden:
        steps = LEAST_STEPS if self.max_iter is None else self.max_iter
        return Broyden(steps, self.rtol, self.history_dtype, self.workspace)

    def fitted(self, solver: Rule, compute: torch.dtype) -> Implicit:
        """The same with max_iter and rtol of their own, after a forward solve of an F that computes in `compute`."""
        steps = max(LEAST_STEPS, solver.max_iter) if self.max_iter is None else self.max_iter
        default = self.rule.resolve(compute).rtol
        asked = solver.resolve(compute).rtol or default  # 0 is no tolerance: the solver was to take all of its steps
        return replace(self, max_iter=steps, rtol=min(default, asked) if self.rtol is None else self.rtol)

    def cotangent(self, equation: Equation) -> tuple[Tensor, Tensor, Tensor]:
        # The equation is linear: with every sample's gradient scaled to 1, squares neither underflow nor overflow. One
        # that is not finite passes unsolved, for loss scaling to see; of zero the solution is zero.
        grad, select = equation.grad, equation.select
        scale = largest(grad).view(-1, *[1] * (grad.dim() - 1))
        solvable = scale.isfinite() & (scale > 0)
        scaled = torch.where(solvable, grad / scale, 0)

        def some(index: Tensor) -> Callable[[Tensor, State | None], Tensor]:
            linearised, constant = select(index), pick(scaled, index)
            return lambda w, state: linearised.affine(w, constant, state)

        # At w⁰ = 0 the map's value is the right-hand side itself: one product with the Jacobian saved.
        state = solve(
            lambda w, state: equation.affine(w, scaled, state),
            torch.zeros_like(grad),
            self.rule.resolve(equation.compute),
            equation.kernels,
            from_zero=True,
            first=scaled,
            affine=True,
            select=some if select else None,
        )
        # w = 0 leaves all of the right-hand side, and would teach the block nothing; w¹ is the right-hand side.
        solved = state.residual < 1
        w = torch.where(solved.view(scale.shape), state.value, scaled)
        residual = torch.where(solved, state.residual, state.trace[1])
        return torch.where(solvable, w * scale, grad), residual, state.iterations


@choice
@dataclass(frozen=True)
class JacobianFree(Adjoint):
    """w = ∂L/∂H: one product with the Jacobian in all (Fung et al., 2022)."""

    def cotangent(self, equation: Equation) -> tuple[Tensor, Tensor, Tensor]:
        return equation.grad, *_unsolved(equation.grad)


@choice
@dataclass(frozen=True)
class Shine(Adjoint):
    """w by the forward solve's own inverse Jacobian (Ramzi et al., 2022): F is evaluated no extra time.

    Needs a Broyden solver, and keeps its residuals for all samples until the backward pass.
    """

    def cotangent(self, equation: Equation) -> tuple[Tensor, Tensor, Tensor]:
        # (I - ∂F/∂H)ᵀ w = grad and J⁻¹ = -I + U Vᵀ of J = ∂F/∂H - I: w = grad - V Uᵀ grad, U = G Pᵀ, V = G Qᵀ.
        # Coefficients of rows that were never filled are zero, but what stands there may not be finite.
        # The pairs' coefficients grow with the inverse square of the residuals: products are of the algebra's dtype.
        grad, memory = equation.grad, equation.memory
        flat, rows = _flatten(grad).to(memory.p.dtype), range(memory.history.shape[1])
        dots = torch.stack([(memory.history[:, j] * flat).sum(1) for j in rows], 1).nan_to_num(0.0)
        coefficients = matvec(memory.q.mT, matvec(memory.p, dots))
        w = flat.clone()
        for j in rows:
            scale = coefficients[:, j : j + 1]
            w -= torch.where(scale != 0, scale * memory.history[:, j], 0)
        w = w.to(grad.dtype)
        return _unflatten(w, grad), *_unsolved(grad)


@choice
@dataclass(frozen=True)
class Phantom(Adjoint):
    """Backpropagation through `steps` damped iterations z ← (1 - damping) z + damping F(z) from the equilibrium (Geng
    et al., 2021). The forward value stays the solver's."""

    steps: int = 5
    damping: float = 0.5

    def __post_init__(self) -> None:
        check_int("Phantom", "steps", self.steps, 1)
        if not isinstance(self.damping, (int, float)) or not 0 < self.damping <= 1:
            raise ValueError(f"Phantom(damping={self.damping!r}): expected a number in (0, 1]")

    def backward(self, block: Block, z: Tensor, grad: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Gradients in X and the parameters."""
        linearised = []
        for _ in range(self.steps):
            linearised.append(block.linearise(z))
            z = torch.lerp(z, linearised[-1].value, self.damping)
        grad_x, grad_params = torch.zeros_like(z), []
        for step in reversed(linearised):
            grad_z, grads = step.vjp_params(self.damping * grad)
            grad_x += grad_z
            grad_params = [a + b for a, b in zip(grad_params, grads, strict=True)] if grad_params else grads
            grad = (1 - self.damping) * grad + grad_z
        return grad_x, grad_params


@choice
@dataclass(frozen=True)
class Unrolled(Adjoint):
    """Plain backpropagation through every step of the solve; memory grows with the steps.

    A sample that its z⁰ solves already takes no step, and so gets no gradient: start from elsewhere, or use Implicit.
    """


def check_shine(solver: Rule | Unroll, adjoint: Adjoint | None) -> None:
    """ValueError where adjoint is Shine and solver leaves no inverse Jacobian for it."""
    if isinstance(adjoint, Shine) and not isinstance(solver, (Broyden, Unroll)):
        raise ValueError(f"adjoint=Shine() reuses Broyden's inverse Jacobian; solver={solver!r} has none")


def _unsolved(grad: Tensor) -> tuple[Tensor, Tensor]:
    return grad.new_full((len(grad),), torch.inf), grad.new_zeros(len(grad), dtype=torch.int64)


def _flatten(x: Tensor) -> Tensor:
    """(n, …) as (n, size) in the order of its memory, as the history's rows are."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(len(x), math.prod(x.shape[1:]))


def _unflatten(flat: Tensor, like: Tensor) -> Tensor:
    if is_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)
