"""The specification of the kernels, in PyTorch's operators: any device, any floating dtype, any layout."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._torch import conv2d
from .contract import (
    DIVERGENCE,
    EPS,
    RUNNING,
    Convolution,
    Norm,
    State,
    Status,
    Step,
    memory_format,
    memory_order,
    wide,
)
from .gram import anderson_coefficients, broyden_coefficients

CHANNELS_LAST_ONLY = False  # whether the kernels read no other layout
SKIPS_STOPPED = False
BUFFERS = (3, 2)  # z + X, conv2's result and F; conv1's and its activation


def convolution(weight: Tensor, x: Tensor, *, transposed: bool = False) -> Convolution:
    weight = direct_weight(weight, x, transposed)
    return lambda x: conv2d(x, weight)


def direct_weight(weight: Tensor, x: Tensor, transposed: bool) -> Tensor:
    """The weight in x's layout; transposed: that of the convolution's gradient in its input."""
    if transposed:
        weight = weight.transpose(0, 1).flip(2, 3)
    return weight.contiguous(memory_format=memory_format(x))


def shift(z: Tensor, x: Tensor, dtype: torch.dtype, state: State | None) -> Tensor:
    return (z + x).to(dtype)


def norm_relu(
    y: Tensor, norm: Norm, *, consume: bool = False, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    out, *statistics = _group_norm(y.to(wide(y.dtype)), norm)
    return out.relu_().to(y.dtype), statistics


def norm_relu_vjp(
    grad: Tensor, y: Tensor, norm: Norm, statistics: list[Tensor], *, params: bool, state: State | None = None
) -> tuple[Tensor, list[Tensor]]:
    wide_y = y.to(wide(y.dtype))
    masked = torch.where(_affine(wide_y, norm, statistics) > 0, grad.to(wide_y.dtype), 0)
    grad_y, *grads = _group_norm_vjp(masked, wide_y, norm, statistics, params)
    return grad_y.to(y.dtype), grads


def norm_tail(
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    *,
    consume: bool = False,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    u, *statistics = _group_norm(y.to(wide(y.dtype)), first)
    if shortcut is not None:
        u = u + shortcut
    if second is None:
        return u, statistics
    out, *more = _group_norm(u.relu_(), second)
    return out, [*statistics, *more]


def norm_tail_vjp(
    grad: Tensor,
    y: Tensor,
    shortcut: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    wide_y = y.to(wide(y.dtype))
    grads: list[Tensor] = []
    if second is not None:
        u = _affine(wide_y, first, statistics[:2])
        if shortcut is not None:
            u = u + shortcut
        positive = u > 0
        grad, *grads = _group_norm_vjp(grad, u.relu_(), second, statistics[2:], params)
        grad = torch.where(positive, grad, 0)
    grad_y, *first_grads = _group_norm_vjp(grad, wide_y, first, statistics[:2], params)
    return grad_y.to(y.dtype), None if shortcut is None else grad, [*first_grads, *grads]


def tail(y: Tensor, shortcut: Tensor | None, first: Norm, second: Norm | None, *, state: State | None = None) -> Tensor:
    return norm_tail(y, shortcut, first, second, consume=True)[0]


def total(*addends: Tensor) -> Tensor:
    return sum(addends[1:], addends[0])


def new_state(z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype, from_zero: bool) -> State:
    return State(z, rows=rows, evaluations=evaluations, history_dtype=history_dtype)


def step(state: State, f: Tensor, z: Tensor, step: Step) -> int | None:
    row = step.row(state)
    gram_row(state, f, z, row=row, first=max(0, row - step.window + 1))
    running = assess(state, step)
    if not step.last and running != 0:
        if step.method == "broyden":
            broyden(state, row)
        elif step.method == "anderson":
            anderson(state, row, step.window)
        else:
            picard(state, row)
    combine(state, z, count=row + 1, advance=not step.last)
    return running


def finish(state: State, z: Tensor) -> None:
    """Does nothing: every step keeps state.value up to date."""


def gram_row(state: State, f: Tensor, z: Tensor, *, row: int, first: int) -> None:
    """Stores g = f - z as the history's row `row`, its inner products with rows first … row, and the norms of g and f.

    If row < 0, only the norms. The inner products are of the stored (rounded) residuals. A row in 8 bits takes its
    scale from the residual before: on a GPU its own norm is known only when it is written.
    """
    before = state.norms[:, 0].clone()
    g = (f - z).permute(*memory_order(z)).reshape(state.n, state.size)
    state.norms[:, 0] = g.to(state.norms.dtype).square().sum(1)
    state.norms[:, 1] = f.to(state.norms.dtype).square().reshape(state.n, state.size).sum(1)
    if row < 0:
        return
    if state.scales is not None:
        scale = row_scale(torch.where(before > 0, before, state.norms[:, 0]), state.size, state.scales.dtype)
        state.scales[:, row] = scale
        largest = torch.finfo(state.history.dtype).max
        g = (g / scale.unsqueeze(1)).clamp(-largest, largest)
    state.history[:, row] = g
    g = stored(state, row).to(state.gram.dtype)
    for j in range(first, row + 1):
        state.gram[:, row, j] = state.gram[:, j, row] = (g * stored(state, j)).sum(1)


def stored(state: State, j: int) -> Tensor:
    """Residual j (n, size) as the history has it."""
    row = state.history[:, j]
    return row if state.scales is None else row.to(state.scales.dtype) * state.scales[:, j : j + 1]


def row_scale(squares: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """(n,) the power of two below the root mean square, from the squares' sums; 1 where that is 0 or not finite."""
    rms = (squares / size).sqrt()
    scale = power_of_2(torch.frexp(rms).exponent - 1, dtype)
    return torch.where(rms.isfinite() & (rms > 0), scale, 1)


