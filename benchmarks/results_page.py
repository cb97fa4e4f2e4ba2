"""Make results/README.md of the JSON files and pictures in results/DEVICE/, and of results/findings.md.

python benchmarks/results_page.py
"""

import json
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from comparison import cell
from convergence_report import worst
from strategies import STRATEGIES, TABLES

RESULTS = Path(__file__).parent / "results"
BASELINE = "4 convolutions"

Content = dict[str, Any]


def spread(values: Iterable[float | None], scale: float = 1.0, digits: int = 1) -> str:
    """Mean ± standard deviation over seeds."""
    found = [scale * value for value in values if value is not None]
    if not found:
        return "–"
    deviation = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.{digits}f}{deviation}"


def gain(own: list[Content], others: list[Content], figure: Callable[[Content], float]) -> str:
    """Mean ± standard error of the differences between trainings of equal seeds, which see the same batches."""
    reference = {report["seed"]: figure(report) for report in others}
    pairs = [figure(report) - reference[report["seed"]] for report in own if report["seed"] in reference]
    if len(pairs) < 2 or own is others:
        return "–"
    return f"{100 * statistics.mean(pairs):+.1f} ± {100 * statistics.stdev(pairs) / math.sqrt(len(pairs)):.1f}"


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    command = f"python benchmarks/ablation.py {settings['data'].upper()} --channels {settings['channels']}"
    command += f" --epochs {settings['epochs']} --batch-size {settings['batch_size']} --device {settings['device']}"
    parts = [
        f"Mask branch alone on {settings['data']}, C = {settings['channels']}, {settings['epochs']} epochs "
        f"with batches of {settings['batch_size']}, {len(trainings)} trainings in {hours:.1f} h of {clock} time, the "
        f"learning rates' search not counted; {machine(content)}. Chosen learning rates: {rates}.",
        f"`{command}` makes all rows; `--rows` with a row's name makes one. Convolutions: what a forward pass costs, "
        "in 3×3 convolutions between all C channels.",
    ]
    head = ["", "mask IoU, %", f"− {BASELINE}", "stopped early, %", "IoU > 0.5, %", "IoU > 0.75, %", "parameters"]
    head += ["residual forward", "residual backward", "steps", "convolutions", "s / epoch", "seeds"]
    for title, names in TABLES.items():
        present = [name for name in names if rows.get(name)]
        if present:
            lines = [ablation_row(name, rows[name], rows.get(BASELINE, [])) for name in present]
            parts += [f"**{title}**", table(head, lines)]
    return "\n\n".join(parts)


def ablation_row(name: str, reports: list[Content], baseline: list[Content]) -> list[str]:
    done = [report for report in reports if "failed" not in report]
    if not done:
        return [name, reports[0]["failed"], *["–"] * 10, f"{len(reports)} failed"]
    tests = [report["test"] for report in done]
    standing = [report for report in baseline if "failed" not in report]
    steps = [test.get("iterations") for test in tests]
    return [
        f"**{name}**" if name == "IFR" else name,
        spread((test["iou"] for test in tests), 100),
        "–" if name == BASELINE else gain(done, standing, lambda report: report["test"]["iou"]),
        spread((report["stopped_early"]["iou"] for report in done), 100),
        spread((test["above_50"] for test in tests), 100),
        spread((test["above_75"] for test in tests), 100),
        f"{done[0]['parameters'] / 1e6:.2f} M",
        median_power(test.get("residual") for test in tests),
        median_power(report["backward_residual"] for report in done),
        spread(steps),
        f"{statistics.mean(map(STRATEGIES[name].convolutions, steps)):.1f}",
        f"{statistics.median(report['seconds_per_epoch'] for report in done):.1f}",
        f"{len(done)}" + f", {len(reports) - len(done)} failed" * (len(done) < len(reports)),
    ]


def median_power(values: Iterable[float | None]) -> str:
    found = [value for value in values if value is not None]
    return f"{statistics.median(found):.0e}" if found else "–"


