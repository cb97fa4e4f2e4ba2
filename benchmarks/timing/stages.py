"""Runs stages, each a process of its own with its own time, and keeps what they leave, even of those that hang or die.

Knows nothing of torch: it starts at once, and whatever befalls torch or the device befalls a stage.
"""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event

TAIL = 8000  # characters of a stage's output that its outcome keeps
LOGGED = 200_000  # bytes of it that the log keeps: the last ones
TICK, REPORTED = 0.05, 2.0  # seconds between looks at the processes, and between reports of what they have so far
STATES = "PASSED|SKIPPED|FAILED|ERROR"  # of tests
PATIENCE = 3  # seconds that a process has to end by itself when it is interrupted


@dataclass(frozen=True)
class Stage:
    """A process, in a session of its own, and what it may take.

    command: of the seconds that it gets. least: seconds kept for it by the stages before it; most: what it may take.
    leaves: the JSON object that it writes, from time to time as a whole. reads: makes such an object of its output.
    missing: why it cannot run. variables: of its environment, added to ours. folder: where it runs; elsewhere than here
    Python would import what lies here. background: it runs beside the stages after it, and has ended before one that
    measures starts.
    """

    name: str
    command: Callable[[float], Sequence[str | Path]]
    least: float
    most: float
    leaves: Path | None = None
    reads: Callable[[str], dict] | None = None
    missing: Callable[[], str] = lambda: ""
    variables: Callable[[], dict[str, str]] = dict
    folder: Path | None = None
    background: bool = False
    measures: bool = True


@dataclass
class Outcome:
    """state: running, passed, failed, timed out, stopped or not run. detail: the stage in a line. tail: the end of its
    output. results: what it left."""

    name: str
    state: str
    seconds: float = 0.0
    detail: str = ""
    tail: str = ""
    results: dict | None = None

    @property
    def bad(self) -> bool:
        return self.state in ("failed", "timed out", "stopped")


