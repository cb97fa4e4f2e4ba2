"""Make results/README.md of the JSON files and pictures in results/DEVICE/, and of results/findings.md.

python benchmarks/report/results_page.py
"""

import json
import math
import statistics
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.strategies import BASELINE, IFR, STRATEGIES, TABLES
from benchmarks.report.convergence_report import (
    PAPER_BOUND,
    STEADY,
    each,
    median,
    moving,
    near,
    numbers,
    roi_name,
    worst,
)
from benchmarks.report.formats import cell, interval, spread, table

RESULTS = Path(__file__).parents[1] / "results"

Content = dict[str, Any]


def machine(content: Content) -> str:
    found = content["environment"]
    device = found.get("gpu") or found["cpu"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "cuda", "driver_version") if name in found)
    return f"{device}; {versions}"


def ablation(content: Content) -> str:
    settings, rows = content["settings"], content["rows"]
    trainings = [report for reports in rows.values() for report in reports]
    hours = sum(epoch["seconds"] for report in trainings for epoch in report.get("epochs", [])) / 3600
    clock = "processor" if settings["device"] == "cpu" else "device"
    rates = ", ".join(f"{row} {rate:g}" for row, rate in content["learning_rates"].items())
    command = f"python benchmarks/quality/ablation.py {settings['data'].upper()} --channels {settings['channels']}"
    command += f" --epochs {settings['epochs']} --batch-size {settings['batch_size']} --device {settings['device']}"
    parts = [
        f"Mask branch alone on {settings['data']}, C = {settings['channels']}, {settings['epochs']} epochs "
        f"with batches of {settings['batch_size']}, {len(trainings)} trainings in {hours:.1f} h of {clock} time, the "
        f"learning rates' search not counted; {machine(content)}. Chosen learning rates: {rates}.",
        f"`{command}` makes all rows; `--rows` with a row's name makes one. − {BASELINE}, − {IFR}: mean difference of "
        "trainings of equal seeds in points, with its 95 % interval by the bootstrap over seeds and images: those "
        "of the test, or all held out, with those for validation. Convolutions: the evaluations that a sample's solve "
        "needs, in 3×3 convolutions between all C channels.",
    ]
    head = ["", "mask IoU, %", f"− {BASELINE}", f"− {BASELINE}, all", f"− {IFR}, all", "stopped early, %"]
    head += ["IoU > 0.5 / 0.75, %", "parameters", "residual forth / back", "steps"]
    head += ["convolutions", "s / epoch", "seeds"]
    for title, names in TABLES.items():
        present = [name for name in names if rows.get(name)]
        if present:
            lines = [ablation_row(name, rows[name], content["gains"]) for name in present]
            parts += [f"**{title}**", table(head, lines)]
    return "\n\n".join(parts)


def ablation_row(name: str, reports: list[Content], gains: Content) -> list[str]:
    done = [report for report in reports if "failed" not in report]
    if not done:
        return [name, reports[0]["failed"], *["–"] * 10, f"{len(reports)} failed"]
    tests = [report["test"] for report in done]
    steps = [test.get("iterations") for test in tests]
    return [
        f"**{name}**" if name == IFR else name,
        spread((test["iou"] for test in tests), 100),
        *(
            interval(gains[reference][name][images]) if name in gains[reference] else "–"
            for reference, images in ((BASELINE, "test"), (BASELINE, "held_out"), (IFR, "held_out"))
        ),
        spread((report["stopped_early"]["iou"] for report in done), 100),
        " / ".join(f"{100 * statistics.mean(test[share] for test in tests):.1f}" for share in ("above_50", "above_75")),
        f"{done[0]['parameters'] / 1e6:.2f} M",
        residuals(tests, done),
        spread(steps),
        f"{statistics.mean(map(STRATEGIES[name].convolutions, steps)):.1f}",
        f"{statistics.median(report['seconds_per_epoch'] for report in done):.1f}",
        f"{len(done)}" + f", {len(reports) - len(done)} failed" * (len(done) < len(reports)),
    ]


def residuals(tests: list[Content], reports: list[Content]) -> str:
    forth = median_power(test.get("residual") for test in tests)
    back = median_power(report["backward_residual"] for report in reports)
    return "–" if forth == "–" else f"{forth} / {back}"


