"""What convergence.py found, printed and drawn: of several RoIs the worst."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

PLAIN = "plain iteration"
PAPER_BOUND = math.exp(-8)
CONVERGED = 1e-10  # relative residual of an equilibrium in float64
STYLES = {"float64": "-", "float32": "--", "bfloat16": ":"}
COLOURS = {"Broyden": "tab:blue", "Anderson": "tab:orange", "Picard": "tab:green", PLAIN: "black"}


def worst(values: list[float | None]) -> float:
    return max(math.inf if value is None else value for value in values)


def near(values: list[float | None]) -> int:
    return sum(value is not None and value < PAPER_BOUND for value in values)


def print_report(report: dict[str, Any]) -> None:
    rois = report["shape"][0]
    print(f"\n{report['settings']['row']}, the worst of {rois} RoIs")
    print("plain iteration, relative step ‖Hⁱ⁺¹ - Hⁱ‖ / ‖Hⁱ⁺¹‖:")
    for name, plain in report["plain"].items():
        reached = dict(zip(plain["steps"], map(worst, plain["relative"]), strict=True))
        shown = [step for step in reached if math.log10(step).is_integer() or step == plain["steps"][-1]]
        line = ", ".join(f"{step}: {reached[step]:.1e}" for step in shown)
        print(f"  {name:9} {line} ({1e3 * plain['seconds_per_step']:.2f} ms a step)")
    found = report["limit"]
    print(f"limit H*: {' / '.join(sorted(set(found['found_by'])))}, relative residual {worst(found['residual']):.1e}")
    if worst(found["residual"]) > CONVERGED:
        print("  H* is no equilibrium: none was found, and distances to it say little")
    print("spectral radius by power iteration (first RoI: by power iteration and by Arnoldi's method):")
    for point in report["spectrum"]:
        largest = f"{math.hypot(*point['eigenvalues'][0]):.3f}" if point["eigenvalues"] else "none converged"
        print(f"  {point['step']:>9}: {worst(point['radius']):.3f} ({point['radius'][0]:.3f}, {largest})")
    print(f"relative distance to H* (RoIs of {rois} below e⁻⁸, relative and absolute) [relative residual]:")
    print(f"  {'':16}{'steps':>7}  " + "".join(f"{name:28}" for name in report["plain"]))
    for solver, steps in dict.fromkeys((e["solver"], e["steps"]) for e in report["solves"]):
        row = [e for e in report["solves"] if (e["solver"], e["steps"]) == (solver, steps)]
        cells = (
            f"{worst(e['relative_distance']):.1e} ({near(e['relative_distance'])}, {near(e['distance'])})"
            f" [{worst(e['residual']):.1e}]"
            for e in row
        )
        print(f"  {solver:16}{steps:>7}  " + "".join(f"{cell:28}" for cell in cells))


def save_picture(path: Path, report: dict[str, Any]) -> None:
    """Five panels: steps, spectral radius, eigenvalues; residuals, distances."""
    figure = Figure(figsize=(14, 8.5), layout="constrained", dpi=110)
    axes = figure.subplot_mosaic([["steps", "radius", "plane"], ["residual", "residual", "distance"]])
    shades = np.linspace(0.85, 0, len(report["spectrum"])).astype(str)

    for name, plain in report["plain"].items():
        axes["steps"].plot(plain["steps"], [worst(row) for row in plain["relative"]], STYLES[name], color="black")
    axes["steps"].set(title=PLAIN, xlabel="step", ylabel="‖Hⁱ⁺¹ - Hⁱ‖ / ‖Hⁱ⁺¹‖", xscale="log")

    radii = [[math.nan if radius is None else radius for radius in point["radius"]] for point in report["spectrum"]]
    axes["radius"].plot([str(point["step"]) for point in report["spectrum"]], radii, "o-", alpha=0.7)
    axes["radius"].axhline(1, color="grey", linewidth=0.8)
    axes["radius"].set(title="spectral radius along the way, a line a RoI", xlabel="step")

    plane, turn, found = axes["plane"], np.linspace(0, 2 * np.pi, 2000), [[1.0, 0.0]]
    plane.plot(np.cos(turn), np.sin(turn), color="grey", linewidth=0.8)
    for point, shade in zip(report["spectrum"], shades, strict=True):
        eigenvalues = np.reshape(point["eigenvalues"], (-1, 2))
        plane.plot(*eigenvalues.T, "x" if point["step"] == "limit" else "o", color=shade, label=point["step"])
        found.extend(eigenvalues)
    left, right, top = np.min(found, 0)[0] - 0.05, np.max(found, 0)[0] + 0.05, np.max(found, 0)[1]
    top = max(1.2 * top, (right - left) / 2)
    plane.set(xlim=(left, right), ylim=(-top, top), aspect="equal", xlabel="real", ylabel="imaginary")
    plane.set_title("leading eigenvalues of the first RoI and unit circle")
    plane.legend(title="step", fontsize=8)

    lines = {}
    for entry in report["solves"]:
        lines.setdefault((entry["solver"], entry["precision"]), []).append(entry)
    for (solver, precision), entries in lines.items():
        look = {"color": COLOURS[solver], "linestyle": STYLES[precision]}
        if "trace" in entries[-1]:
            axes["residual"].plot([worst(row) for row in entries[-1]["trace"]], **look)
        named = [str(entry["steps"]) if solver != PLAIN else f"{entry['steps']}, plain" for entry in entries]
        axes["distance"].plot(named, [worst(entry["relative_distance"]) for entry in entries], marker="o", **look)
    axes["residual"].set(title="solvers", xlabel="step", ylabel="‖F(H) - H‖ / ‖F(H)‖")
    of_solvers = [Line2D([], [], color=colour, label=name) for name, colour in COLOURS.items()]
    of_precisions = [Line2D([], [], color="grey", linestyle=STYLES[name], label=name) for name in report["plain"]]
    axes["residual"].legend(handles=of_solvers + of_precisions, fontsize=8, ncols=2)
    axes["distance"].axhline(PAPER_BOUND, color="grey", linewidth=0.8)
    axes["distance"].annotate("e⁻⁸", (0.98, PAPER_BOUND), xycoords=("axes fraction", "data"), ha="right", va="bottom")
    axes["distance"].set(title="distance to the limit", xlabel="steps", ylabel="‖H - H*‖ / ‖H*‖")
    for panel in ("steps", "residual", "distance"):
        axes[panel].set_yscale("log", nonpositive="mask")
    figure.savefig(path)
