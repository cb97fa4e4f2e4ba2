"""The loop for ONNX: few and large operators, that nobody differentiates, and no report.

The graph has every step of every sample; one that has stopped stays as it is. Coefficients are computed in the
iterate's dtype, as GPU kernels do: TensorRT has no float64. Norms of residuals must lie in its range, squared.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..kernels.contract import DIVERGENCE, ridge
from ..solvers import Solver


def exported_solve(f: Callable[[Tensor], Tensor], z0: Tensor, solver: Solver) -> Tensor:
    """The iterates (n, …) that engine.loop.solve finds best, with a resolved solver. The history has z0's dtype."""
    size, shape = math.prod(z0.shape[1:]), (-1, *z0.shape[1:])
    rtol, _ = solver.resolved()
    next_iterate = METHODS[solver.method](solver)
    z = best = z0.reshape(-1, 1, size)
    for k in range(solver.max_iter + 1):
        fz = f(z.view(shape)).reshape(-1, 1, size)
        g = fz - z
        norm, norm_f = (torch.linalg.vector_norm(t, dim=2, keepdim=True) for t in (g, fz))
        relative, above = norm / norm_f, norm > rtol * norm_f  # NaN is neither above nor less
        if k == 0:
            least, most, running = relative, DIVERGENCE * norm, above
        else:
            improved = running & (relative < least)
            least = torch.where(improved, relative, least)
            best = torch.where(improved, z, best)
            running = running & above & (norm <= most)
        if k < solver.max_iter:
            z = torch.where(running, next_iterate(z, fz, g), z)
    return best.view(shape)


class _Broyden:
    """Called with each iterate z, F(z) and g = F(z) - z, all (n, 1, size). Returns the next iterate.

    step (n, k, 1): gram.py's. inverse (n, k, k): the sum of its pairs' products, p qᵀ.
    """

    def __init__(self, solver: Solver) -> None:
        self.residuals: list[Tensor] = []

    def __call__(self, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        self.residuals.append(g)
        k = len(self.residuals) - 1
        if k == 0:
            self.step = torch.ones_like(g[:, :, :1])
            self.inverse = torch.zeros_like(self.step)
            return fz
        history = torch.cat(self.residuals, 1)
        gram = history @ history.transpose(1, 2)
        step, inverse = pad(self.step, (0, 0, 0, 1)), pad(self.inverse, (0, 1, 0, 1))
        unit = torch.eye(k + 1, dtype=g.dtype, device=g.device)[:, k:]
        y = unit - unit.roll(-1, 0)
        gram_y = gram @ y
        q = (gram @ step).transpose(1, 2) @ inverse - step.transpose(1, 2)
        pair = ((step + y - inverse @ gram_y) / (q @ gram_y)) @ q
        usable = pair.abs().sum((1, 2), keepdim=True) < torch.inf
        self.inverse = inverse + torch.where(usable, pair, 0)
        self.step = unit - self.inverse @ (gram @ unit)
        return z + self.step.transpose(1, 2) @ history


class _Anderson:
    """Called as _Broyden is. A step combines F's last m values, by the differences of them and of the residuals."""

    def __init__(self, solver: Solver) -> None:
        self.window = solver.window - 1
        self.last: tuple[Tensor, Tensor] | None = None
        self.differences: list[tuple[Tensor, Tensor]] = []

    def __call__(self, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        if self.last is not None:
            self.differences.append((fz - self.last[0], g - self.last[1]))
        self.last = fz, g
        if not self.differences[-self.window :] or not self.window:
            return fz
        of_f, of_g = (torch.cat(d, 1) for d in zip(*self.differences[-self.window :], strict=True))
        normal, one = of_g @ of_g.transpose(1, 2), torch.eye(of_g.shape[1], dtype=g.dtype, device=g.device)
        trace = (normal * one).sum((1, 2), keepdim=True)
        gamma = _eliminated(normal + one * torch.where(trace > 0, ridge(g.dtype) * trace, 1), of_g @ g.transpose(1, 2))
        usable = gamma.abs().sum(1, keepdim=True) < torch.inf
        return fz - torch.where(usable, gamma, 0).transpose(1, 2) @ of_f


def _eliminated(system: Tensor, right: Tensor) -> Tensor:
    """system⁻¹ right, for positive definite systems (n, i, i), and right (n, i, 1): ONNX has no linear solver."""
    both = torch.cat([system, right], 2)
    one = torch.eye(system.shape[1], dtype=system.dtype, device=system.device)
    for i in range(system.shape[1]):
        pivot = both[:, i : i + 1] / both[:, i : i + 1, i : i + 1]
        both = both - (both[:, :, i : i + 1] - one[:, i : i + 1]) * pivot
    return both[:, :, -1:]


class _Picard:
    """Called as _Broyden is."""

    def __init__(self, solver: Solver) -> None:
        pass

    def __call__(self, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return fz


METHODS: dict[str, type[_Broyden] | type[_Anderson] | type[_Picard]] = {
    "broyden": _Broyden,
    "anderson": _Anderson,
    "picard": _Picard,
}
