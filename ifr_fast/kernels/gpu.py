"""What both GPU backends share: the solver's state on a device, and results that a step finishes.

A step on a GPU is bound by memory, so nothing is written to be read again: the iterate is rebuilt from the history by
its coefficients, the best one is remembered as coefficients, and F's last operation runs inside the step.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .contract import RUNNING, Norm, SolverState, address, describe, new_scales
from .fields import check_activation, given, new_statistics, parameters

MOST_ROWS = 64  # of a history: its K×K matrices are held on chip


STATE = (  # a DeviceState's tensors, in the order in which `addresses` is asked for them
    "value", "start", "history", "scales", "next_scale", "gram", "p", "q", "step", "total", "best", "norms",
    "residual", "trace", "status", "iterations", "improved",
)  # fmt: skip
ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)


class Tail(NamedTuple):
    """norm_tail's arguments: F's end, left to the step."""

    y: Tensor
    shortcut: Tensor | None
    first: Norm
    second: Norm | None


class Total(NamedTuple):
    """A sum of one to three tensors of the iterate's shape and layout, left to the step."""

    addends: tuple[Tensor, ...]


class DeviceState(SolverState):
    """A solve's state for n samples of `size` unknowns each; names as contract.State's.

    start: z⁰ in the iterate's own memory layout, None for zero. total, best (n, rows): coefficients of the iterate and
    of the best one, z = start + Σ_j total_j row_j; a scale is part of the coefficient. next_scale (n,): with scales,
    the next row's. improved (n,): the sample's last evaluation was its best; left alone once it has stopped. injection,
    r: X, and z + X in F's dtype for the next evaluation (None until `shift` sets them). norm_partials (n, parts, 2),
    gram_partials (n, splits, rows): sums that the rule's kernel finishes. value: set by `finish`; Picard, whose history
    is one row, keeps the best iterate there. fitting: what was checked, and need not be again where the next step
    brings the same objects. It holds them, so that no others can have their ids.

    Raises ValueError for more rows than MOST_ROWS.
    """

    def __init__(
        self, z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype, from_zero: bool = False
    ) -> None:
        if rows > MOST_ROWS:
            raise ValueError(
                f"max_iter={rows}: the GPU kernels keep at most {MOST_ROWS} residuals; backend='eager' has no limit"
            )
        n, device = z.shape[0], z.device
        self.n, self.rows, self.size = n, rows, math.prod(z.shape[1:])
        self.history = torch.empty(n, rows, self.size, dtype=history_dtype, device=device)
        self.scales = new_scales(z, rows, history_dtype)
        self.next_scale = None if self.scales is None else torch.ones(n, dtype=torch.float32, device=device)
        single: dict[str, Any] = {"dtype": torch.float32, "device": device}
        self.gram, self.p, self.q = torch.zeros(3, n, rows, rows, **single)
        self.step, self.total, self.best = torch.zeros(3, n, rows, **single)
        self.norms = torch.zeros(n, 3, **single)
        self.residual = torch.full((n,), torch.inf, **single)
        self.trace = torch.empty(evaluations, n, **single)
        self.status = torch.full((n,), RUNNING, dtype=torch.int64, device=device)
        self.iterations = torch.zeros(n, dtype=torch.int64, device=device)
        self.improved = torch.zeros(n, dtype=torch.bool, device=device)
        self.start = None if from_zero else z.clone()
        self.value = z.clone() if rows < evaluations - 1 else z
        self.injection: Tensor | None = None
        self.r: Tensor | None = None
        self.norm_partials: Tensor | None = None
        self.gram_partials: Tensor | None = None
        self.fitting: dict[Hashable, Any] = {}
        self.seal()

    def select(self, z: Tensor, index: Tensor) -> tuple[DeviceState, Tensor]:
        some, z_some = super().select(z, index)
        some.fitting = {}  # nothing of another number of samples has been checked
        return some, z_some

    def check_size(self, tensor: Tensor, name: str, dtype: torch.dtype) -> None:
        """ValueError where the tensor has not one number of dtype for each of the iterate's."""
        if self.fitting.get(name) is not tensor:
            address(tensor, name, dtype, self.n * self.size, self.device)
            self.fitting[name] = tensor

    def like(self, tensor: Tensor, name: str, y: Tensor) -> Tensor:
        """like(), but once for a tensor that every step brings as it should be."""
        key = name, y.shape, y.device
        if self.fitting.get(key) is tensor:
            return tensor
        found = like(tensor, name, y)
        if found is tensor:
            self.fitting[key] = tensor
        return found

    def reserve_statistics(self, y: Tensor, norm: Norm) -> list[Tensor]:
        """Room for a norm's statistics that no one reads after the step."""
        key = "statistics", y.shape, norm.groups
        if key not in self.fitting:
            self.fitting[key] = new_statistics(y, norm, None)
        return self.fitting[key]

    def reserve_norms(self, parts: int) -> Tensor:
        """norm_partials, with room for the norms' sums in so many parts; a solve's kernels share it."""
        if self.norm_partials is None or self.norm_partials.shape[1] != parts:
            self.norm_partials = torch.empty(self.n, parts, 2, dtype=torch.float32, device=self.norms.device)
        return self.norm_partials


