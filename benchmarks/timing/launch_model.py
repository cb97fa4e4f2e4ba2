"""A launch's time on a GPU as predicted on paper, from the kernel as compiled. No figure here is measured by us.

results/paper/usage.json (tests/tools/kernel_usage.py) says what each kernel takes of a multiprocessor, traffic.py what
it moves. A kernel's predicted time is the larger of two bounds, and what a launch costs:

    launch + max(memory, waves · wait + memory / resident)

memory: its bytes by the bandwidth of where they are, device memory or L2 cache. waves: its blocks over those that fit
the chip beside each other, rounded up. wait: what a block waits in vain by itself, for first words and for sums. While
it waits, the other resident blocks of its multiprocessor move their bytes. Blocks of stopped samples only look.

A convolution is cuDNN's: whole waves of tiles of 128 positions × 256 channels.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.timing.traffic import traffic

RESULTS = Path(__file__).resolve().parents[1] / "results"
CHANNELS, POSITIONS, ACTIVATION = 256, 196, 2  # of a RoI; bytes of an activation
MICRO = 1e6


@dataclass(frozen=True)
class Chip:
    """Rates a second. cache: bytes of what was read last that L2 still has. clock: of a convolution's multiprocessors
    over the clock that a long product falls to, which power limits."""

    arch: int
    multiprocessors: int
    memory: float
    l2: float
    product: float
    cache: float = 35e6
    clock: float = 1.755 / 1.475


CHIPS = {
    # 798 TFLOP/s in bfloat16 and a copy at 3.0 TB/s: measured on an H100 SXM elsewhere (3.35 TB/s by its data sheet).
    # 5.5 TB/s of L2: published microbenchmarks have 5.5 to 7. L2 is 50 MB in two halves, which share part of it.
    # 1.755 GHz: the clock of a lightly loaded chip. 1.475 GHz is where 132 · 4096 FLOP a cycle make 798 TFLOP/s.
    "H100": Chip(90, 132, memory=3.0e12, l2=5.5e12, product=798e12),
    # The H100's chip with 4.8 TB/s by its data sheet, of which a copy is taken to reach the same share.
    "H200": Chip(90, 132, memory=4.3e12, l2=5.5e12, product=798e12),
}

# Estimates in µs, of no measurement of ours.
LAUNCH = 2.5  # from a kernel's start to its first block's first access, and from its last block's end to its own
LOOK = 0.5  # a trip to memory: a block of a stopped sample makes one
SUM = 0.2  # threads of a block add up what they hold
GAP, GAP_PROGRAMMATIC = 1.0, 0.3  # between kernels of a graph; where the next one was started ahead of the last's end
SETUP = 60.0  # weights in bfloat16, z⁰, the first z + X, the state, and at the end the best iterate and copies
PADDING = 30.0  # more of it where x is copied into a larger bucket
# A block's trips to memory that wait for each other, and its sums.
WAITS = {
    "norm_relu": (2, 2),  # the status, then y; mean and variance
    "tail + residual": (3, 5),  # z is read late; two norms, then ‖g‖² and ‖f‖²
    "gram_row": (2, 1),
    "rule": (4, 10),  # partial sums, matrices, results; Broyden's recursion has ten dependent sums
    "combine": (3, 0),  # the status, then coefficients, then rows
    "cluster_step": (4, 14),  # the rule, two meetings of the cluster, and z
    "norm_tail": (3, 4),
    "norm_relu_vjp": (3, 2),
    "norm_tail_vjp": (3, 4),
    "residual of total": (2, 1),
}
# Tensors that the last kernel or convolution has just written, and so are in L2 yet. All others are in memory.
IN_L2 = {
    "norm_relu": {"y", "out"},
    "tail + residual": {"y", "shortcut"},
    "norm_tail": {"y", "shortcut"},
    "norm_relu_vjp": {"grad", "grad_y"},
    "norm_tail_vjp": {"grad_y"},
    "residual of total": {"grad"},
}
MOVED = 16  # tensors of a state
CLUSTER = 8  # blocks, on as many multiprocessors of one GPC, which has 16 to 18


@dataclass(frozen=True)
class Run:
    """What is run. backend: of usage.json, "triton" or "cuda". one_sweep: the cluster kernel instead of gram_row, rule
    and combine. history: bytes of one number. stop: from this evaluation on (counted from 0) only the share `running`
    of the samples runs. segments: the solve ends where one of so many equal parts ends, `lag` parts after the last
    sample has stopped. halves: from the middle on it goes on with half of the samples if no more run. bucket: samples
    that a graph is recorded for, n by default. programmatic: kernels of this package are started ahead (programmatic
    dependent launch), as Triton's are. given: µs of a kernel in place of the model's."""

    n: int = 100
    backend: str = "triton"
    one_sweep: bool = False
    history: int = 2
    steps: int = 15
    stop: int | None = None
    running: float = 0.0
    segments: int = 1
    lag: int = 0
    bucket: int | None = None
    programmatic: bool = False
    halves: bool = False
    given: dict[str, float] = field(default_factory=dict)

    def share(self, evaluation: int) -> float:
        """Of the samples that still run."""
        return 1.0 if self.stop is None or evaluation < self.stop else self.running

    def halved(self, evaluation: int) -> bool:
        """Whether half of the samples alone is evaluated."""
        return self.halves and evaluation >= self.middle() and self.share(evaluation) <= 0.5

    def middle(self) -> int:
        """The evaluation from which on that may be."""
        return math.ceil((self.steps + 1) / 2)

    def evaluations(self) -> int:
        """How many are run before the solve ends."""
        most = self.steps + 1
        if self.stop is None or self.running:
            return most
        ends = [math.ceil(most * part / self.segments) for part in range(1, self.segments + 1)]
        first = next(i for i, end in enumerate(ends) if end >= self.stop)
        return ends[min(first + self.lag, self.segments - 1)]

    def sweeps(self) -> tuple[str, ...]:
        return ("cluster_step",) if self.one_sweep else ("gram_row", "rule", "combine")


@dataclass(frozen=True)
class Predicted:
    """Of one launch, or of some together: bytes from device memory and from L2, and µs."""

    launches: int = 0
    memory: float = 0
    l2: float = 0
    us: float = 0

    def __add__(self, other: Predicted) -> Predicted:
        return Predicted(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))


@cache
def usage() -> dict[str, Any]:
    return json.loads((RESULTS / "paper/usage.json").read_text())


def forward(run: Run, chip: Chip) -> list[dict[str, Any]]:
    """The rows of usage.json for a solve. Where no 8-bit history is there, the 16-bit kernels stand in."""
    wanted = (chip.arch, run.backend, "forward")
    rows = [r for r in usage()["kernels"] if (r["arch"], r["backend"], r["phase"]) == wanted]
    return [r for r in rows if r["history"].startswith("float8") == (run.history == 1)] or rows


def compiled(run: Run, chip: Chip, family: str, number: int) -> dict[str, Any]:
    """The row of usage.json for the family's launch `number` of a solve (from 1), or of its gradient where a solve
    has none."""
    rows = [r for r in forward(run, chip) if r["family"] == family] or [
        r for r in usage()["kernels"] if (r["arch"], r["backend"], r["family"]) == (chip.arch, run.backend, family)
    ]
    inside = [r for r in rows if r["numbers"][0] <= number <= r["numbers"][1]] or rows
    if not inside:
        raise LookupError(f"usage.json has no {family} of {run.backend} for sm_{chip.arch}")
    return inside[0]


def bytes_of(run: Run, chip: Chip, family: str, rows: int, samples: float, *, cold: bool) -> tuple[float, float]:
    """From device memory and from L2. cold: nothing is in L2, as kernels.py measures."""
    moved = traffic(round(samples * CHANNELS * POSITIONS), ACTIVATION, run.history, rows)[family]
    total = sum(moved.values())
    if cold:
        return total, 0
    near = sum(size for name, size in moved.items() if name in IN_L2.get(family, ()))
    if family in ("gram_row", "cluster_step"):
        near = moved["history"] / rows  # the newest row
    if family == "combine":
        near = min(moved["history"], chip.cache)  # what gram_row read last
    return total - near, near


def kernel(run: Run, chip: Chip, family: str, rows: int, share: float, *, cold: bool = False) -> Predicted:
    """A launch over the bucket, of which `share` runs. rows: of the history, which the launch sweeps; for others, the
    number of the launch."""
    samples = run.bucket or run.n
    memory, l2 = bytes_of(run, chip, family, rows, share * samples, cold=cold)
    if family in run.given:
        return Predicted(1, memory, l2, 2 + (run.given[family] - 2) * share)
    took = compiled(run, chip, family, rows)
    resident = took["blocks_per_sm"]
    places = chip.multiprocessors // CLUSTER * CLUSTER if family == "cluster_step" else chip.multiprocessors
    blocks = took["blocks"] / usage()["n"] * samples
    trips, sums = WAITS[family]
    moving = (memory / chip.memory + l2 / chip.l2) * MICRO
    waiting = math.ceil(blocks * share / (places * resident)) * (trips * LOOK + sums * SUM)
    looking = math.ceil(blocks * (1 - share) / (places * resident)) * LOOK
    return Predicted(1, memory, l2, LAUNCH + max(moving, waiting + moving / resident) + looking)


def halving(run: Run, chip: Chip) -> Predicted:
    """Half of the samples taken out of the batch and put back: their history, z and X; each read and written."""
    numbers = (run.bucket or run.n) / 2 * CHANNELS * POSITIONS
    memory = 2 * numbers * (2 * (run.steps * run.history + 4) + ACTIVATION)
    return Predicted(2 * MOVED, memory, us=memory / chip.memory * MICRO + 2 * MOVED * LAUNCH)


def convolution(run: Run, chip: Chip, *, half: bool = False) -> Predicted:
    """One of a bucket, or of half of it. All of its samples are convolved, those that have stopped too."""
    rows, columns, efficiency, ramp = 128, 256, 0.95, 4.0
    samples = run.bucket or run.n
    if half:
        samples //= 2
    tiles = math.ceil(samples * POSITIONS / rows) * math.ceil(CHANNELS / columns)
    rate = chip.product / chip.multiprocessors * efficiency * chip.clock
    tile = 2 * rows * columns * 9 * CHANNELS / rate * MICRO
    filled = tiles * 9 * CHANNELS * (rows + columns) * 2  # operands, read into shared memory
    return Predicted(1, 0, filled, math.ceil(tiles / chip.multiprocessors) * tile + ramp)
