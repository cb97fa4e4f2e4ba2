"""The compiled CPU kernels (csrc/cpu), for float32, float64 and bfloat16: `plain`'s functions, addresses passed on.

A sample's sums are formed in a fixed order, so results depend neither on the number of threads nor on batch mates.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import _native
from . import State, at, is_channels_last, plain, ridge
from .plain import Convolution, Norm, finish, new_state, shift, total, wide

__all__ = [
    "convolution", "finish", "new_state", "norm_relu", "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "shift", "step",
    "tail", "total", "wide",
]  # fmt: skip

CHANNELS_LAST_ONLY = False
DTYPES = {
    torch.float32: _native.DType.f32,
    torch.float64: _native.DType.f64,
    torch.bfloat16: _native.DType.bf16,
}


@cache
def _packs(dtype: torch.dtype) -> bool:
    """Does this torch, on this processor, convolve `dtype` by weights packed for oneDNN?"""
    found = hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") and hasattr(
        torch.ops.mkldnn, "_convolution_pointwise"
    )
    if not (found and torch.backends.mkldnn.is_available()):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def convolution(weight: Tensor, x: Tensor) -> Convolution:
    # oneDNN rearranges the weights in every call, at the cost of a RoI's convolution; packed beforehand it need not.
    if not _packs(weight.dtype):
        return plain.convolution(weight, x)
    unit, shape = [1, 1], [x.shape[0], weight.shape[1], *x.shape[2:]]
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), unit, unit, unit, 1, shape)

    def convolve(x: Tensor, state: State | None = None) -> tuple[Tensor, None]:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, None, unit, unit, unit, 1, "none", [], ""), None

    return convolve


def norm_relu(
    y: Tensor,
    norm: Norm,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    y, shape = _activation(y, groups, eps)
    mean, rstd = _statistics(y, groups, 2)
    out = y if consume else torch.empty_like(y)
    _native.norm_relu(DTYPES[y.dtype], shape, *at(y, *norm, mean, rstd, out))
    return out, mean, rstd


def norm_relu_vjp(
    grad: Tensor,
    y: Tensor,
    norm: Norm,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y, shape = _activation(y, groups, eps)
    grad, grad_y = _like(grad, y, y.dtype), torch.empty_like(y)
    grads = _affine_grads(y, 2 if params else 0)
    _native.norm_relu_vjp(DTYPES[y.dtype], shape, *at(grad, y, *norm, mean, rstd, grad_y), *at(*grads, fill=2))
    return grad_y, [g.sum(0).to(mean.dtype) for g in grads]


def norm_tail(
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y, shape = _activation(y, groups, eps)
    r = None if r is None else _like(r, y, y.dtype)
    post = second is not None
    statistics = _statistics(y, groups, 4 if post else 2)
    out = y if consume and y.dtype == wide(y.dtype) else torch.empty_like(y, dtype=wide(y.dtype))
    _native.norm_tail(
        DTYPES[y.dtype], shape, post, *at(y, r, *first), *at(*(second or ()), fill=2), *at(*statistics, fill=4),
        out.data_ptr(),
    )  # fmt: skip
    return out, statistics


def norm_tail_vjp(
    grad: Tensor,
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    groups: int,
    eps: float,
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    y, shape = _activation(y, groups, eps)
    r = None if r is None else _like(r, y, y.dtype)
    post = second is not None
    grad = _like(grad, y, wide(y.dtype))
    grad_y, grad_r = torch.empty_like(y), torch.empty_like(grad) if post else grad
    grads = _affine_grads(y, (4 if post else 2) if params else 0)
    _native.norm_tail_vjp(
        DTYPES[y.dtype], shape, post, *at(grad, y, r, *first), *at(*(second or ()), fill=2),
        *at(*statistics, fill=4), *at(grad_y, grad_r), *at(*grads, fill=4),
    )  # fmt: skip
    return grad_y, None if r is None else grad_r, [g.sum(0).to(statistics[0].dtype) for g in grads]


def tail(*args: Any, **kwargs: Any) -> Tensor:
    return norm_tail(*args, consume=True, **kwargs)[0]


def step(
    state: State,
    f: Tensor,
    z: Tensor,
    *,
    method: str,
    window: int,
    evaluation: int,
    last: bool,
    rtol: float,
    divergence: float,
    affine: bool = False,
) -> int:
    row = -1 if last else evaluation % state.rows
    return _native.step(
        DTYPES[z.dtype], DTYPES[state.history.dtype], getattr(_native.Method, method),
        *at(f, z, state.value, state.history, state.gram, state.p, state.q, state.step, state.norms),
        *at(state.status, state.iterations, state.improved, state.residual, state.trace[evaluation]),
        state.trace[evaluation - 1].data_ptr() if evaluation else 0,
        state.n, state.size, state.rows, row, evaluation, window, rtol, divergence, ridge(state.gram.dtype),
        affine, torch.get_num_threads(),
    )  # fmt: skip


def _activation(y: Tensor, groups: int, eps: float) -> tuple[Tensor, _native.NormShape]:
    channels_last = is_channels_last(y)
    if not channels_last:
        y = y.contiguous()
    n, channels, height, width = y.shape
    threads = torch.get_num_threads()
    return y, _native.NormShape(n, channels, height * width, groups, eps, channels_last, threads)


def _like(tensor: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor with y's memory layout: a convolution or autograd may hand over another one."""
    if tensor.dtype == dtype and tensor.stride() == y.stride():
        return tensor
    return torch.empty_like(y, dtype=dtype).copy_(tensor)


def _statistics(y: Tensor, groups: int, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[0], groups, dtype=wide(y.dtype), device=y.device) for _ in range(count)]


def _affine_grads(y: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[:2], dtype=torch.float64, device=y.device) for _ in range(count)]
