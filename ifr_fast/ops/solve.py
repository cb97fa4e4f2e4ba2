"""The ops `solve` and `solve_backward`: the equilibria of a residual block for a batch, and their gradients.

Their options travel as one string (engine.call.Call), because AOTInductor passes an op's dtype on as another number.

Samples are solved in chunks that fit the solver's workspace, so memory does not grow with their number. `staged` puts a
chunk into channels_last where oneDNN or tensor cores convolve faster in it. Results have the caller's layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .._torch import is_fake
from ..adjoints import Adjoint, Memory, Problem
from ..checks import check_devices, check_tensor
from ..engine import graphs, segments
from ..engine.call import Call
from ..engine.linearise import BlockMap, staged
from ..engine.loop import solve as solve_chunk
from ..kernels import choose, convolutions
from ..kernels.contract import Kernels, memory_format, wide
from ..solvers import Solver
from .norms import differentiable_once

torch.library.define(
    "ifr_fast::solve",
    "(Tensor x, Tensor[] params, str call)"
    " -> (Tensor value, Tensor residual, Tensor iterations, Tensor trace, Tensor status,"
    " Tensor history, Tensor p, Tensor q)",
)
torch.library.define(
    "ifr_fast::solve_backward",
    "(Tensor grad, Tensor value, Tensor x, Tensor[] params, Tensor[] memory, str call)"
    " -> (Tensor grad_x, Tensor[] grad_params, Tensor adjoint_residual, Tensor iterations)",
)

# The dimension that counts samples in each result of `solve`.
SAMPLES = (0, 0, 0, 1, 0, 0, 0, 0)


def solve_results(x: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Empty results of the op `solve`, in its schema's order. The last three have no elements unless call.keep."""
    n, state, steps = x.shape[0], wide(call.dtype), call.solver.max_iter
    rows, size = (steps, math.prod(x.shape[1:])) if call.keep else (0, 0)
    algebra = torch.float64 if x.device.type == "cpu" else state
    return (
        torch.empty_like(x, memory_format=memory_format(x)),
        x.new_empty(n, dtype=state),
        x.new_empty(n, dtype=torch.int64),
        x.new_empty(steps + 1, n, dtype=state),
        x.new_empty(n, dtype=torch.int64),
        x.new_empty(n, rows, size, dtype=call.solver.history_dtype),
        x.new_empty(n, rows, rows, dtype=algebra),
        x.new_empty(n, rows, rows, dtype=algebra),
    )


def _checked(text: str, x: Tensor, params: Sequence[Tensor], others: Sequence[Tensor] = ()) -> Call:
    """What is asked for; ValueError where the tensors are no block's and its features'."""
    call = Call.decode(text)
    if not isinstance(call.adjoint, Adjoint):
        raise ValueError(f"call's adjoint is {call.adjoint!r}: expected an adjoint")
    check_tensor("x", x)
    count = 6 if call.form == "paper" else 8
    if len(params) != count:
        raise ValueError(f"params has {len(params)} tensors: expected {count}, as form={call.form!r}")
    check_devices(x, [*params, *others])
    return call


@torch.library.register_fake("ifr_fast::solve")
def _(x, params, call):
    return solve_results(x, _checked(call, x, params))


@torch.library.register_fake("ifr_fast::solve_backward")
def _(grad, value, x, params, memory, call):
    n, state = x.shape[0], wide(_checked(call, x, params, [grad, value, *memory]).dtype)
    residual, iterations = x.new_empty(n, dtype=state), x.new_empty(n, dtype=torch.int64)
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    return grad_x, [torch.empty_like(p) for p in params], residual, iterations


@torch.library.impl("ifr_fast::solve", "default")
def _solve(x, params, call):
    asked = _checked(call, x, params)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if not (asked.graphs and graphs.usable(x)):
            return _solve_batch(x, params, asked)
        # A zero sample may need more steps than any other. The last one twice ends when it does.
        return graphs.run(
            lambda batch, params: _solve_batch(batch[0], params, asked),
            ("solve", call), [x], params, dims=SAMPLES, repeat=True,
        )  # fmt: skip


