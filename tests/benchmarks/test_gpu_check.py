"""benchmarks/gpu_check.py and kernels.py, as far as they go without a GPU."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from emulated_cuda import cuda_fixture  # noqa: F401

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, Stage
from benchmarks.timing import kernel_cases, kernel_report, kernels

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def stage(name: str, script: str, *, least=0.0, most=60.0, **fields) -> Stage:
    return Stage(name, lambda _: [sys.executable, "-c", script], least, most, **fields)


@pytest.fixture
def run(tmp_path):
    """Runs stages; gives the outcomes by name, and how many there were at every report."""

    def run(*stages: Stage, budget=60.0) -> tuple[dict[str, Outcome], list[int]]:
        reports = []
        outcomes = gpu_check.run_stages(stages, budget, tmp_path / "log", lambda found: reports.append(len(found)))
        return {outcome.name: outcome for outcome in outcomes}, reports

    return run


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "gpu_check.py: torch finds no GPU here, and all that this does needs one\n"
    assert process.stdout == ""
    assert not out.exists()


def test_failing_and_hanging_stages_cost_the_others_nothing(run, tmp_path):
    left = tmp_path / "left.json"
    # The hanging stage starts a process that would hold on to the log.
    hanging = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    started = time.monotonic()
    outcomes, reports = run(
        stage("failing", "print('before'); raise ValueError('on purpose')"),
        stage("hanging", hanging, most=2),
        stage("missing", "", missing="not installed: something"),
        stage("working", f"open({str(left)!r}, 'w').write('[1]'); print('done, at last')", leaves=left),
    )
    assert time.monotonic() - started < 45
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {"failing": "failed", "hanging": "timed out", "missing": "not run", "working": "passed"}
    assert "Traceback" in outcomes["failing"].tail
    assert outcomes["failing"].detail == "ValueError: on purpose"
    assert outcomes["missing"].detail == "not installed: something"
    assert (outcomes["working"].detail, outcomes["working"].results, outcomes["working"].tail) == (
        "done, at last", [1], "",
    )  # fmt: skip
    assert reports == [1, 2, 3, 4]
    log = (tmp_path / "log").read_text()
    assert all(words in log for words in ("===== failing", "before", "on purpose", "===== working", "done, at last"))


def test_stages_leave_later_ones_their_time(run):
    sleeping = "import time; time.sleep(600)"
    outcomes, _ = run(
        stage("greedy", sleeping, most=100),
        stage("late", "pass", least=12),
        stage("last", sleeping, most=0.5),
        budget=14,
    )
    assert outcomes["greedy"].state == "timed out"
    assert 1 < outcomes["greedy"].seconds < 8
    assert outcomes["late"].state == "passed"
    assert outcomes["last"].state == "not run"


def test_results_of_an_earlier_run_are_not_taken_for_a_stages_own(run, tmp_path):
    old = tmp_path / "old.json"
    old.write_text("[]")
    outcomes, _ = run(stage("silent", "", leaves=old), stage("torn", f"open({str(old)!r}, 'w').write('[')", leaves=old))
    assert outcomes["silent"].results is None
    assert outcomes["torn"].results is None
    assert "old.json is incomplete" in outcomes["torn"].detail


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("test_a.py::x PASSED\n===== 1 failed, 2 passed in 3.21s =====\nend\n", "1 failed, 2 passed in 3.21s"),
        ("========= ERROR SUMMARY: 0 errors\n", "ERROR SUMMARY: 0 errors"),
        ("a\n  b  \n\n", "b"),
        ("", "it printed nothing"),
    ],
)
def test_a_stage_in_one_line(output, expected):
    assert gpu_check.summary(output) == expected


def test_table_of_bars(capsys):
    def swept(family: str, variant: str, reached: float, n: int = 512) -> dict:
        return {"family": family, "variant": variant, "n": n, "dtype": "bfloat16", "of_copy": reached}

    cases = [swept("gram_row", "K = 4", 0.9), swept("gram_row", "K = 15", 0.85), swept("gram_row", "K = 8", 0.1, n=1)]
    cases += [swept("combine", "K = 4", 0.7), {**swept("combine", "K = 8", 0.1), "dtype": "float32"}]
    target = {"what": "graph / floor", "bound": "≤ 1.6", "value": 1.5, "met": True}
    outcomes = [
        Outcome("kernels_triton", "passed", 60, "50 ran", results={"cases": cases}),
        Outcome("kernels_cuda", "not run", detail="no nvcc"),
        Outcome("speed", "passed", 100, "took 100 s", results={"targets": [target]}),
    ]
    bars = gpu_check.bars(outcomes)
    assert [(bar["value"], bar["met"]) for bar in bars] == [
        (1.5, True), (0.85, True), (0.7, False), (None, None), (None, None),
    ]  # fmt: skip
    gpu_check.print_table(outcomes)
    printed = capsys.readouterr().out
    assert [line.split()[-1] for line in printed.splitlines()[-5:]] == ["met", "met", "MISSED", "measured", "measured"]
    assert "no nvcc" in printed
    assert all(bar["met"] is None for bar in gpu_check.bars([]))


def test_planned_stages_fit_the_budget(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "gpu_backends", lambda: {"triton": "", "cuda": "no nvcc", "eager": ""})
    stages = {s.name: s for s in gpu_check.planned(tmp_path, tmp_path)}
    assert sum(s.least for s in stages.values()) < 470 < 8 * 60
    assert stages["kernels_cuda"].missing == "no nvcc"
    for s in stages.values():
        if not s.missing:
            words = [str(word) for word in s.command(100)]
            assert all(Path(word).exists() for word in words if word.endswith(".py")), words


def test_the_benchmarks_take_the_options_that_stages_give_them(tmp_path, monkeypatch):
    from benchmarks import speed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu_check, "gpu_backends", lambda: {"triton": "", "cuda": "", "eager": ""})
    monkeypatch.setattr(kernels, "backends", lambda: dict.fromkeys(kernels.BACKENDS, Outcome("", "")))
    monkeypatch.setattr(Outcome, "available", True, raising=False)
    for s in gpu_check.planned(tmp_path, tmp_path):
        words = [str(word) for word in s.command(100)]
        for module in (speed, kernels):
            if (script := Path(module.__file__).name) in (names := [Path(word).name for word in words]):
                options = module.parse(words[names.index(script) + 1 :])
                assert options.out.parent in (tmp_path, tmp_path.parent)


@pytest.fixture
def toys(monkeypatch):
    """kernels.py --dry on one toy alone: under Triton's interpreter every kernel takes a second."""
    monkeypatch.setattr(kernels, "TOYS", [(kernels.Size(2, 8, 3, 3, 2), torch.bfloat16)])


