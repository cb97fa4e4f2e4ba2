"""benchmarks/gpu_check.py and kernels.py, as far as they go without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import cuda_fixture  # noqa: F401

from benchmarks import gpu_check, speed
from benchmarks.timing import kernel_cases, kernel_report, kernels, profile_solve, smoke
from benchmarks.timing.stages import Outcome, Stage

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def plan(tmp_path, monkeypatch) -> gpu_check.Plan:
    """Of a machine with a GPU, an nvcc and a sanitizer, where no ifr_fast is installed."""
    monkeypatch.setattr(gpu_check, "is_installed", lambda folder: "")
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name, path: f"/bin/{name}")
    plan = gpu_check.Plan(tmp_path / "out", tmp_path)
    facts = {"gpu": "some GPU", "compute capability": "9.0"}
    plan.outcomes["environment"] = Outcome("environment", "passed", results=facts)
    return plan


def after(plan: gpu_check.Plan, build: str, **reasons: str) -> dict[str, Stage]:
    """The stages by name, after a build that came out so and smoke tests that found backends lacking."""
    found = {"triton": "", "cuda": "", "eager": "", **reasons}
    plan.outcomes["build"] = Outcome("build", build)
    plan.outcomes["smoke"] = Outcome("smoke", "passed", results={"backends": {**found, "cuda": "no compiled part"}})
    if build == "passed":
        plan.outcomes["smoke_cuda"] = Outcome("smoke_cuda", "passed", results={"backends": found})
    return {stage.name: stage for stage in plan.stages()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_at_once(tmp_path):
    out = tmp_path / "results"
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "gpu_check.py: torch finds no GPU here, and all that this does needs one\n"
    found = {s["name"]: s for s in json.loads((out / "gpu_check.json").read_text())["stages"]}
    assert found.pop("environment")["state"] == "passed"
    assert {(s["state"], s["detail"]) for s in found.values()} == {("not run", gpu_check.NO_GPU)}


@pytest.mark.parametrize(("capability", "archs"), [("9.0", "90a"), ("8.0", "80"), ("10.0", "100"), ("12.0", "120")])
def test_it_is_built_for_the_gpu_at_hand(capability, archs, plan):
    plan.outcomes["environment"].results["compute capability"] = capability
    build = next(stage for stage in plan.stages() if stage.name == "build")
    assert build.missing() == ""
    assert build.variables()["IFR_FAST_ARCHS"] == archs
    assert build.variables()["IFR_FAST_CUDA"] == "1"
    assert build.background
    assert build.folder == BENCHMARKS.parent


def test_a_build_is_what_later_stages_run(plan, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    stages = after(plan, "passed")
    paths = stages["profile_cuda"].variables()["PYTHONPATH"].split(os.pathsep)
    assert paths == [str(plan.library), os.path.abspath("elsewhere")]
    assert stages["gpu_tests"].variables()["PYTHONPATH"].startswith(str(plan.library))
    assert stages["gpu_tests"].variables()["OMP_NUM_THREADS"] == "1"
    assert not any(stage.missing() for stage in stages.values())


@pytest.mark.parametrize("state", ["failed", "timed out", "not run"])
def test_without_a_build_tritons_stages_run_from_the_sources(state, plan):
    stages = after(plan, state)
    assert {name for name, stage in stages.items() if stage.missing()} == {
        "smoke_cuda", "profile_cuda", "profile_cuda_graph", "profile_cuda_8bit", "kernels_cuda", "cuda_tests",
        "racecheck",
    }  # fmt: skip
    assert stages["profile_triton"].variables()["PYTHONPATH"].split(os.pathsep)[0] == str(BENCHMARKS.parent)
    assert [str(w) for w in stages["memcheck"].command(9)][-4:-1] == ["--backends", "triton", "--out"]


def test_an_installed_package_is_not_built_anew(plan, monkeypatch):
    monkeypatch.setattr(gpu_check, "is_installed", lambda folder: "/somewhere/ifr_fast")
    plan.__post_init__()
    stages = {stage.name: stage for stage in plan.stages()}
    assert "installed" in stages["build"].missing()
    assert not stages["smoke_cuda"].missing()
    assert "PYTHONPATH" not in stages["speed"].variables()


def test_where_triton_cannot_serve_its_stages_say_why(plan):
    stages = after(plan, "passed", triton="no triton here")
    assert stages["profile_triton"].missing() == stages["gpu_tests"].missing() == "no triton here"
    assert not stages["profile_cuda"].missing()
    assert not stages["forward"].missing()


def test_planned_stages_fit_the_budget(plan):
    stages = after(plan, "passed")
    longest_wait = stages["build"].most - stages["smoke"].least
    assert sum(stage.least for stage in stages.values()) + longest_wait < 570 <= 600 - 2 * 10
    assert all(stage.least <= stage.most for stage in stages.values())
    for stage in stages.values():
        words = [str(word) for word in stage.command(100)]
        folder = stage.folder or plan.scratch
        assert all((folder / word).exists() for word in words if word.endswith(".py")), words
    assert gpu_check.parse(["--out", "x"]).budget == 570


def test_programs_take_the_options_that_stages_give_them(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    serving = dict.fromkeys(("triton", "cuda", "eager"), SimpleNamespace(available=True))
    for module in (kernels, profile_solve):
        monkeypatch.setattr(module, "backends", lambda: serving)
    monkeypatch.setattr(profile_solve.choose, "kernels", lambda name, *_: SimpleNamespace(__name__=name))
    programs = {Path(m.__file__).name: m for m in (speed, kernels, profile_solve, smoke)}
    met = set()
    for stage in after(plan, "passed").values():
        words = [str(word) for word in stage.command(100)]
        for i, word in enumerate(words):
            if module := programs.get(Path(word).name):
                options = module.parse(words[i + 1 :])
                assert getattr(options, "history", "").startswith("float8") == ("8bit" in stage.name)
                met.add(module)
                if stage.leaves:
                    assert stage.leaves in (options.out, *(options.out / f"{m}.json" for m in ("speed", "kernels")))
    assert met == set(programs.values())


@pytest.mark.full
def test_every_stage_is_rehearsed_without_a_gpu(tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, BENCHMARKS / "gpu_check.py", "--dry", "--out", out]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout
    stages = {s["name"]: s for s in json.loads((out / "gpu_check.json").read_text())["stages"]}
    idle = {"build", "gpu_tests", "memcheck", "racecheck"}
    assert {name for name, s in stages.items() if s["state"] == "not run"} <= idle
    assert {s["state"] for name, s in stages.items() if name not in idle} == {"passed"}
    assert all(s["results"] for name, s in stages.items() if name not in idle)
    assert {path.name for path in out.iterdir()} == {"gpu_check.json", "gpu_check.log", "speed.json", "speed.png"}


WITHOUT_COMPILED_PART = """
import sys, torch
sys.modules["ifr_fast._native"] = None  # an import of it fails
import ifr_fast
found = {name: backend.available for name, backend in ifr_fast.backends().items()}
assert found["eager"] and found["triton"] and not found["cpu"] and not found["cuda"], found
for backend in ("auto", "eager", "triton"):
    head = ifr_fast.IFRHead(16, groups=4, solver=ifr_fast.Broyden(2), adjoint=ifr_fast.Implicit(2), backend=backend)
    x = torch.randn(1, 16, 4, 4, requires_grad=True)
    head(x).sum().backward()
    assert x.grad.isfinite().all()
