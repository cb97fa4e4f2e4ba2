"""Broyden's and Anderson's methods in the space of the residuals: from a Gram matrix to the next step's coefficients.

If J₀⁻¹ = -I, every step of these methods lies in the span of the residuals g₀ … g_k. So all that they need is the K×K
Gram matrix M = GᵀG (README.md in this folder derives this). The functions change nothing in place and are
differentiable.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .contract import ridge


def broyden_coefficients(
    gram: Tensor, p: Tensor, q: Tensor, step: Tensor, k: int
) -> tuple[tuple[Tensor, Tensor] | None, Tensor]:
    """Broyden's next step in coefficients: U = G Pᵀ, V = G Qᵀ, step = G d. No vector of the problem's size is touched.

    gram (n, K, K). p, q (n, s, K): the pairs so far. step (n, K): the step that led to residual k.
    Returns the new pair (p, q), each (n, K), or None at k = 0; and the next step (n, K).
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
    # The residuals of a stopped sample no longer differ, so scale may be 0. The division is guarded, not its result: a
    # mask over the result would hide an overflow's value and let the NaN of its gradient through.
    usable = scale.reciprocal().isfinite() & ((p_new / scale).isfinite() & q_new.isfinite()).all(1, keepdim=True)
    p_new = torch.where(usable, p_new, 0) / torch.where(usable, scale, 1)
    q_new = torch.where(usable, q_new, 0)
    right = gram[:, :, k]
    step = unit - matvec(p.mT, matvec(q, right)) - p_new * (q_new * right).sum(1, keepdim=True)
    return (p_new, q_new), step


def anderson_coefficients(gram: Tensor, steps: Tensor, k: int, m: int) -> Tensor:
    """Anderson's next step in coefficients. The least-squares problem is solved by its normal equations, with
    ridge(dtype) · trace added to the diagonal.

    gram (n, K, K). steps (n, ≥ k, K): step i led from iterate i to i + 1. m: the window.
    Returns the next step (n, K): the plain one where the system is singular.
    """
    first = max(0, k - m + 1)
    unit = torch.zeros_like(gram[:, 0])
    unit[:, k] = 1
    if first == k:
        return unit
    by_row = gram[:, first + 1 : k + 1] - gram[:, first:k]
    normal = by_row[:, :, first + 1 : k + 1] - by_row[:, :, first:k]
    trace = normal.diagonal(dim1=1, dim2=2).sum(1)
    # The residuals of a stopped sample no longer differ: a unit diagonal keeps its system and gradients finite.
    diagonal = torch.where(trace > 0, ridge(gram.dtype) * trace, 1).unsqueeze(1).expand(-1, k - first).diag_embed()
    system, right = normal + diagonal, by_row[:, :, k : k + 1]
    gamma = torch.linalg.solve_ex(system, right).result
    usable = gamma.isfinite().all(1, keepdim=True)
    if gamma.requires_grad:  # a singular system makes even a masked gradient NaN
        one = torch.eye(k - first, dtype=gram.dtype, device=gram.device)
        gamma = torch.linalg.solve_ex(torch.where(usable, system, one), torch.where(usable, right, 0)).result
    gamma = torch.where(usable, gamma, 0)
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    differences = identity[first + 1 : k + 1] - identity[first:k]
    return unit - matvec((steps[:, first:k] + differences).mT, gamma.squeeze(2))


def matvec(matrix: Tensor, vector: Tensor) -> Tensor:
    """Matrices (n, i, j) times vectors (n, j): (n, i)."""
    # Not a batched product: libraries divide its work by the size of the batch, and wake threads for a few numbers.
    return (matrix * vector.unsqueeze(1)).sum(2)
