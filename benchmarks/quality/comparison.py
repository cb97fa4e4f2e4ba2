"""Compare mask heads end to end: Mask R-CNN trained with each of them from several seeds, COCO metrics, pictures.

    python benchmarks/quality/comparison.py DATA --output runs/comparison
    python benchmarks/quality/comparison.py DATA --output runs/comparison --refine stack unroll ifr --seeds 5

Takes the options of accuracy.py; those of the solver go to the refinements they apply to. Every training has a folder
of its own, OUTPUT/REFINEMENT-seedN, with its checkpoint: started again, a sweep that was stopped goes on where it was.
Several processes may each train other refinements into one folder; a last one with all of them compares what is there.
Writes comparison.json (each training's figures; mean and standard deviation over the seeds; how much AP, and IoU of
masks in given boxes, is gained over each refinement named before, with the 95 % interval over seeds and images),
predictions.png (of the first seed's trainings side by side) and features.png (RoI features of objects before and after
the refinement, as in the paper's Figures 3 and 4). With given boxes all annotated images of the validation split are
taken, whatever --labelled says.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.analysis.resampling import Evaluation, paired_gain, paired_precision_gain
from benchmarks.quality import accuracy
from benchmarks.quality.coco import METRICS, CocoFolder, DataError, matched
from benchmarks.quality.detector import REFINEMENTS
from benchmarks.quality.given_boxes import mask_branch, mask_ious
from benchmarks.quality.training import joined_processes
from benchmarks.report import results_page
from benchmarks.report.environment import environment
from benchmarks.report.files import refuse_changes, write_json, write_whole
from benchmarks.report.pictures import Refined, draw_features, draw_predictions, evenly_spaced, overlay

EXAMPLES = 6  # objects and images in the pictures
KINDS = ("segm", "bbox")


def parse(arguments: list[str] | None = None) -> list[argparse.Namespace]:
    """The options of each training. Exits with a message where options clash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    accuracy.add_options(parser)
    choices = {"nargs": "+", "choices": REFINEMENTS, "default": ["stack", "ifr"], "metavar": "REFINEMENT"}
    parser.add_argument("--refine", help=f"what to compare, of {', '.join(REFINEMENTS)} (stack ifr)", **choices)
    parser.add_argument("--seeds", help="trainings of each refinement (%(default)s)", type=int, default=3)
    parser.add_argument("--output", help="folder (%(default)s)", type=Path, default=Path("runs/comparison"))
    options = parser.parse_args(arguments)
    if options.seeds < 1:
        parser.error(f"--seeds: expected at least 1, got {options.seeds}")
    if len(set(options.refine)) < len(options.refine):
        parser.error(f"--refine: expected each refinement once, got {' '.join(options.refine)}")
    for name, refinements in accuracy.IFR_OPTIONS.items():
        if getattr(options, name) is not None and not set(refinements) & set(options.refine):
            parser.error(f"--{name.replace('_', '-')} applies to none of --refine {' '.join(options.refine)}")

    # Seed by seed, so that a sweep which is stopped has something to compare.
    runs = [of_one(options, refine, seed) for seed in range(options.seeds) for refine in options.refine]
    for run in runs:
        accuracy.check(run, parser)
    return runs


def of_one(options: argparse.Namespace, refine: str, seed: int) -> argparse.Namespace:
    """The options of one training, as accuracy.py takes them."""
    values = {key: value for key, value in vars(options).items() if key != "seeds"}
    values |= {name: None for name, refinements in accuracy.IFR_OPTIONS.items() if refine not in refinements}
    folder = options.output / f"{refine}-seed{seed}"
    resume = (folder / "checkpoint.pt").exists()
    return argparse.Namespace(
        **{**values, "refine": refine, "seed": seed, "output": folder, "checkpoint": folder, "resume": resume}
    )


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """What the figures of a training depend on: of its configuration, or of its options."""
    kept = {key: value for key, value in config.items() if key not in accuracy.INCIDENTAL}
    data = Path(config["data"]).resolve().name
    return {"data": data, "detections_per_image": config["detections_per_image"], **kept}


def report_of(options: argparse.Namespace) -> dict[str, Any] | None:
    """What a finished training reports, or None. Raises DataError where it was made with other settings."""
    path = options.output / "accuracy.json"
    if path.exists():
        report = json.loads(path.read_text())
        refuse_changes(path, settings(report["config"]), settings(accuracy.configuration(options)))
        return report
    if options.resume:
        accuracy.checkpoints_of(options).check()
    return None


