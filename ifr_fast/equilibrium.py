"""The registered ops `solve` and `solve_backward`: one residual block's equilibrium, and its gradients, for a batch.

Samples go through in chunks that fit the solver's workspace, so memory does not grow with their number. On a CPU a
chunk is worked on in channels_last, which oneDNN convolves faster, and leaves in the caller's layout.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from . import backend as backends
from .adjoint import Memory, Phantom
from .config import decode
from .kernels import memory_format
from .kernels.plain import wide
from .ops import solve_results
from .residual import Block
from .rules import Rule
from .solve import solve


def _chunks(rule: Rule, x: Tensor, params: list[Tensor], linearised: int = 0) -> Iterator[slice]:
    """linearised: how many linearisations of the block are held at a time."""
    wider = -(-params[0].shape[0] // x.shape[1])  # mid_channels / channels, rounded up
    buffers = 6 + 2 * wider + linearised * (4 + 3 * wider)
    step = rule.chunk(len(x), math.prod(x.shape[1:]), x.device, buffers) if len(x) else 1
    return (slice(start, start + step) for start in range(0, len(x), step))


def _staged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk, dense in the layout in which it is solved."""
    format = torch.channels_last if x.device.type == "cpu" else memory_format(x)
    # .to() takes a strided slice of a channels_last tensor for one that is laid out so already.
    return x.to(dtype, memory_format=format).contiguous(memory_format=format)


@torch.library.impl("ifr_fast::solve", "default")
def _solve(x, params, form, groups, eps, solver, steps, dtype, history_dtype, adjoint, backend, keep):
    rule = decode(solver)
    kernels = backends.kernels(backend, x.device.type, dtype)
    results = solve_results(x, steps, dtype, history_dtype, keep)
    block = None

    def solve_chunk(chunk: slice) -> Block:
        """Into the results; a function, so that a chunk's history is freed before the next one's is allocated."""
        value, residual, iterations, trace, status, history, p, q = results
        injection = _staged(x[chunk], wide(dtype))
        here = block.at(injection) if block else Block(injection, params, form, groups, eps, kernels, dtype)
        state = solve(here, torch.zeros_like(injection), rule, kernels)
        value[chunk], residual[chunk], iterations[chunk] = state.value, state.residual, state.iterations
        trace[:, chunk], status[chunk] = state.trace, state.status
        if keep:
            # Rows after a sample's last step were never written.
            written = torch.arange(rule.rows, device=x.device) <= state.iterations.unsqueeze(1)
            history[chunk] = torch.where(written.unsqueeze(2), state.history, 0)
            p[chunk], q[chunk] = state.p, state.q
        return here

    with torch.autocast(x.device.type, enabled=False):
        for chunk in _chunks(rule, x, params):
            block = solve_chunk(chunk)
    return results


@torch.library.impl("ifr_fast::solve_backward", "default")
def _solve_backward(grad, value, x, params, memory, form, groups, eps, dtype, adjoint, backend):
    adjoint = decode(adjoint)
    kernels = backends.kernels(backend, x.device.type, dtype)
    grad_x, residual = torch.empty_like(x), x.new_empty(len(x), dtype=wide(dtype))
    grad_params = [torch.zeros_like(p, dtype=wide(dtype)) for p in params]
    block = None

    def solve_chunk(chunk: slice) -> Block:
        injection, z, g = (_staged(t[chunk], wide(dtype)) for t in (x, value, grad))
        here = block.at(injection) if block else Block(injection, params, form, groups, eps, kernels, dtype)
        if isinstance(adjoint, Phantom):
            grad_x[chunk], grads = adjoint.backward(here, z, g)
            residual[chunk] = torch.inf
        else:
            linearised = here.linearise(z)
            w, residual[chunk] = adjoint.cotangent(
                linearised.vjp, g, dtype, kernels, Memory(*(t[chunk] for t in memory))
            )
            grad_x[chunk], grads = linearised.vjp_params(w)
        for total, part in zip(grad_params, grads, strict=True):
            total += part
        return here

    with torch.autocast(x.device.type, enabled=False):
        linearised = adjoint.steps if isinstance(adjoint, Phantom) else 1
        for chunk in _chunks(adjoint.rule.resolve(dtype), x, params, linearised):
            block = solve_chunk(chunk)
    return grad_x, [g.to(p.dtype) for g, p in zip(grad_params, params, strict=True)], residual
