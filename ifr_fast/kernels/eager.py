"""The kernels in PyTorch's own operators: what `backend="reference"` runs, and what the other backends must match.

Activations are (N, C, H, W) in either memory format; affine parameters (C,) and statistics (N, groups) are float32, or
float64 with float64 activations. A norm is the pair (weight, bias).

Two arguments help GPU kernels and are of no use here. state: samples that have stopped may be skipped, what stands for
them in the result is undefined. partial: the GroupNorm sums of y that its convolution made on the way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .._torch import conv2d
from .contract import RUNNING, Convolution, Norm, State, memory_order, ridge, wide
from .gram import anderson_coefficients, broyden_coefficients

CHANNELS_LAST_ONLY = False  # do the kernels read no other layout?


def convolution(weight: Tensor, x: Tensor) -> Convolution:
    """The 3×3 convolution of padding 1 by `weight`, ready for many tensors of x's size (N, ·, H, W). Called with a
    tensor and a state it gives y, and the partial sums of its GroupNorm where it makes them."""
    return lambda x, state=None: (conv2d(x, weight), None)


def shift(z: Tensor, x: Tensor, dtype: torch.dtype, state: State | None) -> Tensor:
    """z + x in dtype: what F's first convolution reads."""
    return (z + x).to(dtype)


