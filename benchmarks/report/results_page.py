"""Make results/README.md of the JSON files and pictures in results/DEVICE/, and of results/choice.md and
findings.md.

python benchmarks/report/results_page.py
"""

import argparse
import json
import statistics
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.strategies import BASELINE, IFR, REFERENCES, STRATEGIES, TABLES
from benchmarks.report.choice import choice_table
from benchmarks.report.convergence_report import PAPER_BOUND, STEADY, median, moving, near, numbers, worst
from benchmarks.report.formats import cell, interval, median_power, spread, table

RESULTS = Path(__file__).parents[1] / "results"
FEW = 10  # rows of an ablation that need no titles

Content = dict[str, Any]


def machine(content: Content) -> str:
    found = content["environment"]
    device = found.get("gpu") or found["cpu"]
    versions = ", ".join(f"{name} {found[name]}" for name in ("torch", "cuda", "driver_version") if name in found)
    return f"{device}; {versions}"


def trainings(content: Content) -> str:
    """What an ablation's trainings were, where they ran, and the command."""
    settings = content["settings"]
    reports = [report for reports in content["rows"].values() for report in reports]
    machines = Counter(report["machine"] for report in reports if "machine" in report)
    where = "; ".join(f"{count} on {name}" for name, count in machines.items()) or machine(content)
    tried = defaultdict(set)
    for entry in content["search"]:
        tried[entry["row"]].add(entry["lr"])
    rates = ", ".join(
        f"{row} {rate:g}" + (f" (of {min(tried[row]):g} to {max(tried[row]):g})" if len(tried[row]) > 1 else "")
        for row, rate in content["learning_rates"].items()
    )
    for row, (report, *_) in content["rows"].items():
        if report["tuned"] != STRATEGIES[row].tuned:  # before it had a search of its own
            rates += f"; {row} that of {report['tuned']}"
    command = f"python benchmarks/quality/ablation.py {settings['data'].upper()} --channels {settings['channels']}"
    command += f" --epochs {settings['epochs']} --batch-size {settings['batch_size']} --device {settings['device']}"
    command += f" --min-area {settings['min_area']} --seeds {max(len(reports) for reports in content['rows'].values())}"
    first, *others = searches(content)
    commands = f"`{command} {first}`" + "".join(f", then the same with `{options}`" for options in others)
    commands += " (for the rows below)" if len(content["rows"]) > FEW else ""
    note = f" {content['note']}" if "note" in content else ""
    data = ", ".join(
        f"{part} {of['objects']:,} objects of {of['images']:,} images" for part, of in content["data"].items()
    )
    return (
        f"{len(reports)} trainings of the mask branch alone on {settings['data']} ({data}), "
        f"C = {settings['channels']}, {settings['epochs']} epochs; {where}. Learning rates: {rates}. {commands}.{note}"
    )


def searches(content: Content) -> list[str]:
    """ablation.py's options, a call each for the rows whose learning rate was searched among the same."""
    tried = Counter((entry["row"], entry["lr"]) for entry in content["search"])
    groups = defaultdict(list)
    for row, reports in content["rows"].items():
        groups[tuple(sorted(lr for tuned, lr in tried if tuned == reports[0]["tuned"]))].append(row)
    found = []
    for rates, rows in groups.items():
        tuned = {content["rows"][row][0]["tuned"] for row in rows}
        seeds = min(count for (row, _), count in tried.items() if row in tuned)
        options = f"--search-seeds {seeds} --lrs {' '.join(f'{lr:g}' for lr in rates)}"
        names = " ".join(f'"{row}"' for row in rows)
        found.append(f"{options} --rows {names}" if len(content["rows"]) <= FEW else options)
    return found


