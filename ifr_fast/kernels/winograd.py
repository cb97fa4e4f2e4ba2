"""The CPU kernels for a block whose convolutions are computed by Winograd's algorithm (csrc/cpu/winograd.cpp).

For a few samples and more its convolutions cost less than half of oneDNN's, so what lies between them counts. Within a
solve each operation is therefore left to what reads its result: z + X and GN1 with ReLU to the convolution's input
transform, the sums of a GroupNorm to the output transform before it, F's tail to the step. Outside of a solve
(state=None) results are tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _native
from . import cpu, eager, fused, weight_cache
from .contract import Convolution, Norm, State, Step, address, describe, optional
from .convolutions import MULTIPLE
from .cpu import CPU
from .fused import Launch, channels_last_address
from .weight_cache import transformed

READ = _native.Read
# The kinds that read `other`, coefficients and bias.
OTHER = READ.sum, READ.norm_vjp, READ.norm_relu_vjp
NORMS = READ.norm_relu, READ.norm_vjp, READ.norm_relu_vjp
RELUS = READ.norm_relu, READ.norm_relu_vjp


class Operand(NamedTuple):
    """What a convolution computes while it reads: csrc's Read, and the tensors of it. status (n,): of the samples."""

    read: _native.Read
    x: Tensor
    status: Tensor | None = None
    other: Tensor | None = None
    coefficients: Tensor | None = None
    bias: Tensor | None = None


class Convolved(NamedTuple):
    """A convolution's result y (n, C, H, W), and sums (n, parts, 2, C) of y and of y * y over parts of it."""

    y: Tensor
    sums: Tensor


class Tail(NamedTuple):
    """F's tail, left to the step. injection: X, or None for form="plain"."""

    y: Convolved
    injection: Tensor | None
    first: Norm
    second: Norm | None


class Winograd:
    """The kernels of one batch (contract.Kernels).

    They keep what they made for a solve until its end: each evaluation runs the same launches on the same memory.
    """

    CHANNELS_LAST_ONLY = True
    SKIPS_STOPPED = True
    BUFFERS = (1, 1)  # the convolutions' results

    norm_tail = staticmethod(cpu.norm_tail)
    new_state = staticmethod(cpu.new_state)

    def __init__(self) -> None:
        self._made: dict[Any, tuple[tuple[Any, ...], Any]] = {}

    def finish(self, state: State, z: Tensor) -> None:
        self._made.clear()  # the next chunk of samples needs the memory

    def once(self, name: Any, make: Callable[..., Any], *inputs: Any) -> Any:
        """make(*inputs), or what it gave under this name the last time, if the inputs are the same objects."""
        last, made = self._made.get(name, ((), None))
        if len(last) != len(inputs) or any(a is not b for a, b in zip(last, inputs, strict=True)):
            made = make(*inputs)
            self._made[name] = inputs, made
        return made

    def convolution(self, weight: Tensor, x: Tensor, *, transposed: bool = False) -> Convolution:
        return _Convolution(self, weight, transposed)

    def shift(self, z: Tensor, x: Tensor, dtype: torch.dtype, state: State | None) -> Tensor | Operand:
        if state is None:
            return eager.shift(z, x, dtype, None)
        return self.once("shift", partial(Operand, READ.sum), z, state.status, x)

    def norm_relu(
        self, y: Any, norm: Norm, *, consume: bool = False, state: State | None = None
    ) -> tuple[Tensor | Operand, list[Tensor]]:
        if state is None:
            return cpu.norm_relu(y, norm, consume=consume)
        coefficients = self.once("norm_relu", fused.norm_sums, y.y, y.sums, norm, state.status)()
        return self.once("h", partial(Operand, READ.norm_relu), y.y, state.status, None, coefficients, norm.bias), []

    def norm_relu_vjp(
        self, grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: State | None = None
    ) -> tuple[Tensor | Operand, list[Tensor]]:
        if state is None:
            return cpu.norm_relu_vjp(grad, y, norm, statistics, params=params)
        inputs = grad, y, norm, statistics, state.status
        coefficients = self.once("norm_relu_vjp", fused.norm_relu_vjp_coefficients, *inputs)()
        read = partial(Operand, READ.norm_relu_vjp)
        return self.once("grad_y1", read, grad, state.status, y, coefficients, norm.bias), []

    def norm_tail_vjp(
        self,
        grad: Tensor,
        y: Tensor,
        shortcut: Tensor | None,
        first: Norm,
        second: Norm | None,
        statistics: list[Tensor],
        *,
        params: bool,
        state: State | None = None,
    ) -> tuple[Tensor | Operand, Tensor | None, list[Tensor]]:
        if state is None:
            return cpu.norm_tail_vjp(grad, y, shortcut, first, second, statistics, params=params)
        inputs = grad, y, shortcut, first, second, statistics, state.status
        grad_u, coefficients = self.once("norm_tail_vjp", fused.norm_tail_vjp_coefficients, *inputs)()
        grad_y = self.once("grad_y2", partial(Operand, READ.norm_vjp), grad_u, state.status, y, coefficients)
        return grad_y, None if shortcut is None else grad_u, []

    def tail(
        self, y: Any, shortcut: Any, first: Norm, second: Norm | None, *, state: State | None = None
    ) -> Tensor | Tail:
        if state is None:
            return cpu.tail(y, shortcut, first, second)
        return Tail(y, None if shortcut is None else shortcut.other, first, second)

    def total(self, *addends: Tensor) -> tuple[Tensor, ...]:
        return addends

    def step(self, state: State, f: Any, z: Tensor, step: Step) -> int:
        if isinstance(f, Tensor):
            return cpu.step(state, f, z, step)
        fields = cpu.step_fields(state, z, step)
        if isinstance(f, Tail):
            inputs = *f.y, f.injection, f.first, f.second, z
            return _native.step_tail(fields | self.once("tail", fused.tail_fields, *inputs))
        return _native.step_total(fields | self.once("total", fused.total_fields, z, *f))


