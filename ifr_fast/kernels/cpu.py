"""The compiled CPU kernels (csrc/cpu), for float32, float64 and bfloat16: `eager`'s functions, addresses passed on.

ValueError for tensors that do not fit each other or are not in a CPU's memory. A sample's sums are formed in a fixed
order, so results depend neither on the number of threads nor on batch mates.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from .. import _native
from . import eager
from .contract import (
    DIVERGENCE,
    EPS,
    Convolution,
    Norm,
    State,
    Step,
    address,
    check_step,
    describe,
    is_channels_last,
    ridge,
    wide,
)
from .eager import finish, new_state, shift, total

__all__ = [
    "CHANNELS_LAST_ONLY", "convolution", "finish", "new_state", "norm_relu", "norm_relu_vjp", "norm_tail",
    "norm_tail_vjp", "shift", "step", "tail", "total",
]  # fmt: skip

CHANNELS_LAST_ONLY = False
DTYPES = {
    torch.float32: _native.DType.f32,
    torch.float64: _native.DType.f64,
    torch.bfloat16: _native.DType.bf16,
}
CPU = torch.device("cpu")
STATE = (
    "value", "history", "gram", "p", "q", "step", "norms", "status", "iterations", "improved", "residual", "trace",
)  # fmt: skip


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
        return eager.convolution(weight, x)
    unit, shape = [1, 1], [x.shape[0], weight.shape[1], *x.shape[2:]]
    packed = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), unit, unit, unit, 1, shape)

    def convolve(x: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, packed, None, unit, unit, unit, 1, "none", [], "")

    return convolve


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    y, shape = _activation(y, norm.groups)
    out = y if consume else torch.empty_like(y)
    statistics = _statistics(y, norm.groups, 2)
    _native.norm_relu(DTYPES[y.dtype], shape, y.data_ptr(), *_affine(y, norm), *_made([*statistics, out], 3))
    return out, statistics


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    y, shape = _activation(y, norm.groups)
    grad, grad_y = _like(grad, "grad", y, y.dtype), torch.empty_like(y)
    grads = _affine_grads(y, 2 if params else 0)
    _native.norm_relu_vjp(
        DTYPES[y.dtype], shape, grad.data_ptr(), y.data_ptr(), *_affine(y, norm),
        *_given(y, norm.groups, statistics, 2), grad_y.data_ptr(), *_made(grads, 2),
    )  # fmt: skip
    return grad_y, [g.sum(0).to(statistics[0].dtype) for g in grads]


def norm_tail(
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    *,
    consume: bool = False,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y, shape = _activation(y, first.groups)
    shortcut = None if shortcut is None else _like(shortcut, "shortcut", y, y.dtype)
    statistics = _statistics(y, first.groups, 2 if second is None else 4)
    out = y if consume and y.dtype == wide(y.dtype) else torch.empty_like(y, dtype=wide(y.dtype))
    _native.norm_tail(
        DTYPES[y.dtype], shape, second is not None, y.data_ptr(), 0 if shortcut is None else shortcut.data_ptr(),
        *_affine(y, first, "first "), *_affine(y, second, "second "), *_made(statistics, 4), out.data_ptr(),
    )  # fmt: skip
    return out, statistics


def norm_tail_vjp(
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    y, shape = _activation(y, first.groups)
    shortcut = None if shortcut is None else _like(shortcut, "shortcut", y, y.dtype)
    two = second is not None
    grad = _like(grad, "grad", y, wide(y.dtype))
    grad_y, grad_shortcut = torch.empty_like(y), torch.empty_like(grad) if two else grad
    grads = _affine_grads(y, (4 if two else 2) if params else 0)
    _native.norm_tail_vjp(
        DTYPES[y.dtype], shape, two, grad.data_ptr(), y.data_ptr(), 0 if shortcut is None else shortcut.data_ptr(),
        *_affine(y, first, "first "), *_affine(y, second, "second "),
        *_given(y, first.groups, statistics, 4 if two else 2), *([] if two else [0, 0]),
        *_made([grad_y, grad_shortcut], 2), *_made(grads, 4),
    )  # fmt: skip
    return grad_y, None if shortcut is None else grad_shortcut, [g.sum(0).to(statistics[0].dtype) for g in grads]


def tail(y: Tensor, shortcut: Tensor | None, first: Norm, second: Norm | None, *, state: State | None = None) -> Tensor:
    return norm_tail(y, shortcut, first, second, consume=True, state=state)[0]


def step(state: State, f: Tensor, z: Tensor, step: Step) -> int:
    *places, trace = state.addresses(STATE)
    check_step(state, step)
    dtype, count = state.value.dtype, state.n * state.size
    if dtype not in (torch.float32, torch.float64) or state.history.dtype not in (dtype, torch.bfloat16):
        raise ValueError(f"iterates in {dtype}, state.history in {state.history.dtype}: float32 or float64 expected")
    unknowns = address(f, "f", dtype, count, CPU), address(z, "z", dtype, count, CPU)
    if f.stride() != z.stride():
        raise ValueError(f"f has strides {f.stride()}: expected those of z, {z.stride()}")
    trace += step.evaluation * state.n * dtype.itemsize
    return _native.step(
        DTYPES[dtype], DTYPES[state.history.dtype], getattr(_native.Method, step.method), *unknowns, *places, trace,
        trace - state.n * dtype.itemsize if step.evaluation else 0,
        state.n, state.size, state.rows, step.row(state), step.evaluation, step.window, step.rtol, DIVERGENCE,
        ridge(state.gram.dtype), step.affine, torch.get_num_threads(),
    )  # fmt: skip


def _activation(y: Tensor, groups: int) -> tuple[Tensor, _native.NormShape]:
    """y, dense and checked, and its shape for the kernels."""
    if y.dim() != 4 or y.dtype not in DTYPES or groups < 1 or y.shape[1] % groups:
        expected = f"(N, C, H, W) in {', '.join(map(str, DTYPES))}, C divisible by groups={groups}"
        raise ValueError(f"y is {describe(y)}: expected {expected}")
    channels_last = is_channels_last(y)
    if not channels_last:
        y = y.contiguous()
    n, channels, height, width = y.shape
    if not y.is_cpu or type(y) is not Tensor:
        address(y, "y", y.dtype, n * channels * height * width, CPU)
    threads = torch.get_num_threads()
    return y, _native.NormShape(n, channels, height * width, groups, EPS, channels_last, threads)


def _like(tensor: Tensor, name: str, y: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor with y's memory layout, checked: a convolution or autograd may hand over another one."""
    if tensor.shape != y.shape or not tensor.is_cpu:
        raise ValueError(f"{name} is {describe(tensor)}: expected y's shape {tuple(y.shape)} on {CPU}")
    if tensor.dtype != dtype or tensor.stride() != y.stride():
        tensor = torch.empty_like(y, dtype=dtype).copy_(tensor)
    if type(tensor) is not Tensor:
        address(tensor, name, dtype, y.numel(), CPU)
    return tensor


