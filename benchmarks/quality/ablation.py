"""Reproduce the paper's ablations on the mask branch alone, trained on frozen features of annotated objects.

    python benchmarks/quality/ablation.py DATA --output runs/ablation
    python benchmarks/quality/ablation.py DATA --output runs/ablation --rows "4 convolutions" IFR --seeds 3

DATA is a folder in COCO format (see accuracy.py). Every training leaves a file in the output folder, so a sweep that
was stopped goes on where it was; ablation.json there holds them all. results_page.py makes tables of it.
"""

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import threading
import warnings
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.analysis.resampling import paired_gain, together
from benchmarks.quality import accuracy
from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.quality.mask_branch import MaskBranch, Splits, train_branch
from benchmarks.quality.objects import Objects, load_objects
from benchmarks.quality.strategies import REFERENCES, STRATEGIES
from benchmarks.quality.training import use_deterministic_algorithms
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import refuse_changes, write_json, write_whole

SEARCH_SEEDS = 2  # of each learning rate; the trainings at the chosen one count


@dataclass(frozen=True)
class Settings:
    """What all trainings of an output folder share."""

    data: str
    channels: int
    epochs: int
    batch_size: int
    min_area: int
    device: str


@dataclass(frozen=True)
class Run:
    """One training."""

    row: str
    lr: float
    seed: int

    def path(self, folder: Path) -> Path:
        """Of its report; its weights lie beside."""
        row = re.sub(r"[^a-z0-9.]+", "-", self.row.lower()).strip("-")
        return folder / "trainings" / f"{row}-lr{self.lr:g}-seed{self.seed}.json"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked. Exits with a message where options clash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = partial(accuracy.add, parser)
    add("data", "folder in COCO format", type=Path)
    add("--output", "folder for trainings and ablation.json", type=Path, default=Path("runs/ablation"))
    add("--rows", "which to train (all)", nargs="+", choices=list(STRATEGIES), metavar="ROW")
    add("--seeds", "trainings of each row", type=int, default=5)
    add("--lrs", "highest learning rates to choose from", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    add("--channels", "width of the branch", type=int, default=256)
    add("--epochs", "length of a training", type=int, default=8)
    add("--batch-size", "objects an iteration", type=int, default=16)
    add("--min-area", "of an object, in pixels", type=int, default=32**2)
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    add("--device", "where to train", choices=("cpu", "cuda"), default=default_device)
    add("--processes", "trainings side by side (one a core, or one on a GPU)", type=int)
    options = parser.parse_args(arguments)
    for name in ("seeds", "channels", "epochs", "batch_size", "processes"):
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


def claim(folder: Path, settings: Settings) -> None:
    """Write down the settings, or raise DataError where the folder holds trainings with others."""
    path = folder / "settings.json"
    if path.exists():
        refuse_changes(path, json.loads(path.read_text()), asdict(settings))
    else:
        write_json(path, asdict(settings))


def load_given(data: Path, folder: Path, settings: Settings) -> list[Objects]:
    """train's objects, to train and validate with, and val's, to test with; their features are kept in the folder."""
    return [
        load_objects(CocoFolder(data, split), folder / "features", min_area=settings.min_area)
        for split in ("train", "val")
    ]


_splits: Splits | None = None  # of this process


def _start(data: Path, folder: Path, settings: Settings, threads: int) -> None:
    global _splits
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    if settings.device == "cuda":  # a CPU's are anyway
        use_deterministic_algorithms()
    warnings.filterwarnings("ignore", message="form='paper'")
    _splits = Splits.make(*load_given(data, folder, settings), torch.device(settings.device))


def _end_with_parent() -> None:
    """A killed sweep does not clean up after itself, and its trainings would go on beside those of the next one."""
    multiprocessing.parent_process().join()
    os._exit(1)


def check_report(run: Run, folder: Path) -> None:
    """Raises DataError where the run was done with another definition of its row."""
    path = run.path(folder)
    if path.exists():
        definition = json.loads(json.dumps(asdict(STRATEGIES[run.row])))
        refuse_changes(path, json.loads(path.read_text()), definition)


def _train(run: Run, folder: Path, settings: Settings) -> tuple[Run, dict[str, Any]]:
    strategy = STRATEGIES[run.row]
    lengths = {"channels": settings.channels, "epochs": settings.epochs, "batch_size": settings.batch_size}
    try:
        branch, report = train_branch(strategy, _splits, **lengths, lr=run.lr, seed=run.seed)
    except FloatingPointError as error:
        report = {"failed": str(error)}
    else:
        write_whole(run.path(folder).with_suffix(".pt"), partial(torch.save, branch.state_dict()))
    report = {**asdict(run), **asdict(strategy), **report}
    write_json(run.path(folder), report)
    return run, report


class Sweep:
    """Trainings in processes of their own; those whose report is there are not repeated."""

    def __init__(self, data: Path, folder: Path, settings: Settings, processes: int) -> None:
        self.folder, self.settings = folder, settings
        self.pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(data, folder, settings, max(1, (os.cpu_count() or 1) // processes)),
        )

    def train(self, runs: list[Run], title: str) -> None:
        """ablation.json is written anew after every training."""
        for run in runs:
            check_report(run, self.folder)
        left = [run for run in runs if not run.path(self.folder).exists()]
        with tqdm(total=len(runs), initial=len(runs) - len(left), desc=title, dynamic_ncols=True) as bar:
            for future in as_completed([self.pool.submit(_train, run, self.folder, self.settings) for run in left]):
                run, report = future.result()
                figure = report.get("failed") or f"test IoU {100 * report['test']['iou']:.1f} %"
                bar.write(f"{run.row}, lr {run.lr:g}, seed {run.seed}: {figure}")
                bar.update()
                write_report(self.folder, self.settings)


def best_rates(reports: list[dict[str, Any]]) -> dict[str, float]:
    """For each strategy that others take their learning rate from, the one that validates best, failures as zero."""
    scores = defaultdict(lambda: defaultdict(list))
    for report in reports:
        if STRATEGIES[report["row"]].tuned == report["row"] and report["seed"] < SEARCH_SEEDS:
            scores[report["row"]][report["lr"]].append(validation_iou(report) or 0.0)
    return {row: max(rates, key=lambda lr: statistics.mean(rates[lr])) for row, rates in scores.items()}


def validation_iou(report: dict[str, Any]) -> float | None:
    return None if "failed" in report else report["validation"]["iou"]


def gains(rows: dict[str, list[dict[str, Any]]], reference: str) -> dict[str, dict[str, Any]]:
    """Each row's IoU less the reference's of equal seeds, on the test's images, and on those for validation too."""
    found = {}
    references = {report["seed"]: report for report in rows.get(reference, []) if "failed" not in report}
    for row, reports in rows.items():
        own = [report for report in reports if "failed" not in report and report["seed"] in references]
        if row == reference or len(own) < 2:
            continue
        others = [references[report["seed"]] for report in own]
        found[row] = {"seeds": len(own)}
        for name, of in (("test", test_of), ("held_out", held_out_of)):
            found[row][name] = paired_gain([of(report) for report in own], [of(report) for report in others])
    return found


def test_of(report: dict[str, Any]) -> dict[str, Any]:
    return report["test"]


def held_out_of(report: dict[str, Any]) -> dict[str, Any]:
    return together(report["test"], report["validation"])


def without_objects(report: dict[str, Any]) -> dict[str, Any]:
    """A report without what it says of every object."""
    return {
        key: {k: v for k, v in value.items() if k not in ("ious", "images")} if isinstance(value, dict) else value
        for key, value in report.items()
    }


def write_report(folder: Path, settings: Settings) -> dict[str, Any]:
    """ablation.json: settings, environment, the learning rates' search, each row's trainings at the chosen one, and
    what they gain on the rows that others are compared with."""
    reports = [json.loads(path.read_text()) for path in folder.glob("trainings/*.json")]
    reports.sort(key=lambda report: (list(STRATEGIES).index(report["row"]), report["lr"], report["seed"]))
    rates = best_rates(reports)
    rows = defaultdict(list)
    for report in reports:
        if report["lr"] == rates.get(report["tuned"]):
            rows[report["row"]].append(report)
    content = {
        "settings": asdict(settings),
        "environment": environment(torch.device(settings.device)),
        "learning_rates": rates,
        "search": [
            {**asdict(Run(report["row"], report["lr"], report["seed"])), "validation_iou": validation_iou(report)}
            for report in reports
            if report["row"] in rates
        ],
        "rows": {row: [without_objects(report) for report in of_row] for row, of_row in rows.items()},
        "gains": {reference: gains(rows, reference) for reference in REFERENCES},
    }
    write_json(folder / "ablation.json", content)
    return content


def trained_branches(folder: Path, row: str) -> list[MaskBranch]:
    """A row's branches in a sweep, seed by seed.

    Raises DataError where the folder has none.
    """
    content = _content(folder)
    if row not in content["rows"]:
        raise DataError(f"sweep: {folder} has no row {row!r}, only {', '.join(content['rows'])}")
    return [_branch(folder, content, row, report) for report in content["rows"][row] if "failed" not in report]


def trained_branch(folder: Path, row: str, seed: int) -> MaskBranch:
    """One of them. Raises DataError where the folder lacks it."""
    content = _content(folder)
    for report in content["rows"].get(row, []):
        if report["seed"] == seed and "failed" not in report:
            return _branch(folder, content, row, report)
    raise DataError(f"sweep: {folder} has no training of {row!r} with seed {seed}")


def load_test_objects(data: Path, folder: Path) -> Objects:
    """The unseen objects of a sweep on the folder `data`."""
    settings = _content(folder)["settings"]
    if data.resolve().name != settings["data"]:
        raise DataError(f"data: expected {settings['data']}, which the sweep in {folder} was trained on, got {data}")
    return load_objects(CocoFolder(data, "val"), folder / "features", min_area=settings["min_area"])


def _content(folder: Path) -> dict[str, Any]:
    path = folder / "ablation.json"
    if not path.exists():
        raise DataError(f"sweep: {folder} has no ablation.json, which ablation.py --output {folder} writes")
    return json.loads(path.read_text())


def _branch(folder: Path, content: dict[str, Any], row: str, report: dict[str, Any]) -> MaskBranch:
    weights = Run(row, report["lr"], report["seed"]).path(folder).with_suffix(".pt")
    state = torch.load(weights, map_location="cpu", weights_only=True)
    channels = content["settings"]["channels"]
    branch = MaskBranch(*(state[name].flatten() for name in ("mean", "std")), channels, STRATEGIES[row].build(channels))
    branch.load_state_dict(state)
    return branch.eval()


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
        seeds = range(min(SEARCH_SEEDS, options.seeds))
        sweep.train([Run(row, lr, seed) for row in tuned for lr in options.lrs for seed in seeds], "learning rates")
        rates = write_report(options.output, settings)["learning_rates"]
        runs = [Run(row, rates[STRATEGIES[row].tuned], seed) for seed in range(options.seeds) for row in rows]
        sweep.train(runs, "rows")
    finally:
        sweep.pool.shutdown(cancel_futures=True)
    return write_report(options.output, settings)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    options = parse(arguments)
    report = run(options)
    print(results_page.ablation(report))
    print(f"wrote {options.output / 'ablation.json'}")
    return report


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"ablation.py: error: {error}")
