"""The paper in plain PyTorch: the specification that everything else is tested against.

Ma et al., "Implicit Feature Refinement for Instance Segmentation", ACM Multimedia 2021, and the solver that it takes
from deep equilibrium models (Bai et al., 2019). Any floating dtype, any device. Nothing here is optimised: `broyden` is
the "as released" solver of the benchmarks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice

import torch
import torch.nn.functional as F
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def residual_block(
    z: Tensor, x: Tensor, params: Sequence[Tensor], *, form: str = "released", groups: int = 32, eps: float = 1e-5
) -> Tensor:
    """F(z; X), one evaluation of the weight-tied residual block. Differentiable.

    z, x: (N, C, H, W). params: conv1 (mid, C, 3, 3), gn1 weight and bias (mid,), conv2 (C, mid, 3, 3), gn2 weight
    and bias (C,) and, unless form is "paper", gn3 weight and bias (C,).

    With R = z + X and Y = GN2(conv2(ReLU(GN1(conv1(R))))):
    "paper" (Eq. 5) is Y + R; "released" (the authors' code) is GN3(ReLU(Y + R)); "plain" (Table 8) is GN3(ReLU(Y)).
    """
    conv1, gn1_weight, gn1_bias, conv2, gn2_weight, gn2_bias, *gn3 = params
    r = z + x
    h = F.relu(torch.group_norm(F.conv2d(r, conv1, padding=1), groups, gn1_weight, gn1_bias, eps))
    y = torch.group_norm(F.conv2d(h, conv2, padding=1), groups, gn2_weight, gn2_bias, eps)
    if form == "paper":
        return y + r
    weight, bias = gn3
    return torch.group_norm(F.relu(y + r if form == "released" else y), groups, weight, bias, eps)


def relative_residual(z: Tensor, g: Tensor) -> Tensor:
    """‖f(z) - z‖ / ‖f(z)‖ of each sample, (N,), given g = f(z) - z."""
    return g.flatten(1).norm(dim=1) / (z + g).flatten(1).norm(dim=1).clamp_min(1e-30)


def picard_iterates(f: Map, z0: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (z_k, g_k = f(z_k) - z_k) of the plain iteration z_{k+1} = f(z_k), endlessly. Differentiable."""
    z = z0
    while True:
        g = f(z) - z
        yield z, g
        z = z + g


def broyden_iterates(f: Map, z0: Tensor, *, steps: int, first_sign: float = 1.0) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (z_k, g_k) for k = 0 … steps of "good Broyden" with explicit low-rank factors (Eq. 6 and 7).

    Every step adds one pair of vectors (u, v) of a sample's size to J_k⁻¹ = -I + U Vᵀ. J₀⁻¹ = -I makes the first step
    z₁ = z₀ + g₀. The released code takes z₁ = z₀ - g₀, which first_sign=-1 reproduces. z0: (N, …); samples are
    independent.
    """
    samples, size = z0.shape[0], z0[0].numel()
    u_factors, v_factors = z0.new_zeros(samples, size, steps), z0.new_zeros(samples, steps, size)

    def inverse_jacobian(k: int, right: Tensor) -> Tensor:
        return -right + torch.einsum(
            "ndk,nk->nd", u_factors[..., :k], torch.einsum("nkd,nd->nk", v_factors[:, :k], right)
        )

    def inverse_jacobian_left(k: int, left: Tensor) -> Tensor:
        return -left + torch.einsum(
            "nk,nkd->nd", torch.einsum("nd,ndk->nk", left, u_factors[..., :k]), v_factors[:, :k]
        )

    z, g = z0, f(z0) - z0
    yield z, g
    update = first_sign * g
    for k in range(steps):
        z_next = z + update
        g_next = f(z_next) - z_next
        dz, dg = (z_next - z).reshape(samples, size), (g_next - g).reshape(samples, size)
        z, g = z_next, g_next
        yield z, g
        v = inverse_jacobian_left(k, dz)
        u = (dz - inverse_jacobian(k, dg)) / (v * dg).sum(1, keepdim=True)
        u[u.isnan()], v[v.isnan()] = 0.0, 0.0
        u_factors[..., k], v_factors[:, k] = u, v
        update = -inverse_jacobian(k + 1, g.reshape(samples, size)).reshape(z0.shape)


def anderson_iterates(f: Map, z0: Tensor, *, steps: int, m: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields (z_k, g_k) for k = 0 … steps of Anderson acceleration over the last m residuals (Walker & Ni, 2011).

    z_{k+1} = z_k + g_k - (ΔZ + ΔG) γ with γ = argmin ‖g_k - ΔG γ‖, a least-squares problem for each sample.
    """
    history: list[tuple[Tensor, Tensor]] = []
    z = z0
    for _ in range(steps + 1):
        g = f(z) - z
        yield z, g
        history = [*history, (z.flatten(1), g.flatten(1))][-m:]
        step = g.flatten(1)
        if len(history) > 1:
            rows = [torch.stack(vectors, 2) for vectors in zip(*history, strict=True)]
            dz, dg = (vectors.diff(dim=2) for vectors in rows)
            gamma = torch.linalg.lstsq(dg, step.unsqueeze(2)).solution
            step = step - ((dz + dg) @ gamma).squeeze(2)
        z = z + step.reshape(z.shape)


def broyden(
    f: Map, z0: Tensor, *, steps: int, first_sign: float = 1.0
) -> tuple[Tensor, Tensor, list[tuple[float, float]]]:
    """The solver as published: `steps` Broyden steps, then the iterate whose residual norm *over the whole batch* is
    the smallest. The loop reads that norm on the host in every step, as the released code does.

    Returns that iterate (N, …), its residual g (N, …), and for every evaluation ‖g‖ and ‖z_k - z_{k-1}‖ / ‖z_{k-1}‖.
    """
    lowest, trace = (z0, z0, float("inf")), []
    previous = z0
    for z, g in broyden_iterates(f, z0, steps=steps, first_sign=first_sign):
        norm = g.norm().item()
        trace.append((norm, (z - previous).norm().item() / (previous.norm().item() + 1e-9)))
        if norm < lowest[2]:
            lowest = z.clone(), g.clone(), norm
        previous = z
    return *lowest[:2], trace


def picard(f: Map, z0: Tensor, *, steps: int) -> Tensor:
    """f applied `steps` times: the explicit weight-tied unroll (Table 6). Differentiable."""
    return next(islice(picard_iterates(f, z0), steps, None))[0]


def implicit_gradient(f: Map, z: Tensor, grad: Tensor) -> Tensor:
    """w with wᵀ = wᵀ ∂f/∂z + gradᵀ at the equilibrium z (Eq. 8), by a dense solve: small shapes only.

    The loss's gradient in a parameter θ or in X is then wᵀ ∂f/∂θ or wᵀ ∂f/∂X. z, grad, result: (N, …). Samples of f
    must be independent.
    """
    size = z[0].numel()
    # f treats samples separately, so the Jacobian of the sum over samples holds each sample's own Jacobian.
    jacobian = torch.autograd.functional.jacobian(lambda v: f(v).sum(0), z)
    jacobian = jacobian.reshape(size, z.shape[0], size).permute(1, 0, 2)
    identity = torch.eye(size, dtype=z.dtype, device=z.device)
    return torch.linalg.solve((identity - jacobian).transpose(1, 2), grad.reshape(-1, size)).reshape(z.shape)