def _affine(y: Tensor, norm: Norm | None, prefix: str = "") -> tuple[int, int]:
    """Addresses of a norm's parameters; zeros where there is none."""
    if norm is None:
        return 0, 0
    weight, bias, _ = norm
    dtype, channels = wide(y.dtype), y.shape[1]
    return (
        address(weight, f"{prefix}weight", dtype, channels, CPU),
        address(bias, f"{prefix}bias", dtype, channels, CPU),
    )


def _given(y: Tensor, groups: int, statistics: list[Tensor], count: int) -> list[int]:
    """Addresses of `count` statistics of the forward pass."""
    names = ("mean", "rstd", "second mean", "second rstd")[:count]
    if len(statistics) != count:
        raise ValueError(f"{len(statistics)} statistics: expected {', '.join(names)}")
    dtype, size = wide(y.dtype), y.shape[0] * groups
    return [address(t, name, dtype, size, CPU) for t, name in zip(statistics, names, strict=True)]


def _statistics(y: Tensor, groups: int, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[0], groups, dtype=wide(y.dtype), device=y.device) for _ in range(count)]


def _affine_grads(y: Tensor, count: int) -> list[Tensor]:
    return [torch.empty(y.shape[:2], dtype=torch.float64, device=y.device) for _ in range(count)]


def _made(tensors: list[Tensor], fill: int) -> list[int]:
    """Addresses of what was allocated here, padded with zeros to `fill`."""
    return [t.data_ptr() for t in tensors] + [0] * (fill - len(tensors))