def choice(content: Content, latency: Content) -> str:
    done = [report for reports in content["rows"].values() for report in reports if "failed" not in report]
    seconds = sum(report["seconds_per_epoch"] * len(report["epochs"]) for report in done)
    return "\n\n".join(
        [
            f"{trainings(content)} These took {seconds / 3600:.1f} hours of one core, and the search of learning rates "
            f"more. − {BASELINE}: points of mask IoU on the test's objects, with 95 % intervals over "
            f"seeds and images. ms: of the trained refinement on {latency['n']} unseen objects; {machine(latency)}, "
            f"{latency['environment']['cpu'].rpartition(', ')[2]}. ×: over {BASELINE} of the same precision in the "
            "same round. `python benchmarks/analysis/latency.py "
            f"{content['settings']['data'].upper()} --sweep runs/ablation`",
            choice_table(content, latency),
        ]
    )


def ablation(content: Content) -> str:
    """One table; each row once, under the title of the paper's table or the question that it belongs to."""
    settings, rows = content["settings"], content["rows"]
    head = ["", "mask IoU, %", f"− {BASELINE}", f"− {BASELINE}, all", f"− {IFR}, all", "parameters"]
    head += ["residual forth / back", "steps", "convolutions", "seeds"]
    lines = [
        ablation_row(name, rows[name], content["gains"], settings["channels"]) for name in REFERENCES if name in rows
    ]
    for title, names in TABLES.items():
        own = [name for name in names if name in rows and name not in {line[0].strip("*") for line in lines}]
        if own and len(rows) > FEW:
            lines.append([f"*{title}*", *[""] * (len(head) - 1)])
        lines += [ablation_row(name, rows[name], content["gains"], settings["channels"]) for name in own]
    return f"{trainings(content)}\n\n{table(head, lines)}"


def ablation_row(name: str, reports: list[Content], gains: Content, channels: int) -> list[str]:
    done = [report for report in reports if "failed" not in report]
    if not done:
        return [name, reports[0]["failed"], *["–"] * 7, f"{len(reports)} failed"]
    tests = [report["test"] for report in done]
    steps = [test.get("iterations") for test in tests]
    return [
        f"**{name}**" if name == IFR else name,
        spread((test["iou"] for test in tests), 100),
        *(
            interval(gains[reference][name][images]) if name in gains[reference] else "–"
            for reference, images in ((BASELINE, "test"), (BASELINE, "held_out"), (IFR, "held_out"))
        ),
        f"{done[0]['parameters'] / 1e6:.2f} M",
        residuals(tests, done),
        spread(steps),
        f"{statistics.mean(STRATEGIES[name].convolutions(count, channels) for count in steps):.1f}",
        f"{len(done)}" + f", {len(reports) - len(done)} failed" * (len(done) < len(reports)),
    ]


def held_out(content: Content) -> str:
    lines = [
        [
            name,
            spread((report["test"]["iou"] for report in reports), 100),
            *(
                interval(content["gains"][reference][name]["test"]) if name in content["gains"][reference] else "–"
                for reference in REFERENCES
            ),
            spread(report["test"].get("iterations") for report in reports),
            str(len(reports)),
        ]
        for name, reports in content["rows"].items()
    ]
    settings = content["settings"]
    return "\n\n".join(
        [
            f"Mask branches trained on {settings['data']}, C = {settings['channels']}, tested on {content['objects']} "
            f"objects in {content['images']} images of {content['data']}, {content['split']}; {machine(content)}. "
            f"`python benchmarks/quality/ablation.py --output runs/ablation --test {content['data'].upper()}`",
            table(["", "mask IoU, %", *(f"− {reference}" for reference in REFERENCES), "steps", "seeds"], lines),
        ]
    )