def _solve_batch(x: Tensor, params: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    kernels = _kernels(call, call.solver, x, params, call.solver.max_iter + 1)
    results = solve_results(x, call)
    value, residual, iterations, trace, status, history, p, q = results
    solver, dtype, block = call.solver, call.dtype, None
    for chunk in _chunks(solver, kernels, x, params):
        # oneDNN and the C++ kernels need one dtype. A GPU reads X as it is: in 16 bits, half of the bytes.
        injection = staged(x[chunk], wide(dtype) if x.device.type == "cpu" else x.dtype, kernels)
        block = block.at(injection) if block else BlockMap(injection, params, call.form, call.groups, kernels, dtype)
        z = torch.zeros_like(injection, dtype=wide(dtype))
        state = solve_chunk(block, z, solver, kernels, from_zero=True, select=block.select)
        value[chunk], residual[chunk], iterations[chunk] = state.value, state.residual, state.iterations
        trace[:, chunk], status[chunk] = state.trace, state.status
        if call.keep:
            # Rows after a sample's last step were never written.
            written = torch.arange(solver.rows, device=x.device) <= state.iterations.unsqueeze(1)
            history[chunk] = torch.where(written.unsqueeze(2), state.history, 0)
            p[chunk], q[chunk] = state.pairs()
        del state, z  # the chunk's history is freed before the next one's is allocated
    return results


@torch.library.impl("ifr_fast::solve_backward", "default")
def _solve_backward(grad, value, x, params, memory, call):
    asked = _checked(call, x, params, [grad, value, *memory])
    if len(memory) != 3 or (asked.adjoint.reuses and not asked.keep):
        raise ValueError(f"memory has {len(memory)} tensors, keep={asked.keep}: expected history, p and q of `solve`")
    batch = [grad, value, x, *memory]
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if asked.graphs and graphs.usable(x):
            dims = (0, 0, 0, *[None] * len(params))
            run = partial(_backward_batch, call=asked)
            results = graphs.run(run, ("solve_backward", call), batch, params, dims=dims)
        else:
            results = _backward_batch(batch, params, asked)
    grad_x, residual, iterations, *grad_params = results
    return grad_x, grad_params, residual, iterations


def _backward_batch(batch: Sequence[Tensor], params: Sequence[Tensor], call: Call) -> list[Tensor]:
    """grad_x, residual, iterations and the parameters' gradients. batch: grad, value, x and the adjoint's memory."""
    grad, value, x, *memory = batch
    adjoint, dtype = call.adjoint, call.dtype
    evaluations = adjoint.backward_solver.max_iter if adjoint.solves else adjoint.linearisations
    solver = adjoint.backward_solver.resolve(dtype)
    kernels = _kernels(call, solver, x, params, evaluations)
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    residual = x.new_empty(len(x), dtype=wide(dtype))
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    grad_params = [torch.zeros_like(p, dtype=wide(dtype)) for p in params]
    block = None
    for chunk in _chunks(solver, kernels, x, params, adjoint.linearisations):
        injection, z, g = (staged(t[chunk], wide(dtype), kernels, like=x[chunk]) for t in (x, value, grad))
        block = block.at(injection) if block else BlockMap(injection, params, call.form, call.groups, kernels, dtype)
        kept = Memory(*(t[chunk] for t in memory))
        grad_x[chunk], grads, residual[chunk], iterations[chunk] = adjoint.backward(Problem(block, z, g, kept))
        for total, part in zip(grad_params, grads, strict=True):
            total += part
        del kept, grads, z, g
    return [grad_x, residual, iterations, *(g.to(p.dtype) for g, p in zip(grad_params, params, strict=True))]


def _kernels(call: Call, solver: Solver, x: Tensor, params: Sequence[Tensor], evaluations: int) -> Kernels:
    """The kernels for a (resolved) solver's so many evaluations of F or of its vjp."""
    kernels = choose.kernels(call.backend, x.device.type, call.dtype, solver.resolved()[1])
    return convolutions.chosen(kernels, call.convolution, x, params[0], call.dtype, evaluations)


def _chunks(
    solver: Solver, kernels: Kernels, x: Tensor, params: Sequence[Tensor], linearised: int = 0
) -> Iterator[slice]:
    """Slices of x that fit the solver's workspace. linearised: linearisations of the block held at the same time."""
    wider = -(-params[0].shape[0] // x.shape[1])  # mid_channels / channels, rounded up
    outside, inside = kernels.BUFFERS
    buffers = 3 + outside + inside * wider + linearised * (4 + 3 * wider)
    size, halved = math.prod(x.shape[1:]), segments.branches()
    if halved:  # a stream's freed memory is not another's, and a branch within a branch has a stream of its own
        buffers += 2 * (outside + inside * wider)
    step = solver.chunk(len(x), size, x.device, buffers, halved=halved) if len(x) else 1
    return (slice(start, start + step) for start in range(0, len(x), step))


def _save(ctx: Any, x: Tensor, params: Sequence[Tensor], call: str, output: tuple[Tensor, ...]) -> None:
    ctx.call, ctx.count = call, len(params)
    ctx.save_for_backward(output[0], x, *params, *output[5:])


def _saved(ctx: Any) -> tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor], str]:
    """The arguments of solve_backward after grad."""
    value, x, *rest = ctx.saved_tensors
    return value, x, rest[: ctx.count], rest[ctx.count :], ctx.call


def _solve_context(ctx, inputs, output):
    x, params, call = inputs
    _save(ctx, x, params, call, output)
    ctx.set_materialize_grads(False)


