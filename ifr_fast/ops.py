"""The registered torch ops: schemas, fakes, autograd. Nothing computes here.

norm_relu and norm_tail go straight to a backend's kernels; solve and solve_backward, one op for a whole solve, are
implemented in equilibrium.py. What is asked of these travels as one string (call.Call): a dtype of its own would be
another number by the time that AOTInductor hands it over.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.flop_counter import flop_registry, register_flop_formula

from . import backend as backends
from .adjoint import Implicit, Phantom
from .call import Call
from .kernels import is_channels_last, memory_format, plain
from .kernels.plain import wide

torch.library.define(
    "ifr_fast::norm_relu",
    "(Tensor y, Tensor weight, Tensor bias, int groups, float eps, str backend) -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ifr_fast::norm_relu_vjp",
    "(Tensor grad, Tensor y, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor)",
)
torch.library.define(
    "ifr_fast::norm_tail",
    "(Tensor y, Tensor? r, Tensor[] norms, int groups, float eps, str backend) -> (Tensor, Tensor[])",
)
torch.library.define(
    "ifr_fast::norm_tail_vjp",
    "(Tensor grad, Tensor y, Tensor? r, Tensor[] norms, Tensor[] statistics, int groups, float eps, str backend)"
    " -> (Tensor, Tensor, Tensor[])",
)
torch.library.define(
    "ifr_fast::solve",
    "(Tensor x, Tensor[] params, str call)"
    " -> (Tensor value, Tensor residual, Tensor iterations, Tensor trace, Tensor status,"
    " Tensor history, Tensor p, Tensor q)",
)
torch.library.define(
    "ifr_fast::solve_backward",
    "(Tensor grad, Tensor value, Tensor x, Tensor[] params, Tensor[] memory, str call)"
    " -> (Tensor grad_x, Tensor[] grad_params, Tensor residual, Tensor iterations)",
)


def _kernels(backend: str, y: Tensor) -> ModuleType:
    kernels = backends.kernels(backend, y.device.type, y.dtype)
    # A layout that the caller did not choose would be a copy that the caller did not ask for.
    return plain if kernels.CHANNELS_LAST_ONLY and not is_channels_last(y) else kernels


def check_devices(x: Tensor, others: Sequence[Tensor]) -> None:
    """ValueError where a tensor is not on x's device. An op with any argument on the meta device runs its fake, whose
    results are uninitialised memory on the devices of the others."""
    for tensor in others:
        if tensor.device != x.device:
            raise ValueError(f"got tensors on {tensor.device} and {x.device}: expected all on one device")


def _pairs(norms: list[Tensor]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None]:
    return (norms[0], norms[1]), (norms[2], norms[3]) if len(norms) == 4 else None


@torch.library.impl("ifr_fast::norm_relu", "default")
def _(y, weight, bias, groups, eps, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_relu(y, (weight, bias), groups, eps)


@torch.library.register_fake("ifr_fast::norm_relu")
def _(y, weight, bias, groups, eps, backend):
    check_devices(y, [weight, bias])
    statistics = y.new_empty(y.shape[0], groups, dtype=wide(y.dtype))
    return torch.empty_like(y), statistics, torch.empty_like(statistics)


@torch.library.impl("ifr_fast::norm_relu_vjp", "default")
def _(grad, y, weight, bias, mean, rstd, groups, eps, backend):
    with torch.cuda.device_of(y):
        kernels = _kernels(backend, y)
        grad_y, grads = kernels.norm_relu_vjp(grad, y, (weight, bias), mean, rstd, groups, eps, params=True)
    return grad_y, *grads


@torch.library.register_fake("ifr_fast::norm_relu_vjp")
def _(grad, y, weight, bias, mean, rstd, groups, eps, backend):
    check_devices(y, [grad, weight, bias, mean, rstd])
    return torch.empty_like(y), torch.empty_like(weight), torch.empty_like(bias)


@torch.library.impl("ifr_fast::norm_tail", "default")
def _(y, r, norms, groups, eps, backend):
    with torch.cuda.device_of(y):
        return _kernels(backend, y).norm_tail(y, r, *_pairs(norms), groups, eps)


@torch.library.register_fake("ifr_fast::norm_tail")
def _(y, r, norms, groups, eps, backend):
    check_devices(y, norms if r is None else [r, *norms])
    statistics = [y.new_empty(y.shape[0], groups, dtype=wide(y.dtype)) for _ in norms]
    return torch.empty_like(y, dtype=wide(y.dtype)), statistics


@torch.library.impl("ifr_fast::norm_tail_vjp", "default")
def _(grad, y, r, norms, statistics, groups, eps, backend):
    with torch.cuda.device_of(y):
        grad_y, grad_r, grads = _kernels(backend, y).norm_tail_vjp(
            grad, y, r, *_pairs(norms), statistics, groups, eps, params=True
        )
    # An op's results may not share memory with its arguments or each other.
    grad_r = grad.new_empty(0) if grad_r is None else grad_r.clone() if grad_r is grad else grad_r
    return grad_y, grad_r, grads


@torch.library.register_fake("ifr_fast::norm_tail_vjp")
def _(grad, y, r, norms, statistics, groups, eps, backend):
    check_devices(y, [grad, *([] if r is None else [r]), *norms, *statistics])
    like = torch.empty_like(y, dtype=wide(y.dtype))
    return torch.empty_like(y), grad.new_empty(0) if r is None else like, [torch.empty_like(n) for n in norms]


def _norm_relu_context(ctx, inputs, output):
    y, weight, bias, *ctx.options = inputs
    ctx.save_for_backward(y, weight, bias, *output[1:])


def _norm_relu_backward(ctx, grad, *_):
    grads = torch.ops.ifr_fast.norm_relu_vjp(grad, *ctx.saved_tensors, *ctx.options)
    return *grads, None, None, None


def _norm_tail_context(ctx, inputs, output):
    y, r, norms, *ctx.options = inputs
    ctx.count, ctx.residual = len(norms), r is not None
    ctx.save_for_backward(y, *([r] if ctx.residual else []), *norms, *output[1])


def _norm_tail_backward(ctx, grad, *_):
    y, *rest = ctx.saved_tensors
    r = rest.pop(0) if ctx.residual else None
    norms, statistics = rest[: ctx.count], rest[ctx.count :]
    grad_y, grad_r, grads = torch.ops.ifr_fast.norm_tail_vjp(grad, y, r, norms, statistics, *ctx.options)
    return grad_y, None if r is None else grad_r.to(r.dtype), grads, None, None, None


torch.library.register_autograd("ifr_fast::norm_relu", _norm_relu_backward, setup_context=_norm_relu_context)
torch.library.register_autograd("ifr_fast::norm_tail", _norm_tail_backward, setup_context=_norm_tail_context)


def solve_results(x: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Empty results of the op `solve`, in its schema's order; the last three have no elements unless call.keep."""
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


