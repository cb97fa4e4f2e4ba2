"""IFRHead: the equilibrium of a residual block, as a drop-in module for a stack of convolutions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from . import (
    equilibrium,  # noqa: F401  (implements the ops)
    transforms,
)
from ._torch import in_backward_pass, in_traced_subgraph, is_fake, not_traced, transforms_active
from .adjoint import Adjoint, Implicit, Shine, Unrolled, check_shine
from .altered import check_map, warn_once
from .block import ResidualBlock, compute_dtype
from .call import Call
from .config import DTYPES, build, check_bool, check_int, check_tensor
from .fixedpoint import fixed_point
from .kernels import memory_format
from .kernels.plain import wide
from .rules import Broyden, Rule, Unroll
from .solve import Solution, differentiable_solve


class IFRHead(nn.Module):
    """Implicit Feature Refinement: H* = F(H*; X), the equilibrium of one weight-tied residual block (Ma et al., 2021).

    Stands where a detector's head has its stack of 3×3 convolutions: (N, C, H, W) in, the same shape, dtype and memory
    format out. float64, float32, bfloat16 or float16; N = 0 works. Under autocast the block computes in its dtype.

    Args:
        channels, form, groups, mid_channels, weight_norm, post_gain: as ResidualBlock's, whose docstring says how to
            initialise the convolutions anew.
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
        Unroll and under torch.func's transforms; not set where torch.compile traces a checkpointed region); its value
        may share memory with the output.
    Where the block's modules were changed (`altered`), its solve is fixed_point's on their calls.
    Raises ValueError for arguments, shapes, dtypes and devices that do not fit, and for a block without an equilibrium
    of each sample; NotImplementedError in forward mode and under tools that cannot take a solve.
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
        check_bool("cuda_graphs", cuda_graphs)
        super().__init__()
        self.channels = channels
        self.block = ResidualBlock(
            channels, form=form, groups=groups, mid_channels=mid_channels, weight_norm=weight_norm, post_gain=post_gain,
            backend=backend,
        )  # fmt: skip
        self.warmup_steps, self.warmup_unroll, self.cuda_graphs = warmup_steps, warmup_unroll, cuda_graphs
        self.warmup = _Warmup()
        if warmup_steps:
            self.register_buffer("warmup_count", torch.zeros((), dtype=torch.int64))
        self._solver = build(solver, (Rule, Unroll), "solver")
        self.adjoint = adjoint
        self.last_solution: Solution | None = None

    @property
    def solver(self) -> Rule | Unroll:
        return self._solver

    @solver.setter
    def solver(self, value: Rule | Unroll | str | Mapping[str, Any]) -> None:
        solver = build(value, (Rule, Unroll), "solver")
        check_shine(solver, self._adjoint)
        self._solver = solver
        self._encode_calls()

    @property
    def adjoint(self) -> Adjoint:
        return self._adjoint

    @adjoint.setter
    def adjoint(self, value: Adjoint | str | Mapping[str, Any]) -> None:
        adjoint = build(value, Adjoint, "adjoint")
        check_shine(self._solver, adjoint)
        self._adjoint = adjoint
        self._encode_calls()

    def _encode_calls(self) -> None:
        """Ops take a string; made here, so that a forward pass, compiled or not, makes none."""
        self._calls: dict[tuple, str] = {}
        if isinstance(self._solver, Rule) and isinstance(self.block, ResidualBlock):
            for dtype in DTYPES:
                for keep in {False, isinstance(self._adjoint, Shine)}:
                    self.call(dtype, keep)

    def call(self, dtype: torch.dtype, keep: bool = False) -> str:
        """What the op `solve` is asked for (call.Call) where the block computes in `dtype`."""
        block = self.block
        key = dtype, block.form, block.groups, block.backend, self.cuda_graphs, keep
        if key not in self._calls:
            solver, adjoint = self._solver.resolve(dtype), self._adjoint.fitted(self._solver, dtype)
            call = Call(block.form, block.groups, dtype, solver, adjoint, block.backend, self.cuda_graphs, keep)
            self._calls[key] = call.encode()
        return self._calls[key]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the equilibrium, of the same shape, dtype and memory format. Differentiable once."""
        self._check_input(x)
        steps = self._unroll_steps()
        return self._differentiable(x, steps) if steps else self._solve(x)

    def solve(self, x: Tensor) -> Tensor:
        """The equilibrium as forward gives it, whatever the warm-up. ValueError where the solver is an Unroll."""
        self._check_input(x)
        if isinstance(self.solver, Unroll):
            raise ValueError(f"solver={self.solver} has no equilibrium to solve for")
        return self._solve(x)

    def altered(self) -> str:
        """Why the block's modules are called rather than their parameters read, in words; "" where they are not."""
        return self.block.altered() if isinstance(self.block, ResidualBlock) else "the block was exchanged"

    def _solve(self, x: Tensor) -> Tensor:
        if isinstance(self.adjoint, Unrolled):
            return self._differentiable(x, 0)
        transforms.refuse_forward_mode("IFRHead")
        if torch.onnx.is_in_onnx_export():
            raise NotImplementedError("IFRHead: ONNX has no operator for a solve; export it with solver=Unroll(steps)")
        if why := self.altered():
            return self._solve_by_calls(x, why)
        keep = isinstance(self.adjoint, Shine) and (torch.is_grad_enabled() or torch.jit.is_tracing())
        params, call = self.block.tensors_for(x), self.call(compute_dtype(x), keep)
        value, residual, iterations, trace, status, *_ = transforms.solve_op(x, params, call)
        self._report(Solution(value, residual, iterations, trace, status))
        # The op's own result is kept for the backward pass; the caller may change this one, as nn.ReLU(inplace=True).
        # A trace is of one graph, with gradients and without.
        return value.clone() if value.requires_grad or torch.jit.is_tracing() else value

    @not_traced("IFRHead's block was altered: its modules are called by a solver that is not traced")
    def _solve_by_calls(self, x: Tensor, why: str) -> Tensor:
        """The solve of a block whose modules must be called: right for any F, slower than the op, not in chunks."""
        if torch.jit.is_tracing() or is_fake(x):
            raise NotImplementedError(
                f"IFRHead cannot be traced or exported as it is: {why}, so its solve is no operator"
            )
        check_map(self.block)
        warn_once(why)
        dtype, backend = compute_dtype(x), getattr(self.block, "backend", "auto")
        own = self.block.own_dtype(dtype) if isinstance(self.block, ResidualBlock) else dtype
        narrowest = own if own.itemsize < dtype.itemsize else dtype  # which the tolerance must leave room for
        value, solution = fixed_point(
            lambda z: self.block(z, x),
            torch.zeros_like(x, dtype=wide(dtype), memory_format=memory_format(x)),
            solver=self.solver.resolve(narrowest),
            adjoint=self.adjoint.fitted(self.solver, narrowest),
            backend=backend,
        )
        self._report(replace(solution, value=solution.value.to(x.dtype)))
        return value.to(x.dtype)

    def _report(self, solution: Solution | None) -> None:
        if torch.compiler.is_compiling() and in_traced_subgraph():
            return
        # What a transform's tensors stand for is gone when it ends.
        self.last_solution = None if solution is None or transforms_active() else solution.detach()

    def _unroll_steps(self) -> int:
        """Blocks to unroll in this forward pass; 0 where the solver runs."""
        if self.training and self.warmup_steps:
            buffer = None if transforms_active() else self._buffers.get("warmup_count")
            if self.warmup.unrolls(self.warmup_steps, buffer):
                return self.warmup_unroll
        return self.solver.steps if isinstance(self.solver, Unroll) else 0

    def _differentiable(self, x: Tensor, steps: int) -> Tensor:
        """An unroll of `steps` blocks, or with 0 the solver's steps, in autograd's sight."""
        dtype = compute_dtype(x)
        why = self.altered()
        if why and not steps:
            check_map(self.block)
        if why and not torch.compiler.is_compiling():
            warn_once(why)
        z = torch.zeros_like(x, dtype=wide(dtype), memory_format=memory_format(x))
        # Widened once: X's gradient is a sum over the steps, too long a one for 16 bits.
        injection = x.to(wide(dtype))
        takes_dtype = getattr(type(self.block), "forward", None) is ResidualBlock.forward
        options = {"dtype": dtype} if takes_dtype else {}
        if steps:
            self._report(None)
            for _ in range(steps):
                z = self.block(z, injection, **options)
        else:
            solved = differentiable_solve(lambda z: self.block(z, injection, **options), z, self.solver.resolve(dtype))
            self._report(solved)
            z = solved.value
        return z.to(x.dtype).contiguous(memory_format=memory_format(x))

    def _check_input(self, x: Tensor) -> None:
        if isinstance(x, torch.fx.Proxy):
            raise NotImplementedError(
                "IFRHead has no graph for torch.fx.symbolic_trace: use torch.export, or a Tracer to which it is a leaf "
                "(is_leaf_module)"
            )
        check_tensor("x", x)
        if x.dim() != 4 or x.shape[1] != self.channels or 0 in x.shape[2:]:
            expected = f"(N, {self.channels}, H, W), as channels={self.channels}"
            raise ValueError(f"x has shape {tuple(x.shape)}: expected {expected}")

    def __prepare_scriptable__(self) -> None:
        raise NotImplementedError(
            "IFRHead cannot be compiled by torch.jit.script: use torch.export, or torch.jit.trace where the rest allows"
        )

    @classmethod
    def from_released(cls, state_dict: Mapping[str, Tensor], prefix: str = "", **kwargs: Any) -> IFRHead:
        """A head with the weights of the authors' checkpoints (github.com/lufanma/IFR).

        state_dict: the checkpoint's, the block's tensors named prefix + conv1.weight_g, conv1.weight_v, gn1.weight, …
        (in the released Mask R-CNN: prefix="roi_heads.mask_head.repeat_block."). groups are 4, as there; kwargs go to
        IFRHead. Raises ValueError where a tensor is missing.
        """
        if not isinstance(state_dict, Mapping) or not isinstance(prefix, str):
            found = f"{type(state_dict).__name__} and {prefix!r}"
            raise ValueError(f"state_dict and prefix are a {found}: expected a mapping of tensors and a string")
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

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing, unexpected, errors):
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected, errors)
        self.warmup.seen = None
        # Heads that differ in their warm-up alone load each other's states.
        key = prefix + "warmup_count"
        for keys in (missing, unexpected):
            if key in keys:
                keys.remove(key)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last_solution": None}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


class _Warmup:
    """Training passes so far: the head's buffer, for checkpoints and averaged copies, and beside it a plain number, so
    that a device is waited for only where the buffer was written by others: loaded, or during the warm-up averaged or
    broadcast (DistributedDataParallel does in every pass)."""

    def __init__(self) -> None:
        self.count = 0
        self.seen: tuple[int, int] | None = None  # the buffer, and its version, that `count` agrees with

    def unrolls(self, steps: int, buffer: Tensor | None) -> bool:
        """Is this pass among the first `steps`? Computed again, in a backward pass, it is as it was."""
        compiling = torch.compiler.is_compiling()
        if not compiling and buffer is not None:
            written = self.seen is None or (self.count <= steps and self.seen != _state(buffer))
            if written or not buffer.is_cuda:
                self.count = int(buffer)
        # One past the last that unrolls is as far as it needs to count; compiled code is specialised on it.
        if self.count <= steps and (compiling or not in_backward_pass()):
            self.count += 1
            if buffer is not None:
                buffer.fill_(self.count)
        if not compiling and buffer is not None:
            self.seen = _state(buffer)
        return self.count <= steps


def _state(buffer: Tensor) -> tuple[int, int]:
    return id(buffer), -1 if buffer.is_inference() else buffer._version