def _solve_gradient(ctx, grad, *_):
    if grad is None:
        return None, [None] * ctx.count, None
    grad_x, grad_params, *_ = torch.ops.ifr_fast.solve_backward(grad, *_saved(ctx))
    return grad_x, grad_params, None


torch.library.register_autograd("ifr_fast::solve", _solve_gradient, setup_context=_solve_context)
torch.library.register_autograd("ifr_fast::solve_backward", differentiable_once)


def transformed_solve(x: Tensor, params: Sequence[Tensor], call: str) -> tuple[Tensor, ...]:
    """The op `solve` under torch.func's transforms, which can see into an autograd function but not into an op."""
    return _Solve.apply(x, call, *params)


class _Solve(torch.autograd.Function):
    """The op `solve` under grad, vjp and vmap. vmap makes a batch of batches one batch: samples are independent."""

    @staticmethod
    def forward(x: Tensor, call: str, *params: Tensor) -> tuple[Tensor, ...]:
        return torch.ops.ifr_fast.solve(x, params, call)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        x, call, *params = inputs
        _save(ctx, x, params, call, output)
        ctx.mark_non_differentiable(*output[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> Any:
        value, x, params, memory, call = _saved(ctx)
        grads = _SolveBackward.apply(grad, value, x, call, len(params), *params, *memory)
        return grads[0], None, *grads[1:]

    @staticmethod
    def vmap(info: Any, dims: Any, x: Tensor, call: str, *params: Tensor) -> Any:
        if any(dim is not None for dim in dims[2:]):
            return _each(_Solve, info, dims, (x, call, *params))
        many = x.movedim(dims[0], 0)
        results = _Solve.apply(many.flatten(0, 1), call, *params)
        return tuple(r.unflatten(d, many.shape[:2]) for r, d in zip(results, SAMPLES, strict=True)), SAMPLES


class _SolveBackward(torch.autograd.Function):
    """The op `solve_backward` under the same transforms. Returns (grad_x, *grad_params)."""

    @staticmethod
    def forward(grad: Tensor, value: Tensor, x: Tensor, call: str, count: int, *rest: Tensor) -> tuple[Tensor, ...]:
        grad_x, grad_params, *_ = torch.ops.ifr_fast.solve_backward(grad, value, x, rest[:count], rest[count:], call)
        return grad_x, *grad_params

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: tuple[Tensor, ...]) -> None:
        pass

    backward = staticmethod(differentiable_once)

    @staticmethod
    def vmap(info: Any, dims: Any, *args: Any) -> Any:
        return _each(_SolveBackward, info, dims, args)  # each member has parameter gradients of its own


def _each(function: type[torch.autograd.Function], info: Any, dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """The vmap of a function, by a loop over the members."""
    results = []
    for i in range(info.batch_size):
        members = [a if d is None else a.select(d, i) for a, d in zip(args, dims, strict=True)]
        results.append(function.apply(*members))
    return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])


# Formulas for torch.utils.flop_counter. A sample that has stopped costs no more. Where nothing is computed (FakeTensor,
# meta), each sample is taken to need all steps.


_onednn = getattr(torch.ops.aten, "mkldnn_convolution", None)  # unrolls on a CPU use it (_torch.conv2d)
if _onednn is not None and _onednn not in flop_registry:

    @register_flop_formula(_onednn)
    def _convolution_flops(x_shape, weight_shape, *_, out_shape, **__):
        return 2 * math.prod(weight_shape) * x_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(torch.ops.ifr_fast.solve, get_raw=True)
def _solve_flops(x, params, call, out_val):
    return _block_flops(x, params) * (x.shape[0] + _steps(out_val[2], Call.decode(call).solver.max_iter))


@register_flop_formula(torch.ops.ifr_fast.solve_backward, get_raw=True)
def _backward_flops(grad, value, x, params, memory, call, out_val):
    adjoint = Call.decode(call).adjoint
    # F, its gradient in the input, and that in the parameters. The first product of a solve, with zero, is free.
    passes = 3 * x.shape[0] * adjoint.linearisations
    if adjoint.solves:
        passes += _steps(out_val[3], adjoint.backward_solver.max_iter)
    return _block_flops(x, params) * passes


def _block_flops(x: Tensor, params: Sequence[Tensor]) -> int:
    """The FLOPs of F's two convolutions for one sample. A multiplication with an addition counts as two."""
    return 2 * (params[0].numel() + params[3].numel()) * x.shape[2] * x.shape[3]


def _steps(iterations: Tensor, most: int) -> int:
    """The steps of all samples together; `most` for each if iterations holds no values."""
    unknown = is_fake(iterations) or iterations.is_meta
    return most * len(iterations) if unknown else int(iterations.sum())