def test_every_kernel_runs_dry(toys, tmp_path, capsys):
    assert kernels.main(["--dry", "--steps", "3", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "kernels.json").read_text())
    families = {case["family"] for case in found["cases"] if case["backend"] == "triton"}
    solver = {"tail + residual", "residual of total", "gram_row", "combine", "rule", "step, and a reset"}
    norms = {"norm_relu", "norm_tail", "norm_relu_vjp", "norm_tail_vjp"}
    assert families == {*solver, *norms, "F", "vjp of F", "forward solve", "backward solve"}
    assert not any("error" in case or "seconds" in case for case in found["cases"])


def test_the_pieces_of_the_cuda_step_run_dry(cuda, toys, tmp_path, monkeypatch, capsys):
    """On a GPU or emulated, where backends() knows of no such kernels."""
    monkeypatch.setattr(kernel_cases.choose, "kernels", lambda *_: cuda)
    size, dtype = kernels.TOYS[0]
    bench = kernels.Bench("cuda", size, dtype, 3, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [case for case in bench.cases() if case.family not in kernels.BLOCK]
    entries = [kernels.run(case, size, dtype, bench, bench.device, dry=True) for case in cases]
    assert not [entry["traceback"] for entry in entries if "error" in entry]
    assert {"gram_row", "combine", "rule", "residual of total", "tail + residual"} < {e["family"] for e in entries}


def test_a_failing_kernel_is_reported_and_the_others_go_on(toys, tmp_path, monkeypatch, capsys):
    def broken(self):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(kernels.Bench, "vjp", broken)
    assert kernels.main(["--dry", "--steps", "3", "--backends", "eager", "--out", str(tmp_path)]) == 1
    cases = json.loads((tmp_path / "kernels.json").read_text())["cases"]
    assert [case["error"] for case in cases if "error" in case] == ["ArithmeticError: on purpose"]
    assert len(cases) > 8
    assert "on purpose" in capsys.readouterr().err


def test_rates_and_shares(capsys):
    """Bytes against the copy, FLOP against the product, launches against their own backend's solve."""

    def case(family: str, backend: str, **fields) -> dict:
        common = {"size": "1×2×3×4", "n": 1, "dtype": "bfloat16", "variant": "", "traffic": 0, "flop": 0}
        return {**common, "family": family, "backend": backend, **fields}

    found = {"backends": ["triton"], "ceilings": {"copy": 4e12, "matmul": 8e14}, "not_run": ["x"]}
    found["cases"] = [
        case("norm_relu", "triton", seconds=1e-5, traffic=2e7, per_solve=16),
        case("convolution", "cudnn", seconds=3e-5, traffic=1, flop=12e9, per_solve=32),
        case("forward solve", "triton", seconds=2e-3, flop=16e11, per_solve=1),
        case("rule", "triton", error="ValueError: of no use"),
    ]
    kernel_report.rate(found)
    norm, convolution, solve, _ = found["cases"]
    assert (norm["of_copy"], norm["share"]) == pytest.approx((0.5, 0.08))
    assert (convolution["of_product"], convolution["share"]) == pytest.approx((0.5, 0.48))
    assert (solve["of_product"], solve["share"]) == pytest.approx((1, 1))
    kernel_report.print_tables(found)
    printed = capsys.readouterr().out.splitlines()
    order = [line.split()[1] for line in printed if line.startswith(("triton", "cudnn"))]
    assert order == ["forward", "convolution", "norm_relu"]
    assert printed[-1] == "3 ran, 1 failed, 1 left out for time"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "only --dry runs without"),
        ("--dry --steps 2", "--steps: expected at least 3, got 2"),
        ("--dry --backends cuda", "--backends: cuda is not available:"),
    ],
)
def test_a_bad_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit):
        kernels.parse(options.split())
    assert message in capsys.readouterr().err
