"""Mask branches that a sweep trained, evaluated on the objects of a folder that it did not know."""

from collections import defaultdict
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.analysis.resampling import gains, summary
from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.quality.mask_branch import evaluate
from benchmarks.quality.objects import load_objects
from benchmarks.quality.strategies import REFERENCES, STRATEGIES
from benchmarks.quality.sweep import load_branch, read_report, runs_with_weights
from benchmarks.report.environment import environment
from benchmarks.report.files import write_json

SPLITS = "test", "val", "train"  # the first that a folder has is taken


def evaluate_sweep(folder: Path, data: Path, rows: list[str] | None) -> tuple[dict[str, Any], Path]:
    """Evaluate a sweep's trainings on data's objects: the report, and the file in the sweep's folder that holds it.

    rows: None means all. Raises DataError where the sweep has none of the rows, or the weights of none of their
    trainings.
    """
    content = read_report(folder)
    settings = content["settings"]
    runs = runs_with_weights(folder, content, rows)
    split = find_split(data)
    objects = load_objects(CocoFolder(data, split), folder / "features", min_area=settings["min_area"])
    objects = objects.to(torch.device(settings["device"]))
    tests = defaultdict(list)
    for run in tqdm(runs, f"tests on {len(objects)} objects", dynamic_ncols=True):
        branch = load_branch(run, folder, settings["channels"]).to(objects.images.device)
        found = evaluate(branch, objects, bf16=STRATEGIES[run.row].bf16)
        tests[run.row].append({"seed": run.seed, "lr": run.lr, "test": found})
    part = {"test": itemgetter("test")}
    report = {
        "data": data.resolve().name,
        "split": split,
        **objects.counts,
        "settings": settings,
        "environment": environment(objects.images.device),
        "rows": {row: [{**test, "test": summary(test["test"])} for test in found] for row, found in tests.items()},
        "gains": {reference: gains(tests, reference, part) for reference in REFERENCES},
    }
    path = folder / f"held_out-{data.resolve().name}-{split}.json"
    write_json(path, report)
    return report, path


def find_split(data: Path) -> str:
    """The first of SPLITS that a folder in COCO format has. Raises DataError where it has none."""
    for split in SPLITS:
        if any((data / "annotations").glob(f"instances_{split}*.json")):
            return split
    expected = ", ".join(f"instances_{split}.json" for split in SPLITS)
    raise DataError(f"test: expected one of {expected} in {data / 'annotations'}")
