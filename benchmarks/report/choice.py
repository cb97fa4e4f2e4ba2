"""Which head? One table and one picture of a sweep's rows: what they gain, weigh and cost.

    python benchmarks/report/choice.py ablation.json latency.json --output choice.png

Takes what benchmarks/quality/ablation.py and benchmarks/analysis/latency.py wrote of the same sweep.
"""

import argparse
import json
import statistics
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.quality.strategies import BASELINE, STRATEGIES
from benchmarks.report.files import write_whole
from benchmarks.report.formats import interval, median_power, spread, table

Content = dict[str, Any]
HEAD = ["", "mask IoU, %", f"− {BASELINE}", "parameters", "convolutions", "steps", "residual forth / back"]
HEAD += ["bfloat16, ms", "×", "float32, ms", "×", "seeds"]
LEAST = -1.5  # points; what loses more is drawn there, with its figure
NOTHING = {"mean": 0.0, "low": 0.0, "high": 0.0}  # what the baseline gains
BESIDE = 1.08  # from one row to the next of its size, along an axis in logarithms
COLOURS = {"ifr": "C1", "separable": "C2"}  # by kind; all others are C0


def choice_table(ablation: Content, latency: Content) -> str:
    """A line for each row of the sweep; times of those that latency has."""
    channels = ablation["settings"]["channels"]
    lines = []
    for row, reports in ablation["rows"].items():
        done = [report for report in reports if "failed" not in report]
        failed = [report["failed"] for report in reports if "failed" in report]
        seeds = f"{len(done)}, {len(failed)} failed" if failed else str(len(done))
        if not done:
            lines.append([row, failed[0], *["–"] * (len(HEAD) - 3), seeds])
            continue
        tests = [report["test"] for report in done]
        steps = [test.get("iterations") for test in tests]
        gain = ablation["gains"][BASELINE].get(row)
        solved = steps[0] is not None
        back = median_power(report["backward_residual"] for report in done)
        lines.append(
            [
                row,
                spread((test["iou"] for test in tests), 100),
                interval(gain["test"]) if gain else "–",
                f"{done[0]['parameters'] / 1e6:.2f} M",
                f"{statistics.mean(STRATEGIES[row].convolutions(count, channels) for count in steps):.1f}",
                spread(steps),
                f"{median_power(test.get('residual') for test in tests)} / {back}" if solved else "–",
                *times(latency["rows"].get(row)),
                seeds,
            ]
        )
    return table(HEAD, lines)


def times(found: Content | None) -> list[str]:
    """Milliseconds and their ratio to the baseline's, in both precisions."""
    if found is None:
        return ["–"] * 4
    return [
        text
        for precision in ("bfloat16", "float32")
        for text in (milliseconds(found[precision]), f"{found[precision]['ratio'][1]:.2f}")
    ]


def milliseconds(timed: Content) -> str:
    """With the steps of the seed that was timed."""
    return f"{1e3 * timed['median']:.1f}" + (f" ({timed['steps']:.1f} steps)" if "steps" in timed else "")


def draw(ablation: Content, latency: Content) -> Figure:
    """IoU gained over the baseline, with 95 % intervals, against milliseconds and against parameters. The legend says
    which number is which row."""
    figure = Figure(figsize=(13, 7), layout="constrained", dpi=110)
    against_time, against_size = figure.subplots(1, 2, sharey=True)
    names, sizes = [], Counter()
    for row, reports in ablation["rows"].items():
        gain = ablation["gains"][BASELINE].get(row)
        if gain is None and row != BASELINE:
            continue
        names.append(f"{len(names) + 1}  {row}")
        mark = partial(point, number=len(names), row=row, bounds=gain["test"] if gain else NOTHING)
        if row in latency["rows"]:
            mark(against_time, min(1e3 * found["median"] for found in latency["rows"][row].values()))
        size = next(report["parameters"] for report in reports if "failed" not in report) / 1e6
        rounded = f"{size:.1f}"
        mark(against_size, size * BESIDE ** sizes[rounded])
        sizes[rounded] += 1
    against_time.set_xlabel(f"ms for {latency['n']} objects, in bfloat16 or float32, whichever is faster")
    against_size.set_xlabel("parameters of the refinement, millions; rows of one size side by side")
    against_time.set_ylabel(f"mask IoU gained over {BASELINE}, points")
    for axes in (against_time, against_size):
        axes.axhline(0, color="black", linewidth=0.8, linestyle="--")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.3)
        axes.margins(x=0.1, y=0.1)
    handles = [Line2D([], [], linestyle="") for _ in names]
    figure.legend(handles, names, loc="outside lower center", ncols=3, handlelength=0, fontsize=9)
    return figure


def point(axes: Axes, x: float, *, number: int, row: str, bounds: dict[str, float]) -> None:
    low, middle, high = (100 * bounds[key] for key in ("low", "mean", "high"))
    colour, label = COLOURS.get(STRATEGIES[row].kind, "C0"), str(number)
    if middle < LEAST:
        axes.plot(x, LEAST, "v", color=colour)
        label, middle = f"{number}: {middle:+.1f}", LEAST
    else:
        axes.errorbar(x, middle, [[middle - low], [high - middle]], fmt="o", color=colour, capsize=3)
    axes.annotate(label, (x, middle), xytext=(5, 5), textcoords="offset points", fontsize=9)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("ablation", help="ablation.json of a sweep", type=Path)
    parser.add_argument("latency", help="latency.json of the same sweep", type=Path)
    parser.add_argument("--output", help="picture (%(default)s)", type=Path, default=Path("runs/choice.png"))
    options = parser.parse_args(arguments)
    ablation, latency = (json.loads(path.read_text()) for path in (options.ablation, options.latency))
    print(choice_table(ablation, latency))
    write_whole(options.output, draw(ablation, latency).savefig)
    print(f"wrote {options.output}")


if __name__ == "__main__":
    main()
