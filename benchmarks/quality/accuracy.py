"""Train a Mask R-CNN on a folder in COCO format, with a mask head of your choice, and take its COCO metrics.

    python benchmarks/quality/accuracy.py DATA --refine ifr
    torchrun --nproc-per-node 8 benchmarks/quality/accuracy.py DATA --refine stack --backbone resnet50 --seed 1

DATA holds annotations/instances_{train,val}.json, and its images in train/ and val/ or in images/. Writes
accuracy.json (configuration, versions, losses, metrics), detections.json (COCO's results format) and masks.png
(predictions beside the ground truth).
"""

import argparse
import math
import os
import platform
import statistics
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.coco import CocoFolder, DataError, TrainingStream, coco_metrics
from benchmarks.quality.detector import ADJOINTS, REFINEMENTS, SOLVERS, build_detector, build_refinement
from benchmarks.quality.training import Checkpoints, Findings, Plan, Process, evaluate, joined_processes, train
from benchmarks.report.files import write_json
from benchmarks.report.pictures import draw_predictions

# Options that do not change what is learnt: a training may be resumed with others.
INCIDENTAL = ("data", "device", "workers", "output", "checkpoint", "checkpoint_every", "resume", "detections_per_image")
POSITIVE = (
    "iterations",
    "epochs",
    "batch_size",
    "lr",
    "image_size",
    "channels",
    "steps",
    "groups",
    "rois_per_image",
    "detections_per_image",
    "checkpoint_every",
)
SOLVED = ("ifr", "ifr-coarse", "ifr-narrow")  # refinements by an equilibrium
IFR_OPTIONS = {
    "solver": SOLVED,
    "adjoint": SOLVED,
    "warmup_steps": SOLVED,
    "steps": (*SOLVED, "unroll"),
    "groups": (*SOLVED, "unroll"),
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked and with its defaults filled in. Exits with a message where options clash."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add_options(parser)
    add(parser, "--refine", "what stands for the mask head's four convolutions", choices=REFINEMENTS, default="ifr")
    add(parser, "--seed", "of weights, data order and sampling", type=int, default=0)
    add(parser, "--checkpoint", "folder to save the training in", type=Path)
    add(parser, "--resume", "go on from the checkpoint", action="store_true")
    add(parser, "--output", "folder for report, detections and picture", type=Path, default=Path("runs/accuracy"))
    options = parser.parse_args(arguments)
    check(options, parser)
    return options


def add(parser: argparse.ArgumentParser, name: str, help: str, **kwargs: Any) -> None:
    if kwargs.get("default") is not None:
        help += " (%(default)s)"
    parser.add_argument(name, help=help, **kwargs)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that trainings to be compared have in common."""
    option = partial(add, parser)
    option("data", "folder in COCO format", type=Path)
    option("--train-annotations", "instances file to train on, where it is not the usual one", type=Path)
    option("--val-annotations", "instances file to evaluate on, where it is not the usual one", type=Path)
    option("--labelled", 'images to take, by what their entry "labelled" says (all)')
    option("--solver", "for ifr and ifr-… (broyden)", choices=SOLVERS)
    option(
        "--steps",
        "solver iterations, forward and backward, for ifr and ifr-… (15); blocks of unroll (4)",
        type=int,
    )
    option(
        "--adjoint",
        "how gradients pass through the solve, for ifr and ifr-… (implicit)",
        choices=ADJOINTS,
    )
    option("--groups", "groups of GroupNorm, for ifr, ifr-… and unroll (32)", type=int)
    option("--warmup-steps", "training iterations with an unrolled block before ifr solves (a tenth)", type=int)
    option("--backbone", "efficientnet_lite0 or a torchvision classifier's name", default="efficientnet_lite0")
    option("--weights", "of the backbone (imagenet for efficientnet_lite0, else none)", choices=("imagenet", "none"))
    option("--channels", "width of pyramid and heads", type=int, default=256)
    option("--image-size", "shorter side in pixels; the longer is at most 5/3 of it", type=int, default=800)
    option("--rois-per-image", "regions sampled from an image in training", type=int, default=512)
    option("--detections-per-image", "kept at most in evaluation", type=int, default=100)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--iterations", type=int, help="length of the training")
    length.add_argument("--epochs", type=float, default=12, help="the same in passes over the data (%(default)g)")
    option("--batch-size", "images an iteration, over all processes", type=int, default=8)
    option("--lr", "highest learning rate", type=float, default=2e-4)
    option("--amp", "mixed precision (none)", choices=("bf16",))
    option(
        "--deterministic",
        "deterministic GPU algorithms, with a warning where there is none (slower; CPUs need it not)",
        action="store_true",
    )
    default_device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", "where to train", choices=("cpu", "cuda"), default=default_device)
    option("--workers", "processes that load data, for each process that trains", type=int, default=2)
    option("--checkpoint-every", "iterations", type=int, default=500)


def check(options: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Fill in the defaults that depend on other options. Exits with a message naming the option at fault."""
    for name, refinements in IFR_OPTIONS.items():
        if getattr(options, name) is not None and options.refine not in refinements:
            flag = "--" + name.replace("_", "-")
            parser.error(f"{flag} applies to --refine {' or '.join(refinements)}, not to {options.refine}")
    for name in POSITIVE:
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    for name in ("seed", "workers", "warmup_steps"):
        value = getattr(options, name)
        if value is not None and value < 0:
            parser.error(f"--{name.replace('_', '-')}: expected zero or more, got {value}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: expected cpu, as torch finds no GPU here, got cuda")
    if options.iterations is not None:
        options.epochs = None
    if options.refine in (*SOLVED, "unroll"):
        options.groups = options.groups or 32
        options.steps = options.steps or (15 if options.refine in SOLVED else 4)
    if options.refine in SOLVED:
        options.solver = options.solver or "broyden"
        options.adjoint = options.adjoint or "implicit"
    world = int(os.environ.get("WORLD_SIZE", 1))
    if options.batch_size % world:
        parser.error(f"--batch-size: expected a multiple of the {world} processes, got {options.batch_size}")
    if options.weights is None:
        options.weights = "imagenet" if options.backbone == "efficientnet_lite0" else "none"
    saved = options.checkpoint and (options.checkpoint / "checkpoint.pt").exists()
    if options.resume and not saved:
        parser.error(f"--resume: no checkpoint.pt in --checkpoint {options.checkpoint}")
    if saved and not options.resume:
        parser.error(f"--checkpoint: {options.checkpoint} holds a training; go on with --resume or name another")


def settle(options: argparse.Namespace, train_set: CocoFolder) -> None:
    """Fill in the lengths that depend on the data."""
    if options.iterations is None:
        options.iterations = math.ceil(options.epochs * len(train_set) / options.batch_size)
    if options.refine in SOLVED and options.warmup_steps is None:
        options.warmup_steps = options.iterations // 10


def configuration(options: argparse.Namespace) -> dict[str, Any]:
    """The options as they are written down."""
    return {key: str(value) if isinstance(value, Path) else value for key, value in vars(options).items()}


def checkpoints_of(options: argparse.Namespace) -> Checkpoints:
    """Where this training is saved; to be called when its lengths are settled."""
    lasting = {key: value for key, value in configuration(options).items() if key not in INCIDENTAL}
    return Checkpoints(options.checkpoint, options.checkpoint_every, lasting)


def build_model(options: argparse.Namespace, num_classes: int) -> torch.nn.Module:
    """The detector that the options describe, its new weights drawn from the seed."""
    torch.manual_seed(options.seed)
    refinement = partial(
        build_refinement,
        options.refine,
        solver=options.solver,
        steps=options.steps,
        adjoint=options.adjoint,
        groups=options.groups,
    )
    return build_detector(
        options.backbone,
        refinement,
        num_classes=num_classes,
        imagenet=options.weights == "imagenet",
        image_size=options.image_size,
        channels=options.channels,
        rois_per_image=options.rois_per_image,
        detections_per_image=options.detections_per_image,
    )


def run(options: argparse.Namespace, process: Process) -> tuple[torch.nn.Module, dict]:
    """Train and evaluate. The first process writes the report; the others' lacks the metrics."""
    train_set = CocoFolder(options.data, "train", options.train_annotations, options.labelled)
    val_set = CocoFolder(options.data, "val", options.val_annotations, options.labelled)
    if val_set.categories != train_set.categories:
        raise DataError(
            f"data: the splits' categories differ: {train_set.categories} to train on, "
            f"{val_set.categories} to evaluate on"
        )
    settle(options, train_set)
    say(process, f"{len(train_set)} images to train on, {len(val_set)} to evaluate on, {process.device}")
    if options.weights == "none":
        say(process, f"{options.backbone} starts from random weights (--weights none): expect low figures")

    model = build_model(options, num_classes=len(train_set.categories) + 1).to(process.device)
    plan = Plan(
        options.iterations,
        options.batch_size,
        options.lr,
        options.seed,
        bf16=options.amp == "bf16",
        workers=options.workers,
        warmup_steps=options.warmup_steps or 0,
    )
    checkpoints = checkpoints_of(options) if options.checkpoint else None
    stream = TrainingStream(train_set, options.seed)
    history = train(model, stream, plan, process, checkpoints, options.resume)
    findings = evaluate(model, val_set, process, bf16=plan.bf16)

    report = {
        "config": configuration(options),
        "processes": process.world,
        "versions": versions(process.device),
        "parameters": count_parameters(model),
        "seconds_per_iteration": statistics.median(entry["seconds"] for entry in history),
        "seconds_per_image_with_reading_and_encoding": findings.seconds_per_image_with_reading_and_encoding,
        "history": history,
    }
    if process.is_first:
        report["metrics"] = coco_metrics(val_set.coco, findings.entries)
        if findings.residuals:
            report["solve"] = summarize_solves(findings)
        write_json(options.output / "detections.json", findings.entries, indent=None)
        draw_predictions(val_set, {"prediction": findings.entries}).savefig(options.output / "masks.png")
        write_json(options.output / "accuracy.json", report)  # last: it says that the training is complete
        summarize(options, report)
    return model, report


def versions(device: torch.device) -> dict[str, str]:
    found = {name: version(name) for name in ("torch", "torchvision", "pycocotools")}
    if device.type == "cuda":
        machine = {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    else:
        machine = {"device": f"{platform.machine()}, {torch.get_num_threads()} threads"}
    return {"python": platform.python_version(), **found, **machine}


def count_parameters(model: torch.nn.Module) -> dict[str, int]:
    """Of the whole detector, of the refinement alone, and of the refinement with the mask predictor."""

    def count(module: torch.nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    refinement = count(model.roi_heads.mask_head)
    mask_head = refinement + count(model.roi_heads.mask_predictor)
    return {"detector": count(model), "refinement": refinement, "mask_head": mask_head}


def summarize_solves(findings: Findings) -> dict[str, float]:
    """How far the solves of the evaluation's RoIs went; residuals are relative."""
    residuals = torch.tensor(findings.residuals)
    return {
        "rois": len(residuals),
        "residual_median": residuals.median().item(),
        "residual_p95": residuals.quantile(0.95).item(),
        "residual_max": residuals.max().item(),
        "iterations_mean": statistics.mean(findings.iterations),
    }


def summarize(options: argparse.Namespace, report: dict) -> None:
    losses = [entry["loss"] for entry in report["history"]]
    few = max(1, len(losses) // 10)
    first, last = statistics.mean(losses[:few]), statistics.mean(losses[-few:])
    pace = report["seconds_per_iteration"]
    print(f"loss {first:.3f} (first {few}) → {last:.3f} (last {few}), {pace:.3f} s/iteration")
    for kind, figures in report["metrics"].items():
        shown = (f"{name} {100 * figures[name]:.1f}" for name in ("AP", "AP50", "AP75") if figures[name] is not None)
        print(f"{kind}: {', '.join(shown)}")
    print("parameters:", ", ".join(f"{name} {count:,}" for name, count in report["parameters"].items()))
    if "solve" in report:
        print("solves:", ", ".join(f"{name} {value:.3g}" for name, value in report["solve"].items()))
    print(f"wrote accuracy.json, detections.json and masks.png in {options.output}")


def say(process: Process, message: str) -> None:
    if process.is_first:
        print(message, flush=True)


def main(arguments: list[str] | None = None) -> tuple[torch.nn.Module, dict]:
    options = parse(arguments)
    with joined_processes(options.device, deterministic=options.deterministic) as process:
        return run(options, process)


if __name__ == "__main__":
    try:
        main()
    except DataError as error:
        sys.exit(f"accuracy.py: error: {error}")