@dataclass
class Run:
    """A stage's process from its start on."""

    stage: Stage
    allowed: float
    scratch: Path
    state: str = "running"
    started: float = field(default_factory=time.monotonic)
    results: dict | None = None

    def __post_init__(self) -> None:
        if self.stage.leaves:
            self.stage.leaves.unlink(missing_ok=True)
        self.output = self.scratch / f"{self.stage.name}.txt"
        variables = {**os.environ, "PYTHONUNBUFFERED": "1", "TQDM_MININTERVAL": "5", **self.stage.variables()}
        with self.output.open("wb") as file:
            self.process = subprocess.Popen(
                list(map(str, self.stage.command(self.allowed))), cwd=self.stage.folder or self.scratch, env=variables,
                stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip

    def over(self) -> bool:
        """Whether the process has ended; one past its time is ended."""
        if self.process.poll() is not None:
            self.state = "failed" if self.process.returncode else "passed"
            self._signal(signal.SIGKILL)  # what it may have left behind
        elif time.monotonic() - self.started > self.allowed:
            self.end("timed out")
        return self.state != "running"

    def end(self, state: str, patience: float = PATIENCE) -> None:
        """Interrupts the process and its children, so that they can say how far they came; then kills them."""
        self._signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(patience)
        self._signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(PATIENCE)
        self.state = state

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def outcome(self) -> Outcome:
        """As it is by now."""
        output = readable(last_bytes(self.output, LOGGED))
        detail = "" if self.state == "running" else summary(output)
        torn = False
        if self.stage.leaves and self.stage.leaves.exists():
            try:
                found = json.loads(self.stage.leaves.read_bytes())
                torn = not isinstance(found, dict)
            except (OSError, ValueError):
                torn = True
            self.results = self.results if torn else found
        if self.stage.reads:
            self.results = self.stage.reads(output)
        if torn and self.state != "running":
            detail += f" {self.stage.leaves.name} is incomplete."
        return Outcome(
            self.stage.name, self.state, time.monotonic() - self.started, detail, output[-TAIL:], self.results
        )


def run_stages(
    stages: Sequence[Stage],
    budget: float,
    outcomes: dict[str, Outcome],
    report: Callable[[], None],
    scratch: Path,
    log: Path,
    stopped: Event,
) -> None:
    """Runs the stages in their order within `budget` seconds, and fills `outcomes` with how each came out, or stands.

    Calls report when a stage starts, while it runs, and when it has ended. Ends early when `stopped` is set. `missing`
    and `variables` of a stage may look at the outcomes of earlier ones. Log: what the stages printed.
    """
    deadline = time.monotonic() + budget
    running: list[Run] = []

    def settle(outcome: Outcome) -> None:
        outcomes[outcome.name] = outcome
        report()
        print(f"{outcome.name}: {outcome.state}, {outcome.seconds:.0f} s. {outcome.detail}", flush=True)

    def finish(run: Run) -> None:
        running.remove(run)
        with log.open("ab") as file:
            file.write(f"\n===== {run.stage.name}\n".encode() + last_bytes(run.output, LOGGED))
        settle(run.outcome())

    def wait(for_whom: Callable[[Run], bool]) -> None:
        """Until these have ended."""
        reported = time.monotonic()
        while any(map(for_whom, running)) and not stopped.is_set():
            for run in [run for run in running if run.over()]:
                finish(run)
            if time.monotonic() - reported > REPORTED:
                outcomes.update({run.stage.name: run.outcome() for run in running})
                report()
                reported = time.monotonic()
            time.sleep(TICK)

    for i, stage in enumerate(stages):
        kept = sum(later.least for later in stages[i + 1 :] if not later.missing())
        if stage.measures and not stage.background:
            for run in running:
                run.allowed = min(run.allowed, max(0, deadline - kept - stage.least - run.started))
            wait(lambda run: run.stage.background)
        if stopped.is_set():
            break
        allowed = min(stage.most, deadline - time.monotonic() - kept)
        if problem := stage.missing():
            settle(Outcome(stage.name, "not run", detail=problem))
            continue
        if allowed < 1:
            settle(Outcome(stage.name, "not run", detail=f"no time left of {budget:.0f} s"))
            continue
        try:
            running.append(Run(stage, allowed, scratch))
        except OSError as error:
            settle(Outcome(stage.name, "failed", detail=f"{type(error).__name__}: {error}"))
            continue
        outcomes[stage.name] = running[-1].outcome()
        report()
        if not stage.background:
            wait(lambda run: not run.stage.background)
    wait(lambda run: True)
    for run in list(running):
        run.end("stopped", patience=1)
        finish(run)
    for stage in stages:
        outcomes.setdefault(stage.name, Outcome(stage.name, "not run", detail="stopped before its turn"))
    report()


def last_bytes(path: Path, most: int) -> bytes:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read(most)


def readable(output: bytes) -> str:
    """Text without what terminals take for commands; of a progress bar what was there last."""
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in output.decode(errors="replace").split("\n"))
    return "".join(c if c.isprintable() or c in "\n\t" else "�" for c in "\n".join(lines))


def summary(output: str) -> str:
    """The line of a stage's output that says most."""
    lines = [line.strip()[:200] for line in output.splitlines() if line.strip()]
    for pattern in (r"=+ (.*\b(?:passed|failed|errors?|skipped)\b.* in [\d.]+s.*?) =+$", r"=+ (.* SUMMARY: .*)$"):
        found = [match[1] for line in lines if (match := re.search(pattern, line))]
        if found:
            return found[-1]
    return lines[-1] if lines else "it printed nothing"


def tests_so_far(output: str) -> dict:
    """How many tests passed, by pytest's words with -v, and which did not: also of a run that was cut off."""
    found = {"passed": 0, "skipped": 0, "failed": []}
    for line in output.splitlines():
        # With xdist "[gw0] [  5%] PASSED name", without it "name PASSED [  5%]".
        match = re.match(rf"\[gw\d+\] .*?\b(?P<state>{STATES}) (?P<name>.+)", line)
        match = match or re.match(rf"(?P<name>\S+::.+?) (?P<state>{STATES})\b", line)
        if match and match["state"] in ("PASSED", "SKIPPED"):
            found[match["state"].lower()] += 1
        elif match and match["name"].strip() not in found["failed"]:
            found["failed"].append(match["name"].strip())
    return found
