"""The ops norm_relu and norm_tail, the block's GroupNorm chains, and their vjps. Unrolls use them under autograd.

Each op calls one function of a backend. A solve is an op itself, and calls those functions directly.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import check_devices
from ..kernels import choose, eager
from ..kernels.contract import Kernels, Norm, is_channels_last, wide

torch.library.define(
    "ifr_fast::norm_relu",
    "(Tensor y, Tensor weight, Tensor bias, int groups, str backend) -> (Tensor, Tensor[])",
)
torch.library.define(
    "ifr_fast::norm_relu_vjp",
    "(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor[] statistics, int groups, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ifr_fast::norm_tail",
    "(Tensor y, Tensor? shortcut, Tensor[] norms, int groups, str backend) -> (Tensor, Tensor[])",
)
torch.library.define(
    "ifr_fast::norm_tail_vjp",
    "(Tensor grad, Tensor y, Tensor? shortcut, Tensor[] norms, Tensor[] statistics, int groups, str backend)"
    " -> (Tensor, Tensor, Tensor[])",
)


def _kernels(backend: str, y: Tensor) -> Kernels:
    kernels = choose.kernels(backend, y.device.type, y.dtype)
    # Converting y to channels_last would be a copy that the caller did not ask for.
    return eager if kernels.CHANNELS_LAST_ONLY and not is_channels_last(y) else kernels


def _pair(norms: list[Tensor], groups: int) -> tuple[Norm, Norm | None]:
    if len(norms) not in (2, 4):
        raise ValueError(f"norms has {len(norms)} tensors: expected weight and bias of one norm or of two")
    weight, bias, *second = norms
    return Norm(weight, bias, groups), Norm(second[0], second[1], groups) if second else None


@torch.library.impl("ifr_fast::norm_relu", "default")
def _(y, weight, bias, groups, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_relu(y, Norm(weight, bias, groups))


@torch.library.register_fake("ifr_fast::norm_relu")
def _(y, weight, bias, groups, backend):
    check_devices(y, [weight, bias])
    return torch.empty_like(y), [y.new_empty(y.shape[0], groups, dtype=wide(y.dtype)) for _ in range(2)]


@torch.library.impl("ifr_fast::norm_relu_vjp", "default")
def _(grad, y, weight, bias, statistics, groups, backend):
    with torch.cuda.device_of(y):
        norm = Norm(weight, bias, groups)
        grad_y, grads = _kernels(backend, y).norm_relu_vjp(grad, y, norm, statistics, params=True)
    return grad_y, *grads


@torch.library.register_fake("ifr_fast::norm_relu_vjp")
def _(grad, y, weight, bias, statistics, groups, backend):
    check_devices(y, [grad, weight, bias, *statistics])
    return torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.impl("ifr_fast::norm_tail", "default")
def _(y, shortcut, norms, groups, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_tail(y, shortcut, *_pair(norms, groups))


@torch.library.register_fake("ifr_fast::norm_tail")
def _(y, shortcut, norms, groups, backend):
    check_devices(y, norms if shortcut is None else [shortcut, *norms])
    statistics = [y.new_empty(y.shape[0], groups, dtype=wide(y.dtype)) for _ in norms]
    return torch.empty_like(y, dtype=wide(y.dtype)), statistics


@torch.library.impl("ifr_fast::norm_tail_vjp", "default")
def _(grad, y, shortcut, norms, statistics, groups, backend):
    with torch.cuda.device_of(y):
        kernels, pair = _kernels(backend, y), _pair(norms, groups)
        grad_y, grad_shortcut, grads = kernels.norm_tail_vjp(grad, y, shortcut, *pair, statistics, params=True)
    # An op's results may not share memory with its arguments or each other.
    if grad_shortcut is None:
        grad_shortcut = grad.new_empty(0)
    return grad_y, grad_shortcut.clone() if grad_shortcut is grad else grad_shortcut, grads


@torch.library.register_fake("ifr_fast::norm_tail_vjp")
def _(grad, y, shortcut, norms, statistics, groups, backend):
    check_devices(y, [grad, *([] if shortcut is None else [shortcut]), *norms, *statistics])
    grad_shortcut = grad.new_empty(0) if shortcut is None else torch.empty_like(y, dtype=wide(y.dtype))
    return torch.empty_like(y), grad_shortcut, [torch.empty_like(n) for n in norms]


def _norm_relu_context(ctx, inputs, output):
    y, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(y, weight, bias, *output[1])


def _norm_relu_gradient(ctx, grad, *_):
    y, weight, bias, *statistics = ctx.saved_tensors
    return *torch.ops.ifr_fast.norm_relu_vjp(grad, y, weight, bias, statistics, *ctx.options), None, None


def _norm_tail_context(ctx, inputs, output):
    y, shortcut, norms, *ctx.options = inputs
    ctx.count, ctx.with_shortcut = len(norms), shortcut is not None
    ctx.save_for_backward(y, *([shortcut] if ctx.with_shortcut else []), *norms, *output[1])


def _norm_tail_gradient(ctx, grad, *_):
    y, *rest = ctx.saved_tensors
    shortcut = rest.pop(0) if ctx.with_shortcut else None
    norms, statistics = rest[: ctx.count], rest[ctx.count :]
    grads = torch.ops.ifr_fast.norm_tail_vjp(grad, y, shortcut, norms, statistics, *ctx.options)
    return grads[0], None if shortcut is None else grads[1].to(shortcut.dtype), grads[2], None, None


torch.library.register_autograd("ifr_fast::norm_relu", _norm_relu_gradient, setup_context=_norm_relu_context)
torch.library.register_autograd("ifr_fast::norm_tail", _norm_tail_gradient, setup_context=_norm_tail_context)


def differentiable_once(ctx: Any, *_: Any) -> None:
    raise RuntimeError("IFRHead is differentiable once: its gradient has no gradient")


for _op in ("norm_relu_vjp", "norm_tail_vjp"):
    torch.library.register_autograd(f"ifr_fast::{_op}", differentiable_once)
