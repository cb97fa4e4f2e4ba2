"""IFRHead: the equilibrium of a residual block, as a drop-in module for a stack of convolutions."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ._torch import in_traced_subgraph, is_fake, not_traced, tracing, transforms_active, version
from .adjoints import Adjoint, Implicit
from .altered import check_map, warn_once
from .block import ResidualBlock, compute_dtype
from .checks import DTYPES, check_bool, check_int, check_tensor, refuse_forward_mode
from .config import build
from .engine.call import Call
from .engine.exported import exported_solve
from .engine.through import differentiable_solve
from .fixed_point import fixed_point
from .kernels import convolutions
from .kernels.contract import memory_format, wide
from .ops.solve import transformed_solve
from .released import released_state
from .solution import Solution
from .solvers import Broyden, Solver, Unroll


class _Latest:
    """Whose equilibrium a head's last_solution is; keeps none of the tensors alive."""

    def __init__(self, head: IFRHead, x: Tensor, solution: Solution) -> None:
        self.x, self.solution, self.state = weakref.ref(x), weakref.ref(solution), self._state(head, x, solution)

    def is_of(self, head: IFRHead, x: Tensor, solution: Solution) -> bool:
        """Whether it is these very two, and neither they nor the head's parameters were changed since."""
        same = self.x() is x and self.solution() is solution
        return same and self.state == self._state(head, x, solution)

    @staticmethod
    def _state(head: IFRHead, x: Tensor, solution: Solution) -> tuple[Any, ...]:
        tensors = (x, solution.value, *head.parameters())
        return head.solver, compute_dtype(x), *((id(t), version(t)) for t in tensors)