class _Convolution:
    """A 3×3 convolution. Maps an activation to a tensor, and an operand of F to Convolved."""

    def __init__(self, kernels: Winograd, weight: Tensor, transposed: bool) -> None:
        if weight.dim() != 4 or weight.shape[2:] != (3, 3) or any(k == 0 or k % MULTIPLE for k in weight.shape[:2]):
            raise ValueError(f"weight is {describe(weight)}: expected shape (K, C, 3, 3), K and C in {MULTIPLE}s")
        weight = weight.contiguous()
        address(weight, "weight", torch.float32, weight.numel(), CPU)
        self.kernels = kernels
        self.weights = transformed(weight, transposed, _transform)
        out, channels = weight.shape[:2]
        self.channels, self.out_channels = (out, channels) if transposed else (channels, out)

    def __call__(self, operand: Tensor | Operand) -> Any:
        if isinstance(operand, Tensor):
            return self._prepared(Operand(READ.plain, operand.contiguous(memory_format=torch.channels_last)))()
        return self.kernels.once(self, self._prepared, operand)()

    def _prepared(self, operand: Operand) -> Launch:
        read, x, status, other, coefficients, bias = operand
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape[2:]:
            raise ValueError(f"x is {describe(x)}: expected shape (N, {self.channels}, H, W), H and W not 0")
        given = ("other", other, OTHER), ("coefficients", coefficients, NORMS), ("bias", bias, RELUS)
        for name, tensor, reads in given:
            if (tensor is None) == (read in reads):
                expected = "a tensor" if tensor is None else "None"
                raise ValueError(f"{name} is {describe(tensor)}: expected {expected} for {read}")
        n, channels, height, width = x.shape
        like: Any = {"device": CPU, "dtype": torch.float32}  # torch's defaults may be others
        y = torch.empty(n, self.out_channels, height, width, memory_format=torch.channels_last, **like)
        sums = None
        if read in (READ.sum, READ.norm_relu):
            sums = torch.empty(n, -(-height // 4), 2, self.out_channels, dtype=torch.float64, device=CPU)
        count = torch.float32, n * channels * (2 if read == READ.norm_relu else 5), CPU
        fields = {
            "read": read, "x": channels_last_address(x, "x", x),
            "other": 0 if other is None else channels_last_address(other, "other", x),
            "coefficients": optional(coefficients, "coefficients", *count),
            "bias": optional(bias, "bias", torch.float32, channels, CPU), "weights": self.weights.data_ptr(),
            "y": y.data_ptr(), "sums": 0 if sums is None else sums.data_ptr(), "workspace": 0,
            "status": optional(status, "status", torch.int64, n, CPU), "n": n, "height": height, "width": width,
            "channels": channels, "out_channels": self.out_channels, "threads": torch.get_num_threads(),
        }  # fmt: skip
        workspace = weight_cache.workspace(_native.winograd_workspace(fields))
        fields["workspace"] = workspace.data_ptr()
        result = y if sums is None else Convolved(y, sums)
        return Launch(_native.winograd, fields, (operand, self.weights, workspace), result)


def _transform(weight: Tensor, transposed: bool, out: Tensor) -> None:
    """Writes the 36 matrices (out_channels / PANEL, channels, PANEL) of a weight (out, in, 3, 3)."""
    kernel = weight.flip(2, 3).permute(2, 3, 0, 1) if transposed else weight.permute(2, 3, 1, 0)
    kernel, count = kernel.contiguous(), weight.shape[0] * weight.shape[1]
    _native.winograd_weights({
        "weight": address(kernel, "weight", torch.float32, 9 * count, CPU),
        "transformed": address(out, "out", torch.float32, 36 * count, CPU), "channels": kernel.shape[2],
        "out_channels": kernel.shape[3], "threads": torch.get_num_threads(),
    })  # fmt: skip
