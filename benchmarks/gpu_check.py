"""Everything that a GPU is needed for, in one command of less than ten minutes on a bare machine.

    python benchmarks/gpu_check.py --out results

Runs from a checkout: where no ifr_fast is installed it builds one, for this GPU alone, in a folder of its own, and goes
on from the sources with Triton's kernels where that fails. Downloads and installs nothing, changes no setting of the
device. Needs torch; to build, nvcc, a C++ compiler, pybind11 and ninja; pytest and hypothesis for the tests (which run
in parallel where pytest-xdist is at hand); matplotlib and tqdm for the speed; torchdeq, if it is to be compared with.

Every stage is a process of its own with its own time, what tells most first: one that fails or hangs costs the others
nothing. Prints a short table last. gpu_check.json holds everything, and is always whole and never more than seconds
old: a program that is killed leaves what it has. gpu_check.log has what the stages printed, speed.json and speed.png
are the last benchmark's. The exit status is 1 where a stage failed, whatever the speed, and 2 without a GPU. --dry
rehearses the stages at toy sizes on a CPU.
"""

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event

sys.path.append(str(Path(__file__).resolve().parents[1]))

from benchmarks.report.files import write_json
from benchmarks.timing.stages import Outcome, Stage, run_stages, tests_so_far

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = Path(__file__).resolve().parent
PACKAGES = ("pytest", "hypothesis", "xdist", "matplotlib", "tqdm", "triton", "torchvision", "torchdeq")
PRINTED = 1000  # characters of a failed stage's output
SHOWN = {"profile_triton": 1700, "profile_triton_graph": 1700, "forward": 4500}  # characters of a passed one's
LONGEST = 11_500  # characters of the report at the end
NEED_NO_GPU = "not (emulation or nvcc or nan_at_first or test_triton_compile)"
NO_GPU = "torch finds no GPU here, and all that this does needs one"
TOY = ["--channels", "8", "--size", "6", "--steps", "3"]