def norm_relu(
    y: Tensor,
    norm: Norm,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """relu(gn(y)), of y's dtype, and the statistics mean, rstd. consume: the result may take y's memory."""
    out, mean, rstd = _group_norm(y.to(wide(y.dtype)), norm, groups, eps)
    return out.relu_().to(y.dtype), mean, rstd


def norm_relu_vjp(
    grad: Tensor,
    y: Tensor,
    norm: Norm,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    eps: float,
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The gradient of y, and with params those of weight and bias, given that of norm_relu's output."""
    wide_y = y.to(wide(y.dtype))
    masked = torch.where(_affine(wide_y, norm, mean, rstd) > 0, grad.to(wide_y.dtype), 0)
    grad_y, *grads = _group_norm_vjp(masked, wide_y, norm, mean, rstd, groups, params)
    return grad_y.to(y.dtype), grads


def norm_tail(
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    groups: int,
    eps: float,
    *,
    consume: bool = False,
    partial: Tensor | None = None,
    state: State | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """The end of the block, in the wide dtype, and its statistics: u = gn_first(y) + r (no r: gn_first(y)), then
    gn_second(relu(u)) where there is a second norm. consume: the result may take y's memory."""
    u, mean, rstd = _group_norm(y.to(wide(y.dtype)), first, groups, eps)
    if r is not None:
        u = u + r
    if second is None:
        return u, [mean, rstd]
    out, *statistics = _group_norm(u.relu_(), second, groups, eps)
    return out, [mean, rstd, *statistics]


def norm_tail_vjp(
    grad: Tensor,
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    statistics: list[Tensor],
    groups: int,
    eps: float,
    *,
    params: bool,
    state: State | None = None,
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Gradients of y (its dtype) and r (wide dtype; None without r), and with params those of the norms' weights and
    biases, given that of norm_tail's output."""
    wide_y = y.to(wide(y.dtype))
    grads: list[Tensor] = []
    if second is not None:
        u = _affine(wide_y, first, *statistics[:2])
        if r is not None:
            u = u + r
        positive = u > 0
        grad, *grads = _group_norm_vjp(grad, u.relu_(), second, *statistics[2:], groups, params)
        grad = torch.where(positive, grad, 0)
    grad_y, *first_grads = _group_norm_vjp(grad, wide_y, first, *statistics[:2], groups, params)
    return grad_y.to(y.dtype), None if r is None else grad, [*first_grads, *grads]


def tail(
    y: Tensor,
    r: Tensor | None,
    first: Norm,
    second: Norm | None,
    groups: int,
    eps: float,
    *,
    partial: Tensor | None = None,
    state: State | None = None,
) -> Tensor:
    """norm_tail's result, for `step` alone: a backend may leave its computation to the step."""
    return norm_tail(y, r, first, second, groups, eps, consume=True)[0]


def total(*addends: Tensor) -> Tensor:
    """The sum, for `step` alone: a backend may leave it to the step."""
    return sum(addends[1:], addends[0])


def new_state(z: Tensor, *, rows: int, evaluations: int, history_dtype: torch.dtype, from_zero: bool) -> State:
    """from_zero: z is zero everywhere."""
    return State(z, rows=rows, evaluations=evaluations, history_dtype=history_dtype)


def step(
    state: State,
    f: Tensor,
    z: Tensor,
    *,
    method: str,
    window: int,
    evaluation: int,
    last: bool,
    rtol: float,
    divergence: float,
    affine: bool = False,
) -> int | None:
    """What follows an evaluation f = F(z): the residual joins the history, every running sample is judged, the method
    ("broyden", "anderson" or "picard") chooses its step, and z moves, in place. last: judged only.

    window: how many residuals back the method takes inner products. The other numbers and the result are assess()'s.
    """
    row = -1 if last else evaluation % state.rows
    gram_row(state, f, z, row=row, first=max(0, row - window + 1))
    running = assess(state, evaluation, rtol, divergence, affine)
    if not last and running != 0:
        if method == "broyden":
            broyden(state, row)
        elif method == "anderson":
            anderson(state, row, window, ridge(state.gram.dtype))
        else:
            picard(state, row)
    combine(state, z, count=row + 1, advance=not last)
    return running


def finish(state: State, z: Tensor) -> None:
    """Sees to state.value after the last step; here every step does."""


def gram_row(state: State, f: Tensor, z: Tensor, *, row: int, first: int) -> None:
    """Stores g = f - z as the history's row `row`, with its inner products with the rows first … row; norms.

    row < 0 takes the norms only. The products are of the stored (rounded) residuals.
    """
    g = (f - z).permute(*memory_order(z)).reshape(state.n, state.size)
    state.norms[:, 0] = g.to(state.norms.dtype).square().sum(1)
    state.norms[:, 1] = f.to(state.norms.dtype).square().reshape(state.n, state.size).sum(1)
    if row < 0:
        return
    state.history[:, row] = g
    g = state.history[:, row].to(state.gram.dtype)
    for j in range(first, row + 1):
        state.gram[:, row, j] = state.gram[:, j, row] = (g * state.history[:, j]).sum(1)


def assess(state: State, evaluation: int, rtol: float, divergence: float, affine: bool) -> int | None:
    """The relative residual of every running sample, and what follows from it: best, status, iterations, trace.

    It is ‖g‖ / ‖f‖; affine: ‖g‖ / ‖g₀‖; as relative_residual() gives it.
    Codes as solve.Status: 0 converged, 2 diverged (‖g‖ > divergence · ‖g₀‖), 3 not finite. Returns how many samples
    still run, or None on a device, where that would cost a synchronisation.
    """
    running = state.status == RUNNING
    g, f = state.norms[:, 0].sqrt(), state.norms[:, 1].sqrt()
    if evaluation == 0:
        state.norms[:, 2] = g
    relative = relative_residual(g, state.norms[:, 2] if affine else f, state.residual.dtype)
    state.trace[evaluation] = torch.where(running, relative, state.trace[max(evaluation - 1, 0)])
    state.iterations.masked_fill_(running, evaluation)
    finite = relative.isfinite()
    state.improved.copy_(running & finite & (relative < state.residual))
    state.residual.copy_(torch.where(state.improved, relative, state.residual))
    code = torch.where(g > divergence * state.norms[:, 2], 2, RUNNING)
    code = torch.where(relative <= rtol, 0, code)
    code = torch.where(finite, code, 3)
    state.status.copy_(torch.where(running, code, state.status))
    return int((state.status == RUNNING).sum()) if state.status.device.type == "cpu" else None


def relative_residual(g: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """g / scale of norms (n,), in dtype: 0 where g is zero, dtype's largest number where the quotient is larger, NaN
    where a norm is not finite."""
    quotient = (g / scale).nan_to_num(0.0).clamp(max=torch.finfo(dtype).max).to(dtype)  # 0 / 0 is NaN
    return torch.where(g.isfinite() & scale.isfinite(), quotient, torch.nan)


def broyden(state: State, k: int) -> None:
    """The step after residual k, by Broyden's method; its pair (p, q) joins the state."""
    p, q, step = broyden_coefficients(state.gram, state.p, state.q, state.step, k)
    if k > 0:
        running = (state.status == RUNNING).unsqueeze(1)
        state.p[:, k - 1], state.q[:, k - 1] = torch.where(running, p, 0), torch.where(running, q, 0)
    state.step.copy_(step)


def anderson(state: State, k: int, m: int, ridge: float) -> None:
    """The step after residual k, by Anderson acceleration over the last m residuals; past steps stay in state.p."""
    if k > 0:
        state.p[:, k - 1] = state.step
    state.step.copy_(anderson_coefficients(state.gram, state.p, k, m, ridge))


def picard(state: State, row: int) -> None:
    """The plain step z + g."""
    state.step.zero_()
    state.step[:, row] = 1


def combine(state: State, z: Tensor, *, count: int, advance: bool) -> None:
    """Keeps z where it is the best so far, then (advance) moves running samples: z += Σ_j step_j g_j, j < count."""
    shape = (-1,) + (1,) * (z.dim() - 1)
    state.value.copy_(torch.where(state.improved.view(shape), z, state.value))
    if not advance:
        return
    update = torch.zeros(state.n, state.size, dtype=z.dtype, device=z.device)
    for j in range(count):
        update += state.step[:, j : j + 1].to(z.dtype) * state.history[:, j]
    order = memory_order(z)
    update = update.view(z.permute(*order).shape).permute(*(order.index(d) for d in range(z.dim())))
    z.copy_(torch.where((state.status == RUNNING).view(shape), z + update, z))


def _per_channel(statistic: Tensor, channels: int) -> Tensor:
    return statistic.repeat_interleave(channels // statistic.shape[1], 1)[:, :, None, None]


def _normalised(x: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    return (x - _per_channel(mean, x.shape[1])) * _per_channel(rstd, x.shape[1])


def _affine(x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor) -> Tensor:
    return _normalised(x, mean, rstd) * norm[0][:, None, None] + norm[1][:, None, None]


def _group_norm(x: Tensor, norm: Norm, groups: int, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    # Squares of float32 overflow above 1e19: double precision on a CPU, where it costs little.
    summed = x.double() if x.device.type == "cpu" else x
    summed = summed.unflatten(1, (groups, -1))
    mean = summed.mean((2, 3, 4), keepdim=True)
    variance = (summed - mean).square().mean((2, 3, 4))
    mean, rstd = mean.view_as(variance).to(x.dtype), (variance + eps).rsqrt().to(x.dtype)
    return _affine(x, norm, mean, rstd), mean, rstd


def _group_norm_vjp(
    grad: Tensor, x: Tensor, norm: Norm, mean: Tensor, rstd: Tensor, groups: int, params: bool
) -> list[Tensor]:
    x_hat = _normalised(x, mean, rstd)
    weighted = grad * norm[0][:, None, None]
    average = _per_channel(weighted.unflatten(1, (groups, -1)).mean((2, 3, 4)), x.shape[1])
    slope = _per_channel((weighted * x_hat).unflatten(1, (groups, -1)).mean((2, 3, 4)), x.shape[1])
    grad_x = (weighted - average - x_hat * slope) * _per_channel(rstd, x.shape[1])
    return [grad_x, (grad * x_hat).sum((0, 2, 3)), grad.sum((0, 2, 3))] if params else [grad_x]
