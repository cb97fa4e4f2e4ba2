"""Diagnostics of a head: spectral radius, adjoint residual, effective receptive field.

The convergence trace is part of every Solution (head.last_solution.trace).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from .block import compute_dtype
from .checks import check_int, check_tensor
from .engine.linearise import BlockMap, staged
from .head import IFRHead
from .kernels import choose
from .kernels.contract import wide
from .solution import Solution
from .solvers import Solver


def spectral_radius(head: IFRHead, x: Tensor, *, iterations: int = 100) -> Tensor:
    """The spectral radius of ∂F/∂z at head's equilibrium for x, per sample. Below 1 the plain iteration contracts
    there. The smaller it is, the fewer steps a solver takes (Sec. 3.5 of the paper).

    x: (N, C, H, W). iterations: of the power iteration on products with the transposed Jacobian. Growth is averaged
    over their last half, because a complex leading pair of eigenvalues makes single steps oscillate.

    Returns (N,), float64 if F computes in float64, else float32. Raises ValueError if iterations < 2, if head.solver is
    an Unroll, or if x does not fit.
    """
    check_int("spectral_radius", "iterations", iterations, 2)
    check_tensor("x", x)
    with torch.no_grad(), torch.cuda.device_of(x):
        z = head.solve(x)
        vjp = _vjp_by_calls(head, x, z) if head.altered() else _vjp(head, x, z)
        w = torch.randn_like(z, dtype=wide(compute_dtype(x)))
        log_growth = w.new_zeros(len(w))
        for i in range(iterations):
            norm = w.flatten(1).norm(dim=1).clamp_min(1e-30)
            if i > iterations // 2:
                log_growth += norm.log()
            w = vjp(w / norm.view(-1, 1, 1, 1))
        log_growth += w.flatten(1).norm(dim=1).clamp_min(1e-30).log()
        return (log_growth / (iterations - iterations // 2)).exp()


def _vjp(head: IFRHead, x: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
    """Products with the transpose of ∂F/∂z at z, by the kernels."""
    block, dtype = head.block, compute_dtype(x)
    kernels = choose.kernels(block.backend, x.device.type, dtype)
    x, z = (staged(t, wide(dtype), kernels) for t in (x, z))
    return BlockMap(x, block.tensors_for(x), block.form, block.groups, kernels, dtype).linearise(z).vjp


def _vjp_by_calls(head: IFRHead, x: Tensor, z: Tensor) -> Callable[[Tensor], Tensor]:
    with torch.enable_grad():
        leaf = z.to(wide(compute_dtype(x))).requires_grad_()
        value = head.block(leaf, x)
    return lambda w: torch.autograd.grad(value, leaf, w, retain_graph=True)[0]


def adjoint_residual(head: IFRHead, x: Tensor, grad: Tensor) -> Tensor:
    """How well Eq. 8 is solved for head at x, given ∂L/∂H = grad: ‖wᵀ ∂F/∂H + ∂L/∂H - wᵀ‖ / ‖∂L/∂H‖ of each sample.

    x, grad: (N, C, H, W). Returns (N,), float32 or float64; inf for adjoints that solve no equation. Raises ValueError
    if head.solver is an Unroll.
    """
    if not isinstance(head.solver, Solver):
        raise ValueError(f"head.solver={head.solver}: an unroll has no adjoint equation")
    if not head.adjoint.solves:
        return torch.full((len(x),), torch.inf, dtype=wide(x.dtype), device=x.device)
    if head.altered():
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            torch.autograd.grad(head.solve(leaf), leaf, grad)
        return cast(Tensor, cast(Solution, head.last_solution).adjoint)
    with torch.no_grad():
        z, empty = head.solve(x), [x.new_empty(len(x), 0)] * 3
        call = head.call(compute_dtype(x))
        return torch.ops.ifr_fast.solve_backward(grad, z, x, head.block.tensors_for(x), empty, call)[2]


def effective_receptive_field(module: nn.Module, x: Tensor) -> Tensor:
    """The effective receptive field of the centre of module's output (Luo et al., 2016). (H, W), x's dtype; its sum is
    1.

    module: maps (N, C, H, W) to the same shape. x: (N, C, H, W). A random mixture of the centre's channels is
    differentiated in x. The gradient's magnitude is averaged over samples and channels.
    """
    check_tensor("x", x)
    x = x.detach().requires_grad_()
    centre = module(x)[:, :, x.shape[2] // 2, x.shape[3] // 2]
    field = torch.autograd.grad(centre, x, torch.randn_like(centre))[0].abs().mean((0, 1))
    return field / field.sum()