def median_power(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.0e}" if found else "–"


def receptive_field(content: Content) -> str:
    rows = [
        [row, *(spread(field["outside"], 100, 2) for field in fields.values()), str(len(fields["gradient"]["outside"]))]
        for row, fields in content["rows"].items()
    ]
    return "\n\n".join(
        [
            f"Share of the centre's gradient outside of the 9×9 positions that four 3×3 convolutions see, mean of "
            f"{content['rois']} RoIs. GroupNorm alone sees all positions, through its mean and variance; with these "
            "held constant, only what passes through convolutions and the equilibrium is left. "
            "`python benchmarks/analysis/receptive_field.py DATA --sweep runs/ablation`.",
            table(["", "outside 9×9, %", "with GroupNorm's statistics held, %", "seeds"], rows),
        ]
    )


def inference_steps(content: Content) -> str:
    baseline = spread(content["baseline"], 100)
    lines = [
        [
            row,
            name,
            spread(entry["iou"], 100),
            interval(entry["gain"]),
            f"{statistics.median(entry['residual']):.0e}",
            spread(entry["steps"]),
            f"{entry['convolutions']:.1f}",
            str(len(entry["iou"])),
        ]
        for row, found in content["rows"].items()
        for name, entry in found.items()
    ]
    head = ["trained as", "tested with", "mask IoU, %", f"− {BASELINE}", "residual", "steps", "convolutions", "seeds"]
    return "\n\n".join(
        [
            f"Trained mask branches, C = {content['channels']}, tested on {content['objects']} objects of "
            f"{content['data']} with other solves than they were trained with: cut after a number of steps, or stopped "
            f"at a relative residual; {BASELINE}: {baseline} %. "
            f"`python benchmarks/analysis/inference_steps.py {content['data'].upper()} --sweep runs/ablation`.",
            table(head, lines),
        ]
    )


def comparison(content: Content) -> str:
    settings = content["settings"]
    given = ("iterations", "batch_size", "image_size", "channels", "rois_per_image", "lr", "amp", "backbone")
    options = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in given if settings.get(name))
    reference = next(iter(content["refinements"]))
    rows = []
    for refine, found in content["refinements"].items():
        masks = [cell(found["segm"][name]) for name in ("AP", "AP50", "AP75")]
        masks.insert(1, interval(content["gains"][refine]["segm"]) if refine in content["gains"] else "–")
        pace, residual = cell(found["seconds_per_iteration"], 1, ".2f"), cell(found.get("residual_median"), 1, ".4f")
        rows.append([refine, *masks, cell(found["bbox"]["AP"]), f"{found['parameters'] / 1e6:.2f} M", residual, pace])
        rows[-1].append(str(found["seeds"]))
    head = ["mask head", "mask AP", f"− {reference}", "AP50", "AP75", "box AP", "refinement's parameters", "residual"]
    return "\n\n".join(
        [
            f"Mask R-CNN trained end to end on {settings['data']}; {machine(content)}. − {reference}: mask AP gained "
            "in points, with its 95 % interval by the bootstrap over seeds and images.",
            f"`python benchmarks/quality/comparison.py {settings['data'].upper()} {options}`",
            table([*head, "s / iteration", "seeds"], rows),
        ]
    )


