"""benchmarks/analysis/convergence.py: its figures against the specification, its resumption, its report."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.analysis import convergence
from benchmarks.analysis.convergence import PRECISIONS, Equation, iterate, limit, solves
from benchmarks.report import results_page
from benchmarks.report.convergence_report import PAPER_BOUND, STEADY, moving
from benchmarks.report.files import DataError
from ifr_fast import Unroll, reference

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]
FEW = ["--rows", "IFR", "--objects", "2", "--object-steps", "60", "--rois", "2"]
BRIEF = [*FEW, "--steps", "120", "--solver-steps", "3", "12", "--device", "cpu"]


@pytest.fixture
def contraction(make_head):
    """A head whose plain iteration converges, and its X, for two RoIs."""
    return make_head(16, post_gain=0.2), torch.randn(2, 16, 5, 5)


@pytest.fixture
def given_problem(monkeypatch):
    """Let the benchmark study a head and X that no sweep has trained."""
    return lambda *problem: monkeypatch.setattr(convergence, "problem", lambda options, row: problem)


@torch.no_grad()
def test_the_plain_iteration_is_the_specifications(contraction):
    head, x = contraction
    state = iterate(Equation.make(head, x, "float64"), 120)
    params = [p.double() for p in head.double().block.tensors()]
    z, steps = torch.zeros_like(x, dtype=torch.float64), []
    for _ in range(120):
        previous, z = z, reference.residual_block(z, x.double(), params, groups=4)
        steps.append((z - previous).flatten(1).norm(dim=1))
    torch.testing.assert_close(state["z"], z, rtol=0, atol=1e-12)
    assert state["steps"] == [*range(1, 101), 105, 110, 115, 120]
    expected = torch.stack(steps)[[step - 1 for step in state["steps"]]]
    torch.testing.assert_close(torch.tensor(state["norm"]).double(), expected, rtol=1e-5, atol=1e-12)
    assert list(state["iterates"]) == [1, 10, 100]


@torch.no_grad()
def test_the_radius_is_the_jacobians(make_head, seed):
    head, x = make_head(8, groups=2, post_gain=0.5), torch.randn(2, 8, 4, 4)
    equation = Equation.make(head, x, "float64")
    z = torch.randn_like(equation.x)
    found = convergence.power_iteration(equation.product(z), convergence.random_like(z, seed))
    for roi in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, roi=roi: replace(equation, x=equation.x[roi : roi + 1])(v), z[roi : roi + 1]
        ).reshape(128, 128)
        assert found[roi].item() == pytest.approx(torch.linalg.eigvals(jacobian).abs().max().item(), rel=0.03)


@torch.no_grad()
def test_each_precision_reaches_the_limit_to_its_floor(contraction):
    exact = Equation.make(*contraction, "float64")
    h = torch.zeros_like(exact.x)
    for _ in range(400):
        h = exact(h)
    floors, residuals = {}, {}
    for precision in PRECISIONS:
        equation = Equation.make(*contraction, precision)
        residuals[precision] = equation.residual(h.to(equation.x.dtype)).max().item()
        entries = solves(equation, [2, 40], h)
        assert [(e["solver"], e["steps"]) for e in entries[:2]] == [("Broyden", 2), ("Broyden", 40)]
        for few, many in zip(entries[::2], entries[1::2], strict=True):
            assert "trace" not in few
            assert len(many["trace"]) == 41
            assert max(many["relative_distance"]) < min(few["relative_distance"])
        floors[precision] = max(max(e["relative_distance"]) for e in entries[1:4:2])  # of Broyden and Anderson
        relative = [d / n for d, n in zip(entries[1]["distance"], convergence.norms(h).tolist(), strict=True)]
        assert relative == pytest.approx(entries[1]["relative_distance"])
    assert residuals["float64"] < 1e-13 < residuals["float32"] < 1e-5 < residuals["bfloat16"]
    assert floors["float64"] < 1e-11 < floors["float32"] < 1e-5 < floors["bfloat16"] < PAPER_BOUND * 30


@torch.no_grad()
def test_the_limit_is_an_equilibrium_even_where_the_iteration_has_not_converged(contraction):
    equation = Equation.make(*contraction, "float64")
    far = equation(torch.zeros_like(equation.x))
    h, found_by = limit(equation, far)
    assert found_by == ["Broyden", "Broyden"]
    assert equation.residual(h).max() < 2e-13
    mixed = torch.stack([h[0], far[1]])
    again, found_by = limit(equation, mixed)
    assert found_by == ["plain iteration", "Broyden"]
    assert torch.equal(again[0], h[0])
    torch.testing.assert_close(again[1], h[1], rtol=0, atol=1e-10)


@pytest.fixture
def two_behaviours(make_head, monkeypatch):
    """A head and X of three RoIs for which the plain iteration converges for all but the second: there it overshoots
    the same equilibrium, F is reflected about it twice as far."""
    head, x = make_head(16, post_gain=0.2), torch.randn(3, 16, 5, 5)
    exact, value = Equation.make(head, x, "float64"), Equation.__call__
    h = limit(exact, torch.zeros_like(exact.x))[0]

    def reflected(equation: Equation, z: torch.Tensor) -> torch.Tensor:
        fz, centre = value(equation, z), h.to(z.dtype)
        away = torch.zeros(len(z), 1, 1, 1)
        away[1] = 1
        return fz + away * torch.tanh(centre - z) * 2

    monkeypatch.setattr(Equation, "__call__", reflected)
    return head, x, h


@torch.no_grad()
def test_a_population_counts_what_oscillates(two_behaviours, seed):
    head, x, h = two_behaviours
    found = convergence.population(head, x, 200, seed)
    assert found["converged"] == [True, False, True]
    assert found["relative"][1] > 0.1 > STEADY > 1e-5 > max(found["relative"][::2])
    assert found["radius"][1] > 1.5 > 1 > max(found["radius"][::2])
    assert max(found["limit"]["residual"]) < 1e-12
    assert found["limit"]["norm"] == pytest.approx(convergence.norms(h).tolist())
    plain, few, many = found["solves"]
    assert (few["steps"], many["steps"]) == (15, 50)
    assert max(many["relative_distance"]) < 1e-5  # the solver's own equation is not reflected
    assert plain["relative_distance"][1] > 0.05 > 1e-5 > max(plain["relative_distance"][::2])
    assert few["distance"] == pytest.approx(
        [d * n for d, n in zip(few["relative_distance"], found["limit"]["norm"], strict=True)]
    )
    assert moving(found) == f"1 of 3, relative steps of {found['relative'][1]:.0e} to {found['relative'][1]:.0e}"


def test_representatives_range_from_the_smallest_radius_to_what_has_not_converged():
    found = {"radius": [0.9, 1.1, 0.5, 0.7, 1.2, None], "converged": [True, False, True, True, True, True]}
    assert convergence.representatives(found, 6) == [2, 3, 0, 4, 5, 1]
    assert convergence.representatives(found, 2) == [2, 1]
    assert convergence.representatives(found, 1) == [2]


def test_the_report_is_the_same_every_time(contraction, given_problem, tmp_path):
    given_problem(*contraction)

    def report(name: str) -> dict:
        report = convergence.main([".", "--output", str(tmp_path / name), *BRIEF])
        assert json.loads((tmp_path / name / "convergence.json").read_text()) == report
        for plain in report["plain"].values():
            assert plain.pop("seconds_per_step") > 0
        return report

    first, second = report("first"), report("second")
    for key in ("population", "chosen", "converged", "plain", "limit", "spectrum", "solves"):
        assert first[key] == second[key]
    assert list(first["plain"]) == list(PRECISIONS)
    assert [point["step"] for point in first["spectrum"]] == [1, 10, 100, "limit"]
    assert len(first["solves"]) == len(PRECISIONS) * (3 * 2 + 1)


def test_distances_to_no_equilibrium_come_with_a_warning(contraction, given_problem, tmp_path, capsys, monkeypatch):
    given_problem(*contraction)
    command = [".", "--output", str(tmp_path), "--precisions", *BRIEF]
    convergence.main(command)
    warning = "H* is no equilibrium"
    assert warning not in capsys.readouterr().out
    monkeypatch.setattr(convergence, "limit", lambda equation, z: (torch.ones_like(z), ["nothing"] * len(z)))
    convergence.main(command)
    assert capsys.readouterr().out.count(warning) == 2  # of the population, and of the RoIs


def test_a_trained_block_is_studied(shapes, sweep, tmp_path, capsys):
    options = ["--sweep", str(sweep), "--objects", "3", "--object-steps", "20", "--rois", "3"]
    options += ["--steps", "10", "--solver-steps", "5", "--device", "cpu"]
    report = convergence.main([str(shapes), *options, "--output", str(tmp_path)])
    assert report["shape"] == [3, 32, 14, 14]
    assert list(report["population"]) == ["IFR", "IFR, 4 groups"]
    assert {"torch", "device"} <= set(report["environment"])
    assert "spectral radius" in capsys.readouterr().out
    page = results_page.convergence(report)
    assert page.count("| IFR, 4 groups | Broyden | 50 |") == 1
    with Image.open(tmp_path / "convergence.png") as picture:
        assert picture.size[0] > 1000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--rois", "-2"], "--rois: expected at least 1, got -2"),
        (["--objects", "2"], "--rois: expected at most 2, the population's objects, got 3"),
        (["--object-steps", "0"], "--object-steps: expected at least 1, got 0"),
        (["--solver-steps", "15", "0"], "--solver-steps: expected at least 1, got 0"),
        (["--seed", "-1"], "--seed: expected zero or more, got -1"),
    ],
)
def test_unusable_options_are_named(capsys, options, message):
    with pytest.raises(SystemExit):
        convergence.parse([".", *options])
    assert message in capsys.readouterr().err


def test_what_the_sweep_lacks_is_named(shapes, sweep, tmp_path):
    def problem(*options: str) -> None:
        convergence.problem(convergence.parse([str(shapes), "--sweep", str(sweep), *options]), "IFR")

    with pytest.raises(DataError, match="has no training of 'IFR' with seed 7"):
        problem("--seed", "7")
    with pytest.raises(DataError, match=r"objects: expected at most [0-9]+, those of .*, got 1000"):
        problem("--objects", "1000")
    with pytest.raises(DataError, match=r"has no ablation\.json"):
        problem("--sweep", str(tmp_path))


@pytest.mark.parametrize("refinement", ["convolutions", "unroll", "paper's form"])
def test_a_row_without_equilibrium_is_refused(make_head, monkeypatch, refinement):
    options = {"unroll": {"solver": Unroll(4)}, "paper's form": {"form": "paper"}}
    refine = make_head(16, **options[refinement]) if refinement in options else nn.Identity()
    monkeypatch.setattr(convergence, "trained_branch", lambda *_: SimpleNamespace(refine=refine))
    with pytest.raises(DataError, match="rows: 'any' has no equilibrium"):
        convergence.problem(convergence.parse(["."]), "any")


def test_steps_are_recorded_densely_first_then_evenly_in_their_logarithm():
    steps = convergence.recorded_steps(100_000)
    assert steps[:101] == [*range(1, 101), 105]
    assert {10, 100, 1000, 10_000, 100_000} <= set(steps)
    assert len(steps) == 100 + 3 * 50
    assert max(math.log10(b / a) for a, b in pairwise(steps[100:])) < 0.03
    assert convergence.recorded_steps(7) == [1, 2, 3, 4, 5, 6, 7]
