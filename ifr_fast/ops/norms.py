"""The ops of the block's GroupNorm chains, norm_relu and norm_tail, and their vjps: an unroll's, under autograd.

Each goes straight to a backend's kernels. Inside a solve, which is an op itself, the kernels are called without these.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..checks import check_devices
from ..kernels import choose, eager
from ..kernels.contract import is_channels_last, wide

torch.library.define(
    "ifr_fast::norm_relu",
    "(Tensor y, Tensor weight, Tensor bias, int groups, float eps, str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ifr_fast::norm_relu_vjp",
    "(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ifr_fast::norm_tail",
    "(Tensor y, Tensor? r, Tensor[] norms, int groups, float eps, str backend) -> (Tensor, Tensor[])",
)
torch.library.define(
    "ifr_fast::norm_tail_vjp",
    "(Tensor grad, Tensor y, Tensor? r, Tensor[] norms, Tensor[] statistics, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor[])",
)


def _kernels(backend: str, y: Tensor) -> ModuleType:
    kernels = choose.kernels(backend, y.device.type, y.dtype)
    # A layout that the caller did not choose would be a copy that the caller did not ask for.
    return eager if kernels.CHANNELS_LAST_ONLY and not is_channels_last(y) else kernels


def _pairs(norms: list[Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    return (norms[0], norms[1]), (norms[2], norms[3]) if len(norms) == 4 else None


@torch.library.impl("ifr_fast::norm_relu", "default")
def _(y, weight, bias, groups, eps, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_relu(y, (weight, bias), groups, eps)


@torch.library.register_fake("ifr_fast::norm_relu")
def _(y, weight, bias, groups, eps, backend):
    check_devices(y, [weight, bias])
    statistics = y.new_empty(y.shape[0], groups, dtype=wide(y.dtype))
    return torch.empty_like(y), statistics, torch.empty_like(statistics)


@torch.library.impl("ifr_fast::norm_relu_vjp", "default")
def _(grad, y, weight, bias, mean, rstd, groups, eps, backend):
    with torch.cuda.device_of(y):
        kernels = _kernels(backend, y)
        grad_y, grads = kernels.norm_relu_vjp(grad, y, (weight, bias), mean, rstd, groups, eps, params=True)
    return grad_y, *grads


@torch.library.register_fake("ifr_fast::norm_relu_vjp")
def _(grad, y, weight, bias, mean, rstd, groups, eps, backend):
    check_devices(y, [grad, weight, bias, mean, rstd])
    return torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.impl("ifr_fast::norm_tail", "default")
def _(y, r, norms, groups, eps, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_tail(y, r, *_pairs(norms), groups, eps)


@torch.library.register_fake("ifr_fast::norm_tail")
def _(y, r, norms, groups, eps, backend):
    check_devices(y, norms if r is None else [r, *norms])
    statistics = [y.new_empty(y.shape[0], groups, dtype=wide(y.dtype)) for _ in norms]
    return torch.empty_like(y, dtype=wide(y.dtype)), statistics


@torch.library.impl("ifr_fast::norm_tail_vjp", "default")
def _(grad, y, r, norms, statistics, groups, eps, backend):
    with torch.cuda.device_of(y):
        grad_y, grad_r, grads = _kernels(backend, y).norm_tail_vjp(
            grad, y, r, *_pairs(norms), statistics, groups, eps, params=True
        )
    # An op's results may not share memory with its arguments or each other.
    grad_r = grad.new_empty(0) if grad_r is None else grad_r.clone() if grad_r is grad else grad_r
    return grad_y, grad_r, grads


@torch.library.register_fake("ifr_fast::norm_tail_vjp")
def _(grad, y, r, norms, statistics, groups, eps, backend):
    check_devices(y, [grad, *([] if r is None else [r]), *norms, *statistics])
    like = torch.empty_like(y, dtype=wide(y.dtype))
    return torch.empty_like(y), grad.new_empty(0) if r is None else like, [torch.empty_like(n) for n in norms]


def _norm_relu_context(ctx, inputs, output):
    y, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(y, weight, bias, *output[1:])


def _norm_relu_backward(ctx, grad, *_):
    grads = torch.ops.ifr_fast.norm_relu_vjp(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None


def _norm_tail_context(ctx, inputs, output):
    y, r, norms, *ctx.options = inputs
    ctx.count, ctx.residual = len(norms), r is not None
    ctx.save_for_backward(y, *([r] if ctx.residual else []), *norms, *output[1])


def _norm_tail_backward(ctx, grad, *_):
    y, *rest = ctx.saved_tensors
    r = rest.pop(0) if ctx.residual else None
    norms, statistics = rest[: ctx.count], rest[ctx.count :]
    grad_y, grad_r, grads = torch.ops.ifr_fast.norm_tail_vjp(grad, y, r, norms, statistics, *ctx.options)
    return grad_y, None if r is None else grad_r.to(r.dtype), grads, None, None, None


torch.library.register_autograd("ifr_fast::norm_relu", _norm_relu_backward, setup_context=_norm_relu_context)
torch.library.register_autograd("ifr_fast::norm_tail", _norm_tail_backward, setup_context=_norm_tail_context)


def differentiable_once(ctx: Any, *_: Any) -> None:
    raise RuntimeError("IFRHead is differentiable once: its gradient has no gradient")


for _op in ("norm_relu_vjp", "norm_tail_vjp"):
    torch.library.register_autograd(f"ifr_fast::{_op}", differentiable_once)