def summarize(reports: list[dict[str, Any]], evaluations: list[Evaluation], device: torch.device) -> dict[str, Any]:
    """What comparison.json holds but for the gains. evaluations: of each training's masks in given boxes."""
    configs = [settings(report["config"]) for report in reports]
    common = {key: value for key, value in configs[0].items() if all(config.get(key) == value for config in configs)}
    fields = ("parameters", "seconds_per_iteration", "seconds_per_image_with_reading_and_encoding", "metrics", "solve")
    runs = [
        {
            **{key: value for key, value in config.items() if key not in common or key in ("refine", "seed")},
            "final_loss": report["history"][-1]["loss"],
            "mask_iou": sum(evaluation["iou_sums"]) / sum(evaluation["objects"]),
            **{field: report[field] for field in (*fields, "versions") if field in report},
        }
        for config, report, evaluation in zip(configs, reports, evaluations, strict=True)
    ]
    refines = dict.fromkeys(run["refine"] for run in runs)
    return {
        "settings": common,
        "environment": environment(device),
        "given_boxes": {"images": len(evaluations[0]["images"]), "objects": sum(evaluations[0]["objects"])},
        "refinements": {refine: over_seeds([run for run in runs if run["refine"] == refine]) for refine in refines},
        "runs": runs,
    }


