"""Compare refinements in the mask branch alone, trained on frozen features of annotated objects.

    python benchmarks/quality/ablation.py DATA --output runs/ablation
    python benchmarks/quality/ablation.py DATA --output runs/ablation --rows "4 convolutions" IFR --seeds 3
    python benchmarks/quality/ablation.py --output runs/ablation --test FOLDER

DATA is a folder in COCO format (see accuracy.py). Every training leaves a report and its weights in the output folder,
so a sweep that was stopped goes on where it was; ablation.json there holds all reports. results_page.py makes tables of
it. --test trains nothing: it evaluates the saved weights on the objects of another folder in COCO format.
"""

import argparse
import json
import os
import statistics
import sys
from collections import defaultdict
from dataclasses import asdict
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.analysis.resampling import gains, summary, together
from benchmarks.quality import accuracy
from benchmarks.quality.coco import DataError
from benchmarks.quality.held_out import evaluate_sweep
from benchmarks.quality.strategies import REFERENCES, STRATEGIES
from benchmarks.quality.sweep import Run, Settings, Sweep, claim, load_given
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import write_json

LEVEL = 1e-3  # a difference of validation IoUs that tells nothing: seeds scatter by twice that


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Exits with a message where options clash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = partial(accuracy.add, parser)
    add("data", "folder in COCO format to train on", type=Path, nargs="?")
    add("--output", "folder for trainings and ablation.json", type=Path, default=Path("runs/ablation"))
    add("--rows", "which to train (all)", nargs="+", choices=list(STRATEGIES), metavar="ROW")
    add("--seeds", "trainings of each row", type=int, default=5)
    add("--search-seeds", "trainings of each learning rate to choose by", type=int, default=2)
    add("--lrs", "highest learning rates to choose from", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--channels", "width of the branch", type=int, default=256)
    add("--epochs", "length of a training", type=int, default=8)
    add("--batch-size", "objects an iteration", type=int, default=16)
    add("--min-area", "of an object, in pixels", type=int, default=32**2)
    add("--test", "folder in COCO format, to evaluate the saved weights on instead of training", type=Path)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", "where to train", choices=("cpu", "cuda"), default=default_device)
    add("--processes", "trainings side by side (one a core, or one on a GPU)", type=int)
    options = parser.parse_args(arguments)
    if (options.data is None) == (options.test is None):
        parser.error("expected DATA, to train on, or --test FOLDER, to evaluate what was trained")
    for name in ("seeds", "search_seeds", "channels", "epochs", "batch_size", "processes"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {value}")
    if options.channels % 32:
        parser.error(f"--channels: expected a multiple of 32, the groups of GroupNorm, got {options.channels}")
    if min(options.lrs) <= 0:
        parser.error(f"--lrs: expected positive numbers, got {min(options.lrs)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as torch finds no GPU here, got cuda")
    options.processes = options.processes or (1 if options.device == "cuda" else os.cpu_count())
    return options


def best_rates(reports: list[dict[str, Any]]) -> dict[str, float]:
    """For each strategy that others take their learning rate from, the one that validates best, failures as zero.

    Learning rates are compared by the seeds that all of them have, or each by its own where they share none. Of those
    within LEVEL of the best it is the highest: with it solves take the fewest steps.
    """
    scores = defaultdict(lambda: defaultdict(dict))
    for report in reports:
        if STRATEGIES[report["row"]].tuned == report["row"]:
            scores[report["row"]][report["lr"]][report["seed"]] = validation_iou(report) or 0.0

    found = {}
    for row, rates in scores.items():
        common = set.intersection(*(set(seeds) for seeds in rates.values()))
        means = {lr: statistics.mean(seeds[seed] for seed in common or seeds) for lr, seeds in rates.items()}
        found[row] = max(lr for lr, mean in means.items() if mean >= max(means.values()) - LEVEL)
    return found


def validation_iou(report: dict[str, Any]) -> float | None:
    return None if "failed" in report else report["validation"]["iou"]


PARTS = {
    "test": itemgetter("test"),
    "held_out": lambda report: together(report["test"], report["validation"]),
}


def without_images(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what it says of each image, and without the data's size."""
    kept = {key: value for key, value in report.items() if key != "train"}
    return kept | {key: summary(report[key]) for key in ("test", "validation") if key in report}


def sizes(reports: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    """How many images and objects each part of the data has, by the first training that did not fail."""
    for report in reports:
        if "failed" not in report:
            parts = {part: report[part] for part in ("validation", "test")}
            counted = {part: {"images": len(of["images"]), "objects": sum(of["objects"])} for part, of in parts.items()}
            return {"train": report["train"], **counted}
    return {}


def write_report(folder: Path, settings: Settings) -> dict[str, Any]:
    """ablation.json: settings, the data's size, environment, the learning rates' search, each row's trainings at the
    chosen one, and what they gain on the rows that others are compared with."""
    reports = [json.loads(path.read_text()) for path in folder.glob("trainings/*.json")]
    reports.sort(key=lambda report: (list(STRATEGIES).index(report["row"]), report["lr"], report["seed"]))
    rates = best_rates(reports)
    rows = defaultdict(list)
    for report in reports:
        if report["lr"] == rates.get(report["tuned"]):
            rows[report["row"]].append(report)
    content = {
        "settings": asdict(settings),
        "data": sizes(reports),
        "environment": environment(torch.device(settings.device)),
        "learning_rates": rates,
        "search": [
            {
                **asdict(Run(report["row"], report["lr"], report["seed"])),
                "validation_iou": validation_iou(report),
                "steps": report.get("test", {}).get("iterations"),
            }
            for report in reports
            if report["row"] in rates
        ],
        "rows": {row: [without_images(report) for report in of_row] for row, of_row in rows.items()},
        "gains": {reference: gains(rows, reference, PARTS) for reference in REFERENCES},
    }
    write_json(folder / "ablation.json", content)
    return content


def run(options: argparse.Namespace) -> dict[str, Any]:
    rows = options.rows or list(STRATEGIES)
    settings = Settings(
        options.data.resolve().name,
        options.channels,
        options.epochs,
        options.batch_size,
        options.min_area,
        options.device,
    )
    claim(options.output, settings)
    load_given(options.data, options.output, settings)  # before processes need them
    sweep = Sweep(options.data, options.output, settings, options.processes)
    try:
        tuned = sorted({STRATEGIES[row].tuned for row in rows})
        seeds = range(min(options.search_seeds, options.seeds))
        report = partial(write_report, options.output, settings)
        searched = [Run(row, lr, seed) for row in tuned for lr in options.lrs for seed in seeds]
        sweep.train(searched, "learning rates", report)
        rates = report()["learning_rates"]
        runs = [Run(row, rates[STRATEGIES[row].tuned], seed) for seed in range(options.seeds) for row in rows]
        sweep.train(runs, "rows", report)
    finally:
        sweep.pool.shutdown(cancel_futures=True)
    return write_report(options.output, settings)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    if options.test is None:
        report, path = run(options), options.output / "ablation.json"
        print(results_page.ablation(report))
    else:
        report, path = evaluate_sweep(options.output, options.test, options.rows)
        print(results_page.held_out(report))
    print(f"wrote {path}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"ablation.py: error: {error}")
