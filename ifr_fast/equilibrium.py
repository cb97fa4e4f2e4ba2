"""The registered ops `solve` and `solve_backward`: one residual block's equilibrium, and its gradients, for a batch.

Samples go through in chunks that fit the solver's workspace, so memory does not grow with their number. On a CPU a
chunk is worked on in channels_last, which oneDNN convolves faster, and leaves in the caller's layout.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import backend as backends
from .adjoint import Memory, Phantom
from .config import decode
from .kernels.plain import wide
from .ops import solve_results
from .residual import Block
from .rules import Rule
from .solve import memory_format, solve


def _chunks(rule: Rule, x: Tensor) -> Iterator[slice]:
    step = rule.chunk(len(x), x[0].numel(), x.device) if len(x) else 1
    return (slice(start, start + step) for start in range(0, len(x), step))


def _staged(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A chunk in the layout in which it is solved."""
    return x.to(dtype, memory_format=torch.channels_last if x.device.type == "cpu" else memory_format(x))


@torch.library.impl("ifr_fast::solve", "default")
def _solve(x, params, form, groups, eps, solver, steps, dtype, history_dtype, adjoint, backend, keep):
    rule = decode(solver)
    kernels = backends.kernels(backend, x.device.type, dtype)
    results = solve_results(x, steps, dtype, history_dtype, keep)
    value, residual, iterations, trace, status, history, p, q = results
    block = None
    with torch.autocast(x.device.type, enabled=False):
        for chunk in _chunks(rule, x):
            injection = _staged(x[chunk], wide(dtype))
            block = block.at(injection) if block else Block(injection, params, form, groups, eps, kernels, dtype)
            state = solve(block, torch.zeros_like(injection), rule, kernels)
            value[chunk], residual[chunk], iterations[chunk] = state.value, state.residual, state.iterations
            trace[:, chunk], status[chunk] = state.trace, state.status
            if keep:
                # Rows after a sample's last step were never written.
                written = torch.arange(rule.rows, device=x.device) <= state.iterations.unsqueeze(1)
                history[chunk] = torch.where(written.unsqueeze(2), state.history, 0)
                p[chunk], q[chunk] = state.p, state.q
    return results


@torch.library.impl("ifr_fast::solve_backward", "default")
def _solve_backward(grad, value, x, params, memory, form, groups, eps, dtype, adjoint, backend):
    adjoint = decode(adjoint)
    kernels = backends.kernels(backend, x.device.type, dtype)
    grad_x, residual = torch.empty_like(x), x.new_empty(len(x), dtype=wide(dtype))
    grad_params = [torch.zeros_like(p, dtype=wide(dtype)) for p in params]
    block = None
    with torch.autocast(x.device.type, enabled=False):
        for chunk in _chunks(adjoint.rule.resolve(dtype), x):
            injection, z, g = (_staged(t[chunk], wide(dtype)) for t in (x, value, grad))
            block = block.at(injection) if block else Block(injection, params, form, groups, eps, kernels, dtype)
            if isinstance(adjoint, Phantom):
                chunk_grad_x, grads = adjoint.backward(block, z, g)
                residual[chunk] = torch.inf
            else:
                linearised = block.linearise(z)
                chunk_memory = Memory(*(t[chunk] for t in memory))
                w, residual[chunk] = adjoint.cotangent(linearised.vjp, g, dtype, kernels, chunk_memory)
                chunk_grad_x, grads = linearised.vjp_params(w)
            grad_x[chunk] = chunk_grad_x
            for total, part in zip(grad_params, grads, strict=True):
                total += part
    return grad_x, [g.to(p.dtype) for g, p in zip(grad_params, params, strict=True)], residual