@torch.library.register_fake("ifr_fast::solve")
def _(x, params, call):
    check_devices(x, params)
    return solve_results(x, Call.decode(call))


@torch.library.register_fake("ifr_fast::solve_backward")
def _(grad, value, x, params, memory, call):
    check_devices(x, [grad, value, *params, *memory])
    n, state = x.shape[0], wide(Call.decode(call).dtype)
    residual, iterations = x.new_empty(n, dtype=state), x.new_empty(n, dtype=torch.int64)
    grad_x = torch.empty_like(x, memory_format=memory_format(x))
    return grad_x, [torch.empty_like(p) for p in params], residual, iterations


def _solve_context(ctx, inputs, output):
    x, params, ctx.call = inputs
    ctx.count = len(params)
    ctx.save_for_backward(output[0], x, *params, *output[5:])
    ctx.set_materialize_grads(False)


def _solve_backward(ctx, grad, *_):
    value, x, *rest = ctx.saved_tensors
    if grad is None:
        return None, [None] * ctx.count, None
    params, memory = rest[: ctx.count], rest[ctx.count :]
    grad_x, grad_params, *_ = torch.ops.ifr_fast.solve_backward(grad, value, x, params, memory, ctx.call)
    return grad_x, grad_params, None


torch.library.register_autograd("ifr_fast::solve", _solve_backward, setup_context=_solve_context)


def _once(ctx, *_):
    raise RuntimeError("IFRHead is differentiable once: its gradient has no gradient")


for _op in ("norm_relu_vjp", "norm_tail_vjp", "solve_backward"):
    torch.library.register_autograd(f"ifr_fast::{_op}", _once)


# What torch.utils.flop_counter counts. A sample that has stopped costs no more; where nothing was computed (FakeTensor,
# meta), each takes all steps.


if torch.ops.aten.mkldnn_convolution not in flop_registry:  # an unroll's, on a CPU (_torch.conv2d)

    @register_flop_formula(torch.ops.aten.mkldnn_convolution)
    def _(x_shape, weight_shape, *_, out_shape, **__):
        return 2 * math.prod(weight_shape) * x_shape[0] * math.prod(out_shape[2:])


@register_flop_formula(torch.ops.ifr_fast.solve, get_raw=True)
def _(x, params, call, out_val):
    return _block_flops(x, params) * (x.shape[0] + _steps(out_val[2], Call.decode(call).solver.max_iter))


@register_flop_formula(torch.ops.ifr_fast.solve_backward, get_raw=True)
def _(grad, value, x, params, memory, call, out_val):
    adjoint = Call.decode(call).adjoint
    # F, its gradients in the input, and in the parameters; Implicit's first product is with zero.
    passes = 3 * x.shape[0] * (adjoint.steps if isinstance(adjoint, Phantom) else 1)
    if isinstance(adjoint, Implicit):
        passes += _steps(out_val[3], adjoint.max_iter)
    return _block_flops(x, params) * passes


def _block_flops(x: Tensor, params: Sequence[Tensor]) -> int:
    """Of F's two convolutions for one sample, a multiplication and an addition counted as two."""
    return 2 * (params[0].numel() + params[3].numel()) * x.shape[2] * x.shape[3]


def _steps(iterations: Tensor, most: int) -> int:
    """Steps of all samples together."""
    unknown = isinstance(iterations, FakeTensor) or iterations.is_meta
    return most * len(iterations) if unknown else int(iterations.sum())
