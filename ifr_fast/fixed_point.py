"""fixed_point: the equilibrium of any callable, with gradients."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ._torch import autocast, is_fake, reference_count, version
from .adjoints import Adjoint, Equation, Implicit, Memory
from .checks import check_tensor, refuse_transforms
from .config import build
from .engine.loop import solution, solve
from .engine.through import differentiable_solve, unit_scale
from .kernels import choose
from .kernels.contract import Kernels, State, memory_format, wide
from .solution import Solution
from .solvers import Broyden, Solver, Unroll


def fixed_point(
    f: Callable[..., Tensor],
    z0: Tensor,
    *,
    params: Sequence[Tensor] = (),
    solver: Solver | Unroll | str | Mapping[str, Any] = Broyden(),  # noqa: B008  (immutable)
    adjoint: Adjoint | str | Mapping[str, Any] = Implicit(),  # noqa: B008
    backend: str = "auto",
) -> tuple[Tensor, Solution | None]:
    """Solves z* = f(z*, *params) for each sample, starting from z0.

    Args:
        f: maps (z, *params) to a tensor of z's shape and device, of any floating dtype. z has z0's shape (N, …), dtype
            and layout. Samples (the first dimension) must not depend on each other. f is called with the whole batch,
            so the history takes max_iter times z0's size. f may keep the z that it is given, but must not change it.
        z0: (N, …), float64, float32, bfloat16 or float16. It gets no gradient: the equilibrium does not depend on it.
        params: tensors passed to f. Gradients reach them, and whatever else f closes over (a module's parameters, say),
            whether named here or not.
        solver, adjoint, backend: as for IFRHead. An Unroll applies f `steps` times under autograd; its Solution is
            None.

    Returns z*, the best iterate in z0's dtype and layout, and the Solution, whose value may share memory with z*. z* is
    differentiable once. A backward pass fills the Solution's `adjoint`, and on a CPU warns if Implicit missed its
    tolerance. Under torch.utils.checkpoint the backward pass evaluates f as often as the forward pass, once more if
    adjoint is Implicit, and takes that adjoint's own products. On a GPU f's argument and result are scaled to about 1
    and back, two sweeps per evaluation.

    Raises ValueError for arguments that do not fit, NotImplementedError under torch.func's transforms and in forward
    mode (except for Unroll and Unrolled), and RuntimeError if a backward pass uses create_graph=True.
    """
    method: Solver | Unroll = build(solver, (Solver, Unroll), "solver")
    gradient: Adjoint = build(adjoint, Adjoint, "adjoint")
    if not callable(f):
        raise ValueError(f"f is {f!r}: expected a callable that maps z to a tensor of the same shape")
    check_tensor("z0", z0)
    if z0.dim() < 1:
        raise ValueError("z0 has shape (): expected (N, …)")
    if isinstance(params, Tensor) or not isinstance(params, Sequence):
        raise ValueError(f"params is a {type(params).__name__}: expected a list or tuple of tensors")
    choose.check(backend)
    gradient.check(method)
    z0 = z0.detach()
    if z0.is_inference() and not torch.is_inference_mode_enabled():
        z0 = z0.clone()  # autograd cannot save inference tensors
    f = _CheckedMap(f, params, z0)
    if isinstance(method, Unroll):
        z = z0
        for _ in range(method.steps):
            z = f(z).to(z0.dtype)
        return z.contiguous(memory_format=memory_format(z0)), None
    resolved, iterate = method.resolve(z0.dtype), wide(z0.dtype)
    gradient = gradient.fitted(method, z0.dtype)
    start = z0.to(iterate).contiguous(memory_format=memory_format(z0))
    if gradient.through:
        solved = differentiable_solve(f, start, resolved)
        return solved.value.to(z0.dtype).contiguous(memory_format=memory_format(z0)), solved.detach()
    refuse_transforms("fixed_point")
    if is_fake(z0):
        raise NotImplementedError("fixed_point cannot be traced: its solve is no operator (meta tensors give shapes)")
    kernels, backward_kernels = (
        choose.kernels(backend, z0.device.type, iterate, s.resolved()[1])
        for s in (resolved, gradient.backward_solver.resolve(z0.dtype))
    )
    with torch.no_grad(), torch.cuda.device_of(z0):
        state, value = _solve(f, start.clone(), resolved, kernels)
    adjoint_residual = torch.full_like(state.residual, torch.nan)
    solved = replace(solution(state), value=value, adjoint=adjoint_residual)
    if not torch.is_grad_enabled():
        return value.to(z0.dtype), solved
    # The only evaluation that the graph keeps: through it gradients reach the parameters.
    leaf = value.detach().requires_grad_(gradient.solves)
    end = gradient.end(f, leaf)
    if not _depends_on_more(end, leaf):
        return value.to(z0.dtype), solved
    memory = Memory(state.history, *state.pairs()) if gradient.reuses else None
    # Checkpointing's hooks would repeat the forward pass for every product with the Jacobian. So the products use a
    # separate evaluation.
    beside = gradient.solves and _tensors_are_saved_by_hooks()

    def cotangent(grad: Tensor) -> Tensor:
        z, fz = leaf, end
        if beside:
            z = value.detach().requires_grad_()
            with torch.enable_grad():
                fz = f(z)

        def affine(w: Tensor, constant: Tensor, state: State | None) -> Tensor:
            product = torch.autograd.grad(fz, z, w, retain_graph=True, allow_unused=True)[0]
            return constant if product is None else product + constant

        grad = grad.contiguous(memory_format=memory_format(value))
        w, residual, _ = gradient.cotangent(Equation(affine, grad, z0.dtype, backward_kernels, memory))
        adjoint_residual.copy_(residual)
        if gradient.solves:
            _warn_unsolved(residual, gradient.backward_solver.resolve(z0.dtype).resolved()[0])
        return w

    return _Attach.apply(end, value, cotangent).to(z0.dtype), solved


class _CheckedMap:
    """f with its params, for z of any floating dtype. f is called in z0's dtype and under the caller's autocast, also
    in a backward pass. Its result is checked and converted to the iterates' dtype."""

    def __init__(self, f: Callable[..., Tensor], params: Sequence[Tensor], z0: Tensor) -> None:
        self.f, self.params, self.dtype = f, params, z0.dtype
        device = z0.device.type
        self.autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.no_autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
        if device != "meta" and torch.is_autocast_enabled(device):
            self.autocast = partial(autocast, device, True, torch.get_autocast_dtype(device))
            self.no_autocast = partial(autocast, device, False)

    def __call__(self, z: Tensor) -> Tensor:
        given = z.to(self.dtype)
        before = version(given)
        with self.autocast():
            out = self.f(given, *self.params)
        if not isinstance(out, Tensor) or out.shape != z.shape or out.device != z.device:
            found = f"shape {tuple(out.shape)} on {out.device}" if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(f"f returned {found} for z of shape {tuple(z.shape)} on {z.device}: expected the same")
        if out.layout is not torch.strided:
            raise ValueError(f"f returned layout {out.layout}: expected a dense tensor")
        if not out.is_floating_point():
            raise ValueError(f"f returned dtype {out.dtype} for z of dtype {self.dtype}: expected a floating dtype")
        if version(given) != before:
            raise ValueError(
                "f changed its argument z in place (nn.ReLU(inplace=True), say): expected it to leave z alone"
            )
        return out.to(wide(self.dtype))

    def on_buffer(self, z: Tensor) -> Tensor:
        """f(z) for a z that the solver will overwrite. If f keeps z, or a view of it, z moves to new memory."""
        if z.dtype != self.dtype:
            return self(z)
        before = reference_count(z)
        out = self(z.detach())
        if before is None or reference_count(z) != before:
            z.set_(z.clone())  # type: ignore[call-overload]  # torch's stubs lack set_(tensor)
        return out


def _solve(f: _CheckedMap, z: Tensor, solver: Solver, kernels: Kernels) -> tuple[State, Tensor]:
    """The solver's state, and the best iterate in z's layout. z is overwritten."""
    scale: Tensor | None = None
    first: Tensor | None = None
    # Squares may overflow or underflow if they are summed in the iterates' own dtype.
    if z.dtype == torch.float64 or z.device.type != "cpu":
        first = f.on_buffer(z)
        scale = unit_scale(first, z).view(-1, *[1] * (z.dim() - 1))
        ordinary = z.device.type == "cpu" and bool(((scale > 1e-100) & (scale < 1e100)).all())
        scale = None if ordinary else scale
    with f.no_autocast():
        if scale is None or first is None:
            state = solve(lambda z, _: f.on_buffer(z), z, solver, kernels, first=first)
            return state, state.value
        s = scale
        state = solve(lambda z, _: s * f(z / s), s * z, solver, kernels, first=s * first)
        return state, state.value / s


def _tensors_are_saved_by_hooks() -> bool:
    """Whether checkpointing, or another hook on the tensors that autograd saves, is active."""
    try:
        with torch.autograd.graph.disable_saved_tensors_hooks(""):  # raises if there are hooks
            return False
    except RuntimeError:
        return True


def _warn_unsolved(residual: Tensor, rtol: float) -> None:
    """Warns on a CPU if an adjoint residual exceeds rtol. The text never changes, so Python shows it once."""
    if residual.device.type == "cpu" and rtol > 0 and bool((residual > rtol).any()):
        warnings.warn(
            "fixed_point: a gradient's own equation (Eq. 8) was not solved to the adjoint's rtol, so the gradient is "
            "inexact; the Solution's `adjoint` has the adjoint residual of each sample. Give "
            "adjoint=Implicit(max_iter=…) more steps, or make f contract.",
            stacklevel=2,
        )


class _Attach(torch.autograd.Function):
    """Puts the equilibrium's value on the graph of f at the equilibrium. Its backward pass turns ∂L/∂z* into the w with
    which f's graph is backpropagated."""

    @staticmethod
    def forward(ctx: Any, end: Tensor, value: Tensor, cotangent: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.cotangent = cotangent
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        if torch.is_grad_enabled():  # f's graph would treat w as a constant: wrong second derivatives
            raise RuntimeError("fixed_point is differentiable once: create_graph=True has no meaning for it")
        with torch.cuda.device_of(grad):
            return ctx.cotangent(grad), None, None


def _depends_on_more(end: Tensor, leaf: Tensor) -> bool:
    """Whether end depends on a tensor that requires a gradient, other than leaf."""
    if not leaf.requires_grad or (end.is_leaf and end is not leaf):
        return end.requires_grad
    own = torch.autograd.graph.get_gradient_edge(leaf).node
    nodes: list[Any] = [end.grad_fn]
    seen: set[Any] = {None, own}
    while nodes:
        node = nodes.pop()
        if node in seen:
            continue
        if hasattr(node, "variable"):  # accumulates the gradient of a leaf
            return True
        seen.add(node)
        nodes += [following for following, _ in node.next_functions]
    return False
