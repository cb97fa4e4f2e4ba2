"""Broyden's and Anderson's methods in the space of the residuals: from a Gram matrix to the next step's coefficients.

Starting from J₀⁻¹ = -I, every step of these methods lies in the span of the residuals g₀ … g_k, so their K×K Gram
matrix M = GᵀG is all that they need (README.md here derives it). Functional, hence differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import ridge


def broyden_coefficients(
    gram: Tensor, p: Tensor, q: Tensor, step: Tensor, k: int
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """Broyden's method in the space of the residuals: U = G Pᵀ, V = G Qᵀ, step = G d; no vector of the problem's size
    is touched. gram (n, K, K); p, q (n, s, K) the pairs so far; step (n, K) the one that led to residual k.

    Returns the new pair (p, q), (n, K) each, None at k = 0, and the next step. Functional, hence differentiable.
    """
    unit = torch.zeros_like(step)
    unit[:, k] = 1
    if k == 0:
        return None, unit
    gram_step = matvec(gram, step)
    gram_y = gram[:, :, k] - gram[:, :, k - 1]
    y = unit - unit.roll(-1, 1)
    q_new = matvec(q.mT, matvec(p, gram_step)) - step
    scale = (q_new * gram_y).sum(1, keepdim=True)
    p_new = step + y - matvec(p.mT, matvec(q, gram_y))
    # A sample that has stopped has no difference left. The division is guarded, not its result: a mask over the result
    # would hide an overflow's value and let the NaN of its gradient through.
    usable = scale.reciprocal().isfinite() & ((p_new / scale).isfinite() & q_new.isfinite()).all(1, keepdim=True)
    p_new = torch.where(usable, p_new, 0) / torch.where(usable, scale, 1)
    q_new = torch.where(usable, q_new, 0)
    right = gram[:, :, k]
    step = unit - matvec(p.mT, matvec(q, right)) - p_new * (q_new * right).sum(1, keepdim=True)
    return (p_new, q_new), step


def anderson_coefficients(gram: Tensor, steps: Tensor, k: int, m: int) -> Tensor:
    """Anderson acceleration in the space of the residuals: the least-squares problem by its normal equations, with
    ridge(dtype) · trace on the diagonal. gram (n, K, K); steps (n, ≥ k, K): step i led from iterate i to i + 1.

    Returns the next step (n, K); a plain one where the system is singular. Functional, hence differentiable.
    """
    first = max(0, k - m + 1)
    unit = torch.zeros_like(gram[:, 0])
    unit[:, k] = 1
    if first == k:
        return unit
    by_row = gram[:, first + 1 : k + 1] - gram[:, first:k]
    normal = by_row[:, :, first + 1 : k + 1] - by_row[:, :, first:k]
    trace = normal.diagonal(dim1=1, dim2=2).sum(1)
    # A sample that has stopped has no differences left: a unit diagonal keeps its system, and gradients, finite.
    diagonal = torch.where(trace > 0, ridge(gram.dtype) * trace, 1).unsqueeze(1).expand(-1, k - first).diag_embed()
    system, right = normal + diagonal, by_row[:, :, k : k + 1]
    gamma = torch.linalg.solve_ex(system, right).result
    usable = gamma.isfinite().all(1, keepdim=True)
    if gamma.requires_grad:  # through a singular system even a masked gradient is NaN
        one = torch.eye(k - first, dtype=gram.dtype, device=gram.device)
        gamma = torch.linalg.solve_ex(torch.where(usable, system, one), torch.where(usable, right, 0)).result
    gamma = torch.where(usable, gamma, 0)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    differences = identity[first + 1 : k + 1] - identity[first:k]
    return unit - matvec((steps[:, first:k] + differences).mT, gamma.squeeze(2))


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """(n, i, j) by (n, j)."""
    # Not a batched product: libraries cut those by the size of the batch and wake threads for a few numbers.
    return (matrix * vector.unsqueeze(1)).sum(2)