def residuals(tests: list[Content], reports: list[Content]) -> str:
    forth = median_power(test.get("residual") for test in tests)
    back = median_power(report["backward_residual"] for report in reports)
    return "–" if forth == "–" else f"{forth} / {back}"


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
    """A line for each way to solve at the test, a column for each way to train."""
    rows = content["rows"]
    ways = list(next(iter(rows.values())))
    lines = [[way, *(tested(way, found[way]) for found in rows.values())] for way in ways]
    lines.append(["seeds", *(str(len(found[ways[0]]["iou"])) for found in rows.values())])
    command = f"inference_steps.py {content['data'].upper()} --sweep runs/ablation --objects {content['objects']}"
    command += " --steps " + " ".join(way.removesuffix(" steps") for way in ways if way.endswith(" steps"))
    command += " --rtols " + " ".join(way.removeprefix("to ") for way in ways if way.startswith("to "))
    command += " --rows " + " ".join(f'"{row}"' for row in rows)
    return "\n\n".join(
        [
            f"Mask branches, C = {content['channels']}, tested on {content['objects']} objects of {content['data']}, "
            f"their solves cut after some steps or stopped at a residual; {machine(content)}. A column for each way to "
            f"train: points of mask IoU gained over {BASELINE}, which have {spread(content['baseline'], 100)} %; then "
            "the median residual of a solve that was cut, the mean steps of one that stopped. "
            f"`python benchmarks/analysis/{command}`",
            table(["tested with", *rows], lines),
        ]
    )


def tested(way: str, entry: Content) -> str:
    spent = f"{spread(entry['steps'])} steps" if way.startswith("to ") else median_power(entry["residual"])
    return f"{interval(entry['gain'])}; {spent}"


def latency(content: Content) -> str:
    lines = []
    for row, found in content["rows"].items():
        for precision, entry in found.items():
            low, middle, high = entry["ratio"]
            times = [f"{1e3 * entry[key]:.1f}" for key in ("median", "processor_median")]
            solve = [f"{entry['residual']:.0e}", f"{entry['steps']:.1f}"] if "steps" in entry else ["–", "–"]
            lines.append([row, precision, *times, f"{middle:.2f} ({low:.2f}–{high:.2f})", *solve])
    return "\n\n".join(
        [
            f"Trained refinements, C = {content['channels']}, on {content['n']} unseen objects of {content['data']} a "
            f"pass, in turns within one run; {machine(content)}. × stack: paired within a round, median and quartiles. "
            f"`python benchmarks/analysis/latency.py {content['data'].upper()} --sweep runs/ablation`",
            table(["", "precision", "ms", "CPU ms", "× stack", "residual", "steps"], lines),
        ]
    )


def comparison(content: Content) -> str:
    settings = content["settings"]
    names = (
        "labelled",
        "iterations",
        "batch_size",
        "image_size",
        "channels",
        "rois_per_image",
        "lr",
        "amp",
        "backbone",
    )
    options = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in names if settings.get(name))
    options += f" --refine {' '.join(content['refinements'])}"
    options += f" --seeds {max(found['seeds'] for found in content['refinements'].values())}"

    def gained(refine: str, kind: str) -> list[str]:
        return [interval(of[refine][kind]) if refine in of else "–" for of in content["gains"].values()]

    boxes = content.get("given_boxes")  # which older reports lack
    rows = []
    for refine, found in content["refinements"].items():
        masks = [cell(found["segm"][name]) for name in ("AP", "AP50", "AP75")]
        masks[1:1] = gained(refine, "segm")
        pace, residual = cell(found["seconds_per_iteration"], 1, ".2f"), cell(found.get("residual_median"), 1, ".4f")
        rows.append([refine, *masks, cell(found["bbox"]["AP"]), f"{found['parameters'] / 1e6:.2f} M", residual, pace])
        rows[-1].append(str(found["seeds"]))
        if boxes:
            rows[-1][1:1] = [cell(found["mask_iou"]), *gained(refine, "mask_iou")]
    differences = [f"− {reference}" for reference in content["gains"]]
    head = ["mask AP", *differences, "AP50", "AP75", "box AP", "refinement's parameters", "residual"]
    if boxes:
        head[:0] = ["mask IoU, boxes given", *differences]
    hours = settings["iterations"] * sum(run["seconds_per_iteration"] for run in content["runs"]) / 3600
    given = f" Boxes given: {boxes['objects']:,} objects of {boxes['images']} images." if boxes else ""
    return "\n\n".join(
        [
            f"Mask R-CNN trained end to end on {settings['data']}; {machine(content)}. The iterations took {hours:.1f} "
            "hours of one process. − …: points gained, with their 95 % interval over seeds and images."
            f"{given} `python benchmarks/quality/comparison.py {settings['data'].upper()} {options}`",
            table(["mask head", *head, "s / iteration", "seeds"], rows),
        ]
    )