def over_seeds(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of one refinement's runs; the parameters are the refinement's alone."""
    summary = {"seeds": len(runs), "parameters": runs[0]["parameters"]["refinement"]}
    for kind in KINDS:
        summary[kind] = {name: mean_and_std(run["metrics"][kind][name] for run in runs) for name in METRICS}
    summary["mask_iou"] = mean_and_std(run["mask_iou"] for run in runs)
    summary["seconds_per_iteration"] = mean_and_std(run["seconds_per_iteration"] for run in runs)
    if all("solve" in run for run in runs):
        summary["residual_median"] = mean_and_std(run["solve"]["residual_median"] for run in runs)
    return summary


def gains(
    runs: list[argparse.Namespace], evaluations: list[Evaluation], dataset: CocoFolder
) -> dict[str, dict[str, dict[str, dict[str, float]]]]:
    """reference → each refinement after it → what that gains: AP of boxes and masks, IoU in given boxes."""
    matches = {kind: [] for kind in KINDS}
    for run in tqdm(runs, "matching detections", dynamic_ncols=True):
        entries = json.loads((run.output / "detections.json").read_text())
        for kind, of_kind in matches.items():
            of_kind.append(matched(dataset.coco, entries, kind))

    def of(refine: str, values: list[Any]) -> list[Any]:
        return [value for run, value in zip(runs, values, strict=True) if run.refine == refine]

    found = {}
    for reference, refine in combinations(dict.fromkeys(run.refine for run in runs), 2):
        gained = {"mask_iou": paired_gain(of(refine, evaluations), of(reference, evaluations))}
        gained |= {kind: paired_precision_gain(*(of(r, matches[kind]) for r in (refine, reference))) for kind in KINDS}
        found.setdefault(reference, {})[refine] = gained
    return found


def mean_and_std(values: Iterable[float | None]) -> dict[str, float] | None:
    """Sample standard deviation, of one value none; None where COCO gives a figure for no object."""
    values = list(values)
    if None in values:
        return None
    spread = {"std": statistics.stdev(values)} if len(values) > 1 else {}
    return {"mean": statistics.mean(values), **spread}


def trained(run: argparse.Namespace, dataset: CocoFolder, device: torch.device) -> MaskRCNN:
    """The detector of a finished training."""
    model = accuracy.build_model(run, len(dataset.categories) + 1)
    accuracy.checkpoints_of(run).load(model)
    return model.to(device).eval()


def evaluate_given_boxes(run: argparse.Namespace, dataset: CocoFolder, device: torch.device) -> Evaluation:
    """Of a finished training's masks; kept in its folder, as the rest of its report is."""
    path = run.output / "given_boxes.json"
    if not path.exists():
        write_json(path, mask_ious(trained(run, dataset, device), dataset, bf16=run.amp == "bf16"), indent=None)
    return json.loads(path.read_text())


def choose_examples(dataset: CocoFolder) -> list[dict[str, Any]]:
    """The largest object's annotation in each of some evenly spaced images. Raises DataError where there is none."""
    largest = [
        max(sound, key=lambda annotation: annotation["area"])
        for id in dataset.image_ids
        if (sound := [a for a in dataset.annotations(id) if not a["iscrowd"] and min(a["bbox"][2:]) >= 1])
    ]
    if not largest:
        raise DataError("data: the images to evaluate on show no objects, so there is nothing to compare")
    return evenly_spaced(largest, EXAMPLES)


def save_pictures(
    runs: list[argparse.Namespace], dataset: CocoFolder, examples: list[dict[str, Any]], device: torch.device
) -> None:
    """predictions.png and features.png of finished trainings, one for each refinement."""
    folder = runs[0].output.parent
    predictions = {run.refine: json.loads((run.output / "detections.json").read_text()) for run in runs}
    write_whole(folder / "predictions.png", draw_predictions(dataset, predictions, pictures=EXAMPLES).savefig)
    heads = {}
    for run in tqdm(runs, "features", dynamic_ncols=True):
        model = trained(run, dataset, device)
        heads[run.refine] = [refine(model, dataset, annotation) for annotation in examples]
    objects = [cut_out(dataset, annotation) for annotation in examples]
    write_whole(folder / "features.png", draw_features(objects, heads).savefig)


def cut_out(dataset: CocoFolder, annotation: dict[str, Any]) -> tuple[str, np.ndarray]:
    """Caption and picture (h, w, 3) of an object, tinted where its mask is."""
    image = dataset.image(annotation["image_id"]).permute(1, 2, 0).numpy()
    x, y, width, height = annotation["bbox"]
    shown = overlay(image, [dataset.coco.annToRLE(annotation)], [(0.2, 0.9, 0.3)])
    rows = slice(max(0, math.floor(y)), math.ceil(y + height))
    columns = slice(max(0, math.floor(x)), math.ceil(x + width))
    name = dataset.coco.imgs[annotation["image_id"]]["file_name"]
    return f"{dataset.categories[annotation['category_id']]} {name}", shown[rows, columns]


@torch.inference_mode()
def refine(model: MaskRCNN, dataset: CocoFolder, annotation: dict[str, Any]) -> Refined:
    """What the detector's mask head makes of an object in its annotated box; a feature's size is its L2 norm."""
    device = next(model.parameters()).device
    x, y, width, height = annotation["bbox"]
    image = dataset.image(annotation["image_id"]).to(device) / 255
    boxes = torch.tensor([[x, y, x + width, y + height]], device=device)
    labels = torch.tensor([dataset.labels[annotation["category_id"]]], device=device)
    coarse, refined, mask = mask_branch(model, image, boxes, labels)

    def picture(values: Tensor) -> np.ndarray:
        return values[0].float().cpu().numpy()

    return Refined(picture(coarse.norm(dim=1)), picture(refined.norm(dim=1)), picture(mask))


def main(arguments: list[str] | None = None) -> None:
    runs = parse(arguments)
    options, folder = runs[0], runs[0].output.parent
    train_set = CocoFolder(options.data, "train", options.train_annotations, options.labelled)
    val_set = CocoFolder(options.data, "val", options.val_annotations, options.labelled)
    for run in runs:
        accuracy.settle(run, train_set)
    examples = choose_examples(val_set)
    reports = [report_of(run) for run in runs]
    with joined_processes(options.device, deterministic=options.deterministic) as process:
        for number, run in enumerate(runs):
            state = "done before" if reports[number] else "resumed" if run.resume else "new"
            accuracy.say(process, f"\n{number + 1} of {len(runs)}: {run.refine}, seed {run.seed} ({state})")
            if reports[number] is None:
                _, reports[number] = accuracy.run(run, process)
        if process.is_first:
            annotated = CocoFolder(options.data, "val", options.val_annotations)
            evaluations = [evaluate_given_boxes(run, annotated, process.device) for run in runs]
            content = summarize(reports, evaluations, process.device)
            content["gains"] = gains(runs, evaluations, val_set)
            write_json(folder / "comparison.json", content)
            save_pictures([run for run in runs if run.seed == 0], val_set, examples, process.device)
            print(f"\n{results_page.comparison(content)}\n")
            print(f"wrote comparison.json, predictions.png and features.png in {folder}")


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"comparison.py: error: {error}")