def power_of_2(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2 to the integers `exponent`, kept where it and its inverse are normal numbers of dtype."""
    limit = int(math.log2(torch.finfo(dtype).max)) - 1
    return torch.ldexp(torch.ones_like(exponent, dtype=dtype), exponent.clamp(-limit, limit))


def assess(state: State, step: Step) -> int | None:
    """Computes every running sample's relative residual, and updates what follows from it: the state's improved,
    residual, status, iterations and trace.

    Returns how many samples still run, or None on a GPU, where counting would cost a synchronisation.
    """
    running = state.status == RUNNING
    g, f = state.norms[:, 0].sqrt(), state.norms[:, 1].sqrt()
    if step.evaluation == 0:
        state.norms[:, 2] = g
    relative = relative_residual(g, state.norms[:, 2] if step.affine else f, state.residual.dtype)
    state.trace[step.evaluation] = torch.where(running, relative, state.trace[max(step.evaluation - 1, 0)])
    state.iterations.masked_fill_(running, step.evaluation)
    finite = relative.isfinite()
    state.improved.copy_(running & finite & (relative < state.residual))
    state.residual.copy_(torch.where(state.improved, relative, state.residual))
    code = torch.where(g > DIVERGENCE * state.norms[:, 2], Status.DIVERGED, RUNNING)
    code = torch.where(relative <= step.rtol, Status.CONVERGED, code)
    code = torch.where(finite, code, Status.NONFINITE)
    state.status.copy_(torch.where(running, code, state.status))
    return int((state.status == RUNNING).sum()) if state.status.device.type == "cpu" else None


def relative_residual(g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """g / scale of norms (n,), in dtype. 0 if g is zero; dtype's largest number if the quotient is larger; NaN if a
    norm is not finite."""
    quotient = (g / scale).nan_to_num(0.0).clamp(max=torch.finfo(dtype).max).to(dtype)  # 0 / 0 is NaN
    return torch.where(g.isfinite() & scale.isfinite(), quotient, torch.nan)


def broyden(state: State, k: int) -> None:
    """Broyden's step after residual k. Its pair (p, q) joins the state."""
    pair, step = broyden_coefficients(state.gram, state.p, state.q, state.step, k)
    if pair is not None:
        running = (state.status == RUNNING).unsqueeze(1)
        state.p[:, k - 1], state.q[:, k - 1] = (torch.where(running, new, 0) for new in pair)
    state.step.copy_(step)


def anderson(state: State, k: int, m: int) -> None:
    """Anderson's step after residual k, over the last m residuals. state.p keeps the past steps."""
    if k > 0:
        state.p[:, k - 1] = state.step
    state.step.copy_(anderson_coefficients(state.gram, state.p, k, m))


def picard(state: State, row: int) -> None:
    """The plain step: z moves by g."""
    state.step.zero_()
    state.step[:, row] = 1


def combine(state: State, z: Tensor, *, count: int, advance: bool) -> None:
    """Keeps z where it is the best iterate. With advance, then moves running samples: z += Σ_{j < count} step_j g_j."""
    shape = (-1,) + (1,) * (z.dim() - 1)
    state.value.copy_(torch.where(state.improved.view(shape), z, state.value))
    if not advance:
        return
    update = torch.zeros(state.n, state.size, dtype=z.dtype, device=z.device)
    for j in range(count):
        update += state.step[:, j : j + 1].to(z.dtype) * stored(state, j)
    order = memory_order(z)
    update = update.view(z.permute(*order).shape).permute(*(order.index(d) for d in range(z.dim())))
    z.copy_(torch.where((state.status == RUNNING).view(shape), z + update, z))


def _per_channel(statistic: Tensor, channels: int) -> Tensor:
    return statistic.repeat_interleave(channels // statistic.shape[1], 1)[:, :, None, None]


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _per_channel(mean, x.shape[1])) * _per_channel(rstd, x.shape[1])


def _affine(x: Tensor, norm: Norm, statistics: list[Tensor]) -> Tensor:
    return _normalised(x, *statistics) * norm.weight[:, None, None] + norm.bias[:, None, None]


def _group_norm(x: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
    # Squares of float32 overflow above 1e19. Double precision costs little on a CPU.
    summed = x.double() if x.device.type == "cpu" else x
    summed = summed.unflatten(1, (norm.groups, -1))
    mean = summed.mean((2, 3, 4), keepdim=True)
    variance = (summed - mean).square().mean((2, 3, 4))
    mean, rstd = mean.view_as(variance).to(x.dtype), (variance + EPS).rsqrt().to(x.dtype)
    return _affine(x, norm, [mean, rstd]), mean, rstd


def _group_norm_vjp(grad: Tensor, x: Tensor, norm: Norm, statistics: list[Tensor], params: bool) -> list[Tensor]:
    x_hat = _normalised(x, *statistics)
    weighted = grad * norm.weight[:, None, None]
    groups = (norm.groups, -1)
    average = _per_channel(weighted.unflatten(1, groups).mean((2, 3, 4)), x.shape[1])
    slope = _per_channel((weighted * x_hat).unflatten(1, groups).mean((2, 3, 4)), x.shape[1])
    grad_x = (weighted - average - x_hat * slope) * _per_channel(statistics[1], x.shape[1])
    return [grad_x, (grad * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))] if params else [grad_x]
