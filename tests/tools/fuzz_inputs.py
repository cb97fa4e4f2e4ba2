"""Random arguments for fuzz_cases.py: features of any scale and layout, solvers, adjoints."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from ifr_fast import Anderson, Broyden, Implicit, JacobianFree, Phantom, Picard, Shine, Unroll, Unrolled

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "contiguous", "channels_last", "sliced", "sliced channels_last", "transposed", "expanded")


class Draw(random.Random):
    def chance(self, probability: float) -> bool:
        return self.random() < probability

    def power(self, low: float, high: float) -> float:
        """10 to an exponent in [low, high]."""
        return 10 ** self.uniform(low, high)


def random_solver(draw: Draw) -> Any:
    if draw.chance(0.1):
        return Unroll(draw.randint(1, 6))
    cls = draw.choice((Broyden, Broyden, Anderson, Picard))
    return cls(**random_options(draw), **({"m": draw.randint(1, 6)} if cls is Anderson else {}))


def random_adjoint(draw: Draw, solver: Any) -> Any:
    kind = draw.choice((Implicit, Implicit, Phantom, JacobianFree, Unrolled, Shine))
    if kind is Shine and not isinstance(solver, (Broyden, Unroll)):
        kind = Unrolled
    if kind is Phantom:
        return Phantom(draw.randint(1, 5), draw.choice((0.5, 1, draw.uniform(0.01, 1))))
    return kind(**random_options(draw)) if kind is Implicit else kind()


def random_options(draw: Draw) -> dict[str, Any]:
    return dict(
        max_iter=draw.randint(1, 20),
        rtol=draw.choice((None, None, 0, 0.0, draw.power(-6, -1), draw.power(-6, -1))),
        history_dtype=draw.choice(
            (None, None, torch.float32, torch.float64, torch.bfloat16, "bfloat16", "float8_e5m2")
        ),
        workspace=draw.choice((None, None, 1, int(draw.power(2, 6)))),  # small ones make chunks
    )


def random_features(
    draw: Draw, shape: tuple[int, ...], dtype: torch.dtype, ordinary: bool
) -> tuple[Tensor, list[str], str]:
    """Samples of random kinds and scales, in a random layout; the kinds; the layout."""
    x = torch.randn(shape, dtype=torch.float64)
    mixed, wild = (not ordinary and draw.chance(p) for p in (0.5, 0.4))
    together = draw.power(-30, 30) if wild else draw.power(-2, 2)
    kinds = []
    for sample in x:
        kind = draw.choice(("normal", "normal", "flat", "zero", "offset", "nan", "inf", "spike")) if mixed else "normal"
        scale = draw.power(-30, 30) if wild and mixed else together
        kinds.append(f"{kind} {scale:.0e}")
        if kind == "flat" and sample.dim() > 1 and sample.numel():  # constant maps, one value a channel
            sample.copy_(sample.flatten(1)[:, :1].view(-1, *[1] * (sample.dim() - 1)).clone())
        if kind == "offset":
            sample += draw.power(1, 4)
        if kind in ("zero", "spike"):
            sample.zero_()
        sample *= scale
        if kind in ("nan", "inf", "spike") and sample.numel():
            sample.view(-1)[draw.randrange(sample.numel())] = scale if kind == "spike" else float(kind)
    layout = draw.choice(LAYOUTS)
    return laid_out(x.to(dtype), layout), kinds, layout


def laid_out(x: Tensor, layout: str) -> Tensor:
    """x with other strides; "expanded" repeats the first of the first dimension."""
    if "channels_last" in layout and x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    if "sliced" in layout and x.dim() > 0:
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1]), torch.nan)
        wide = (
            wide.contiguous(memory_format=torch.channels_last) if "channels_last" in layout and x.dim() == 4 else wide
        )
        wide[..., ::2] = x
        return wide[..., ::2]
    if layout == "transposed" and x.dim() > 1:
        return x.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "expanded" and x.dim() > 0:
        return x[:1].expand(x.shape)
    return x


def perturb(x: Tensor, noise: float) -> Tensor:
    return x * (1 + noise * (2 * torch.rand_like(x) - 1)) if noise else x
