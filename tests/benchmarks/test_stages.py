"""timing/stages.py: stages that fail, hang, print garbage, leave torn files; and the whole program killed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event, Thread

import pytest

from benchmarks.timing import stages
from benchmarks.timing.stages import Outcome, Stage, run_stages

ROOT = Path(__file__).parents[2]


def stage(name: str, script: str, *, least=0.0, most=60.0, missing="", **fields) -> Stage:
    return Stage(name, lambda _: [sys.executable, "-c", script], least, most, missing=lambda: missing, **fields)


@pytest.fixture
def run(tmp_path):
    """Runs stages; gives the outcomes by name, and the states at every report."""

    def run(*chosen: Stage, budget=60.0, stopped=None) -> tuple[dict[str, Outcome], list[dict[str, str]]]:
        outcomes, reports = {}, []

        def report() -> None:
            reports.append({name: outcome.state for name, outcome in outcomes.items()})

        scratch = tmp_path / "scratch"
        scratch.mkdir(exist_ok=True)
        run_stages(chosen, budget, outcomes, report, scratch, tmp_path / "log", stopped or Event())
        return outcomes, reports

    return run


def is_alive(process: int) -> bool:
    status = Path(f"/proc/{process}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def test_failing_and_hanging_stages_cost_the_others_nothing(run, tmp_path):
    left, child = tmp_path / "left.json", tmp_path / "child"
    # It starts a process that would hold on to its output, and will not be interrupted.
    hanging = f"""
import signal, subprocess, sys, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
process = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
open({str(child)!r}, 'w').write(str(process.pid))
time.sleep(600)"""
    started = time.monotonic()
    outcomes, reports = run(
        stage("failing", "print('before'); raise ValueError('on purpose')"),
        stage("hanging", hanging, most=2),
        stage("missing", "", missing="not installed: something"),
        Stage("nowhere", lambda _: [tmp_path / "no such program"], 0, 60),
        stage("working", f"open({str(left)!r}, 'w').write('{{\"a\": 1}}'); print('done, at last')", leaves=left),
    )
    assert time.monotonic() - started < 45
    states = {name: outcome.state for name, outcome in outcomes.items()}
    assert states == {
        "failing": "failed", "hanging": "timed out", "missing": "not run", "nowhere": "failed", "working": "passed",
    }  # fmt: skip
    assert "Traceback" in outcomes["failing"].tail
    assert outcomes["failing"].detail == "ValueError: on purpose"
    assert outcomes["missing"].detail == "not installed: something"
    assert "FileNotFoundError" in outcomes["nowhere"].detail
    assert (outcomes["working"].detail, outcomes["working"].results) == ("done, at last", {"a": 1})
    assert not is_alive(int(child.read_text()))
    assert {"failing": "running"} in reports
    assert reports[-1] == states
    log = (tmp_path / "log").read_text()
    assert all(words in log for words in ("===== failing", "before", "on purpose", "===== working", "done, at last"))


@pytest.fixture
def interruptible():
    """A shell's script starts what runs in the background deaf to interruptions, and so the children of that."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_interrupted_stage_says_how_far_it_came(run, interruptible):
    script = "import time\ntry: time.sleep(600)\nexcept KeyboardInterrupt: print('half of it')"
    outcomes, _ = run(stage("slow", script, most=2))
    assert (outcomes["slow"].state, outcomes["slow"].detail) == ("timed out", "half of it")


def test_stages_leave_later_ones_their_time(run):
    sleeping = "import time; time.sleep(600)"
    outcomes, _ = run(
        stage("greedy", sleeping, most=100),
        stage("absent", "", least=1000, missing="not here"),
        stage("late", "pass", least=12),
        stage("last", sleeping, most=0.5),
        budget=14,
    )
    assert outcomes["greedy"].state == "timed out"
    assert 1 < outcomes["greedy"].seconds < 8
    assert outcomes["late"].state == "passed"
    assert outcomes["last"].state == "not run"


def test_a_background_stage_runs_beside_what_measures_nothing(run, tmp_path):
    """And ends before anything measures; what comes after it sees how it ended."""
    began, seen = tmp_path / "began", []
    building = f"import time; open({str(began)!r}, 'w'); time.sleep(3)"
    beside = f"import os, time\nwhile not os.path.exists({str(began)!r}): time.sleep(0.02)"
    outcomes, reports = run(
        stage("build", building, background=True),
        stage("beside", beside, measures=False),
        Stage("measuring", lambda _: [sys.executable, "-c", ""], 0, 60, variables=lambda: seen.append(1) or {}),
    )
    assert all(outcome.state == "passed" for outcome in outcomes.values())
    assert {"build": "running", "beside": "passed"} in reports
    assert not any(report.get("build") == "running" and "measuring" in report for report in reports)
    assert seen == [1]


def test_a_hanging_background_stage_is_ended_in_time_for_the_others(run):
    outcomes, _ = run(
        stage("build", "import time; time.sleep(600)", background=True, most=100),
        stage("measuring", "pass", least=8),
        budget=10,
    )
    assert outcomes["build"].state == "timed out"
    assert outcomes["build"].seconds < 8
    assert outcomes["measuring"].state == "passed"


def test_results_of_an_earlier_run_are_not_taken_for_a_stages_own(run, tmp_path):
    old = tmp_path / "old.json"
    old.write_text("{}")
    written = f"f = open({str(old)!r}, 'wb'); f.write(%r)"
    outcomes, _ = run(
        stage("silent", "", leaves=old),
        stage("torn", written % b'{"a": [', leaves=old),
        stage("list", written % b"[1]", leaves=old),
        stage("binary", written % b"\xff\xfe\x00", leaves=old),
    )
    assert all(outcome.results is None for outcome in outcomes.values())
    assert all("old.json is incomplete" in outcomes[name].detail for name in ("torn", "list", "binary"))


