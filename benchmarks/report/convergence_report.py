"""What convergence.py found: its figures in words, and its picture."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PLAIN = "plain iteration"
PAPER_BOUND = math.exp(-8)
CONVERGED = 1e-10  # relative residual of an equilibrium in float64
STEADY = 1e-4  # relative step of a plain iteration that has converged in float32 or float64
STYLES = {"float64": "-", "float32": "--", "bfloat16": ":"}
COLOURS = {"Broyden": "tab:blue", "Anderson": "tab:orange", "Picard": "tab:green", PLAIN: "black"}
ROIS = matplotlib.colormaps["Dark2"].colors
ROWS = matplotlib.colormaps["tab10"].colors
STEP, DISTANCE = "‖Hⁱ⁺¹ - Hⁱ‖ / ‖Hⁱ⁺¹‖", "‖H - H*‖ / ‖H*‖"


def numbers(values: list[float | None]) -> list[float]:
    return [math.inf if value is None else value for value in values]


def worst(values: list[float | None]) -> float:
    return max(numbers(values))


def median(values: list[float | None]) -> float:
    return statistics.median(numbers(values))


def near(values: list[float | None]) -> int:
    return sum(value < PAPER_BOUND for value in numbers(values))


def moving(population: dict[str, Any]) -> str:
    """How many objects have not converged, and what relative steps they go on with."""
    left = [step for step, done in zip(population["relative"], population["converged"], strict=True) if not done]
    steps = f", relative steps of {min(numbers(left)):.0e} to {worst(left):.0e}" if left else ""
    return f"{len(left)} of {len(population['converged'])}{steps}"


def roi_name(report: dict[str, Any], roi: int) -> str:
    radius, converged = numbers(report["spectrum"][-1]["radius"])[roi], report["converged"][roi]
    return f"object {report['chosen'][roi]}, radius {radius:.2f}" + ", not converged" * (not converged)


def save_picture(path: Path, report: dict[str, Any]) -> None:
    """Six panels: the populations' steps and distances; the RoIs' steps, radii, residuals and distances."""
    figure = Figure(figsize=(15, 8.5), layout="constrained", dpi=110)
    axes = figure.subplot_mosaic([["population", "nearness", "radius"], ["steps", "residual", "distance"]])
    draw_populations(axes["population"], axes["nearness"], report["population"])
    draw_way(axes["steps"], axes["radius"], report)
    draw_solvers(axes["residual"], axes["distance"], report)
    for panel in ("population", "steps", "residual", "distance"):
        axes[panel].set_yscale("log", nonpositive="mask")
    figure.savefig(path)


def draw_populations(steps: Axes, nearness: Axes, populations: dict[str, Any]) -> None:
    for (row, population), colour in zip(populations.items(), ROWS, strict=False):
        radius, relative = drawable(population["radius"]), drawable(population["relative"])
        steps.plot(radius, relative, "o", color=colour, label=row, alpha=0.6)
        shares = np.arange(1, len(radius) + 1) / len(radius)
        for entry, style in zip(population["solves"][1:], ("-", "--"), strict=True):
            line = f"{row}, {entry['steps']} steps"
            nearness.step(sorted(drawable(entry["relative_distance"])), 100 * shares, style, color=colour, label=line)
    taken = next(iter(populations.values()))["solves"][0]["steps"]
    steps.axhline(STEADY, color="grey", linewidth=0.8)
    steps.axvline(1, color="grey", linewidth=0.8)
    steps.set(title=f"objects after {taken:,} plain steps", xlabel="spectral radius at H*", ylabel=STEP)
    steps.legend(fontsize=8)
    nearness.axvline(PAPER_BOUND, color="grey", linewidth=0.8)
    nearness.set(title="objects so near to H* after Broyden's method", xlabel=DISTANCE, ylabel="%", xscale="log")
    nearness.legend(fontsize=8)


def draw_way(steps: Axes, radius: Axes, report: dict[str, Any]) -> None:
    """A colour a RoI, a style a precision."""
    for roi, colour in zip(range(len(report["chosen"])), ROIS, strict=False):
        for name, plain in report["plain"].items():
            steps.plot(plain["steps"], drawable(row[roi] for row in plain["relative"]), STYLES[name], color=colour)
        radii = drawable(point["radius"][roi] for point in report["spectrum"])
        label = roi_name(report, roi)
        radius.plot([str(point["step"]) for point in report["spectrum"]], radii, "o-", color=colour, label=label)
    steps.set(title=PLAIN, xlabel="step", ylabel=STEP, xscale="log")
    radius.axhline(1, color="grey", linewidth=0.8)
    radius.set(title="spectral radius along the way", xlabel="step")
    radius.margins(y=0.35)  # for the legend
    radius.legend(fontsize=8, loc="upper center")


def draw_solvers(residual: Axes, distance: Axes, report: dict[str, Any]) -> None:
    """Of several RoIs the worst; of the plain iteration's ends all."""
    lines = {}
    for entry in report["solves"]:
        lines.setdefault((entry["solver"], entry["precision"]), []).append(entry)
    for (solver, precision), entries in lines.items():
        look = {"color": COLOURS[solver], "linestyle": STYLES[precision]}
        if solver == PLAIN:
            (entry,) = entries
            ends = drawable(entry["relative_distance"])
            distance.plot([f"{entry['steps']:,}, plain"] * len(ends), ends, "o", color="black")
            continue
        residual.plot([worst(row) for row in entries[-1]["trace"]], **look)
        named = [str(entry["steps"]) for entry in entries]
        distance.plot(named, [worst(entry["relative_distance"]) for entry in entries], marker="o", **look)
    residual.set(title="solvers, the worst RoI", xlabel="step", ylabel="‖F(H) - H‖ / ‖F(H)‖")
    of_solvers = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    of_precisions = [Line2D([], [], color="grey", linestyle=STYLES[name], label=name) for name in report["plain"]]
    residual.legend(handles=of_solvers + of_precisions, fontsize=8, ncols=2)
    distance.axhline(PAPER_BOUND, color="grey", linewidth=0.8)
    distance.annotate("e⁻⁸", (0.98, PAPER_BOUND), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    distance.set(title="distance to H*, the worst RoI (plain: each)", xlabel="steps", ylabel=DISTANCE)


def drawable(values: Iterable[float | None]) -> list[float]:
    return [math.nan if value is None else value for value in values]
