"""fixed_point: the equilibrium of any callable, with gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend as backends
from .adjoint import Adjoint, Equation, Implicit, Memory, Phantom, Shine, Unrolled, check_shine
from .config import build
from .kernels import State, memory_format
from .kernels.plain import wide
from .rules import Broyden, Rule, Unroll
from .solve import Solution, differentiable_solve, solution, solve


def fixed_point(
    f: Callable[..., Tensor],
    z0: Tensor,
    *,
    params: Sequence[Tensor] = (),
    solver: Rule | Unroll | str | Mapping[str, Any] = Broyden(),  # noqa: B008  (immutable)
    adjoint: Adjoint | str | Mapping[str, Any] = Implicit(),  # noqa: B008
    backend: str = "auto",
) -> tuple[Tensor, Solution | None]:
    """z* = f(z*, *params), sample by sample, from z0.

    Args:
        f: maps (z, *params), z of z0's shape (N, …), dtype and layout, to the same shape. Samples (the first
            dimension) must not see each other. It is called with the whole batch: the history takes max_iter·z0's size.
        params: tensors handed to f. Gradients reach them, and whatever else f closes over (a module's parameters,
            say), whether named here or not. z0 gets none: the equilibrium does not depend on it.
        solver, adjoint, backend: as IFRHead's. An Unroll applies f `steps` times under autograd; its Solution is None.

    Returns z* (the best iterate, differentiable once: create_graph=True raises RuntimeError) and the Solution.
    ValueError for arguments that do not fit.
    """
    solver, adjoint = build(solver, (Rule, Unroll), "solver"), build(adjoint, Adjoint, "adjoint")
    if z0.dim() < 1 or not z0.is_floating_point():
        raise ValueError(f"z0 has shape {tuple(z0.shape)} and dtype {z0.dtype}: expected (N, …) and a floating dtype")
    check_shine(solver, adjoint)
    z0 = z0.detach()
    if isinstance(solver, Unroll):
        z = z0
        for _ in range(solver.steps):
            z = f(z, *params)
        return z, None
    rule, iterate = solver.resolve(z0.dtype), wide(z0.dtype)

    def widened(z: Tensor) -> Tensor:
        z = z.to(z0.dtype)
        before = None if z.is_inference() else z._version
        out = f(z, *params)
        if not isinstance(out, Tensor) or out.shape != z.shape:
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"f returned {found} for z of shape {tuple(z.shape)}: expected a tensor of the same")
        if before is not None and z._version != before:
            raise ValueError(
                "f changed its argument z in place (nn.ReLU(inplace=True), say): expected it to leave z alone"
            )
        return out.to(iterate)

    start = z0.to(iterate).contiguous(memory_format=memory_format(z0))
    if isinstance(adjoint, Unrolled):
        solved = differentiable_solve(widened, start, rule)
        return solved.value.to(z0.dtype), solved.detach()
    kernels = backends.kernels(backend, z0.device.type, iterate)
    with torch.no_grad(), torch.cuda.device_of(z0):
        state = solve(lambda z, _: widened(z), start.clone(), rule, kernels)
    solved = solution(state)
    if not torch.is_grad_enabled():
        return solved.value.to(z0.dtype), solved
    # The one evaluation that the graph keeps: from it gradients go on to the parameters.
    leaf = solved.value.detach().requires_grad_(isinstance(adjoint, Implicit))
    if isinstance(adjoint, Phantom):
        end = leaf
        for _ in range(adjoint.steps):
            end = torch.lerp(end, widened(end), adjoint.damping)
        return _Attach.apply(end, solved.value, lambda grad: grad).to(z0.dtype), solved
    end = widened(leaf)
    if not _depends_on_more(end, leaf):
        return solved.value.to(z0.dtype), solved
    memory = Memory(state.history, state.p, state.q) if isinstance(adjoint, Shine) else None

    def cotangent(grad: Tensor) -> Tensor:
        def affine(w: Tensor, constant: Tensor, state: State) -> Tensor:
            with torch.enable_grad():
                product = torch.autograd.grad(end, leaf, w, retain_graph=True, allow_unused=True)[0]
            return constant if product is None else product + constant

        grad = grad.contiguous(memory_format=memory_format(solved.value))
        return adjoint.cotangent(Equation(affine, grad, z0.dtype, kernels, memory))[0]

    return _Attach.apply(end, solved.value, cotangent).to(z0.dtype), solved


class _Attach(torch.autograd.Function):
    """The equilibrium's value on the graph of f at the equilibrium; turns ∂L/∂z* into the w that f's graph takes."""

    @staticmethod
    def forward(ctx, end: Tensor, value: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.cotangent = cotangent
        return value.clone()

    @staticmethod
    def backward(ctx, grad: Tensor):
        if torch.is_grad_enabled():  # f's graph would take w for a constant, and second derivatives be wrong
            raise RuntimeError("fixed_point is differentiable once: create_graph=True has no meaning for it")
        with torch.cuda.device_of(grad):
            return ctx.cotangent(grad), None, None


def _depends_on_more(end: Tensor, leaf: Tensor) -> bool:
    """Does anything that requires a gradient, beside leaf, lead to end?"""
    if not leaf.requires_grad:
        return end.requires_grad
    own = torch.autograd.graph.get_gradient_edge(leaf).node
    nodes, seen = [end.grad_fn], {None, own}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):  # accumulates the gradient of a leaf
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
