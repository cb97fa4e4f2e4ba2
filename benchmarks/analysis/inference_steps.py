"""What a trained head's masks are worth when it solves in fewer or more steps than in training.

    python benchmarks/analysis/inference_steps.py DATA --sweep runs/ablation --output runs/inference_steps

Takes the branches that ablation.py trained, and tests them on DATA's unseen objects with Broyden's method cut after a
number of steps, and stopped at a relative residual; beside them stands the baseline, four convolutions. Writes
inference_steps.json and .png.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.analysis.resampling import paired_gain
from benchmarks.quality.mask_branch import MaskBranch, evaluate
from benchmarks.quality.objects import Objects
from benchmarks.quality.strategies import BASELINE, STRATEGIES
from benchmarks.quality.sweep import load_test_objects, trained_branches
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import DataError, write_json
from ifr_fast import Broyden, IFRHead, Unroll

ROWS = ["IFR", "IFR, C/4 inside, stopping at 1e-1"]
EXACT = 1e-6  # the residual at which a solve that is cut stops; bfloat16 does not reach it


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("data", help="the sweep's folder in COCO format", type=Path)
    parser.add_argument("--sweep", help="ablation.py's output (%(default)s)", type=Path, default=Path("runs/ablation"))
    parser.add_argument("--rows", help="of the sweep (%(default)s)", nargs="+", default=ROWS, metavar="ROW")
    limit = "of the unseen objects to test on, evenly spaced (all)"
    parser.add_argument("--objects", help=limit, type=int)
    steps, tolerances = [5, 7, 10, 15], [1e-1, 3e-2, 1e-2]
    parser.add_argument("--steps", help="to cut after (%(default)s)", nargs="+", type=int, default=steps)
    stop = "residuals to stop at, after at most 15 steps (%(default)s)"
    parser.add_argument("--rtols", help=stop, nargs="+", type=float, default=tolerances)
    parser.add_argument("--output", help="folder (%(default)s)", type=Path, default=Path("runs/inference_steps"))
    options = parser.parse_args(arguments)
    if options.objects is not None and options.objects < 1:
        parser.error(f"--objects: expected at least 1, got {options.objects}")
    for name in ("steps", "rtols"):
        if min(getattr(options, name)) <= 0:
            parser.error(f"--{name}: expected positive numbers, got {min(getattr(options, name))}")
    return options


def run(options: argparse.Namespace) -> dict[str, Any]:
    branches = {row: trained_branches(options.sweep, row) for row in (BASELINE, *options.rows)}
    check(branches)
    objects = load_test_objects(options.data, options.sweep)
    if options.objects:
        objects = objects[torch.linspace(0, len(objects) - 1, min(options.objects, len(objects))).long()]
    channels = next(iter(branches[BASELINE].values())).reduce.out_channels
    solvers = {f"{steps} steps": Broyden(max_iter=steps, rtol=EXACT) for steps in options.steps}
    solvers |= {f"to {rtol:g}": Broyden(rtol=rtol) for rtol in options.rtols}
    total = sum(len(of_seed) * (len(solvers) if row != BASELINE else 1) for row, of_seed in branches.items())
    with tqdm(total=total, desc="tests", dynamic_ncols=True) as bar:
        baseline = evaluations(branches.pop(BASELINE), BASELINE, objects, bar)
        rows = {
            row: {
                name: summary(row, evaluations(of_seed, row, objects, bar, solver), baseline, channels)
                for name, solver in solvers.items()
            }
            for row, of_seed in branches.items()
        }
    report = {
        "data": options.data.resolve().name,
        "channels": channels,
        "objects": len(objects),
        "environment": environment(torch.device("cpu")),
        "baseline": [test["iou"] for test in baseline.values()],
        "rows": rows,
    }
    write_json(options.output / "inference_steps.json", report)
    save_picture(options.output / "inference_steps.png", report)
    return report


def check(branches: dict[str, dict[int, MaskBranch]]) -> None:
    """Raises DataError for a row that solves nothing, or has a seed that the baseline has not."""
    for row, of_seed in branches.items():
        refine = next(iter(of_seed.values())).refine
        if row != BASELINE and (not isinstance(refine, IFRHead) or isinstance(refine.solver, Unroll)):
            raise DataError(f"rows: expected some that solve for an equilibrium, got {row!r}")
        if more := sorted(of_seed.keys() - branches[BASELINE].keys()):
            raise DataError(f"sweep: {row!r} has weights of the seeds {more}, {BASELINE!r} has not")


def evaluations(
    of_seed: dict[int, MaskBranch], row: str, objects: Objects, bar: tqdm, solver: Broyden | None = None
) -> dict[int, dict[str, Any]]:
    """Each seed's branch on the objects, its refinement solved by `solver` where it is one that solves."""
    found = {}
    for seed, branch in of_seed.items():
        if solver is not None:
            branch.refine.solver = solver
        found[seed] = evaluate(branch, objects, bf16=STRATEGIES[row].bf16)
        bar.update()
    return found


def summary(
    row: str, own: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]], channels: int
) -> dict[str, Any]:
    tests = list(own.values())
    steps = [test["iterations"] for test in tests]
    return {
        "seeds": list(own),
        "iou": [test["iou"] for test in tests],
        "gain": paired_gain(tests, [baseline[seed] for seed in own]),
        "residual": [test["residual"] for test in tests],
        "steps": steps,
        "convolutions": STRATEGIES[row].convolutions(statistics.mean(steps), channels),
    }


def save_picture(path: Path, report: dict[str, Any]) -> None:
    """Mask IoU against what it costs: a curve of solves that are cut, points of solves that stop at a residual."""
    figure = Figure(figsize=(8, 5), layout="constrained", dpi=110)
    axes = figure.subplots()
    level = 100 * statistics.mean(report["baseline"])
    axes.axhline(level, color="black", linestyle="--", label=BASELINE)
    axes.plot(STRATEGIES[BASELINE].convolutions(None, report["channels"]), level, "ko")
    for number, (row, found) in enumerate(report["rows"].items()):
        for marker, kind in (("o-", "steps"), ("*", "to")):
            of = [entry for name, entry in found.items() if kind in name.split()]
            costs = [entry["convolutions"] for entry in of]
            ious = [100 * statistics.mean(entry["iou"]) for entry in of]
            label = f"{row}: cut" if kind == "steps" else f"{row}: stopped at a residual"
            axes.plot(costs, ious, marker, color=f"C{number}", markersize=6 if kind == "steps" else 12, label=label)
    axes.set_xlabel("3×3 convolutions between all channels at inference")
    axes.set_ylabel("mask IoU, %")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report = run(options)
    print(results_page.inference_steps(report))
    print(f"wrote {options.output / 'inference_steps.json'} and {options.output / 'inference_steps.png'}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"inference_steps.py: error: {error}")
