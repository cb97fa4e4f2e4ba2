"""IFRHead: the equilibrium of a residual block, as a drop-in module for a stack of convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import equilibrium  # noqa: F401  (implements the ops)
from .adjoint import Adjoint, Implicit, Shine, Unrolled, check_shine
from .block import EPS, ResidualBlock, refuse_forward_mode
from .config import build, check_int, encode
from .rules import Broyden, Rule, Unroll
from .solve import Solution, differentiable_solve

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class IFRHead(nn.Module):
    """Implicit Feature Refinement: H* = F(H*; X), the equilibrium of one weight-tied residual block (Ma et al., 2021).

    Stands where a detector's head has its stack of 3×3 convolutions: (N, C, H, W) in, the same shape, dtype and memory
    format out. float64, float32, bfloat16 or float16; N = 0 works. Under autocast the block computes in its dtype.

    Args:
        channels, form, groups, mid_channels, weight_norm, post_gain: as ResidualBlock's.
        solver: Broyden, Anderson or Picard (rules.Rule: max_iter, rtol, …), or Unroll(steps) for the explicit unroll.
        adjoint: how gradients pass: Implicit, Phantom, JacobianFree, Shine, Unrolled. An Unroll ignores it.
            Both also by name or as dict(type=name, …), and may be assigned later.
        warmup_steps, warmup_unroll: the first `warmup_steps` forward passes in training mode unroll the block
            `warmup_unroll` times in place of solving (the authors' remedy for an untrained block that does not
            contract). The count is part of the state dict where warmup_steps > 0. Under activation checkpointing a
            head that is called k times an iteration needs a multiple of k: all of them unroll, or none. torch.compile
            would compile every pass of the warm-up anew: let it begin after the last.
        backend: "auto", "reference", "native", "triton", "cuda"; see backends().
        cuda_graphs: on a GPU, record the solve and its backward pass as CUDA graphs and replay them: for small batches,
            where launching takes longer than computing. Batches are padded to one of eight sizes an octave; recordings
            keep their workspace (rules.Rule) until ifr_fast.graphs.clear().

    Attributes: block, the ResidualBlock; last_solution, the Solution of the last forward pass (None after an
        Unroll); its value may share memory with the output.
    Raises ValueError for arguments, shapes and dtypes that do not fit.
    """

    def __init__(
        self,
        channels: int = 256,
        *,
        form: str = "released",
        groups: int = 32,
        mid_channels: int | None = None,
        weight_norm: bool = True,
        post_gain: float = 1.0,
        solver: Rule | Unroll | str | Mapping[str, Any] = Broyden(),  # noqa: B008  (immutable)
        adjoint: Adjoint | str | Mapping[str, Any] = Implicit(),  # noqa: B008
        warmup_steps: int = 0,
        warmup_unroll: int = 4,
        backend: str = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        check_int("IFRHead", "warmup_steps", warmup_steps, 0)
        check_int("IFRHead", "warmup_unroll", warmup_unroll, 1)
        super().__init__()
        self.block = ResidualBlock(
            channels, form=form, groups=groups, mid_channels=mid_channels, weight_norm=weight_norm, post_gain=post_gain,
            backend=backend,
        )  # fmt: skip
        self.warmup_steps, self.warmup_unroll, self.cuda_graphs = warmup_steps, warmup_unroll, cuda_graphs
        self.warmup = _Warmup()
        if warmup_steps:
            self.register_buffer("warmup_count", torch.zeros((), dtype=torch.int64))
        self.solver, self.adjoint = solver, adjoint
        self.last_solution: Solution | None = None

    @property
    def solver(self) -> Rule | Unroll:
        return self._solver

    @solver.setter
    def solver(self, value: Rule | Unroll | str | Mapping[str, Any]) -> None:
        solver = build(value, (Rule, Unroll), "solver")
        check_shine(solver, getattr(self, "_adjoint", None))
        self._solver = solver
        # Ops take strings; made here, so that a forward pass, compiled or not, makes none.
        self._calls = {}
        if isinstance(self._solver, Rule):
            resolved = {dtype: self._solver.resolve(dtype) for dtype in DTYPES}
            self._calls = {d: (encode(r), r.max_iter, d, r.history_dtype) for d, r in resolved.items()}

    @property
    def adjoint(self) -> Adjoint:
        return self._adjoint

    @adjoint.setter
    def adjoint(self, value: Adjoint | str | Mapping[str, Any]) -> None:
        adjoint = build(value, Adjoint, "adjoint")
        check_shine(self._solver, adjoint)
        self._adjoint = adjoint
        self._adjoint_text = encode(self._adjoint)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the equilibrium, of the same shape, dtype and memory format. Differentiable once."""
        self._check_input(x)
        steps = self._unroll_steps()
        return self._differentiable(x, steps) if steps else self.solve(x)

    def solve(self, x: Tensor) -> Tensor:
        """The equilibrium as forward gives it, whatever the warm-up. ValueError where the solver is an Unroll."""
        self._check_input(x)
        refuse_forward_mode()
        if isinstance(self.solver, Unroll):
            raise ValueError(f"solver={self.solver} has no equilibrium to solve for")
        if isinstance(self.adjoint, Unrolled):
            return self._differentiable(x, 0)
        solver, max_iter, dtype, history_dtype = self._calls[self.block.compute_dtype(x)]
        params = self.block.tensors()
        keep = isinstance(self.adjoint, Shine) and torch.is_grad_enabled()
        value, residual, iterations, trace, status, *_ = torch.ops.ifr_fast.solve(
            x, params, self.block.form, self.block.groups, EPS, solver, max_iter, dtype, history_dtype,
            self._adjoint_text, self.block.backend, self.cuda_graphs, keep,
        )  # fmt: skip
        self.last_solution = Solution(value, residual, iterations, trace, status).detach()
        # The op's own result is kept for the backward pass; the caller may change this one, as nn.ReLU(inplace=True).
        return value.clone() if value.requires_grad else value

    def _unroll_steps(self) -> int:
        """Blocks to unroll in this forward pass; 0 where the solver runs."""
        if self.training and self.warmup_steps and self.warmup.unrolls(self.warmup_steps):
            return self.warmup_unroll
        return self.solver.steps if isinstance(self.solver, Unroll) else 0

    def _differentiable(self, x: Tensor, steps: int) -> Tensor:
        """An unroll of `steps` blocks, or with 0 the solver's steps, in autograd's sight."""
        dtype = self.block.compute_dtype(x)
        injection = x.to(torch.float64 if dtype == torch.float64 else torch.float32)
        z = torch.zeros_like(injection)
        if steps:
            self.last_solution = None
            for _ in range(steps):
                z = self.block(z, injection, dtype)
        else:
            solve = differentiable_solve(lambda z: self.block(z, injection, dtype), z, self.solver.resolve(dtype))
            self.last_solution = solve.detach()
            z = solve.value
        return z.to(x.dtype)

    def _check_input(self, x: Tensor) -> None:
        channels = self.block.channels
        if x.dim() != 4 or x.shape[1] != channels or 0 in x.shape[2:]:
            raise ValueError(f"x has shape {tuple(x.shape)}: expected (N, {channels}, H, W), as channels={channels}")
        if x.dtype not in DTYPES:
            raise ValueError(f"x has dtype {x.dtype}: expected float64, float32, bfloat16 or float16")

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], prefix: str = "", **kwargs: Any) -> IFRHead:
        """A head with the weights of the authors' checkpoints (github.com/lufanma/IFR).

        state_dict: the checkpoint's, the block's tensors named prefix + conv1.weight_g, conv1.weight_v, gn1.weight, …
        (in the released Mask R-CNN: prefix="roi_heads.mask_head.repeat_block."). groups are 4, as there; kwargs go to
        IFRHead. Raises ValueError where a tensor is missing.
        """
        prefix = prefix if not prefix or prefix.endswith(".") else prefix + "."
        kwargs = {"groups": 4, "form": "released", **kwargs}
        layers = (1, 2) if kwargs["form"] == "paper" else (1, 2, 3)
        norms = [f"gn{i}.{name}" for i in layers for name in ("weight", "bias")]
        names = {name: name for name in norms}
        for conv in ("conv1", "conv2"):
            if kwargs.setdefault("weight_norm", prefix + "conv1.weight_g" in state_dict):
                names[f"{conv}.parametrizations.weight.original0"] = f"{conv}.weight_g"
                names[f"{conv}.parametrizations.weight.original1"] = f"{conv}.weight_v"
            else:
                names[f"{conv}.weight"] = f"{conv}.weight"
        missing = [prefix + name for name in names.values() if prefix + name not in state_dict]
        if missing:
            found = [k for k in state_dict if k.endswith(("conv1.weight_g", "conv1.weight"))][:3]
            raise ValueError(f"prefix={prefix!r}: the state dict has no {', '.join(missing)}; it has e.g. {found}")
        conv1 = state_dict[prefix + names.get("conv1.weight", "conv1.weight_v")]
        head = cls(conv1.shape[1], mid_channels=conv1.shape[0], **kwargs)
        head.block.load_state_dict({ours: state_dict[prefix + theirs] for ours, theirs in names.items()})
        return head

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        if "warmup_count" in self._buffers:
            self.warmup_count.fill_(self.warmup.count)
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        key = prefix + "warmup_count"
        if self.warmup_steps and key in state_dict:
            self.warmup.count = int(state_dict[key])
        # Heads that differ in their warm-up alone load each other's states.
        for keys in (missing, unexpected):
            if key in keys:
                keys.remove(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_solution": None}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


class _Warmup:
    """Training passes so far: a plain number, so that reading it waits for no device."""

    def __init__(self) -> None:
        self.count = 0

    def unrolls(self, steps: int) -> bool:
        """Is this pass among the first `steps`? Computed again, in a backward pass, it is as it was."""
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        # One past the last that unrolls is as far as it needs to count; compiled code is specialised on it.
        if not again and self.count <= steps:
            self.count += 1
        return self.count <= steps
