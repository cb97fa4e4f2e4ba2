"""What a solve of the residual block is asked for, as the one string that the registered ops take beside tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

import torch

from . import config
from .adjoint import Adjoint
from .rules import Rule


@dataclass(frozen=True)
class Call:
    """form, groups: the block's. dtype: what its convolutions compute in. solver: resolved. adjoint: fitted to it.
    backend: as backend.kernels takes it. graphs: replay CUDA graphs. keep: return what Shine needs of the solve."""

    form: str
    groups: int
    dtype: torch.dtype
    solver: Rule
    adjoint: Adjoint
    backend: str
    graphs: bool = False
    keep: bool = False

    def encode(self) -> str:
        """A string that decode() turns back into an equal Call."""
        return json.dumps([
            self.form, self.groups, str(self.dtype).removeprefix("torch."), config.encode(self.solver),
            config.encode(self.adjoint), self.backend, self.graphs, self.keep,
        ])  # fmt: skip

    @staticmethod
    @lru_cache(maxsize=1024)
    def decode(text: str) -> Call:
        form, groups, dtype, solver, adjoint, *rest = json.loads(text)
        return Call(form, groups, getattr(torch, dtype), config.decode(solver), config.decode(adjoint), *rest)
