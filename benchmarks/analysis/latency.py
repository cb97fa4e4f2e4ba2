"""What trained refinements cost at inference, on the features of unseen objects: time, residual and steps.

    python benchmarks/analysis/latency.py DATA --sweep runs/ablation --output runs/latency

Takes a branch of each row that ablation.py trained: of the seeds whose weights are there, the one whose solves take
nearest to the row's mean steps. All rows are timed in turns within one run, on objects drawn anew for every round, in
bfloat16 (autocast, as they were trained) and in float32, where a solve stops at the same residual. "ms": the median of
the wall time; "CPU ms": of the processor time of all threads. "× stack": the time over that of the four convolutions of
the same precision in the same round, median and quartiles of the rounds. Writes latency.json.
"""

import argparse
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.mask_branch import MaskBranch
from benchmarks.quality.objects import Objects
from benchmarks.quality.strategies import BASELINE
from benchmarks.quality.sweep import load_test_objects, read_report, typical_branch
from benchmarks.quality.training import autocast
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import DataError, write_json
from benchmarks.timing import measure
from benchmarks.timing.measure import Call, Timed, quartiles, ratios
from ifr_fast import IFRHead, Unroll, weight_cache

CPU = torch.device("cpu")
PRECISIONS = {"bfloat16": True, "float32": False}  # whether autocast is on


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("data", help="the sweep's folder in COCO format", type=Path)
    add("--sweep", help="ablation.py's output (%(default)s)", type=Path, default=Path("runs/ablation"))
    add("--rows", help="of the sweep (all)", nargs="+", metavar="ROW")
    add("--n", help="objects a pass (%(default)s)", type=int, default=16)
    add("--threads", help="(%(default)s)", type=int, default=torch.get_num_threads())
    add("--budget", help="seconds of timing, where 3 runs of each row fit (%(default)s)", type=float, default=120)
    add("--output", help="folder (%(default)s)", type=Path, default=Path("runs/latency"))
    options = parser.parse_args(arguments)
    for name in ("n", "threads", "budget"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    return options


@dataclass
class Contender:
    """A row's trained refinement in one precision, of one seed. x: what it is given, replaced before every round."""

    row: str
    seed: int
    precision: str
    branch: MaskBranch
    x: Tensor | None = None
    timed: Timed | None = None

    def renew(self, objects: Objects) -> None:
        with autocast(CPU, PRECISIONS[self.precision]):
            self.x = self.branch.reduced(objects.features)

    def call(self) -> Call:
        def refine() -> Tensor:
            with autocast(CPU, PRECISIONS[self.precision]):
                return self.branch.refine(self.x)

        return refine

    def report(self, objects: Objects, baseline: Timed) -> dict[str, Any]:
        """Times in seconds; the ratio is [first quartile, median, third quartile]. residual, steps: of all objects."""
        found = {"seed": self.seed, "median": self.timed.median}
        found["ratio"] = list(quartiles(ratios(self.timed.walls, baseline.walls)))
        found["processor_median"] = quartiles(sample.processor for sample in self.timed.samples.values())[1]
        self.renew(objects)
        self.call()()
        solution = getattr(self.branch.refine, "last_solution", None)
        if solution is not None:
            found |= {"residual": solution.residual.median().item(), "steps": solution.iterations.float().mean().item()}
        return found


def contenders(sweep: Path, rows: list[str]) -> list[Contender]:
    """A branch of each row, in each precision."""
    found = []
    for row in rows:
        seed, branch = typical_branch(sweep, row)
        if isinstance(branch.refine, IFRHead) and not isinstance(branch.refine.solver, Unroll):
            rtol, _ = branch.refine.solver.resolve(torch.bfloat16).resolved()
            branch.refine.solver = replace(branch.refine.solver, rtol=rtol)  # the training's, in float32 too
        found += [Contender(row, seed, precision, branch) for precision in PRECISIONS]
    return found


@torch.no_grad()
def run(options: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(options.threads)
    facts = environment(CPU)
    rows = list(dict.fromkeys([BASELINE, *(options.rows or read_report(options.sweep)["rows"])]))
    everything = contenders(options.sweep, rows)
    objects = load_test_objects(options.data, options.sweep)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> Objects:
        return objects[torch.randperm(len(objects), generator=generator)[:count]]

    def renew() -> None:
        drawn = draw(options.n)
        for contender in everything:
            contender.renew(drawn)

    renew()
    for contender in everything:
        contender.call()()  # the first call transforms weights
        contender.timed = Timed(contender.call, every_round=contender.row == BASELINE)
    measure.time_in_turns([contender.timed for contender in everything], CPU, options.budget, before_round=renew)
    baselines = {c.precision: c.timed for c in everything if c.row == BASELINE}
    some, found = draw(16 * options.n), {row: {} for row in rows}
    for contender in everything:
        found[contender.row][contender.precision] = contender.report(some, baselines[contender.precision])
    report = {
        "data": options.data.resolve().name,
        "channels": everything[0].branch.reduce.out_channels,
        "n": options.n,
        "environment": facts,
        "rows": found,
    }
    write_json(options.output / "latency.json", report)
    return report


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report = run(options)
    print(results_page.latency(report))
    print(f"wrote {options.output / 'latency.json'}")
    return report


if __name__ == "__main__":
    weight_cache.set_limit(1 << 30)  # a model has few heads; here all rows are timed in turns
    try:
        main()
    except DataError as error:
        sys.exit(f"latency.py: error: {error}")
