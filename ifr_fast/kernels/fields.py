"""Arguments of csrc's GroupNorm kernels by their names there: addresses, checked or of what the caller allocated."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from .contract import Norm, address, describe, wide

STATISTICS = ("first_mean", "first_rstd", "second_mean", "second_rstd")
GRADS = ("first_grad_weight", "first_grad_bias", "second_grad_weight", "second_grad_bias")


def check_activation(y: Tensor, groups: int, dtypes: Collection[torch.dtype]) -> None:
    """ValueError where y is no activation of one of these dtypes that so many groups divide."""
    if y.dim() != 4 or y.dtype not in dtypes or groups < 1 or y.shape[1] % groups:
        expected = f"(N, C, H, W) in {', '.join(map(str, dtypes))}, C divisible by groups={groups}"
        raise ValueError(f"y is {describe(y)}: expected {expected}")


def parameters(y: Tensor, first: Norm, second: Norm | None) -> dict[str, int]:
    """The norms' weights and biases, checked; 0 where there is no second norm."""
    expected = wide(y.dtype), y.shape[1], y.device
    return {
        "first_weight": address(first.weight, "first weight", *expected),
        "first_bias": address(first.bias, "first bias", *expected),
        "second_weight": 0 if second is None else address(second.weight, "second weight", *expected),
        "second_bias": 0 if second is None else address(second.bias, "second bias", *expected),
    }


def given(y: Tensor, first: Norm, second: Norm | None, statistics: Sequence[Tensor]) -> dict[str, int]:
    """The statistics that the forward pass left, two a norm, checked; 0 where there is no second norm."""
    count = 2 if second is None else 4
    if len(statistics) != count:
        raise ValueError(f"{len(statistics)} statistics: expected {', '.join(STATISTICS[:count])}")
    expected = wide(y.dtype), y.shape[0] * first.groups, y.device
    return {
        "first_mean": address(statistics[0], "first mean", *expected),
        "first_rstd": address(statistics[1], "first rstd", *expected),
        "second_mean": 0 if second is None else address(statistics[2], "second mean", *expected),
        "second_rstd": 0 if second is None else address(statistics[3], "second rstd", *expected),
    }


def made(names: Sequence[str], tensors: Sequence[Tensor]) -> dict[str, int]:
    """What the caller allocated; 0 for the names that are left over."""
    found = dict.fromkeys(names, 0)
    for name, tensor in zip(names, tensors, strict=False):
        found[name] = tensor.data_ptr()
    return found


def new_statistics(y: Tensor, first: Norm, second: Norm | None) -> list[Tensor]:
    """Room for the means and rstds (n, groups), in the order of STATISTICS."""
    n, groups, dtype, device = y.shape[0], first.groups, wide(y.dtype), y.device
    return [torch.empty(n, groups, dtype=dtype, device=device) for _ in range(4 if second else 2)]