def test_garbage_on_the_output_is_made_readable(run, seed):
    script = f"import random, sys; r = random.Random({seed}); sys.stdout.buffer.write(r.randbytes(2_000_000))"
    outcomes, _ = run(
        stage("endless line", "print('=' * 3_000_000)"),
        stage("garbage", script + "; sys.stdout.buffer.write(b'\\nbar 1\\rbar 2\\nfine\\n')"),
    )
    assert outcomes["endless line"].seconds < 20
    assert outcomes["garbage"].detail == "fine"
    assert "bar 2" in outcomes["garbage"].tail
    assert "bar 1" not in outcomes["garbage"].tail
    assert len(outcomes["garbage"].tail) <= stages.TAIL
    assert all(c.isprintable() or c in "\n\t" for c in outcomes["garbage"].tail)
    json.loads(json.dumps(vars(outcomes["garbage"])))


def test_what_a_running_stage_has_so_far_is_reported(run, tmp_path, monkeypatch):
    monkeypatch.setattr(stages, "REPORTED", 0.1)
    left, stopped = tmp_path / "left.json", Event()
    script = f"import time; open({str(left)!r}, 'w').write('{{\"half\": 1}}'); time.sleep(600)"

    def stop() -> None:
        while not left.exists():
            time.sleep(0.05)
        time.sleep(0.5)
        stopped.set()

    thread = Thread(target=stop)
    thread.start()
    outcomes, reports = run(stage("slow", script, leaves=left), stage("never", "pass"), stopped=stopped)
    thread.join()
    assert len([report for report in reports if report == {"slow": "running"}]) > 2
    assert (outcomes["slow"].state, outcomes["slow"].results) == ("stopped", {"half": 1})
    assert outcomes["never"].state == "not run"


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
    assert stages.summary(output) == expected


@pytest.mark.parametrize("options", [[], ["-n", "2"]])
def test_the_tests_that_failed_are_named(options, tmp_path):
    names = ["passes", "fails[a b]", "skipped", "breaks"]
    (tmp_path / "test_toy.py").write_text("""
import pytest
def test_passes(): pass
@pytest.mark.parametrize('x', ['a b', 'c'])
def test_fails(x): assert x == 'c', 'PASSED tests::x'
def test_skipped(): pytest.skip('x')
@pytest.fixture
def broken(): raise ValueError
def test_breaks(broken): pass
""")
    command = [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *options, "test_toy.py"]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment).stdout
    found = stages.tests_so_far(output)
    assert (found["passed"], found["skipped"]) == (2, 1), output
    assert {name.partition("::test_")[2] for name in found["failed"]} == {names[1], names[3]}


PROGRAM = """
import json, sys
sys.path.append({root!r})
from benchmarks import gpu_check
from benchmarks.timing import stages
from benchmarks.timing.stages import Stage

stages.REPORTED = 0.1
HANG = [sys.executable, "-c", "import time; time.sleep(30)"]

def quick(plan, i):
    left = plan.scratch / f"{{i}}.json"
    text = f"import time; time.sleep(0.05); open({{str(left)!r}}, 'w').write({{json.dumps(dict(i=i))!r}})"
    command = [sys.executable, "-c", text + "; print('x' * 10**6)"]
    return Stage(f"s{{i}}", lambda _: command, 0, 60, left, measures=False)

gpu_check.Plan.stages = lambda plan: [
    Stage("build", lambda _: HANG, 0, 60, background=True),
    *(quick(plan, i) for i in range(6)),
    Stage("hang", lambda _: HANG, 0, 60, measures=False),
]
sys.exit(gpu_check.main(["--out", {out!r}]))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM], ids=lambda number: number.name)
def test_a_killed_program_leaves_all_that_was_finished(number, tmp_path, seed):
    """At random times: the JSON is whole, and holds every stage that was said to have ended."""
    draw, complete = random.Random(seed), 0
    for i in range(6):
        out = tmp_path / str(i)
        program = PROGRAM.format(root=str(ROOT), out=str(out))
        with (tmp_path / f"{i}.txt").open("w") as file:
            process = subprocess.Popen([sys.executable, "-c", program], stdout=file, stderr=file)
        deadline = time.monotonic() + 20
        while not (out / "gpu_check.json").exists():
            assert process.poll() is None, (tmp_path / f"{i}.txt").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(draw.uniform(0, 1.5))
        process.send_signal(number)
        started = time.monotonic()
        status = process.wait(20)
        found = {s["name"]: s for s in json.loads((out / "gpu_check.json").read_text())["stages"]}
        printed = (tmp_path / f"{i}.txt").read_text()
        ended = [f"s{j}" for j in range(6) if f"s{j}: passed" in printed]
        complete += len(ended)
        for name in ended:
            assert (found[name]["state"], found[name]["results"]) == ("passed", {"i": int(name[1:])})
        if number == signal.SIGTERM:
            assert status == 128 + number
            assert time.monotonic() - started < 8
            assert found["hang"]["state"] in ("stopped", "not run")
            assert found["build"]["state"] == "stopped"
            assert not list(out.glob("*.unfinished"))
            assert printed.splitlines()[-1].endswith("not measured")  # the table comes last
        else:
            assert status == -number
    assert complete > 0
