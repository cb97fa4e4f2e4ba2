"""Winograd's convolutions (ifr_fast/kernels/winograd.py) by themselves: one, those that a call runs, a stack of them.

They run where the extension is compiled, on CPUs in float32. Its modules are imported only then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ifr_fast import backends


class WinogradConvolution(NamedTuple):
    """What the time of a convolution depends on."""

    n: int
    channels: int
    out_channels: int
    height: int
    width: int

    def alone(self, device: torch.device) -> Callable[[], Any]:
        """A bare one of random tensors, prepared as in a solve. It sums, normalises and allocates nothing."""
        from ifr_fast.kernels import winograd

        x = torch.randn(self.n, self.channels, self.height, self.width, device=device)
        x = x.contiguous(memory_format=torch.channels_last)
        weight = torch.randn(self.out_channels, self.channels, 3, 3, device=device)
        return partial(winograd.Winograd().convolution(weight, x), winograd.Operand(winograd.READ.plain, x))

    def __str__(self) -> str:
        shape = self.n, self.channels, self.height, self.width
        return f"Winograd's convolution of {shape} to {self.out_channels} channels"


@contextmanager
def noted() -> Iterator[Counter[WinogradConvolution]]:
    """Counts Winograd's convolutions, of which PyTorch's profiler sees none. They must have been prepared inside."""
    found: Counter[WinogradConvolution] = Counter()
    if not backends()["cpu"].available:
        yield found
        return
    from ifr_fast import _native

    def noting(fields: dict[str, Any]) -> None:
        found[WinogradConvolution(*(fields[name] for name in WinogradConvolution._fields))] += 1
        launch(fields)

    launch, _native.winograd = _native.winograd, noting
    try:
        yield found
    finally:
        _native.winograd = launch


class WinogradStack(nn.Module):
    """A stack of 3×3 convolutions with ReLU, whose convolutions and their gradients in x are Winograd's.

    Its weights are transformed when they are first used, and never again: what is timed does not change them.
    """

    def __init__(self, stack: nn.Sequential) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(layer) for layer in stack if isinstance(layer, nn.Conv2d))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class _Layer(nn.Module):
    def __init__(self, convolution: nn.Conv2d) -> None:
        super().__init__()
        self.weight, self.bias = convolution.weight, convolution.bias

    @cached_property
    def directions(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        """The convolution, and its gradient in x."""
        from ifr_fast.kernels.winograd import Winograd

        weight = self.weight.detach()
        return tuple(Winograd().convolution(weight, weight, transposed=back) for back in (False, True))

    def forward(self, x: Tensor) -> Tensor:
        return _Convolve.apply(x, self.weight, self.directions).add_(self.bias[:, None, None]).relu_()


class _Convolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, directions: tuple[Callable[[Tensor], Tensor], ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        forth, ctx.back = directions
        return forth(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        lengths = [1, 1], [1, 1], [1, 1], False, [0, 0], 1
        _, grad_weight, _ = torch.ops.aten.convolution_backward(grad, x, weight, None, *lengths, [False, True, False])
        return ctx.back(grad), grad_weight, None
