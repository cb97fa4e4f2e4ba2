"""The Jacobian penalty: a term of the loss that makes the equilibrium cheaper to find."""

from __future__ import annotations

import torch
from torch import Tensor

from ._torch import not_traced, outside_compile
from .block import ResidualBlock, compute_dtype
from .checks import check_tensor, refuse_transforms
from .head import IFRHead
from .kernels.contract import wide


@not_traced("jacobian_penalty is differentiated twice, which torch.compile does not trace")
def jacobian_penalty(head: IFRHead, x: Tensor) -> Tensor:
    """Hutchinson's estimate of ‖∂F/∂z‖² / (C·H·W) at head's equilibrium for x, the mean over samples (Bai et al.,
    "Stabilizing Equilibrium Models by Jacobian Regularization", 2021). ‖·‖ is Frobenius' norm.

    Add it to the loss, times a weight: the smaller ∂F/∂z, the fewer steps a solver takes. It is differentiable in
    head's parameters and in x, with the equilibrium held fixed, as in the paper. It costs one evaluation of F and one
    vjp, and in the backward pass the derivative of both: about eight evaluations of F in all.

    x: (N, C, H, W). The equilibrium is that of head's latest forward pass if x is the tensor which that pass was given,
    with gradients, and the parameters have not changed. Otherwise, in a warm-up and after a compiled pass the penalty
    solves first, without gradients. Its random probe, of entries ±1, comes from torch's global generator. N = 0 gives
    0.

    Returns a scalar in float32, or in float64 if F computes in float64. Raises TypeError if head is no IFRHead,
    ValueError if head.solver is an Unroll or if x does not fit, NotImplementedError in forward mode and under
    torch.func's transforms.
    """
    return outside_compile(_penalty)(head, x)


def _penalty(head: IFRHead, x: Tensor) -> Tensor:
    head = getattr(head, "_orig_mod", head)  # as torch.compile wraps it
    if not isinstance(head, IFRHead):
        raise TypeError(f"head is {type(head).__name__}: expected IFRHead")
    check_tensor("x", x)
    refuse_transforms("jacobian_penalty", instead="")
    keep = torch.is_grad_enabled()
    z = head.equilibrium(x).to(wide(compute_dtype(x)))
    with torch.inference_mode(False), torch.enable_grad():
        x, z = (t.clone() if t.is_inference() else t for t in (x, z))  # a vjp cannot keep inference tensors
        z = z.detach().requires_grad_()
        # Called: the block's own kernels have no second derivative.
        by_calls = isinstance(head.block, ResidualBlock) and not head.altered()
        value = head.block.by_calls(z, x, compute_dtype(x)) if by_calls else head.block(z, x)
        probe = torch.randint_like(value, 2).mul_(2).sub_(1)
        (product,) = torch.autograd.grad(value, z, probe, create_graph=keep, materialize_grads=True)
    return product.square().sum() / max(1, product.numel())