class IFRHead(nn.Module):
    """Implicit Feature Refinement: H* = F(H*; X), the equilibrium of one weight-tied residual block (Ma et al., 2021).

    Replaces the stack of 3×3 convolutions in a detector's head. Takes (N, C, H, W) in float64, float32, bfloat16 or
    float16 and gives the same shape, dtype and memory format. N = 0 works. Under autocast the block computes in
    autocast's dtype.

    Args:
        channels, form, groups, mid_channels, weight_norm, post_gain: as for ResidualBlock, whose docstring also says
            how to initialise the convolutions.
        solver: Broyden, Anderson or Picard (max_iter, rtol, …: solvers.Solver), or Unroll(steps), the explicit unroll.
        adjoint: how gradients pass: Implicit, Phantom, JacobianFree, Shine or Unrolled. An Unroll ignores it. solver
            and adjoint may also be a name or dict(type=name, …), and may be assigned later.
        backend: "auto", "eager", "cpu", "triton" or "cuda"; see backends().
        convolution: how the cpu kernels convolve in a solve: "direct" by oneDNN, "winograd" by Winograd's algorithm
            (float32, channels in multiples of 32), "auto" by what was the faster one. weight_cache keeps transformed
            weights. An Unroll, Unrolled and an altered block convolve directly.
        cuda_graphs: on a GPU, record the solve and its backward pass as CUDA graphs and replay them: launching takes no
            time, and the device itself can end a solve early (the guide, README.md in this folder). Batches are padded
            to one of sixteen sizes an octave. Recordings keep their workspace (solvers.Solver) until
            ifr_fast.graphs.clear().

    Attributes:
        block: the ResidualBlock.
        last_solution: the Solution of the last forward pass. Its value may share memory with the output. None after an
            Unroll and under torch.func's transforms. Not set where torch.compile traces a checkpointed region, and by
            an export to ONNX.
        training_unroll: if not 0, passes in training mode apply the block this many times instead of solving.
            WarmupUnroll sets it.

    If the block's modules were changed (`altered`), fixed_point solves by calling them. Raises ValueError for
    arguments, shapes, dtypes and devices that do not fit, and for a block without an equilibrium of each sample. Raises
    NotImplementedError in forward mode and under tools that cannot take a solve. torch.onnx.export gets the solve in
    plain operators, with all of max_iter's steps (engine/exported.py).
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
        solver: Solver | Unroll | str | Mapping[str, Any] = Broyden(),  # noqa: B008  (immutable)
        adjoint: Adjoint | str | Mapping[str, Any] = Implicit(),  # noqa: B008
        backend: str = "auto",
        convolution: str = "auto",
        cuda_graphs: bool = False,
    ) -> None:
        check_bool("cuda_graphs", cuda_graphs)
        super().__init__()
        self.channels = channels
        self.block = ResidualBlock(
            channels, form=form, groups=groups, mid_channels=mid_channels, weight_norm=weight_norm, post_gain=post_gain,
            backend=backend,
        )  # fmt: skip
        self.convolution, self.cuda_graphs = convolutions.check(convolution), cuda_graphs
        self._training_unroll = 0
        self._solver = build(solver, (Solver, Unroll), "solver")
        self.adjoint = adjoint
        self.last_solution: Solution | None = None
        self._latest: _Latest | None = None
        self.register_load_state_dict_pre_hook(_forget_warmup_count)

    @property
    def solver(self) -> Solver | Unroll:
        return self._solver

    @solver.setter
    def solver(self, value: Solver | Unroll | str | Mapping[str, Any]) -> None:
        solver = build(value, (Solver, Unroll), "solver")
        self._adjoint.check(solver)
        self._solver = solver
        self._encode_calls()

    @property
    def adjoint(self) -> Adjoint:
        return self._adjoint

    @adjoint.setter
    def adjoint(self, value: Adjoint | str | Mapping[str, Any]) -> None:
        adjoint = build(value, Adjoint, "adjoint")
        adjoint.check(self._solver)
        self._adjoint = adjoint
        self._encode_calls()

    @property
    def training_unroll(self) -> int:
        return self._training_unroll

    @training_unroll.setter
    def training_unroll(self, value: int) -> None:
        check_int("IFRHead", "training_unroll", value, 0)
        self._training_unroll = value

    def _encode_calls(self) -> None:
        """Encodes the ops' string argument in advance, so that a forward pass, compiled or not, encodes nothing."""
        self._calls: dict[tuple[Any, ...], str] = {}
        if isinstance(self._solver, Solver) and isinstance(self.block, ResidualBlock):
            for dtype in DTYPES:
                for keep in {False, self._adjoint.reuses}:
                    self.call(dtype, keep)

    def call(self, dtype: torch.dtype, keep: bool = False) -> str:
        """The string that the op `solve` takes (engine.call.Call) if the block computes in `dtype`."""
        block = self.block
        key = dtype, block.form, block.groups, block.backend, self.convolution, self.cuda_graphs, keep
        if key not in self._calls:
            solver = self._iterative()
            resolved, adjoint = solver.resolve(dtype), self._adjoint.fitted(solver, dtype)
            options = block.backend, self.convolution, self.cuda_graphs, keep
            call = Call(block.form, block.groups, dtype, resolved, adjoint, *options)
            self._calls[key] = call.encode()
        return self._calls[key]

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) → the equilibrium, of the same shape, dtype and memory format. Differentiable once: the gradient
        of its gradient raises RuntimeError."""
        self._check_input(x)
        if self.training and self._training_unroll:
            return self._differentiable(x, self._training_unroll)
        return self._differentiable(x, self.solver.steps) if isinstance(self.solver, Unroll) else self._solve(x)

    def solve(self, x: Tensor) -> Tensor:
        """The equilibrium as forward gives it, also during a warm-up. Raises ValueError if the solver is an Unroll."""
        self._check_input(x)
        self._iterative()
        return self._solve(x)

    def equilibrium(self, x: Tensor) -> Tensor:
        """The equilibrium for x, detached: last_solution's if that is of this very tensor, in a pass with gradients and
        with the parameters as they are; else solved for, which leaves last_solution as it is. Raises ValueError if the
        solver is an Unroll."""
        solution, latest = self.last_solution, self._latest
        if solution is not None and latest is not None and latest.is_of(self, x, solution):
            return solution.value
        with torch.no_grad():
            value = self.solve(x)
        self.last_solution, self._latest = solution, latest
        return value

    def _iterative(self) -> Solver:
        if isinstance(self._solver, Unroll):
            raise ValueError(f"solver={self._solver} has no equilibrium to solve for")
        return self._solver

    def altered(self) -> str:
        """Why the block's modules are called instead of their parameters read, in words; "" if they are not called."""
        return self.block.altered() if isinstance(self.block, ResidualBlock) else "the block was exchanged"

    def _solve(self, x: Tensor) -> Tensor:
        if self.adjoint.through or torch.onnx.is_in_onnx_export():  # ONNX has no operator for a solve
            return self._differentiable(x, 0)
        refuse_forward_mode("IFRHead")
        if why := self.altered():
            return self._solve_by_calls(x, why)
        keep = self.adjoint.reuses and (torch.is_grad_enabled() or tracing())
        params, call = self.block.tensors_for(x), self.call(compute_dtype(x), keep)
        solve = transformed_solve if transforms_active() else torch.ops.ifr_fast.solve
        value, residual, iterations, trace, status, *_ = solve(x, params, call)
        self._report(Solution(value, residual, iterations, trace, status), x)
        # The op's own result is saved for the backward pass. The caller gets a copy, which it may change
        # (nn.ReLU(inplace=True)). A trace always copies: its one graph serves calls with and without gradients.
        return value.clone() if value.requires_grad or tracing() else value

    @not_traced("IFRHead's block was altered: its modules are called by a solver that is not traced")
    def _solve_by_calls(self, x: Tensor, why: str) -> Tensor:
        """Solves by calling the block's modules: right for any F, but slower than the op and not in chunks."""
        if tracing() or is_fake(x):
            raise NotImplementedError(
                f"IFRHead cannot be traced or exported as it is: {why}, so its solve is no operator"
            )
        check_map(self.block)
        warn_once(why)
        solver, dtype, backend = self._iterative(), compute_dtype(x), getattr(self.block, "backend", "auto")
        own = self.block.own_dtype(dtype) if isinstance(self.block, ResidualBlock) else dtype
        narrowest = own if own.itemsize < dtype.itemsize else dtype  # whose rounding the default rtol allows for
        value, solution = fixed_point(
            lambda z: self.block(z, x),
            torch.zeros_like(x, dtype=wide(dtype), memory_format=memory_format(x)),
            solver=solver.resolve(narrowest),
            adjoint=self.adjoint.fitted(solver, narrowest),
            backend=backend,
        )
        self._report(solution and replace(solution, value=solution.value.to(x.dtype)), x)
        return value.to(x.dtype)

    def _report(self, solution: Solution | None, x: Tensor) -> None:
        compiled = torch.compiler.is_compiling()
        if compiled and in_traced_subgraph():
            return
        # The tensors of a transform are not valid after it ends.
        self.last_solution = None if solution is None or transforms_active() else solution.detach()
        self._latest = None
        if self.last_solution is not None and torch.is_grad_enabled() and not compiled:  # else changes may go uncounted
            self._latest = _Latest(self, x, self.last_solution)

    def _differentiable(self, x: Tensor, steps: int) -> Tensor:
        """Applies the block `steps` times, or takes the solver's steps if `steps` is 0, recorded by autograd."""
        dtype = compute_dtype(x)
        why = self.altered()
        if why and not steps:
            check_map(self.block)
        if why and not torch.compiler.is_compiling():
            warn_once(why)
        z = torch.zeros_like(x, dtype=wide(dtype), memory_format=memory_format(x))
        # Widened once: X's gradient is a sum over the steps, too long for 16 bits.
        injection = x.to(wide(dtype))
        takes_dtype = getattr(type(self.block), "forward", None) is ResidualBlock.forward
        options = {"dtype": dtype} if takes_dtype else {}
        if steps:
            self._report(None, x)
            for _ in range(steps):
                z = self.block(z, injection, **options)
        elif torch.onnx.is_in_onnx_export():
            z = exported_solve(lambda z: self.block(z, injection, **options), z, self._iterative().resolve(dtype))
        else:
            solver = self._iterative().resolve(dtype)
            solved = differentiable_solve(lambda z: self.block(z, injection, **options), z, solver)
            self._report(solved, x)
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
        """A head with the weights of one of the authors' checkpoints (github.com/lufanma/IFR).

        state_dict: the checkpoint's. It names the block's tensors prefix + conv1.weight_g, conv1.weight_v, gn1.weight,
        … In the released Mask R-CNN prefix is "roi_heads.mask_head.repeat_block.". kwargs go to IFRHead; groups default
        to 4, as there. Raises ValueError if a tensor is missing.
        """
        options, state = released_state(state_dict, prefix, kwargs)
        head = cls(**options)
        head.block.load_state_dict(state)
        return head

    def __getstate__(self) -> dict[str, Any]:
        """A copy or a pickle holds no batch, and takes no part in the warm-up of the model that it is of."""
        return {**self.__dict__, "last_solution": None, "_latest": None, "_training_unroll": 0}

    def extra_repr(self) -> str:
        return f"solver={self.solver}, adjoint={self.adjoint}"


def _forget_warmup_count(head: IFRHead, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drops a key of release 0.1's checkpoints: heads counted their warm-up themselves then."""
    state_dict.pop(prefix + "warmup_count", None)
