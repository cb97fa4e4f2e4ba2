"""Solution: what a solve reached."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kernels.contract import Status as Status


@dataclass(frozen=True)
class Solution:
    """What a solve reached, for each of N samples. Tensors are on the solve's device and detached.

    value: (N, …) the best iterate, the one with the smallest relative residual; z⁰ if none is finite.
    residual: (N,) the best iterate's relative residual ‖F(z) - z‖ / ‖F(z)‖; inf if none is finite.
    iterations: (N,) int64, the steps taken. status: (N,) int64, codes of `Status`.
    trace: (max_iter + 1, N) the relative residual of every evaluation, NaN where it is not finite. The last value of a
    sample that has stopped repeats.
    adjoint: (N,) set by fixed_point: the adjoint residual, the error of Eq. 8 relative to ‖∂L/∂H‖, of the latest
    backward pass. NaN before one; inf if the adjoint solves no equation. None otherwise: see
    diagnostics.adjoint_residual.

    residual, trace and adjoint are float32, or float64 if F computes in float64.
    """

    value: Tensor
    residual: Tensor
    iterations: Tensor
    trace: Tensor
    status: Tensor
    adjoint: Tensor | None = None

    def detach(self) -> Solution:
        value, residual, iterations, trace, status = (
            t.detach() for t in (self.value, self.residual, self.iterations, self.trace, self.status)
        )
        return Solution(
            value, residual, iterations, trace, status, None if self.adjoint is None else self.adjoint.detach()
        )

    def __str__(self) -> str:
        """One line for a person to read. Waits for the device."""
        counts = {s.name: int((self.status == s).sum()) for s in Status}
        states = ", ".join(f"{n} {name.lower()}" for name, n in counts.items() if n)
        worst = f"{float(self.residual.max()):.1e}" if len(self.residual) else "none"
        return f"{len(self.status)} samples ({states}), worst relative residual {worst}"