def activation(y: Tensor, groups: int) -> Tensor:
    """y in the layout that the kernels read, checked: a convolution or autograd may hand over another one."""
    check_activation(y, groups, ACTIVATIONS)
    return aligned(y.contiguous(memory_format=torch.channels_last), "y", y)


def like(tensor: Tensor, name: str, y: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """tensor, checked and in dtype (None: its own), laid out as the kernels read y."""
    if tensor.shape != y.shape or tensor.device != y.device:
        raise ValueError(f"{name} is {describe(tensor)}: expected y's shape {tuple(y.shape)} on {y.device}")
    if dtype is not None:
        tensor = tensor.to(dtype)
    return aligned(tensor.contiguous(memory_format=torch.channels_last), name, y)


def aligned(tensor: Tensor, name: str, y: Tensor) -> Tensor:
    """tensor, checked to be as large as y, at an address that 16 divides: in a caller's slice it may be at another one,
    for which Triton would compile other variants."""
    at = address(tensor, name, tensor.dtype, y.numel(), y.device)
    return tensor.clone() if at % 16 else tensor


def checked(
    y: Tensor,
    first: Norm,
    second: Norm | None,
    state: DeviceState | None,
    statistics: Sequence[Tensor] | None = None,
) -> Tensor:
    """y as the kernels read it; ValueError where what belongs to it would not fit."""
    y = activation(y, first.groups)
    key = (y.shape, y.dtype, id(first), id(second), id(status_of(state)), *map(id, statistics or ()))
    if state is None or key not in state.fitting or y.device != state.device:
        parameters(y, first, second)
        if statistics is not None:
            given(y, first, second, statistics)
        if state is not None:
            address(state.status, "state.status", torch.int64, y.shape[0], y.device)
            state.fitting[key] = first, second, state.status, *(statistics or ())
    return y


def status_of(state: DeviceState | None) -> Tensor | None:
    """What tells kernels which samples they may skip; None: none."""
    return None if state is None else state.status


def shift(z: Tensor, x: Tensor, dtype: torch.dtype, state: DeviceState | None) -> Tensor:
    """z + x in dtype, what F's first convolution reads; with a state it comes from the last step."""
    if state is None:
        return (z + x).to(dtype)
    if state.r is None:
        state.injection, state.r = x, (z + x).to(dtype)
    return state.r


def tail(
    y: Tensor, shortcut: Tensor | None, first: Norm, second: Norm | None, *, state: DeviceState | None = None
) -> Tail:
    return Tail(y, shortcut, first, second)


def total(*addends: Tensor) -> Total:
    return Total(addends)
