"""torch's function transforms: which of them an equilibrium takes part in, and how."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import ops  # noqa: F401  (registers torch.ops.ifr_fast)
from ._torch import forward_mode_active, transforms_active


def refuse_forward_mode(who: str) -> None:
    """NotImplementedError in forward mode, where an equilibrium would pass for a constant."""
    if forward_mode_active():
        raise NotImplementedError(
            f"{who} has no forward-mode derivatives (jvp, jacfwd, dual numbers): an unroll has (solver=Unroll(…))"
        )


def refuse_transforms(who: str) -> None:
    """NotImplementedError inside of any of torch.func's transforms and in forward mode."""
    refuse_forward_mode(who)
    if transforms_active():
        raise NotImplementedError(
            f"{who} does not work under torch.func's transforms (grad, vjp, vmap, …): use backward() or "
            "torch.autograd.grad; an unroll does (solver=Unroll(…))"
        )


def solve_op(x: Tensor, params: Sequence[Tensor], call: str) -> tuple[Tensor, ...]:
    """The op `solve`. Under torch.func's transforms as an autograd function, for they do not reach into an op."""
    if transforms_active():
        return _Solve.apply(x, call, *params)
    return torch.ops.ifr_fast.solve(x, params, call)


class _Solve(torch.autograd.Function):
    """The op `solve` under grad, vjp and vmap. Batches of batches are one batch: samples share nothing."""

    @staticmethod
    def forward(x: Tensor, call: str, *params: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.ifr_fast.solve(x, params, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        x, ctx.call, *params = inputs
        ctx.count = len(params)
        ctx.save_for_backward(output[0], x, *params, *output[5:])
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple:
        value, x, *rest = ctx.saved_tensors
        grads = _SolveBackward.apply(grad, value, x, ctx.call, ctx.count, *rest)
        return grads[0], None, *grads[1:]

    @staticmethod
    def vmap(info: Any, dims: tuple, x: Tensor, call: str, *params: Tensor) -> tuple:
        if any(dim is not None for dim in dims[2:]):
            return _each(_Solve, info, dims, (x, call, *params))
        many = x.movedim(dims[0], 0)
        results = _Solve.apply(many.flatten(0, 1), call, *params)
        shape, samples = many.shape[:2], (0, 0, 0, 1, 0, 0, 0, 0)
        return tuple(r.unflatten(d, shape) for r, d in zip(results, samples, strict=True)), samples


class _SolveBackward(torch.autograd.Function):
    """The op `solve_backward` under the same: (grad_x, *grad_params)."""

    @staticmethod
    def forward(grad: Tensor, value: Tensor, x: Tensor, call: str, count: int, *rest: Tensor) -> tuple[Tensor, ...]:
        grad_x, grad_params, *_ = torch.ops.ifr_fast.solve_backward(grad, value, x, rest[:count], rest[count:], call)
        return grad_x, *grad_params

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise RuntimeError("IFRHead is differentiable once: its gradient has no gradient")

    @staticmethod
    def vmap(info: Any, dims: tuple, *args: Any) -> tuple:
        return _each(_SolveBackward, info, dims, args)  # every member has parameters' gradients of its own


def _each(function: type[torch.autograd.Function], info: Any, dims: tuple, args: tuple) -> tuple:
    """The vmap of a function, member by member."""
    results = []
    for i in range(info.batch_size):
        members = [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]
        results.append(function.apply(*members))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])