def convergence(content: Content) -> str:
    settings, found, chosen = content["settings"], content["limit"], content["chosen"]
    counted, nearness, populations = [], [], content["population"]
    exactness = max(worst(population["limit"]["residual"]) for population in populations.values())
    for row, population in populations.items():
        radius = population["radius"]
        above = sum(value > 1 for value in numbers(radius))
        counted.append([row, moving(population), f"{median(radius):.2f}", f"{worst(radius):.2f}", str(above)])
        for entry in population["solves"]:
            nearness.append([row, entry["solver"], f"{entry['steps']:,}"])
            for values in (entry["relative_distance"], entry["distance"]):
                nearness[-1] += [f"{median(values):.0e}", f"{worst(values):.0e}", str(near(values))]
    plain = []
    for roi in range(len(chosen)):
        for name, run in content["plain"].items():
            reached = {step: numbers(row)[roi] for step, row in zip(run["steps"], run["relative"], strict=True)}
            plain.append([roi_name(content, roi), name, *(f"{reached[step]:.0e}" for step in powers(run))])
    steps = [f"{step:,}" for step in powers(content["plain"]["float64"])]
    radii = [f"{point['step']}: {each(point['radius'], '.2f')}" for point in content["spectrum"]]
    leading = ", ".join(f"{complex(*value):.2f}" for value in content["spectrum"][-1]["eigenvalues"][:3])
    precisions = list(content["plain"])
    distances = []
    for solver, length in dict.fromkeys((entry["solver"], entry["steps"]) for entry in content["solves"]):
        of = [e for e in content["solves"] if (e["solver"], e["steps"]) == (solver, length)]
        cells = [each(e["relative_distance"], ".0e") for e in of]
        distances.append([solver, f"{length:,}", *cells, *(f"{worst(e['residual']):.0e}" for e in of)])
    command = " ".join(
        f"--{name.replace('_', '-')} {settings[name]}" for name in ("seed", "objects", "object_steps", "rois", "steps")
    )
    command += "".join(f' "{row}"' if i else f' --rows "{row}"' for i, row in enumerate(settings["rows"]))
    columns = ["median", "worst", "below e⁻⁸"]
    return "\n\n".join(
        [
            f"Trained blocks, seed {settings['seed']}, on unseen objects; "
            f"{content['elapsed_seconds'] / 60:.0f} minutes on {machine(content)}.",
            f"`python benchmarks/analysis/convergence.py {settings['data'].upper()} {command}`",
            f"**{settings['objects']} objects, {settings['object_steps']:,} plain steps each in float32.** An object "
            f"has converged where the last step is below {STEADY:.0e} of the iterate; the spectral radius is that of "
            "∂F/∂H at H*, the equilibrium that Broyden's method finds in float64.",
            table(["", "not converged", "radius, median", "radius, largest", "radius above 1"], counted),
            f"**Their distance to H*, first relative, then absolute,** float32. The paper's bound is e⁻⁸ = "
            f"{PAPER_BOUND:.1e}; the relative residual of H* is at most {exactness:.0e}.",
            table(["", "solver", "steps", *(f"relative, {c}" for c in columns), *columns], nearness),
            f"**{content['row']}, {len(chosen)} of these objects longer:** relative step of the plain iteration after "
            "so many steps",
            table(["", "", *steps], plain),
            f"Spectral radius of each along the way by power iteration, {'; '.join(radii)}. The last one's leading "
            f"eigenvalues at H*, by Arnoldi's method: {leading or 'none found'}.",
            f"**Relative distance of each to H*, and the worst relative residual.** H* was found by "
            f"{', '.join(found['found_by'])}, its own relative residual in float64 is {worst(found['residual']):.0e}.",
            table(["solver", "steps", *precisions, *(f"residual, {name}" for name in precisions)], distances),
        ]
    )


def powers(run: Content) -> list[int]:
    return [step for step in run["steps"] if math.log10(step).is_integer()]


SECTIONS = {
    "ablation": ("The paper's ablations", ablation),
    "inference_steps": ("Fewer or more steps at inference", inference_steps),
    "comparison": ("Mask R-CNN end to end", comparison),
    "convergence": ("Convergence", convergence),
    "receptive_field": ("Effective receptive field", receptive_field),
}


def page(results: Path) -> str:
    """The page in Markdown. A file's name begins with its section's key; a picture of the same name is shown below."""
    parts = ["# Results", (results / "findings.md").read_text().strip()]
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for kind, (title, section) in SECTIONS.items():
            for path in sorted(folder.glob(f"{kind}*.json")):
                parts += [f"## {title}: {folder.name}/{path.name}", section(json.loads(path.read_text()))]
                pictures = sorted(folder.glob(f"{path.stem}*.png"))
                parts += [f"![{picture.stem}]({folder.name}/{picture.name})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    (RESULTS / "README.md").write_text(page(RESULTS))
    print(f"wrote {RESULTS / 'README.md'}")