def receptive_field(content: Content) -> str:
    rows = [
        [row, spread(entry["outside"], 100, 2), str(len(entry["outside"]))] for row, entry in content["rows"].items()
    ]
    return "\n\n".join(
        [
            f"Share of the centre's gradient outside of the 9×9 positions that four 3×3 convolutions see, mean of "
            f"{content['rois']} RoIs; `python benchmarks/receptive_field.py DATA --sweep runs/ablation`.",
            table(["", "outside 9×9, %", "seeds"], rows),
        ]
    )


def comparison(content: Content) -> str:
    settings = content["settings"]
    given = ("iterations", "batch_size", "image_size", "channels", "rois_per_image", "lr", "amp", "backbone")
    options = " ".join(f"--{name.replace('_', '-')} {settings[name]}" for name in given if settings.get(name))
    rows = []
    for refine, found in content["refinements"].items():
        masks = [cell(found["segm"][name]) for name in ("AP", "AP50", "AP75")]
        pace, residual = cell(found["seconds_per_iteration"], 1, ".2f"), cell(found.get("residual_median"), 1, ".4f")
        rows.append([refine, *masks, cell(found["bbox"]["AP"]), f"{found['parameters'] / 1e6:.2f} M", residual, pace])
        rows[-1].append(str(found["seeds"]))
    head = ["mask head", "mask AP", "AP50", "AP75", "box AP", "refinement's parameters", "residual", "s / iteration"]
    return "\n\n".join(
        [
            f"Mask R-CNN trained end to end on {settings['data']}; {machine(content)}.",
            f"`python benchmarks/comparison.py {settings['data'].upper()} {options}`",
            table([*head, "seeds"], rows),
        ]
    )


def convergence(content: Content) -> str:
    settings, found = content["settings"], content["limit"]
    count = content["shape"][0]
    methods = sorted(set(found["found_by"]))
    plain = [
        [
            name,
            *(f"{worst(dict(zip(run['steps'], run['relative'], strict=True))[step]):.0e}" for step in powers(run)),
        ]
        for name, run in content["plain"].items()
    ]
    steps = [f"{step:,}" for step in powers(content["plain"]["float64"])]
    radii = [f"{point['step']}: {worst(point['radius']):.3f}" for point in content["spectrum"]]
    largest = [f"{point['step']}: {math.hypot(*point['eigenvalues'][0]):.3f}" for point in content["spectrum"]]
    precisions = list(content["plain"])
    distances = []
    for solver, length in dict.fromkeys((entry["solver"], entry["steps"]) for entry in content["solves"]):
        of = [e for e in content["solves"] if (e["solver"], e["steps"]) == (solver, length)]
        cells = [f"{worst(e['relative_distance']):.0e} / {worst(e['distance']):.0e}" for e in of]
        residuals = [f"{worst(e['residual']):.0e}" for e in of]
        distances.append([solver, f"{length:,}", *cells, *residuals])
    command = (
        f'--row "{settings["row"]}" --seed {settings["seed"]} --rois {settings["rois"]} --steps {settings["steps"]}'
    )
    return "\n\n".join(
        [
            f"The block of row {settings['row']}, seed {settings['seed']}, on {count} unseen objects; figures are of "
            f"the worst. {content['elapsed_seconds'] / 60:.0f} minutes on {machine(content)}.",
            f"`python benchmarks/convergence.py {settings['data'].upper()} {command}`",
            "**Relative step of the plain iteration, ‖Hⁱ⁺¹ - Hⁱ‖ / ‖Hⁱ⁺¹‖, after so many steps**",
            table(["", *steps], plain),
            f"Spectral radius along the way by power iteration, {', '.join(radii)}; of the first object by Arnoldi's "
            f"method, {', '.join(largest)}.",
            f"**Distance to the limit, relative / absolute, and relative residual.** The limit was found by "
            f"{' and '.join(methods)} in float64, its own relative residual is {worst(found['residual']):.0e} and its "
            f"norm {statistics.mean(found['norm']):.0f}. The paper's bound is e⁻⁸ = {math.exp(-8):.1e}.",
            table(["solver", "steps", *precisions, *(f"residual, {name}" for name in precisions)], distances),
        ]
    )


def powers(run: Content) -> list[int]:
    return [step for step in run["steps"] if math.log10(step).is_integer()]


SECTIONS = {
    "ablation": ("The paper's ablations", ablation),
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
