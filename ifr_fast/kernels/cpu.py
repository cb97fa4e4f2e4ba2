"""The compiled CPU kernels (csrc/cpu), for float32, float64 and bfloat16; `eager` is their specification.

ValueError for tensors that do not fit each other or are not in a CPU's memory. A sample's sums are formed in a fixed
order, so results depend neither on the number of threads nor on batch mates.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import _native
from .._torch import packed_conv2d
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
from .eager import BUFFERS, direct_weight, finish, new_state, shift, total
from .fields import GRADS, STATISTICS, check_activation, given, made, new_statistics, parameters

__all__ = [
    "BUFFERS", "CHANNELS_LAST_ONLY", "SKIPS_STOPPED", "convolution", "finish", "new_state", "norm_relu",
    "norm_relu_vjp", "norm_tail", "norm_tail_vjp", "shift", "step", "tail", "total",
]  # fmt: skip

CHANNELS_LAST_ONLY = SKIPS_STOPPED = False
DTYPES = {
    torch.float32: _native.DType.f32,
    torch.float64: _native.DType.f64,
    torch.bfloat16: _native.DType.bf16,
}
CPU = torch.device("cpu")
STATE = (
    "value", "history", "gram", "p", "q", "step", "norms", "status", "iterations", "improved", "residual", "trace",
)  # fmt: skip


def convolution(weight: Tensor, x: Tensor, *, transposed: bool = False) -> Convolution:
    weight = direct_weight(weight, x, transposed)
    return packed_conv2d(weight, x) or eager.convolution(weight, x)


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = _activation(y, norm.groups)
    out, statistics = y if consume else torch.empty_like(y), new_statistics(y, norm, None)
    _native.norm_relu(DTYPES[y.dtype], {
        **shape_fields(y, norm.groups), "y": y.data_ptr(), "shortcut": 0, **parameters(y, norm, None),
        **made(STATISTICS, statistics), "out": out.data_ptr(),
    })  # fmt: skip
    return out, statistics


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    y = _activation(y, norm.groups)
    grad = _like(grad, "grad", y, y.dtype)
    grad_y, _, grads = _vjp(_native.norm_relu_vjp, grad, y, None, norm, None, statistics, params)
    return grad_y, grads


def norm_tail(
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    *,
    consume: bool = False,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    y = _activation(y, first.groups)
    shortcut = None if shortcut is None else _like(shortcut, "shortcut", y, y.dtype)
    out = y if consume and y.dtype == wide(y.dtype) else torch.empty_like(y, dtype=wide(y.dtype))
    statistics = new_statistics(y, first, second)
    _native.norm_tail(DTYPES[y.dtype], {
        **shape_fields(y, first.groups), "y": y.data_ptr(), "shortcut": 0 if shortcut is None else shortcut.data_ptr(),
        **parameters(y, first, second), **made(STATISTICS, statistics), "out": out.data_ptr(),
    })  # fmt: skip
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
    y = _activation(y, first.groups)
    grad = _like(grad, "grad", y, wide(y.dtype))
    shortcut = None if shortcut is None else _like(shortcut, "shortcut", y, y.dtype)
    return _vjp(_native.norm_tail_vjp, grad, y, shortcut, first, second, statistics, params)


def _vjp(
    kernel: Callable[..., None],
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    params: bool,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    grad_y, grad_shortcut = torch.empty_like(y), torch.empty_like(grad) if second else grad
    count = (4 if second else 2) if params else 0
    grads = [torch.empty(*y.shape[:2], dtype=torch.float64, device=CPU) for _ in range(count)]  # of every sample apart
    kernel(DTYPES[y.dtype], {
        **shape_fields(y, first.groups), "grad": grad.data_ptr(), "y": y.data_ptr(),
        "shortcut": 0 if shortcut is None else shortcut.data_ptr(), **parameters(y, first, second),
        **given(y, first, second, statistics), "grad_y": grad_y.data_ptr(), "coefficients": 0,
        "grad_shortcut": grad_shortcut.data_ptr() if second else 0, **made(GRADS, grads),
    })  # fmt: skip
    return grad_y, None if shortcut is None else grad_shortcut, [g.sum(0).to(statistics[0].dtype) for g in grads]


def tail(y: Tensor, shortcut: Tensor | None, first: Norm, second: Norm | None, *, state: State | None = None) -> Tensor:
    return norm_tail(y, shortcut, first, second, consume=True, state=state)[0]


def step(state: State, f: Tensor, z: Tensor, step: Step) -> int:
    fields = step_fields(state, z, step)
    f_place = address(f, "f", z.dtype, z.numel(), CPU)
    if f.stride() != z.stride():
        raise ValueError(f"f has strides {f.stride()}: expected those of z, {z.stride()}")
    return _native.step({**fields, "f": f_place})


def step_fields(state: State, z: Tensor, step: Step) -> dict[str, Any]:
    """The fields of csrc's Step, checked, but for f."""
    places = dict(zip(STATE, state.addresses(STATE), strict=True))
    check_step(state, step)
    dtype = state.value.dtype
    if dtype not in (torch.float32, torch.float64) or state.history.dtype not in (dtype, torch.bfloat16):
        raise ValueError(f"iterates in {dtype}, state.history in {state.history.dtype}: float32 or float64 expected")
    z_place = address(z, "z", dtype, state.n * state.size, CPU)
    if len(z) != state.n:
        raise ValueError(f"z is {describe(z)}: expected {state.n} samples, as in the state")
    evaluation = state.n * dtype.itemsize  # bytes of the trace
    places["trace"] += step.evaluation * evaluation
    return {
        "type": DTYPES[dtype], "history_type": DTYPES[state.history.dtype],
        "method": getattr(_native.Method, step.method), "z": z_place, **places,
        "previous": places["trace"] - (evaluation if step.evaluation else 0), "n": state.n, "size": state.size,
        "rows": state.rows, "row": step.row(state), "evaluation": step.evaluation, "window": step.window,
        "rtol": step.rtol, "divergence": DIVERGENCE, "ridge": ridge(state.gram.dtype), "affine": step.affine,
        "threads": torch.get_num_threads(),
    }  # fmt: skip


def _activation(y: Tensor, groups: int) -> Tensor:
    """y, dense and checked."""
    check_activation(y, groups, DTYPES)
    if not is_channels_last(y):
        y = y.contiguous()
    if not y.is_cpu or type(y) is not Tensor:
        address(y, "y", y.dtype, y.numel(), CPU)
    return y


def shape_fields(y: Tensor, groups: int) -> dict[str, Any]:
    """What the kernels are told of y's shape and layout."""
    n, channels, height, width = y.shape
    return {
        "n": n, "channels": channels, "positions": height * width, "groups": groups, "eps": EPS,
        "channels_last": is_channels_last(y), "status": 0, "threads": torch.get_num_threads(),
    }  # fmt: skip


def _like(tensor: Tensor, name: str, y: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor with y's memory layout, checked: a convolution or autograd may hand over another one."""
    if tensor.shape != y.shape or not tensor.is_cpu:
        raise ValueError(f"{name} is {describe(tensor)}: expected y's shape {tuple(y.shape)} on {CPU}")
    if tensor.dtype != dtype or tensor.stride() != y.stride():
        tensor = torch.empty_like(y, dtype=dtype).copy_(tensor)
    if type(tensor) is not Tensor:
        address(tensor, name, dtype, y.numel(), CPU)
    return tensor
