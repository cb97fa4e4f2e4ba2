"""The compiled CPU kernels around Winograd's convolutions (csrc/cpu): GroupNorms that end or begin in a convolution,
and steps that compute f while they read it. `eager` is the specification.

Every evaluation of a solve runs the same kernels on the same memory. So a kernel's arguments are checked once, when its
Launch is made. Activations are float32 in channels_last. status (n,): samples that have stopped are left out, and the
results of those stay unwritten; None: none has stopped. ValueError for tensors that do not fit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from .contract import EPS, Norm, address, describe, optional
from .cpu import CPU, shape_fields
from .fields import GRADS, check_activation, given, parameters


class Launch(NamedTuple):
    """A kernel and its arguments. Calling it runs the kernel and returns `result`, which the kernel fills; it holds
    what the arguments point to."""

    kernel: Callable[[dict[str, Any]], Any]
    fields: dict[str, Any]
    inputs: tuple[Any, ...]
    result: Any

    def __call__(self) -> Any:
        self.kernel(self.fields)
        return self.result


def norm_sums(y: Tensor, sums: Tensor, norm: Norm, status: Tensor | None) -> Launch:
    """The coefficients (n, 2, C) of gn(y) = (y - first) * second + bias. sums (n, parts, 2, C) float64: of y, and of
    y * y, over parts of the map."""
    fields = {**_shape(y, norm.groups, status), "y": channels_last_address(y, "y", y), **_sums(sums, y)}
    coefficients = y.new_empty(y.shape[0], 2, y.shape[1])
    weight = parameters(y, norm, None)["first_weight"]
    fields |= {"weight": weight, "coefficients": coefficients.data_ptr()}
    return Launch(_native.norm_sums, fields, (y, sums, norm, status), coefficients)


def norm_relu_vjp_coefficients(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], status: Tensor | None
) -> Launch:
    """norm_relu_vjp, left to a convolution: the coefficients (n, 5, C) of Read::norm_relu_vjp (csrc/cpu/kernels.h), for
    which x is grad and other is y."""
    fields = _vjp_fields(grad, y, norm, None, statistics, status)
    coefficients = y.new_empty(y.shape[0], 5, y.shape[1])
    fields |= {"shortcut": 0, "coefficients": coefficients.data_ptr(), "grad_shortcut": 0}
    kernel = partial(_native.norm_relu_vjp, _native.DType.f32)
    return Launch(kernel, fields, (grad, y, norm, statistics, status), coefficients)


def norm_tail_vjp_coefficients(
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    status: Tensor | None,
) -> Launch:
    """norm_tail_vjp, left to a convolution: the gradient of gn_first(y) + shortcut, and the coefficients (n, 5, C) of
    Read::norm_vjp (csrc/cpu/kernels.h), for which x is that gradient and other is y."""
    fields = _vjp_fields(grad, y, first, second, statistics, status)
    coefficients = y.new_empty(y.shape[0], 5, y.shape[1])
    grad_shortcut = torch.empty_like(y) if second else grad
    fields |= {
        "shortcut": 0 if shortcut is None else channels_last_address(shortcut, "shortcut", y),
        "coefficients": coefficients.data_ptr(), "grad_shortcut": grad_shortcut.data_ptr() if second else 0,
    }  # fmt: skip
    kernel = partial(_native.norm_tail_vjp, _native.DType.f32)
    inputs = grad, y, shortcut, first, second, statistics, status
    return Launch(kernel, fields, inputs, (grad_shortcut, coefficients))


def tail_fields(
    y: Tensor, sums: Tensor, injection: Tensor | None, first: Norm, second: Norm | None, z: Tensor
) -> dict[str, Any]:
    """For _native.step_tail, beside cpu.step_fields: f = tail(y, z + injection, first, second); without an injection,
    tail(y, None, first, second). sums: as norm_sums has them. y's memory is overwritten."""
    check_activation(y, first.groups, (torch.float32,))
    place = channels_last_address(y, "y", y)
    channels_last_address(z, "z", y)
    return {
        "f": 0, "y": place, "u": place, **_sums(sums, y),
        "injection": 0 if injection is None else channels_last_address(injection, "injection", y),
        **parameters(y, first, second), "channels": y.shape[1], "groups": first.groups, "eps": EPS,
    }  # fmt: skip


def total_fields(z: Tensor, *addends: Tensor) -> dict[str, Any]:
    """For _native.step_total, beside cpu.step_fields: f = total(*addends), of two or three addends."""
    if len(addends) not in (2, 3):
        raise ValueError(f"{len(addends)} addends: expected 2 or 3")
    names = "first", "second", "third"
    places = [channels_last_address(t, f"{name} addend", z) for name, t in zip(names, addends, strict=False)]
    channels_last_address(z, "z", z)
    return {"f": 0, "third": 0, **dict(zip(names, places, strict=False))}


def channels_last_address(tensor: Tensor, name: str, y: Tensor) -> int:
    """The address of an activation of y's shape."""
    count = y.numel()
    place = address(tensor, name, torch.float32, count, CPU)
    laid_out = tensor.dim() == 4 and (count == 0 or tensor.is_contiguous(memory_format=torch.channels_last))
    if tensor.shape != y.shape or not laid_out:
        raise ValueError(f"{name} is {describe(tensor)}: expected shape {tuple(y.shape)} in channels_last")
    return place


def _shape(y: Tensor, groups: int, status: Tensor | None) -> dict[str, Any]:
    """The fields of csrc's NormShape."""
    check_activation(y, groups, (torch.float32,))
    place = optional(status, "status", torch.int64, len(y), CPU)
    return {**shape_fields(y, groups), "channels_last": True, "status": place}


def _sums(sums: Tensor, y: Tensor) -> dict[str, int]:
    """The sums that a convolution left of its output y, and the number of parts."""
    n, channels = y.shape[:2]
    if sums.dim() != 4 or sums.shape != (n, sums.shape[1], 2, channels) or not sums.shape[1]:
        raise ValueError(f"sums is {describe(sums)}: expected shape {(n, 'parts', 2, channels)}")
    return {"sums": address(sums, "sums", torch.float64, sums.numel(), CPU), "parts": sums.shape[1]}


def _vjp_fields(
    grad: Tensor, y: Tensor, first: Norm, second: Norm | None, statistics: list[Tensor], status: Tensor | None
) -> dict[str, Any]:
    """What the vjps of one norm and of two have in common."""
    return {
        **_shape(y, first.groups, status), "y": channels_last_address(y, "y", y),
        "grad": channels_last_address(grad, "grad", y),
        **parameters(y, first, second), **given(y, first, second, statistics), "grad_y": 0, **dict.fromkeys(GRADS, 0),
    }  # fmt: skip
