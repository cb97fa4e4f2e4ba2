"""Call: the options of a solve of the residual block, as one value. The registered ops take it as one string."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch

from .. import config
from ..checks import DTYPES, check_bool, check_int
from ..kernels import choose, convolutions
from ..solvers import Solver
from .linearise import FORMS

if TYPE_CHECKING:
    from ..adjoints import Adjoint


@dataclass(frozen=True)
class Call:
    """form, groups: the block's. dtype: what its convolutions compute in. solver: resolved. adjoint: fitted to the
    solver. backend: as for choose.kernels. convolution: one of convolutions.NAMES. graphs: replay CUDA graphs. keep:
    return what Shine needs of the solve.

    Raises ValueError for an unknown form, dtype, backend or convolution, for groups, graphs and keep of another type,
    and for a solver that is not resolved.
    """

    form: str
    groups: int
    dtype: torch.dtype
    solver: Solver
    adjoint: Adjoint
    backend: str
    convolution: str = "auto"
    graphs: bool = False
    keep: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS or self.dtype not in DTYPES or self.solver != self.solver.resolve(self.dtype):
            raise ValueError(f"{self}: expected a form of {FORMS}, a dtype of {DTYPES} and a resolved solver")
        check_int("Call", "groups", self.groups, 1)
        check_bool("graphs", self.graphs)
        check_bool("keep", self.keep)
        choose.check(self.backend)
        convolutions.check(self.convolution)

    def encode(self) -> str:
        """A string that decode() turns back into an equal Call."""
        return json.dumps([
            self.form, self.groups, config.dtype_name(self.dtype), config.encode(self.solver),
            config.encode(self.adjoint), self.backend, self.convolution, self.graphs, self.keep,
        ])  # fmt: skip

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> Call:
        """The Call that encode() turned into `text`. Raises ValueError for any other string."""
        try:
            form, groups, dtype, solver, adjoint, *rest = json.loads(text)
            return Call(form, groups, getattr(torch, dtype), config.decode(solver), config.decode(adjoint), *rest)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"call={text!r}: expected what Call.encode() gives ({error})") from error
