"""The registered ops `solve` and `solve_backward`: one residual block's equilibrium, and its gradients, for a batch.

Samples go through in chunks that fit the solver's workspace, so memory does not grow with their number. A chunk is
worked on in channels_last, which oneDNN and tensor cores convolve faster, and leaves in the caller's layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from types import ModuleType

import torch
from torch import Tensor

from . import backend as backends
from . import graphs as recordings
from .adjoint import Equation, Memory, Phantom
from .call import Call
from .kernels import memory_format
from .kernels.plain import wide
from .ops import check_devices, solve_results
from .residual import EPS, Block
from .rules import Rule
from .solve import solve


def _chunks(rule: Rule, x: Tensor, params: list[Tensor], linearised: int = 0) -> Iterator[slice]:
    """linearised: how many linearisations of the block are held at a time."""
    wider = -(-params[0].shape[0] // x.shape[1])  # mid_channels / channels, rounded up
    buffers = 6 + 2 * wider + linearised * (4 + 3 * wider)
    step = rule.chunk(len(x), math.prod(x.shape[1:]), x.device, buffers) if len(x) else 1
    return (slice(start, start + step) for start in range(0, len(x), step))


def staged(x: Tensor, dtype: torch.dtype, kernels: ModuleType, like: Tensor | None = None) -> Tensor:
    """A chunk, dense in the layout in which it is solved: where kernels take any, that of `like`, or x's own."""
    channels_last = x.device.type == "cpu" or kernels.CHANNELS_LAST_ONLY
    format = torch.channels_last if channels_last else memory_format(x if like is None else like)
    # .to() takes a strided slice of a channels_last tensor for one that is laid out so already.
    return x.to(dtype, memory_format=format).contiguous(memory_format=format)


@torch.library.impl("ifr_fast::solve", "default")
def _solve(x, params, call):
    check_devices(x, params)
    asked = Call.decode(call)

    def run(batch: Sequence[Tensor], params: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return _solve_batch(*batch, params, asked)

    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        if asked.graphs and recordings.usable(x):
            return recordings.run(run, ("solve", call), [x], params, dims=(0, 0, 0, 1, 0, 0, 0, 0))
        return run([x], params)


def _solve_batch(x: Tensor, params: Sequence[Tensor], call: Call) -> tuple[Tensor, ...]:
    kernels = backends.kernels(call.backend, x.device.type, call.dtype)
    results = solve_results(x, call)
    rule, dtype, block = call.solver, call.dtype, None

    def solve_chunk(chunk: slice) -> Block:
        """Into the results; a function, so that a chunk's history is freed before the next one's is allocated."""
        value, residual, iterations, trace, status, history, p, q = results
        # oneDNN and the C++ kernels want one dtype; a GPU reads X as it is, in half of the bytes.
        injection = staged(x[chunk], wide(dtype) if x.device.type == "cpu" else x.dtype, kernels)
        here = block.at(injection) if block else Block(injection, params, call.form, call.groups, EPS, kernels, dtype)
        z = torch.zeros_like(injection, dtype=wide(dtype))
        state = solve(here, z, rule, kernels, from_zero=True, select=here.select)
        value[chunk], residual[chunk], iterations[chunk] = state.value, state.residual, state.iterations
        trace[:, chunk], status[chunk] = state.trace, state.status
        if call.keep:
            # Rows after a sample's last step were never written.
            written = torch.arange(rule.rows, device=x.device) <= state.iterations.unsqueeze(1)
            history[chunk] = torch.where(written.unsqueeze(2), state.history, 0)
            p[chunk], q[chunk] = state.p, state.q
        return here

    for chunk in _chunks(rule, x, params):
        block = solve_chunk(chunk)
    return results


@torch.library.impl("ifr_fast::solve_backward", "default")
def _solve_backward(grad, value, x, params, memory, call):
    check_devices(x, [grad, value, *params, *memory])
    asked = Call.decode(call)

    def run(batch: Sequence[Tensor], params: Sequence[Tensor]) -> list[Tensor]:
        grad, value, x, *memory = batch
        grad_x, grad_params, residual, iterations = _solve_backward_batch(grad, value, x, params, memory, asked)
        return [grad_x, residual, iterations, *grad_params]

    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        batch = [grad, value, x, *memory]
        if asked.graphs and recordings.usable(x):
            dims = (0, 0, 0, *[None] * len(params))
            results = recordings.run(run, ("solve_backward", call), batch, params, dims=dims)
        else:
            results = run(batch, params)
    grad_x, residual, iterations, *grad_params = results
    return grad_x, grad_params, residual, iterations


def _solve_backward_batch(
    grad: Tensor, value: Tensor, x: Tensor, params: Sequence[Tensor], memory: Sequence[Tensor], call: Call
) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
    adjoint, dtype = call.adjoint, call.dtype
    kernels = backends.kernels(call.backend, x.device.type, dtype)
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    residual = x.new_empty(len(x), dtype=wide(dtype))
    iterations = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    grad_params = [torch.zeros_like(p, dtype=wide(dtype)) for p in params]
    block = None

    def solve_chunk(chunk: slice) -> Block:
        injection, z, g = (staged(t[chunk], wide(dtype), kernels, like=x[chunk]) for t in (x, value, grad))
        here = block.at(injection) if block else Block(injection, params, call.form, call.groups, EPS, kernels, dtype)
        if isinstance(adjoint, Phantom):
            grad_x[chunk], grads = adjoint.backward(here, z, g)
            residual[chunk] = torch.inf
        else:
            linearised = here.linearise(z)
            kept = Memory(*(t[chunk] for t in memory))
            equation = Equation(linearised.affine, g, dtype, kernels, kept, linearised.select)
            w, residual[chunk], iterations[chunk] = adjoint.cotangent(equation)
            grad_x[chunk], grads = linearised.vjp_params(w)
        for total, part in zip(grad_params, grads, strict=True):
            total += part
        return here

    linearised = adjoint.steps if isinstance(adjoint, Phantom) else 1
    for chunk in _chunks(adjoint.rule.resolve(dtype), x, params, linearised):
        block = solve_chunk(chunk)
    return grad_x, [g.to(p.dtype) for g, p in zip(grad_params, params, strict=True)], residual, iterations