@dataclass
class Plan:
    """The stages' commands. outcomes: of the stages so far, which decide what the later ones run on."""

    out: Path
    scratch: Path
    dry: bool = False
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.found = is_installed(self.scratch)
        self.cuda_path = os.environ.get("PATH", "") + os.pathsep + "/usr/local/cuda/bin"
        self.library = self.scratch / "library"

    def results(self, name: str) -> dict:
        outcome = self.outcomes.get(name)
        return (outcome and outcome.results) or {}

    @property
    def built(self) -> bool:
        return "build" in self.outcomes and self.outcomes["build"].state == "passed"

    @property
    def unbuilt(self) -> str:
        return "" if self.found or self.built else "there is no built ifr_fast"

    def no_gpu(self) -> str:
        facts = self.results("environment")
        return NO_GPU if facts and "gpu" not in facts and not self.dry else ""

    def lacking(self, backend: str) -> str:
        """Why this backend cannot serve, by what the smoke tests found; nothing where it can or nobody knows."""
        for name in ("smoke_cuda", "smoke"):
            if found := self.results(name).get("backends"):
                return found[backend]
            if self.built:
                break  # what was found before the build means nothing now
        return ""

    def variables(self) -> dict[str, str]:
        """What ifr_fast is imported from."""
        if self.found:
            return {}
        others = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
        here = self.library if self.built else ROOT
        return {"PYTHONPATH": os.pathsep.join([str(here), *map(os.path.abspath, others)])}

    def stages(self) -> list[Stage]:
        found = [
            self.script("environment", "report/environment.py", 8, 60, lambda _: [self.json("environment")]),
            self.build(),
            self.smoke("smoke", 20, 75, "triton", "eager"),
            self.smoke("smoke_cuda", 8, 40, "cuda"),
            self.profile("triton", "", 15, 45),
            self.profile("triton", "_graph", 15, 45),
            self.profile("cuda", "", 8, 30),
            self.profile("cuda", "_graph", 8, 30),
            self.profile("cuda", "_8bit", 8, 30),  # on Hopper its step is one kernel, which sweeps the history once
            self.speed("forward", 45, 75, "--short"),
            self.kernels("triton", 40, 80),
            self.kernels("cuda", 20, 45),
            self.tests("gpu_tests", 50, 90, "test_gpu_head*.py"),
            self.tests("triton_tests", 20, 60, "test_triton*.py"),
            self.tests("cuda_tests", 10, 40, "test_cuda*.py", "cuda"),
            self.speed("speed", 120, 220),
            self.sanitizer("memcheck", 15, 60, ["triton", "cuda"]),
            self.sanitizer("racecheck", 10, 40, ["cuda"], "--kernels-alone"),
        ]
        return [
            replace(
                stage,
                missing=lambda own=stage.missing: self.no_gpu() or own(),
                variables=lambda own=stage.variables: {**self.variables(), **own()},
            )
            for stage in found
        ]

    def json(self, name: str, file: str = "") -> Path:
        """Where the stage of this name leaves its JSON."""
        return self.scratch / name / (file or f"{name}.json")

    def script(
        self, name: str, path: str, least: float, most: float, options: Callable[[float], Sequence], **fields
    ) -> Stage:
        """A program of ours."""
        self.json(name).parent.mkdir(exist_ok=True)
        fields = {"leaves": self.json(name), **fields}
        return Stage(name, lambda s: [sys.executable, BENCHMARKS / path, *options(s)], least, most, **fields)

    def build(self) -> Stage:
        """A package for this GPU alone, beside the first smoke test, which measures nothing."""

        def missing() -> str:
            home = os.environ.get("CUDA_HOME")
            nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else self.cuda_path)
            return f"ifr_fast is installed: {self.found}" if self.found else "" if nvcc else "there is no nvcc"

        def variables() -> dict[str, str]:
            jobs = str(max(1, (os.cpu_count() or 1) - 2))
            arch = self.results("environment").get("compute capability", "").replace(".", "")
            archs = {"IFR_FAST_ARCHS": "90a" if arch == "90" else arch} if arch else {}
            return {"IFR_FAST_CUDA": "1", "MAX_JOBS": jobs, **archs}

        command = [sys.executable, "setup.py", "build", "--build-lib", self.library]
        fields = {"variables": variables, "missing": missing, "folder": ROOT, "background": True, "measures": False}
        return Stage("build", lambda _: command, 0, 150, **fields)

    def smoke(self, name: str, least: float, most: float, *backends: str) -> Stage:
        def missing() -> str:
            return self.lacking("cuda") or self.unbuilt

        toys = ["--n", "1", "3"] if self.dry else []
        options = ["--backends", *(["eager"] if self.dry else backends), "--out", self.json(name), *toys]
        # The first one runs beside the build; what the second finds says what the stages after it can run.
        fields = {"missing": missing} if "cuda" in backends and not self.dry else {"measures": "cuda" in backends}
        return self.script(name, "timing/smoke.py", least, most, lambda _: options, **fields)

    def profile(self, backend: str, way: str, least: float, most: float) -> Stage:
        """Replays by a process of their own: a profiler that meets graphs of its process's past may see nothing."""
        name = f"profile_{backend}{way}"
        ways = {"": [], "_graph": ["--graph"], "_8bit": ["--graph", "--history", "float8_e5m2"]}
        options = ["--backend", "eager" if self.dry else backend, *ways[way]]
        options += ["--out", self.json(name), *(["--n", "2", *TOY] if self.dry else [])]
        missing = (lambda: "") if self.dry else lambda: self.lacking(backend)
        return self.script(name, "timing/profile_solve.py", least, most, lambda _: options, missing=missing)

    def kernels(self, backend: str, least: float, most: float) -> Stage:
        def options(seconds: float) -> list:
            toys = ["--dry", "--steps", "3"] if self.dry else []
            chosen = ["--backends", "eager" if self.dry else backend, "--budget", max(5, round(seconds - 15))]
            return [*chosen, "--out", self.json(name).parent, *toys]

        name, missing = f"kernels_{backend}", (lambda: "") if self.dry else lambda: self.lacking(backend)
        fields = {"leaves": self.json(name, "kernels.json"), "missing": missing}
        return self.script(name, "timing/kernels.py", least, most, options, **fields)

    def speed(self, name: str, least: float, most: float, *short: str) -> Stage:
        """The whole one leaves its files where they are wanted."""
        folder = self.json(name).parent if short else self.out

        def options(seconds: float) -> list:
            device, toys = ("cpu", ["--n", "2", "3", "--table", "2", *TOY]) if self.dry else ("cuda", [])
            budget = 2 if self.dry else max(10, round(seconds - (15 if short else 45)))
            return ["--device", device, "--budget", budget, "--out", folder, *short, *toys]

        fields = {"leaves": folder / "speed.json", "missing": lambda: lacking_packages("matplotlib", "tqdm")}
        return self.script(name, "speed.py", least, most, options, **fields)

    def tests(self, name: str, least: float, most: float, pattern: str, backend: str = "triton") -> Stage:
        paths = sorted((ROOT / "tests").rglob(pattern))
        options = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml", "-v", "--tb=short", "--maxfail=15"]
        options += ["--full", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=45", "-k", NEED_NO_GPU]
        options += ["--collect-only", "-q"] if self.dry else []
        if not lacking_packages("xdist") and not self.dry:  # kernels are compiled most of the time: a core a process
            options += ["-n", str(max(1, min(12, (os.cpu_count() or 1) - 2)))]

        def missing() -> str:
            absent = lacking_packages("pytest", "hypothesis") or ("" if paths else f"there are no tests/{pattern}")
            if self.dry:
                own = {"gpu_tests": "it is all skipped without a GPU", "cuda_tests": self.unbuilt}
                return absent or own.get(name, "")
            return absent or self.lacking(backend)

        command = [sys.executable, "-m", "pytest", *options, *paths]
        fields = {"missing": missing, "reads": tests_so_far, "variables": lambda: {"OMP_NUM_THREADS": "1"}}
        return Stage(name, lambda _: command, least, most, **fields)

    def sanitizer(self, name: str, least: float, most: float, backends: list[str], *options: str) -> Stage:
        tool = shutil.which("compute-sanitizer", path=self.cuda_path)
        command = [tool, "--tool", name, "--error-exitcode", "9", "--print-limit", "20"]
        if name == "memcheck":
            command += ["--report-api-errors", "no"]  # libraries try calls that may fail
        command += [sys.executable, BENCHMARKS / "timing/kernels.py", "--dry", "--steps", "3", *options]

        def missing() -> str:
            absent = "" if tool else "there is no compute-sanitizer"
            return absent or ("" if any(not self.lacking(b) for b in backends) else self.lacking(backends[0]))

        def complete(_: float) -> list:
            chosen = [backend for backend in backends if not self.lacking(backend)]
            return [*command, "--backends", *chosen, "--out", self.scratch / name]

        # With the allocator's cache, accesses past a tensor would fall into another one's memory.
        uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        fields = {"missing": missing, "variables": lambda: uncached, "leaves": self.json(name, "kernels.json")}
        return Stage(name, complete, least, most, **fields)


def is_installed(folder: Path) -> str:
    """Where ifr_fast is imported from by a program that runs in this folder, if anywhere."""
    program = "from importlib.util import find_spec as f; s = f('ifr_fast'); print(s.origin if s else '')"
    return subprocess.run([sys.executable, "-c", program], cwd=folder, capture_output=True, text=True).stdout.strip()


def lacking_packages(*names: str) -> str:
    absent = [name for name in names if importlib.util.find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


def bars(outcomes: dict[str, Outcome]) -> list[dict]:
    """What the project aims at on a GPU: speed.py's targets, and what the sweeps reach beyond the caches."""
    results = {outcome.name: outcome.results or {} for outcome in outcomes.values()}
    # The whole benchmark's are the better ones; what it did not come to, the short one may have.
    aims: dict[str, dict] = {}
    for aim in (aim for name in ("speed", "forward") for aim in results.get(name, {}).get("targets", [])):
        if aims.setdefault(aim["what"], aim)["value"] is None:
            aims[aim["what"]] = aim
    found = list(aims.values())
    for backend in ("triton", "cuda"):
        cases = results.get(f"kernels_{backend}", {}).get("cases", [])
        for family in ("gram_row", "combine"):
            large = [c for c in cases if c["family"] == family and c["n"] == 512 and c["history"] == "bfloat16"]
            reached = [c["of_copy"] for c in large if "of_copy" in c]
            value = min(reached) if reached else None
            met = None if value is None else value >= 0.8
            what = f"{family} / copy, bandwidth, {backend}, N = 512, the worst K"
            found.append({"what": what, "bound": "≥ 0.8", "value": value, "met": met})
    return found


def table(outcomes: dict[str, Outcome]) -> str:
    """What is printed last: the ends of what is to be shown and of what failed, the stages, the bars. Too long a table
    loses its beginning."""
    lines = []
    for name, outcome in sorted(outcomes.items(), key=lambda item: item[1].bad):
        if shown := PRINTED if outcome.bad else SHOWN.get(name, 0) if outcome.state == "passed" else 0:
            lines += [f"\n----- {name}, the end of its output", outcome.tail[-shown:].partition("\n")[2].rstrip()]
    lines.append("")
    for outcome in outcomes.values():
        lines.append(f"{outcome.name:21} {outcome.state:10} {outcome.seconds:4.0f} s  {outcome.detail[:100]}")
    lines.append("")
    for bar in bars(outcomes):
        value = "" if bar["value"] is None else f"{bar['value']:.3g}"
        verdict = {True: "met", False: "MISSED", None: "not measured"}[bar["met"]]
        lines.append(f"{bar['what']:66} {value:>8}  {bar['bound']:>7}  {verdict}")
    return "\n".join(lines)[-LONGEST:]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STAGE", help="stages to leave out")
    parser.add_argument("--budget", type=float, default=570, help="seconds in all (%(default)s)")
    parser.add_argument("--dry", action="store_true", help="rehearse at toy sizes, without a GPU")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu_check_", ignore_cleanup_errors=True) as scratch:
        plan = Plan(out, Path(scratch), options.dry)
        return check(options, plan.stages(), plan)


def check(options: argparse.Namespace, stages: list[Stage], plan: Plan) -> int:
    """Run the stages that are not to be skipped; the exit status."""
    if unknown := set(options.skip) - {stage.name for stage in stages}:
        names = ", ".join(stage.name for stage in stages)
        sys.exit(f"gpu_check.py: --skip: expected some of {names}; got {', '.join(sorted(unknown))}")
    outcomes, absent = plan.outcomes, [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    log = plan.out / "gpu_check.log"
    log.write_bytes(b"")

    def report() -> None:
        found = {"skipped": options.skip, "not_installed": absent, "bars": bars(outcomes)}
        found["stages"] = [vars(outcome) for outcome in outcomes.values()]
        write_json(plan.out / "gpu_check.json", found)

    stopped, received = Event(), []

    def stop(number: int, _) -> None:
        received.append(number)
        stopped.set()

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:  # nohup's
            signal.signal(number, stop)
    report()
    chosen = [stage for stage in stages if stage.name not in options.skip]
    run_stages(chosen, options.budget, outcomes, report, plan.scratch, log, stopped)
    print(table(outcomes), flush=True)
    if received:
        return 128 + received[0]
    if plan.no_gpu():
        print(f"gpu_check.py: {NO_GPU}", file=sys.stderr)
        return 2
    return int(any(outcome.bad for outcome in outcomes.values()))


if __name__ == "__main__":
    sys.exit(main())
