"""Checks of users' arguments. Each error names the argument, what was given and what was expected."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ._torch import forward_mode_active, transforms_active

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # that inputs may have


def check_int(owner: str, name: str, value: Any, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}({name}={value!r}): expected an integer ≥ {minimum}")


def check_tensor(name: str, value: Any) -> None:
    """Raises ValueError unless value is a dense tensor of one of DTYPES."""
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"{name} is {value!r}: expected a tensor")
    if value.layout is not torch.strided:
        raise ValueError(f"{name} has layout {value.layout}: expected a dense tensor")
    if value.dtype not in DTYPES:
        expected = "expected dtype float64, float32, bfloat16 or float16"
        raise ValueError(f"{name} has shape {tuple(value.shape)} and dtype {value.dtype}: {expected}")


def check_bool(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{name}={value!r}: expected True or False")


def check_rtol(owner: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if value is not None and not (number and 0 <= value < float("inf")):
        raise ValueError(f"{owner}(rtol={value!r}): expected None or a number ≥ 0")


UNROLL = ": use an unroll there (solver=Unroll(…))"  # what works where a solve does not


def refuse_forward_mode(who: str, instead: str = UNROLL) -> None:
    """Raises NotImplementedError in forward mode, which would treat an equilibrium as a constant."""
    if forward_mode_active():
        raise NotImplementedError(f"{who} has no forward-mode derivatives (jvp, jacfwd, dual numbers){instead}")


def refuse_transforms(who: str, instead: str = UNROLL) -> None:
    """Raises NotImplementedError inside any of torch.func's transforms and in forward mode."""
    refuse_forward_mode(who, instead)
    if transforms_active():
        raise NotImplementedError(
            f"{who} does not work under torch.func's transforms (grad, vjp, vmap, …), only with backward() or "
            f"torch.autograd.grad{instead}"
        )


def check_devices(x: Tensor, others: Sequence[Tensor]) -> None:
    """Raises ValueError if a tensor is not on x's device. If any argument is on the meta device, torch runs the op's
    fake implementation: results on the other devices would be uninitialised memory."""
    for tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"got tensors on {tensor.device} and {x.device}: expected all on one device")