from benchmarks import speed
from benchmarks.timing import kernels, profile_solve, smoke
from benchmarks.report.environment import environment
print(environment(torch.device("cpu"))["no compiled kernels for CPUs"])
"""


def test_the_sources_serve_without_their_compiled_part(tmp_path):
    """On a machine where the build fails."""
    pytest.importorskip("triton")
    variables = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(BENCHMARKS.parent)}
    command = [sys.executable, "-c", WITHOUT_COMPILED_PART]
    process = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "does not import" in process.stdout


def test_table_of_bars():
    def swept(family: str, variant: str, reached: float, n: int = 512) -> dict:
        return {"family": family, "variant": variant, "n": n, "history": "bfloat16", "of_copy": reached}

    cases = [swept("gram_row", "K = 4", 0.9), swept("gram_row", "K = 15", 0.85), swept("gram_row", "K = 8", 0.1, n=1)]
    cases += [swept("combine", "K = 4", 0.7), {**swept("combine", "K = 8", 0.1), "history": "float8_e5m2"}]
    floor = {"what": "graph / floor", "bound": "≤ 1.6", "value": 1.5, "met": True}
    stack = {"what": "graph / stack", "bound": "≤ 1.2", "value": 1.3, "met": False}
    unknown = {"value": None, "met": None}
    outcomes = [
        Outcome("profile_triton", "passed", 9, tail="a kernel\n" * 10_000),
        Outcome("kernels_triton", "passed", 60, "50 ran", results={"cases": cases}),
        Outcome("kernels_cuda", "not run", detail="no nvcc"),
        Outcome("memcheck", "failed", 9, "1 error", tail="x\nwhere the error is"),
        # The whole benchmark was cut off: what it has not measured, the short one may have.
        Outcome("speed", "timed out", 100, "cut off", results={"targets": [{**floor, **unknown}, stack]}),
        Outcome("forward", "passed", 50, "ok", results={"targets": [floor, {**stack, **unknown}]}),
    ]
    outcomes = {outcome.name: outcome for outcome in outcomes}
    bars = {bar["what"]: (bar["value"], bar["met"]) for bar in gpu_check.bars(outcomes)}
    assert list(bars.values()) == [(1.5, True), (1.3, False), (0.85, True), (0.7, False), (None, None), (None, None)]
    table = gpu_check.table(outcomes)
    assert len(table) < 12_000
    assert [line.split()[-1] for line in table.splitlines()[-4:]] == ["met", "MISSED", "measured", "measured"]
    assert all(words in table for words in ("no nvcc", "a kernel", "where the error is"))
    assert all(bar["met"] is None for bar in gpu_check.bars({}))


@pytest.fixture
def toys(monkeypatch):
    """kernels.py --dry on one toy alone: under Triton's interpreter every kernel takes a second."""
    size = kernels.Size(2, 8, 3, 3, 2)
    histories = kernels.BF16, kernels.E5M2
    monkeypatch.setattr(kernels, "TOYS", [kernels.Setting(size, kernels.BF16, history) for history in histories])


