"""The residual block as a function: F at an injection X, and its linearisation, on a backend's kernels.

Used inside a solve, where autograd is off: the vjps are written out. `block.ResidualBlock` is the module around it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from functools import cached_property
from types import ModuleType

import torch
from torch import Tensor

from .kernels import memory_format

FORMS = ("released", "paper", "plain")


class Block:
    """F(·; X) for one chunk of samples; calling it evaluates F.

    params as reference.residual_block's, in any floating dtype. dtype: what the convolutions compute in. The iterate, F
    and gradients are in kernels.wide(dtype); the chunk's memory layout is x's.
    """

    def __init__(
        self,
        x: Tensor,
        params: Sequence[Tensor],
        form: str,
        groups: int,
        eps: float,
        kernels: ModuleType,
        dtype: torch.dtype,
    ) -> None:
        self.x, self.form, self.groups, self.eps, self.kernels, self.dtype = x, form, groups, eps, kernels, dtype
        conv1, gn1_weight, gn1_bias, conv2, gn2_weight, gn2_bias, *gn3 = params
        affine = kernels.wide(dtype)
        self.format = memory_format(x)
        self.weight1, self.weight2 = conv1, conv2
        self.conv1, self.conv2 = self._convolution(conv1), self._convolution(conv2)
        self.norm1, self.norm2 = _norm(gn1_weight, gn1_bias, affine), _norm(gn2_weight, gn2_bias, affine)
        self.norm3 = None if form == "paper" else _norm(*gn3, affine)

    def _convolution(self, weight: Tensor) -> Callable[[Tensor], Tensor]:
        return self.kernels.convolution(weight.to(self.dtype, memory_format=self.format), self.x)

    @cached_property
    def transposed(self) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
        """The gradients of both convolutions in their inputs: convolutions by the turned, transposed kernels."""
        weights = (w.transpose(0, 1).flip(2, 3) for w in (self.weight1, self.weight2))
        return tuple(self._convolution(w) for w in weights)

    def at(self, x: Tensor) -> Block:
        """The same block at another injection of the same layout."""
        other = copy(self)
        other.x = x
        return other

    def __call__(self, z: Tensor) -> Tensor:
        return self._forward(z, keep=False)[0]

    def linearise(self, z: Tensor) -> Linearised:
        return Linearised(self, z)

    def _forward(self, z: Tensor, *, keep: bool) -> tuple[Tensor, tuple]:
        """F(z), and with `keep` what its linearisation needs."""
        k, groups, eps = self.kernels, self.groups, self.eps
        r = (z + self.x).to(self.dtype)
        y1 = self.conv1(r)
        h, *statistics1 = k.norm_relu(y1, self.norm1, groups, eps, consume=not keep)
        y2 = self.conv2(h)
        residual = None if self.form == "plain" else r
        out, statistics2 = k.norm_tail(y2, residual, self.norm2, self.norm3, groups, eps, consume=not keep)
        return out, (r, y1, statistics1, h, y2, residual, statistics2)


class Linearised:
    """The block's linearisation at z: value F(z), and products with the Jacobian's transpose."""

    def __init__(self, block: Block, z: Tensor) -> None:
        self.block = block
        self.value, self.saved = block._forward(z, keep=True)

    def vjp(self, w: Tensor) -> Tensor:
        """wᵀ ∂F/∂z = wᵀ ∂F/∂X, like z."""
        return self._vjp(w, params=False)[0]

    def vjp_params(self, w: Tensor) -> tuple[Tensor, list[Tensor]]:
        """wᵀ ∂F/∂X, and wᵀ ∂F/∂θ for every parameter θ in order."""
        return self._vjp(w, params=True)

    def _vjp(self, w: Tensor, *, params: bool) -> tuple[Tensor, list[Tensor]]:
        b, k = self.block, self.block.kernels
        r, y1, statistics1, h, y2, residual, statistics2 = self.saved
        grad_y2, grad_r, grads2 = k.norm_tail_vjp(
            w, y2, residual, b.norm2, b.norm3, statistics2, b.groups, b.eps, params=params
        )
        conv1_t, conv2_t = b.transposed
        grad_h = conv2_t(grad_y2)
        grad_y1, grads1 = k.norm_relu_vjp(grad_h, y1, b.norm1, *statistics1, b.groups, b.eps, params=params)
        grad_z = conv1_t(grad_y1)
        grad_z = grad_z.to(w.dtype) if grad_r is None else grad_r + grad_z
        if not params:
            return grad_z, []
        conv1, conv2 = _weight_grad(r, grad_y1, b.weight1), _weight_grad(h, grad_y2, b.weight2)
        return grad_z, [conv1, *grads1, conv2, *grads2]


def _norm(weight: Tensor, bias: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return weight.to(dtype).contiguous(), bias.to(dtype).contiguous()


def _weight_grad(x: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(x.dtype)  # only its shape and layout count here
    return torch.ops.aten.convolution_backward(
        grad, x, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