def convergence(content: Content) -> str:
    settings, populations = content["settings"], content["population"]
    counted, nearness = [], []
    for row, population in populations.items():
        radius = population["radius"]
        above = sum(value > 1 for value in numbers(radius))
        counted.append([row, moving(population), f"{median(radius):.2f}", f"{worst(radius):.2f}", str(above)])
        for entry in population["solves"]:
            nearness.append([row, entry["solver"], f"{entry['steps']:,}"])
            for values in (entry["relative_distance"], entry["distance"]):
                nearness[-1] += [f"{median(values):.0e}", f"{worst(values):.0e}", str(near(values))]
    names = ("seed", "objects", "object_steps", "rois", "steps")
    command = f"convergence.py {settings['data'].upper()} "
    command += " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in names)
    columns = ["median", "worst", "below e⁻⁸"]
    return "\n\n".join(
        [
            f"Trained blocks on {settings['objects']} unseen objects, {settings['object_steps']:,} plain steps each in "
            f"float32; {machine(content)}. `python benchmarks/analysis/{command}` "
            f"An object has converged where the last step is below {STEADY:.0e} of the iterate; the spectral radius is "
            "that of ∂F/∂H at H*, the equilibrium that Broyden's method finds in float64.",
            table(["", "not converged", "radius, median", "radius, largest", "radius above 1"], counted),
            f"Their distance to H*, first relative, then absolute. The paper's bound is e⁻⁸ = {PAPER_BOUND:.1e}. The "
            "picture shows some of these objects longer, and every solver in three precisions.",
            table(["", "solver", "steps", *(f"relative, {c}" for c in columns), *columns], nearness),
        ]
    )


SECTIONS = {
    "ablation": ("Ablations of the mask branch", ablation),
    "held_out": ("Other objects", held_out),
    "inference_steps": ("Fewer or more steps at inference", inference_steps),
    "comparison": ("Mask R-CNN end to end", comparison),
    "convergence": ("Convergence", convergence),
    "receptive_field": ("Effective receptive field", receptive_field),
}


def read(path: Path) -> Content:
    return json.loads(path.read_text())


def page(results: Path) -> str:
    """The page in Markdown. A file's name begins with its section's key; a picture of the same name is shown below.

    First comes choice.md, with the ablations of which the latency was measured, the longest trainings' first; then
    findings.md, with all others.
    """
    parts = ["# Results", (results / "choice.md").read_text().strip()]
    timed = {path.with_name(path.name.replace("latency", "ablation")): path for path in results.glob("*/latency*.json")}
    chosen = {path: read(path) for path in sorted(timed)}
    for path, content in sorted(chosen.items(), key=lambda item: -item[1]["settings"]["epochs"]):
        picture = path.with_name(path.name.replace("ablation", "choice")).with_suffix(".png")
        parts += [f"### {path.parent.name}/{path.name}", choice(content, read(timed[path]))]
        parts += [f"![{picture.stem}]({picture.parent.name}/{picture.name})"]
    parts.append((results / "findings.md").read_text().strip())
    for folder in sorted(path for path in results.iterdir() if path.is_dir()):
        for kind, (title, section) in SECTIONS.items():
            for path in sorted(set(folder.glob(f"{kind}*.json")) - chosen.keys()):
                parts += [f"## {title}: {folder.name}/{path.name}", section(read(path))]
                pictures = sorted(folder.glob(f"{path.stem}*.png"))
                parts += [f"![{picture.stem}]({folder.name}/{picture.name})" for picture in pictures]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.partition("\n")[0]).parse_args()
    (RESULTS / "README.md").write_text(page(RESULTS))
    print(f"wrote {RESULTS / 'README.md'}")
