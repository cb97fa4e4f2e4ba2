"""How gradients pass through an equilibrium H* = F(H*; X).

The loss's gradient in parameters and X is wᵀ ∂F/∂(θ, X) with wᵀ = wᵀ ∂F/∂H + ∂L/∂H (Eq. 8). The adjoints differ in w:
Implicit solves for it, JacobianFree and Shine guess it, Phantom and Unrolled backpropagate through steps instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
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

    affine: Callable[[Tensor, Tensor, Any], Any]
    grad: Tensor
    compute: torch.dtype
    kernels: Kernels
    memory: Memory | None = None
    select: Callable[[Tensor], Linearised] | None = None


class Cotangent(NamedTuple):
    """w (n, …), and for each sample the adjoint residual ‖wᵀ ∂F/∂H + ∂L/∂H - wᵀ‖ / ‖∂L/∂H‖ (n,), inf where nothing is
    solved, and the steps taken (n,)."""

    w: Tensor
    adjoint_residual: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Problem:
    """What a backward pass has to do: ∂L/∂H = grad, at the equilibrium `value` of a block, for a chunk of samples."""

    block: BlockMap
    value: Tensor
    grad: Tensor
    memory: Memory


class Gradients(NamedTuple):
    """In X and in each parameter; the others as Cotangent's."""

    x: Tensor
    params: list[Tensor]
    adjoint_residual: Tensor
    iterations: Tensor


@dataclass(frozen=True)
class Adjoint:
    """Base of the adjoints."""

    through: ClassVar[bool] = False  # does autograd see every step of the forward solve?
    reuses: ClassVar[bool] = False  # does it need the forward solve's Memory?
    solves: ClassVar[bool] = False  # does it solve Eq. 8?

    @property
    def backward_solver(self) -> Solver:
        """The solver of the adjoint's equation, and what bounds the workspace of the backward pass."""
        return Broyden()

    @property
    def linearisations(self) -> int:
        """Linearisations of F that a backward pass holds at a time."""
        return 1

    def check(self, solver: Solver | Unroll) -> None:
        """ValueError where the forward solver leaves nothing that the adjoint can work on."""

    def fitted(self, solver: Solver, compute: torch.dtype) -> Adjoint:
        """The adjoint with what it takes from the forward solver filled in."""
        return self

    def end(self, f: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
        """What autograd is to see of f at its equilibrium z."""
        return f(z)

    def cotangent(self, equation: Equation) -> Cotangent:
        """The w that `end` is multiplied by."""
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
    """Solves Eq. 8, from w⁰ = 0, by Broyden's method or by another `solver`.

    Args:
        max_iter, rtol, history_dtype, workspace: of Broyden's method, as solvers.Solver's. What is None follows the
            forward solve: max_iter is its, and at least 15; rtol is its where that is tighter than the default.
        solver: instead of these four a solver of its own, as IFRHead's; an rtol of None follows the forward solve.

    Where F does not contract, no w may be better than w = 0. Such a sample takes JacobianFree's w instead.
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
        """The same with max_iter and rtol of its own, after a forward solve of an F that computes in `compute`."""
        own = self.backward_solver
        if self.solver is None and self.max_iter is None:
            own = replace(own, max_iter=max(LEAST_STEPS, solver.max_iter))
        if own.rtol is None:
            default, _ = own.resolve(compute).resolved()
            asked, _ = solver.resolve(compute).resolved()
            own = replace(own, rtol=min(default, asked or default))  # 0 is no tolerance: all steps were asked for
        return Implicit(solver=own)

    def cotangent(self, equation: Equation) -> Cotangent:
        # The equation is linear: with every sample's gradient scaled to 1, squares neither underflow nor overflow. One
        # that is not finite passes unsolved, for loss scaling to see; of zero the solution is zero.
        grad = equation.grad
        scale = largest(grad).view(-1, *[1] * (grad.dim() - 1))
        solvable = scale.isfinite() & (scale > 0)
        scaled = torch.where(solvable, grad / scale, 0)

        def selected(select: Callable[[Tensor], Linearised], index: Tensor) -> Callable[[Tensor, Any], Any]:
            linearised, constant = select(index), pick(scaled, index)
            return lambda w, state: linearised.affine(w, constant, state)

        # At w⁰ = 0 the map's value is the right-hand side itself: one product with the Jacobian saved.
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
        # w = 0 leaves all of the right-hand side, and would teach the block nothing; w¹ is the right-hand side.
        solved = state.residual < 1
        w = torch.where(solved.view(scale.shape), state.value, scaled)
        adjoint_residual = torch.where(solved, state.residual, state.trace[1])
        return Cotangent(torch.where(solvable, w * scale, grad), adjoint_residual, state.iterations)


@choice
@dataclass(frozen=True)
class JacobianFree(Adjoint):
    """w = ∂L/∂H: one product with the Jacobian in all (Fung et al., 2022)."""


@choice
@dataclass(frozen=True)
class Shine(Adjoint):
    """w by the forward solve's own inverse Jacobian (Ramzi et al., 2022): F is evaluated no extra time.

    Needs a Broyden solver, and keeps its residuals for all samples until the backward pass.
    """

    reuses: ClassVar[bool] = True

    def check(self, solver: Solver | Unroll) -> None:
        if not isinstance(solver, (Broyden, Unroll)):
            raise ValueError(f"adjoint=Shine() reuses Broyden's inverse Jacobian; solver={solver!r} has none")

    def cotangent(self, equation: Equation) -> Cotangent:
        # (I - ∂F/∂H)ᵀ w = grad and J⁻¹ = -I + U Vᵀ of J = ∂F/∂H - I: w = grad - V Uᵀ grad, U = G Pᵀ, V = G Qᵀ.
        # Coefficients of rows that were never filled are zero, but what stands there may not be finite.
        # The pairs' coefficients grow with the inverse square of the residuals: products are of the algebra's dtype.
        grad, memory = equation.grad, equation.memory
        if memory is None:
            raise ValueError("Shine needs the forward solve's memory: the solve kept none")
        flat, rows = _flatten(grad).to(memory.p.dtype), range(memory.history.shape[1])
        dots = torch.stack([(memory.history[:, j] * flat).sum(1) for j in rows], 1).nan_to_num(0.0)
        coefficients = matvec(memory.q.mT, matvec(memory.p, dots))
        w = flat.clone()
        for j in rows:
            scale = coefficients[:, j : j + 1]
            w -= torch.where(scale != 0, scale * memory.history[:, j], 0)
        w = w.to(grad.dtype)
        return _unsolved(_unflatten(w, grad))


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
    """Plain backpropagation through every step of the solve; memory grows with the steps.

    A sample that its z⁰ solves already takes no step, and so gets no gradient: start from elsewhere, or use Implicit.
    """

    through: ClassVar[bool] = True


def _unsolved(w: Tensor) -> Cotangent:
    """w, which solves no equation."""
    return Cotangent(w, w.new_full((len(w),), torch.inf), w.new_zeros(len(w), dtype=torch.int64))


def _flatten(x: Tensor) -> Tensor:
    """(n, …) as (n, size) in the order of its memory, as the history's rows are."""
    return (x.permute(0, 2, 3, 1) if is_channels_last(x) else x).reshape(len(x), math.prod(x.shape[1:]))


def _unflatten(flat: Tensor, like: Tensor) -> Tensor:
    if is_channels_last(like):
        n, c, h, w = like.shape
        return flat.view(n, h, w, c).permute(0, 3, 1, 2)
    return flat.view(like.shape)
