"""Trainings of mask branches in processes of their own, and what they leave in a folder: reports and weights."""

import json
import multiprocessing
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.quality.mask_branch import MaskBranch, Splits, train_branch
from benchmarks.quality.objects import Objects, load_objects
from benchmarks.quality.strategies import STRATEGIES
from benchmarks.quality.training import use_deterministic_algorithms
from benchmarks.report.environment import cpu_name
from benchmarks.report.files import refuse_changes, write_json, write_whole


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
        write_whole(weights(run, folder), partial(torch.save, branch.state_dict()))
    report = {**asdict(run), **asdict(strategy), "machine": cpu_name(), **report}
    write_json(run.path(folder), report, indent=None)
    return run, report


class Sweep:
    """Trainings in processes of their own; those whose report is there are not repeated."""

    def __init__(self, data: Path, folder: Path, settings: Settings, processes: int) -> None:
        self.folder, self.settings = folder, settings
        self.pool = ProcessPoolExecutor(
            processes,
            multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(data, folder, settings, max(1, torch.get_num_threads() // processes)),
        )

    def train(self, runs: list[Run], title: str, after_each: Callable[[], object]) -> None:
        """Trains those of `runs` that are left, and calls after_each after each of them."""
        for run in runs:
            check_report(run, self.folder)
        left = [run for run in runs if not run.path(self.folder).exists()]
        with tqdm(total=len(runs), initial=len(runs) - len(left), desc=title, dynamic_ncols=True) as bar:
            for future in as_completed([self.pool.submit(_train, run, self.folder, self.settings) for run in left]):
                run, report = future.result()
                figure = report.get("failed") or f"test IoU {100 * report['test']['iou']:.1f} %"
                bar.write(f"{run.row}, lr {run.lr:g}, seed {run.seed}: {figure}")
                bar.update()
                after_each()


def trained_branches(folder: Path, row: str) -> dict[int, MaskBranch]:
    """A row's branches in a sweep by their seeds, of the trainings whose weights are there.

    Raises DataError where there are none.
    """
    content = read_report(folder)
    channels = content["settings"]["channels"]
    return {run.seed: load_branch(run, folder, channels) for run in runs_with_weights(folder, content, [row])}


def typical_branch(folder: Path, row: str) -> tuple[int, MaskBranch]:
    """A row's branch, and its seed: of those whose weights are there the nearest to the mean steps of all seeds."""
    content = read_report(folder)
    kept = runs_with_weights(folder, content, [row])
    tests = {report["seed"]: report["test"] for report in content["rows"][row] if "failed" not in report}
    steps = {seed: test.get("iterations", 0.0) for seed, test in tests.items()}  # 0: rows that solve nothing
    mean = statistics.mean(steps.values())
    run = min(kept, key=lambda run: abs(steps[run.seed] - mean))
    return run.seed, load_branch(run, folder, content["settings"]["channels"])


def trained_branch(folder: Path, row: str, seed: int) -> MaskBranch:
    """A row's branch of one seed. Raises DataError where the folder lacks it."""
    content = read_report(folder)
    for run in trained_runs(folder, content, row):
        if run.seed == seed:
            return load_branch(run, folder, content["settings"]["channels"])
    raise DataError(f"sweep: {folder} has no training of {row!r} with seed {seed}")


def runs_with_weights(folder: Path, content: dict[str, Any], rows: list[str] | None) -> list[Run]:
    """A sweep's trainings of which the weights are there. Raises DataError where there are none."""
    runs = [run for row in rows or content["rows"] for run in trained_runs(folder, content, row)]
    kept = [run for run in runs if weights(run, folder).exists()]
    if not kept:
        of = ", ".join(map(repr, rows or content["rows"]))
        raise DataError(f"sweep: {folder}/trainings has no weights (.pt) of {of}, only {len(runs)} reports")
    return kept


def trained_runs(folder: Path, content: dict[str, Any], row: str) -> list[Run]:
    """A row's trainings in a sweep's report, seed by seed. Raises DataError where it has none."""
    if row not in content["rows"]:
        raise DataError(f"sweep: {folder} has no row {row!r}, only {', '.join(content['rows'])}")
    return [Run(row, report["lr"], report["seed"]) for report in content["rows"][row] if "failed" not in report]


def load_test_objects(data: Path, folder: Path) -> Objects:
    """The unseen objects of a sweep on the folder `data`."""
    settings = read_report(folder)["settings"]
    if data.resolve().name != settings["data"]:
        raise DataError(f"data: expected {settings['data']}, which the sweep in {folder} was trained on, got {data}")
    return load_objects(CocoFolder(data, "val"), folder / "features", min_area=settings["min_area"])


def read_report(folder: Path) -> dict[str, Any]:
    """A sweep's ablation.json. Raises DataError where there is none."""
    path = folder / "ablation.json"
    if not path.exists():
        raise DataError(f"sweep: {folder} has no ablation.json, which ablation.py --output {folder} writes")
    return json.loads(path.read_text())


def weights(run: Run, folder: Path) -> Path:
    return run.path(folder).with_suffix(".pt")


def load_branch(run: Run, folder: Path, channels: int) -> MaskBranch:
    """A training's branch, from its weights. Raises DataError where they are missing."""
    path = weights(run, folder)
    if not path.exists():
        raise DataError(f"sweep: {path} is missing: the report beside it came without the weights")
    state = torch.load(path, map_location="cpu", weights_only=True)
    refinement = STRATEGIES[run.row].build(channels)
    branch = MaskBranch(*(state[name].flatten() for name in ("mean", "std")), channels, refinement)
    branch.load_state_dict(state)
    return branch.eval()
