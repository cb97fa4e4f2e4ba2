"""What a solve reached."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .kernels.contract import Status as Status


@dataclass(frozen=True)
class Solution:
    """What a solve reached, sample by sample; tensors on the solve's device, detached.

    value: (N, …) the best iterate of each sample: the one of the smallest relative residual, z⁰ where none is finite.
    residual: (N,) ‖F(z) - z‖ / ‖F(z)‖ there (inf where none is finite). iterations: (N,) int64 steps taken.
    trace: (max_iter + 1, N) the relative residual of every evaluation, NaN of one that was not finite; a stopped
    sample's last one repeats. status: (N,) int64, codes of `Status`.
    adjoint: of fixed_point, (N,) the relative residual of the gradient's own equation (Eq. 8) in the latest backward
    pass; NaN before one, inf where the adjoint solves no equation. None elsewhere: diagnostics.adjoint_residual.
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
        """One line that a person reads; waits for the device."""
        counts = {s.name: int((self.status == s).sum()) for s in Status}
        states = ", ".join(f"{n} {name.lower()}" for name, n in counts.items() if n)
        worst = f"{float(self.residual.max()):.1e}" if len(self.residual) else "none"
        return f"{len(self.status)} samples ({states}), worst relative residual {worst}"
