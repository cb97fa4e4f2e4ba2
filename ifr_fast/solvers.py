"""The solvers that a user chooses from: Broyden, Anderson, Picard; and the explicit Unroll.

These classes hold options only. kernels/gram.py has the algebra, engine/loop.py the loop.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from .checks import check_int, check_rtol
from .config import choice
from .kernels.contract import Method

# How many tensors of the iterate's size an evaluation of the block and the step around it hold: the injection, z, the
# best iterate, F, R and the convolutions' results.
BUFFERS = 8


def check_options(options: Any) -> None:
    """Raises ValueError if max_iter, rtol, history_dtype or workspace do not fit. Makes a dtype's name the dtype."""
    name = type(options).__name__
    if options.max_iter is not None or isinstance(options, Solver):
        check_int(name, "max_iter", options.max_iter, 1)
    check_rtol(name, options.rtol)
    if options.workspace is not None:
        check_int(name, "workspace", options.workspace, 1)
    given = options.history_dtype
    dtype = getattr(torch, given, given) if isinstance(given, str) else given
    if not (dtype is None or dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float8_e5m2)):
        raise ValueError(f"{name}(history_dtype={given!r}): expected None, float32, float64, bfloat16 or float8_e5m2")
    object.__setattr__(options, "history_dtype", dtype)


@dataclass(frozen=True)
class Solver:
    """Options of every iterative solver.

    max_iter: the largest number of steps; F is evaluated at most max_iter + 1 times.
    rtol: a sample stops when ‖F(z) - z‖ ≤ rtol·‖F(z)‖. None means 1e-3, or 1e-2 where F is computed in 16 bits. 0 means
    max_iter steps, unless F(z) = z exactly.
    history_dtype: dtype of the stored residuals, a torch.dtype or its name. bfloat16 halves memory and traffic and
    leaves the trace of the residuals alike; float32 and float64 both mean the iterate's dtype. float8_e5m2 halves
    bfloat16's. It keeps two binary digits after the first, and a scale for every residual: an evaluation's relative
    residual may be 20 % off bfloat16's where convolutions are in bfloat16, more in float32, on average less than 10 %.
    Shine's gradients become coarser. On a CPU only the eager kernels serve it, more slowly. None means bfloat16 where F
    is computed in 16 bits, else the iterate's dtype.
    workspace: bytes that a solve may take beside its results. None means 32 MiB on a CPU and 1 GiB elsewhere. Samples
    are solved in chunks that fit, of one sample at least.

    Raises ValueError for other values.
    """

    method: ClassVar[Method]  # its name in the kernels

    max_iter: int = 15
    rtol: float | None = None
    history_dtype: torch.dtype | None = None
    workspace: int | None = None

    def __post_init__(self) -> None:
        check_options(self)

    def resolve(self, compute: torch.dtype) -> Solver:
        """This solver with its defaults filled in, for an F that computes in `compute`."""
        narrow = compute.itemsize <= 2
        iterate = torch.float64 if compute == torch.float64 else torch.float32
        stored = self.history_dtype or (torch.bfloat16 if narrow else iterate)
        return replace(
            self,
            rtol=(1e-2 if narrow else 1e-3) if self.rtol is None else self.rtol,
            history_dtype=stored if stored.itemsize <= 2 else iterate,
        )

    def resolved(self) -> tuple[float, torch.dtype]:
        """rtol and history_dtype. Raises ValueError before resolve()."""
        if self.rtol is None or self.history_dtype is None:
            raise ValueError(f"{self} is not resolved: rtol and history_dtype depend on the dtype (resolve)")
        return self.rtol, self.history_dtype

    def chunk(
        self, samples: int, size: int, device: torch.device, buffers: int = BUFFERS, *, halved: bool = False
    ) -> int:
        """How many samples of `size` unknowns to solve at a time: an even split that fits the (resolved) solver's
        workspace.

        buffers: how many tensors of the iterate's size are held beside the history. halved: half of the samples may be
        solved on, beside all of them.
        """
        budget = self.workspace or (32 << 20 if device.type == "cpu" else 1 << 30)
        _, stored = self.resolved()
        iterate = 8 if stored == torch.float64 else 4
        history = self.rows * stored.itemsize
        sample = size * (history + buffers * iterate)
        most = max(1, budget // max(1, sample + sample // 2 if halved else sample))
        return -(-samples // -(-samples // most))

    @property
    def rows(self) -> int:
        """How many residuals the history holds."""
        return self.max_iter

    @property
    def window(self) -> int:
        """The method takes inner products with this many of the latest residuals."""
        return self.max_iter


@choice
@dataclass(frozen=True)
class Broyden(Solver):
    """Broyden's "good" method (Eq. 6 and 7) with J₀⁻¹ = -I, without line search. Options: see Solver."""

    method: ClassVar[Method] = "broyden"


@choice
@dataclass(frozen=True)
class Anderson(Solver):
    """Anderson acceleration over the last m residuals (Walker & Ni, 2011) with mixing 1. Other options: see Solver.
    Raises ValueError unless m ≥ 1."""

    method: ClassVar[Method] = "anderson"

    m: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("Anderson", "m", self.m, 1)

    @property
    def window(self) -> int:
        return self.m


@choice
@dataclass(frozen=True)
class Picard(Solver):
    """The plain iteration z ← F(z). Stopping, best iterate and report are as in the others. Options: see Solver."""

    method: ClassVar[Method] = "picard"

    @property
    def rows(self) -> int:
        return 1


@choice
@dataclass(frozen=True)
class Unroll:
    """The explicit weight-tied unroll: F applied `steps` times (Table 6), with ordinary backpropagation. It solves
    nothing and gives no Solution. Raises ValueError unless steps ≥ 1."""

    steps: int = 4

    def __post_init__(self) -> None:
        check_int("Unroll", "steps", self.steps, 1)
