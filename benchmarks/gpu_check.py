"""Everything that a GPU is needed for, in one command and less than eight minutes.

    python benchmarks/gpu_check.py --out results

Runs the tests that need a GPU, a sanitizer where there is one, the kernels' benchmark and the benchmark against the
convolutions. Every stage is a process of its own with its own time: one that fails or hangs costs the others nothing.
Builds and installs nothing, changes no setting of the device. Prints a short table last; leaves gpu_check.json, which
holds it all and is written after every stage, gpu_check.log with what the stages printed, and the benchmarks' files.
Needs ifr_fast to import, pytest and hypothesis for the tests (which run in parallel where pytest-xdist is at hand),
matplotlib and tqdm for the benchmarks; torchdeq, if it is to be compared with. The exit status is 1 where a stage
failed, whatever the speed.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = Path(__file__).resolve().parent
PACKAGES = ("pytest", "hypothesis", "matplotlib", "tqdm", "triton", "torchdeq")
TAIL, PRINTED = 8000, 1200  # characters of a failed stage's output that the report keeps, and that are printed
NEED_NO_GPU = "not (emulation or nvcc or nan_at_first or test_triton_compile)"
SLACK = 45  # seconds between a benchmark's own budget and the end of its stage


@dataclass(frozen=True)
class Stage:
    """A process. command: of the seconds it gets. least: seconds kept for it by the stages before it; most: what it
    may take. leaves: the JSON that it writes. missing: why it cannot run."""

    name: str
    command: Callable[[float], Sequence[str | Path]]
    least: float
    most: float
    leaves: Path | None = None
    missing: str = ""
    variables: dict[str, str] = field(default_factory=dict)


@dataclass
class Outcome:
    """state: passed, failed, timed out or not run. detail: the stage in a line. results: the JSON that it left."""

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    tail: str = ""
    results: dict | None = None


def run_stages(
    stages: Sequence[Stage], budget: float, log: Path, report: Callable[[list[Outcome]], None]
) -> list[Outcome]:
    """Runs them one after another within `budget` seconds, calling report after each."""
    deadline = time.monotonic() + budget
    outcomes = []
    for i, stage in enumerate(stages):
        allowed = min(stage.most, deadline - time.monotonic() - sum(s.least for s in stages[i + 1 :] if not s.missing))
        if stage.missing:
            outcome = Outcome(stage.name, "not run", detail=stage.missing)
        elif allowed < 1:
            outcome = Outcome(stage.name, "not run", detail=f"no time left of {budget:.0f} s")
        else:
            outcome = run_stage(stage, allowed, log)
        outcomes.append(outcome)
        print(f"{stage.name}: {outcome.state}, {outcome.seconds:.0f} s. {outcome.detail}", flush=True)
        report(outcomes)
    return outcomes


def run_stage(stage: Stage, allowed: float, log: Path) -> Outcome:
    if stage.leaves:
        stage.leaves.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("a+", encoding="utf-8", errors="replace") as file:
        file.write(f"\n===== {stage.name}\n")
        file.flush()
        beginning = file.tell()
        # A session of its own, so that what the stage has started ends with it. Not run where the package's sources
        # are: Python would import them in place of the package that is installed.
        process = subprocess.Popen(
            list(map(str, stage.command(allowed))), cwd=BENCHMARKS, env=variables() | stage.variables, stdout=file,
            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        try:
            state = "failed" if process.wait(allowed) else "passed"
        except subprocess.TimeoutExpired:
            state = "timed out"
            end(process)
        file.seek(beginning)
        output = file.read()
    outcome = Outcome(stage.name, state, time.monotonic() - started, summary(output))
    if state != "passed":
        outcome.tail = output[-TAIL:]
    if stage.leaves and stage.leaves.exists():
        try:
            outcome.results = json.loads(stage.leaves.read_text())
        except json.JSONDecodeError:
            outcome.detail += f" {stage.leaves.name} is incomplete."
    return outcome


def end(process: subprocess.Popen) -> None:
    """The process and its children."""
    for number, patience in ((signal.SIGTERM, 3), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def variables() -> dict[str, str]:
    """This process's, with absolute import paths, for stages run in another folder; unbuffered."""
    found = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if "PYTHONPATH" in found:
        found["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, filter(None, found["PYTHONPATH"].split(os.pathsep))))
    return found


def summary(output: str) -> str:
    """The line of a stage's output that says most."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    for pattern in (r"=+ (.*\b(?:passed|failed|errors?|skipped)\b.* in [\d.]+s.*?) =+$", r"=+ (.* SUMMARY: .*)$"):
        found = [match[1] for line in lines if (match := re.search(pattern, line))]
        if found:
            return found[-1]
    return lines[-1][:200] if lines else "it printed nothing"


def planned(out: Path, scratch: Path) -> list[Stage]:
    found = gpu_backends()
    python = sys.executable

    def missing(*names: str) -> str:
        absent = [name for name in names if importlib.util.find_spec(name) is None]
        return f"not installed: {', '.join(absent)}" if absent else ""

    def tests(name: str, least: float, most: float, pattern: str, lacking: str = "") -> Stage:
        paths = sorted((ROOT / "tests").rglob(pattern))
        options = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-v", "--tb=short", "--maxfail=15"]
        options += ["--full", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=45", "-k", NEED_NO_GPU]
        if not missing("xdist"):  # most of the time kernels are compiled, on one core a process
            options += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]
        absent = lacking or missing("pytest", "hypothesis") or ("" if paths else f"there are no tests/{pattern}")
        return Stage(name, lambda _: [python, "-m", "pytest", *options, *paths], least, most, missing=absent)

    def kernels(backend: str, least: float, most: float) -> Stage:
        folder = out / f"kernels_{backend}"

        def command(seconds: float) -> list:
            options = "--backends", backend, "--budget", max(5, round(seconds - SLACK / 3)), "--out", folder
            return [python, BENCHMARKS / "timing/kernels.py", *options]

        return Stage(f"kernels_{backend}", command, least, most, folder / "kernels.json", found[backend])

    tool = shutil.which("compute-sanitizer", path=os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin")

    def sanitizer(name: str, least: float, most: float, backends: list[str], *options: str) -> Stage:
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        if name == "memcheck":
            command += ["--report-api-errors", "no"]  # libraries try calls that may fail
        dry = [python, BENCHMARKS / "timing/kernels.py", "--dry", "--steps", "3", "--out", scratch, *options]
        dry += ["--backends", *backends]
        absent = "" if tool else "there is no compute-sanitizer"
        absent = absent or ("" if backends else f"there are no such kernels here: {found['cuda']}")
        # With the allocator's cache, accesses past a tensor would fall into another one's memory.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        return Stage(name, lambda _: [*command, *dry], least, most, missing=absent, variables=uncached)

    def speed(seconds: float) -> list:
        budget = max(10, round(seconds - SLACK))
        return [python, BENCHMARKS / "speed.py", "--device", "cuda", "--budget", budget, "--out", out]

    own = [name for name in ("triton", "cuda") if not found[name]]
    facts = scratch / "environment.json"
    return [
        Stage("environment", lambda _: [python, BENCHMARKS / "report/environment.py", facts], 10, 40, facts),
        tests("gpu_tests", 75, 150, "test_gpu.py"),
        tests("triton_tests", 35, 80, "test_triton*.py"),
        tests("cuda_tests", 15, 60, "test_cuda*.py", found["cuda"]),
        sanitizer("memcheck", 20, 70, own),
        sanitizer("racecheck", 15, 50, [name for name in own if name == "cuda"], "--kernels-alone"),
        kernels("triton", 45, 120),
        kernels("cuda", 25, 50),
        kernels("eager", 10, 25),
        Stage("speed", speed, 185, 230, out / "speed.json", missing("matplotlib", "tqdm")),
    ]


def gpu_backends() -> dict[str, str]:
    """Why a backend cannot serve here, and nothing where it can."""
    from ifr_fast import backends

    return {name: "" if backend.available else backend.reason for name, backend in backends().items()}


def bars(outcomes: Sequence[Outcome]) -> list[dict]:
    """What the project aims at on a GPU: speed.py's targets, and what the sweeps reach beyond the caches."""
    results = {outcome.name: outcome.results or {} for outcome in outcomes}
    found = []
    for backend in ("triton", "cuda"):
        cases = results.get(f"kernels_{backend}", {}).get("cases", [])
        for family in ("gram_row", "combine"):
            large = [c for c in cases if c["family"] == family and c["n"] == 512 and c["dtype"] == "bfloat16"]
            reached = [c["of_copy"] for c in large if "of_copy" in c]
            value = min(reached) if reached else None
            met = None if value is None else value >= 0.8
            what = f"{family} / copy, bandwidth, {backend}, N = 512, the worst K"
            found.append({"what": what, "bound": "≥ 0.8", "value": value, "met": met})
    return [*results.get("speed", {}).get("targets", []), *found]


def print_table(outcomes: Sequence[Outcome]) -> None:
    print()
    for outcome in outcomes:
        print(f"{outcome.name:18} {outcome.state:10} {outcome.seconds:4.0f} s  {outcome.detail[:110]}")
    print()
    for bar in bars(outcomes):
        value = "" if bar["value"] is None else f"{bar['value']:.3g}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        print(f"{bar['what']:66} {value:>8}  {bar['bound']:>7}  {verdict}")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="stages to leave out")
    parser.add_argument("--budget", type=float, default=470, help="seconds in all (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        parser.exit(2, "gpu_check.py: torch finds no GPU here, and all that this does needs one\n")
    try:
        importlib.import_module("ifr_fast")
    except ImportError as error:
        parser.exit(2, f"gpu_check.py: ifr_fast does not import ({error}): install it first, as README says\n")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        return check(options, out, planned(out, Path(scratch)))


def check(options: argparse.Namespace, out: Path, stages: list[Stage]) -> int:
    """Run the stages that are not to be skipped; the exit status."""
    unknown = set(options.skip) - {stage.name for stage in stages}
    if unknown:
        names = ", ".join(stage.name for stage in stages)
        sys.exit(f"gpu_check.py: --skip: expected some of {names}; got {', '.join(sorted(unknown))}")
    absent = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if absent:
        print(f"not installed: {', '.join(absent)}")
    log = out / "gpu_check.log"
    log.write_text("")

    def report(outcomes: list[Outcome]) -> None:
        found = {"skipped": options.skip, "not_installed": absent, "bars": bars(outcomes)}
        found["stages"] = [vars(outcome) for outcome in outcomes]
        (out / "gpu_check.json").write_text(json.dumps(found, indent=1) + "\n")

    chosen = [stage for stage in stages if stage.name not in options.skip]
    outcomes = run_stages(chosen, options.budget, log, report)
    for outcome in outcomes:
        if outcome.tail:
            print(f"\n----- {outcome.name}, the end of its output\n{outcome.tail[-PRINTED:]}")
    print_table(outcomes)
    return int(any(outcome.state in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
