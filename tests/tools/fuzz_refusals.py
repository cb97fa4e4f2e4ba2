"""Calls that must be refused: one argument is wrong, and the ValueError names it."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, Phantom, Picard, Shine, Unroll, fixed_point

HEAD = dict(channels=8, groups=2)
X, Z = torch.ones(2, 8, 3, 3), torch.ones(2, 3)

# By the argument's name: what makes the call, and wrong values for it.
REFUSED: list[tuple[str, Callable, list]] = [
    ("channels", lambda v: IFRHead(v, groups=1), [0, -8, 2.0, True, None, "8"]),
    ("groups", lambda v: IFRHead(8, groups=v), [0, 3, 16, -2, 2.0, None, "2"]),
    ("mid_channels", lambda v: IFRHead(**HEAD, mid_channels=v), [0, 7, -4, 4.0, "4"]),
    ("form", lambda v: IFRHead(**HEAD, form=v), ["", "Released", None, 1]),
    ("post_gain", lambda v: IFRHead(**HEAD, post_gain=v), [float("nan"), float("inf"), None, "1"]),
    ("backend", lambda v: IFRHead(**HEAD, backend=v), ["", "gpu", None, 3, ["cpu"]]),
    ("backend", lambda v: fixed_point(torch.cos, Z, backend=v), ["", "gpu", None, 3, ["cpu"]]),
    ("solver", lambda v: IFRHead(**HEAD, solver=v), [None, 5, "newton", {"type": "x"}, {}, Implicit(), Broyden]),
    ("solver", lambda v: fixed_point(torch.cos, Z, solver=v), [None, 5, "newton", {"type": "x"}, {}, Implicit()]),
    ("adjoint", lambda v: IFRHead(**HEAD, adjoint=v), [None, 5, "newton", {"type": "x"}, {}, Broyden(), Implicit]),
    ("adjoint", lambda v: fixed_point(torch.cos, Z, adjoint=v), [None, 5, "guess", {"type": "x"}, {}, Broyden()]),
    ("adjoint", lambda v: IFRHead(**HEAD, solver=v, adjoint=Shine()), [Picard(), Anderson()]),
    ("adjoint", lambda v: fixed_point(torch.cos, Z, solver=v, adjoint=Shine()), [Picard(), Anderson()]),
    ("max_iter", Broyden, [0, -1, 1.0, None, "3", True, float("nan")]),
    ("max_iter", lambda v: IFRHead(**HEAD, solver=dict(type="Broyden", max_iter=v)), [0, 2.5, "3"]),
    ("max_iter", Implicit, [0, -1, 1.0, "3", True]),
    ("rtol", lambda v: Anderson(rtol=v), [-1e-3, float("nan"), float("inf"), "1", True, 1j]),
    ("history_dtype", lambda v: Picard(history_dtype=v), [torch.int64, torch.float16, "bf16", "nn", 3, ["bfloat16"]]),
    ("workspace", lambda v: Broyden(workspace=v), [0, -5, 1e6, "1", True]),
    ("m", lambda v: Anderson(m=v), [0, -1, 2.0, None]),
    ("steps", Unroll, [0, -1, 2.0, None, True]),
    ("steps", Phantom, [0, -1, 2.0, None, True]),
    ("damping", lambda v: Phantom(damping=v), [0, -0.5, 1.1, float("nan"), None, "1"]),
    ("x", IFRHead(**HEAD), [X[0], X[:, :4], X[..., :0], X.long(), X.to(torch.complex64), X.bool(), X.tolist(), None]),
    ("z0", lambda v: fixed_point(torch.cos, v), [Z.long(), Z[0, 0], Z.to(torch.complex64), Z.tolist(), None, 1.0]),
    ("f", lambda v: fixed_point(v, Z), [None, 3, lambda z: z[:1], lambda z: z.long(), lambda z: None, lambda z: [z]]),
    ("params", lambda v: fixed_point(lambda z, *_: z, Z, params=v), [Z, 3, None]),
]


def random_refusal(draw: random.Random) -> tuple[str, Callable, object]:
    """The argument's name, the call, and the argument."""
    name, call, values = draw.choice(REFUSED)
    return name, call, draw.choice(values)


def unrefused(name: str, call: Callable, value: object) -> str | None:
    """What is wrong about how the call answers; None where it is refused as it should be."""
    words = f"{name}={value!r}"[:80]
    try:
        call(value)
    except ValueError as error:
        return None if name in str(error) else f"{words}: ValueError does not name it: {error}"
    except Exception as error:
        return f"{words}: {type(error).__name__}: {error}"
    return f"{words} is accepted"