def test_every_kernel_runs_dry(toys, tmp_path, capsys):
    """With a history in 8 bits, what reads or writes it."""
    assert kernels.main(["--dry", "--steps", "3", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    found = json.loads((tmp_path / "kernels.json").read_text())
    families = {"bfloat16": set(), "float8_e5m2": set()}
    for case in found["cases"]:
        assert ("8-bit history" in case["variant"]) == (case["history"] == "float8_e5m2")
        if case["backend"] == "triton":
            families[case["history"]].add(case["family"])
    solver = {"tail + residual", "residual of total", "gram_row", "combine", "rule", "step, and a reset"}
    solver |= {"forward solve", "backward solve"}
    norms = {"norm_relu", "norm_tail", "norm_relu_vjp", "norm_tail_vjp"}
    assert families == {"bfloat16": {*solver, *norms, "F", "vjp of F"}, "float8_e5m2": solver}
    assert not any("error" in case or "seconds" in case for case in found["cases"])
    assert found["refused"] == []


@pytest.mark.parametrize("history", [torch.bfloat16, torch.float8_e5m2])
def test_the_pieces_of_the_cuda_step_run_dry(history, cuda, monkeypatch):
    """On a GPU or emulated, where backends() knows of no such kernels."""
    monkeypatch.setattr(kernel_cases.choose, "kernels", lambda *_: cuda)
    setting = kernels.Setting(kernels.Size(2, 8, 3, 3, 2), torch.bfloat16, history)
    bench = kernels.Bench("cuda", setting, 3, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = [case for case in bench.cases() if case.family not in kernels.BLOCK]
    entries = [kernels.run(case, setting, bench, bench.device, dry=True) for case in cases]
    assert not [entry["traceback"] for entry in entries if "error" in entry]
    assert {"gram_row", "combine", "rule", "residual of total", "tail + residual"} < {e["family"] for e in entries}
    assert not any("kernel" in case.variant for case in cases)  # a sample is too small for a cluster


def test_steps_by_one_kernel_and_by_three_are_timed_side_by_side(cuda, monkeypatch):
    """Where a GPU's kernels would take one. Its launches are noted."""
    if cuda.device.capability(torch.device("cuda")) != (9, 0):
        pytest.skip("this GPU has no such kernel")
    monkeypatch.setattr(kernel_cases.choose, "kernels", lambda *_: cuda)
    setting = kernels.Setting(kernels.Size(1, 256, 8, 8, 32), torch.bfloat16, torch.float8_e5m2)
    bench = kernels.Bench("cuda", setting, 3, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    cases = list(bench.cases())
    steps = {case.variant: case for case in cases if case.family == "step, and a reset"}
    words = "8-bit history, {}, K = {}"
    assert set(steps) == {words.format(way, k) for way in ("one kernel", "three kernels") for k in (2, 3)}
    launched, native = [], cuda.solver._native.cuda

    class Noting:
        def __getattr__(self, name):
            launched.append(name)
            return getattr(native, name)

    monkeypatch.setattr(cuda.solver._native, "cuda", Noting())
    kernels.run(steps[words.format("one kernel", 3)], setting, bench, bench.device, dry=True)
    sweeps = {"cluster_step", "gram_row", "rule", "combine"}
    assert sweeps & set(launched) == {"cluster_step"}
    launched.clear()
    kernels.run(steps[words.format("three kernels", 3)], setting, bench, bench.device, dry=True)
    assert sweeps & set(launched) == sweeps - {"cluster_step"}
    # Its three kernels sweep the history twice, and a solve on this GPU launches none of them but for the last step.
    elements = setting.size.elements
    assert (
        steps[words.format("three kernels", 3)].traffic - steps[words.format("one kernel", 3)].traffic == 3 * elements
    )
    assert {c.family: c.per_solve for c in cases if c.per_solve} == {
        "tail + residual": 4, "rule": 1, "forward solve": 1,
    }  # fmt: skip
    solves = [(case.family, case.variant.split(", ")[1]) for case in cases if case.family in kernels.SOLVED]
    assert solves == [
        (f"{p} solve", f"{w} kernel{s}") for p in ("forward", "backward") for w, s in (("one", ""), ("three", "s"))
    ]


def test_a_step_that_is_never_asked_is_not_timed_as_another(cuda, monkeypatch):
    monkeypatch.setattr(kernel_cases.choose, "kernels", lambda *_: cuda)
    setting = kernels.Setting(kernels.Size(1, 256, 8, 8, 32), torch.bfloat16, torch.float8_e5m2)
    bench = kernels.Bench("cuda", setting, 3, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="nothing asked"):
        bench.in_three_kernels(lambda: None)()


def test_what_a_backend_refuses_is_named(toys, tmp_path, monkeypatch, capsys):
    serving = kernel_cases.choose.kernels

    def refusing(name, device, dtype, history):
        if history == torch.float8_e5m2:
            raise ValueError(f"{name} keeps no such history")
        return serving(name, device, dtype, history)

    monkeypatch.setattr(kernel_cases.choose, "kernels", refusing)
    options = ["--dry", "--steps", "3", "--backends", "triton", "--kernels-alone", "--out", str(tmp_path)]
    assert kernels.main(options) == 0
    found = json.loads((tmp_path / "kernels.json").read_text())
    (reason,) = found["refused"]
    assert reason == "triton, 2×8×3×3 torch.bfloat16, 8-bit history: triton keeps no such history"
    assert f"not run: {reason}" in capsys.readouterr().out
    assert {case["history"] for case in found["cases"]} == {"bfloat16"}


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
        common = {"size": "1×2×3×4", "n": 1, "dtype": "bfloat16", "history": "bfloat16", "variant": "", "per_solve": 0}
        return {**common, "traffic": 0, "flop": 0, "family": family, "backend": backend, **fields}

    found = {"backends": ["triton"], "ceilings": {"copy": 4e12, "matmul": 8e14}, "not_run": ["x"], "refused": []}
    found["cases"] = [
        case("norm_relu", "triton", seconds=1e-5, traffic=2e7, per_solve=16),
        case("convolution", "cudnn", seconds=3e-5, traffic=1, flop=12e9, per_solve=32),
        case("forward solve", "triton", seconds=2e-3, flop=16e11, per_solve=1),
        # Others' solves: of another history, and by steps that the backend would not take.
        case("forward solve", "triton", seconds=1e-3, flop=16e11, per_solve=1, history="float8_e5m2"),
        case("forward solve", "triton", seconds=3e-3, flop=16e11, variant="three kernels"),
        case("rule", "triton", error="ValueError: of no use"),
    ]
    kernel_report.rate(found)
    norm, convolution, solve, *_ = found["cases"]
    assert (norm["of_copy"], norm["share"]) == pytest.approx((0.5, 0.08))
    assert (convolution["of_product"], convolution["share"]) == pytest.approx((0.5, 0.48))
    assert (solve["of_product"], solve["share"]) == pytest.approx((1, 1))
    kernel_report.print_tables(found)
    printed = capsys.readouterr().out.splitlines()
    order = [line.split()[1] for line in printed if line.startswith(("triton", "cudnn"))]
    assert order == ["forward", "forward", "convolution", "norm_relu", "forward"]
    assert printed[-1] == "5 ran, 1 failed, 1 left out for time"


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
