"""Solvers and adjoints as users write them: objects, names, dicts; and what they refuse."""

import pytest
import torch

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Picard, Shine, Unroll, Unrolled
from ifr_fast.config import build, decode, encode
from ifr_fast.solvers import Solver


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("anderson", Anderson()),
        ("Broyden", Broyden()),
        (dict(type="Broyden", max_iter=7), Broyden(max_iter=7)),
        (dict(type="picard", rtol=0.1), Picard(rtol=0.1)),
        (dict(type="Unroll", steps=2), Unroll(2)),
        (dict(type="Broyden", history_dtype="bfloat16"), Broyden(history_dtype=torch.bfloat16)),
        (Broyden(3), Broyden(3)),
    ],
)
def test_solver_specs(spec, expected):
    assert IFRHead(8, groups=2, solver=spec).solver == expected


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("phantom", Phantom()),
        (dict(type="Implicit", max_iter=3), Implicit(3)),
        (dict(type="Implicit", solver="anderson"), Implicit(solver=Anderson())),
        (dict(type="Implicit", solver=dict(type="Picard", max_iter=3)), Implicit(solver=Picard(3))),
        ("JacobianFree", JacobianFree()),
    ],
)
def test_adjoint_specs(spec, expected):
    assert IFRHead(8, groups=2, adjoint=spec).adjoint == expected


@pytest.mark.parametrize(
    "value",
    [
        Broyden(3, 0.5, torch.bfloat16, 99),
        Anderson(m=2),
        Picard(),
        Implicit(rtol=0.0),
        Implicit(solver=Anderson(9, history_dtype="bfloat16", m=3)),
        Phantom(2, 0.3),
        Shine(),
        Unrolled(),
    ],
    ids=lambda v: type(v).__name__,
)
def test_encoded_objects_come_back(value):
    assert decode(encode(value)) == value


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Broyden(max_iter=0), "max_iter=0"),
        (lambda: Broyden(max_iter=2.5), "max_iter=2.5"),
        (lambda: Broyden(rtol=-1.0), "rtol=-1.0"),
        (lambda: Broyden(rtol="tight"), "rtol='tight'"),
        (lambda: Anderson(m=0), "m=0"),
        (lambda: Picard(history_dtype=torch.int8), "history_dtype"),
        (lambda: Broyden(history_dtype="float8"), "float8"),
        (lambda: Broyden(workspace=0), "workspace=0"),
        (lambda: Implicit(max_iter=0), r"Implicit\(max_iter=0"),
        (lambda: Implicit(3, solver=Broyden()), r"Implicit\(solver=…, max_iter=…\)"),
        (lambda: Implicit(solver="newton"), "solver='newton': expected one of Broyden, Anderson, Picard"),
        (lambda: Implicit(solver=Unroll(3)), "solver=Unroll"),
        (lambda: Broyden().chunk(3, 10, torch.device("cpu")), "is not resolved"),
        (lambda: Phantom(steps=0), "steps=0"),
        (lambda: Phantom(damping=0.0), "damping=0.0"),
        (lambda: Unroll(0), "steps=0"),
        (lambda: build("newton", Solver, "solver"), "solver='newton': expected one of Broyden, Anderson, Picard"),
        (lambda: build(dict(type="Broyden", steps=3), Solver, "solver"), "Broyden takes history_dtype, max_iter"),
        (lambda: build(Implicit(), Solver, "solver"), "solver=Implicit"),
        (lambda: build(None, Solver, "solver"), "solver=None"),
    ],
)
def test_refusals_name_the_argument(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize(
    ("compute", "rtol", "history"),
    [
        (torch.float64, 1e-3, torch.float64),
        (torch.float32, 1e-3, torch.float32),
        (torch.bfloat16, 1e-2, torch.bfloat16),
        (torch.float16, 1e-2, torch.bfloat16),
    ],
)
def test_defaults_follow_the_dtype(compute, rtol, history):
    rule = Broyden().resolve(compute)
    assert (rule.rtol, rule.history_dtype) == (rtol, history)
    assert Broyden(rtol=0.0, history_dtype="bfloat16").resolve(compute) == Broyden(
        rtol=0.0, history_dtype=torch.bfloat16
    )
