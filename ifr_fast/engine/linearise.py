"""The residual block as a function: F at an injection X, and its linearisation, by a backend's kernels.

Solves use it while autograd is off, so the vjps are written out. `block.ResidualBlock` is the module around it.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..kernels import eager
from ..kernels.contract import Convolution, Kernels, Norm, memory_format, pick, wide

FORMS = ("released", "paper", "plain")


def staged(x: Tensor, dtype: torch.dtype, kernels: Kernels, like: Tensor | None = None) -> Tensor:
    """A chunk, dense in the layout in which it is solved: channels_last on a CPU and where the kernels read nothing
    else, otherwise the layout of `like` (None: of x)."""
    channels_last = x.device.type == "cpu" or kernels.CHANNELS_LAST_ONLY
    format = torch.channels_last if channels_last else memory_format(x if like is None else like)
    # For .to() a strided slice of a channels_last tensor is in that layout already.
    return x.to(dtype, memory_format=format).contiguous(memory_format=format)


class BlockMap:
    """F(·; X) for one chunk of samples. Calling it evaluates F.

    x: the injection X; its memory layout is the chunk's. params: as in reference.residual_block, in any floating dtype.
    dtype: what the convolutions compute in. The iterate, F and gradients are in wide(dtype).
    """

    def __init__(
        self,
        x: Tensor,
        params: Sequence[Tensor],
        form: str,
        groups: int,
        kernels: Kernels,
        dtype: torch.dtype,
    ) -> None:
        self.x, self.form, self.groups, self.kernels, self.dtype = x, form, groups, kernels, dtype
        conv1, gn1_weight, gn1_bias, conv2, gn2_weight, gn2_bias, *gn3 = params
        self.weight1, self.weight2 = conv1, conv2
        self.conv1, self.conv2 = self._convolution(conv1), self._convolution(conv2)
        self.norm1, self.norm2 = self._norm(gn1_weight, gn1_bias), self._norm(gn2_weight, gn2_bias)
        self.norm3 = None if form == "paper" else self._norm(*gn3)

    def _convolution(self, weight: Tensor, *, transposed: bool = False) -> Convolution:
        return self.kernels.convolution(weight.to(self.dtype), self.x, transposed=transposed)

    def _norm(self, weight: Tensor, bias: Tensor) -> Norm:
        dtype = wide(self.dtype)
        return Norm(weight.to(dtype).contiguous(), bias.to(dtype).contiguous(), self.groups)

    @cached_property
    def transposed(self) -> tuple[Convolution, Convolution]:
        """Both convolutions' gradients in their inputs."""
        return self._convolution(self.weight1, transposed=True), self._convolution(self.weight2, transposed=True)

    def at(self, x: Tensor) -> BlockMap:
        """The same block at another injection, of the same layout."""
        other = copy(self)
        other.x = x
        return other

    def select(self, index: Tensor) -> BlockMap:
        """F of the samples at `index`."""
        return self.at(pick(self.x, index))

    def __call__(self, z: Tensor, state: Any = None) -> Tensor:
        """F(z) for the solver's step. The step's state may hold z + X already."""
        y, shortcut, _ = self._until_tail(z, state, keep=False)
        return self.kernels.tail(y, shortcut, self.norm2, self.norm3, state=state)

    def linearise(self, z: Tensor) -> Linearised:
        return Linearised(self, z)

    def _until_tail(self, z: Tensor, state: Any, *, keep: bool) -> tuple[Any, Any, tuple[Any, ...]]:
        """The input of F's tail (y, shortcut), and what the linearisation of the part before it needs (if `keep`)."""
        k = self.kernels
        r = k.shift(z, self.x, self.dtype, state)
        y1 = self.conv1(r)
        h, statistics = k.norm_relu(y1, self.norm1, consume=not keep, state=state)
        return self.conv2(h), None if self.form == "plain" else r, (r, y1, statistics, h)


class Linearised:
    """The block's linearisation at z: the value F(z), and products with the transposed Jacobian."""

    def __init__(self, block: BlockMap, z: Tensor) -> None:
        self.block = block
        y, shortcut, head = block._until_tail(z, None, keep=True)
        self.value, statistics = block.kernels.norm_tail(y, shortcut, block.norm2, block.norm3)
        self.saved: tuple[tuple[Any, ...], tuple[Any, ...]] = head, (y, shortcut, statistics)

    def select(self, index: Tensor) -> Linearised:
        """The linearisation for the samples at `index`. It cannot give the parameters' gradients."""

        def some(*tensors: Tensor) -> list[Tensor]:
            return [pick(t, index) for t in tensors]

        (_, y1, statistics1, _), (y2, shortcut, statistics2) = self.saved
        other = copy(self)
        tail = *some(y2), None if shortcut is None else pick(shortcut, index), some(*statistics2)
        other.saved = (None, *some(y1), some(*statistics1), None), tail
        return other

    def vjp(self, w: Tensor) -> Tensor:
        """wᵀ ∂F/∂z = wᵀ ∂F/∂X, like w."""
        return eager.total(*self._vjp(w, None, params=False)[0]).to(w.dtype)

    def affine(self, w: Tensor, constant: Tensor, state: Any) -> Tensor:
        """wᵀ ∂F/∂z + constant, for the solver's step."""
        return self.block.kernels.total(*self._vjp(w, state, params=False)[0], constant)

    def vjp_params(self, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wᵀ ∂F/∂X, like w, and wᵀ ∂F/∂θ for every parameter θ in order."""
        addends, grads = self._vjp(w, None, params=True)
        return eager.total(*addends).to(w.dtype), grads

    def _vjp(self, w: Tensor, state: Any, *, params: bool) -> tuple[list[Tensor], list[Tensor]]:
        b, k = self.block, self.block.kernels
        (r, y1, statistics1, h), (y2, shortcut, statistics2) = self.saved
        grad_y2, grad_shortcut, grads2 = k.norm_tail_vjp(
            w, y2, shortcut, b.norm2, b.norm3, statistics2, params=params, state=state
        )
        conv1_t, conv2_t = b.transposed
        grad_y1, grads1 = k.norm_relu_vjp(conv2_t(grad_y2), y1, b.norm1, statistics1, params=params, state=state)
        grad_z = conv1_t(grad_y1)
        addends = [grad_z] if grad_shortcut is None else [grad_shortcut, grad_z]
        if not params:
            return addends, []
        conv1, conv2 = _weight_grad(r, grad_y1, b.weight1), _weight_grad(h, grad_y2, b.weight2)
        return addends, [conv1, *grads1, conv2, *grads2]


def _weight_grad(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)  # only its shape and layout are used
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
