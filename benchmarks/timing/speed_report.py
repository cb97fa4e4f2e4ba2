"""Rows, targets and picture of benchmarks/speed.py."""

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.timing.contenders import (
    BASE,
    BF16,
    BF16_HISTORY,
    BF16_STACK,
    COMPILED_STACK,
    EARLY,
    F_ALONE,
    GRAPH,
    IFR,
    RELEASED,
    TORCHDEQ_BF16,
    Contender,
)
from benchmarks.timing.measure import Ceiling, Convolution, Timed

FORWARD, BACKWARD = "forward", "forward+backward"
MIB = 1 << 20


@dataclass
class Row:
    """A contender at one N, forward or forward+backward, and what was found out about it."""

    contender: Contender
    n: int
    mode: str
    in_table: bool
    unavailable: str = ""
    timed: Timed | None = None
    peak_bytes: int = 0
    convolutions: Counter[Convolution] = field(default_factory=Counter)
    residual: Tensor | None = None

    @property
    def label(self) -> str:
        return f"{self.contender.name}, N = {self.n}, {self.mode}"


def report(
    rows: list[Row],
    lone: dict[Convolution, Timed],
    ceilings: dict[str, Ceiling],
    settings: dict,
    facts: dict[str, str],
    elapsed: float,
) -> dict:
    """All that speed.json holds. Times in seconds, memory in bytes, ceilings in FLOP or bytes a second."""
    stacks = {(r.n, r.mode): r.timed.median for r in rows if r.contender.name == BASE and not r.unavailable}
    entries = [describe(row, lone, stacks.get((row.n, row.mode))) for row in rows]
    rates = {name: ceiling.rate for name, ceiling in ceilings.items()}
    return {
        "settings": {k: v if isinstance(v, int | float | list) else str(v) for k, v in settings.items()},
        "environment": facts,
        "elapsed_seconds": elapsed,
        "ceilings": rates,
        "rows": entries,
        "targets": targets(entries, aims(settings, rates)) if has_targets(settings) else [],
    }


def describe(row: Row, lone: dict[Convolution, Timed], stack: float | None) -> dict:
    entry = {"name": row.contender.name, "n": row.n, "mode": row.mode, "in_table": row.in_table}
    entry["in_sweep"], entry["note"] = row.contender.in_sweep, row.contender.note
    if row.unavailable:
        return {**entry, "unavailable": row.unavailable}
    alone = sum(count * lone[c].median for c, count in row.convolutions.items())
    residual = row.residual
    return {
        **entry,
        "median": row.timed.median,
        "quartiles": row.timed.quartiles,
        "seconds": row.timed.seconds,
        "ratio_to_stack": row.timed.median / stack if stack else None,
        "ratio_to_convolutions": row.timed.median / alone if alone else None,
        "convolutions": [
            {"call": str(c), "count": count, "alone": lone[c].median} for c, count in row.convolutions.items()
        ],
        "peak_extra_bytes": row.peak_bytes,
        "residual_median": None if residual is None else residual.median().item(),
        "residual_worst": None if residual is None else residual.max().item(),
        "parameters": row.contender.parameters,
    }


# What the targets are for. With other threads or at other sizes the same ratios have other values.
TARGET_SETTINGS = {
    "cpu": {"threads": 2, "table": 16, "channels": 256, "size": 14, "steps": 15},
    "cuda": {"table": 100, "channels": 256, "size": 14, "steps": 15},
}


def has_targets(settings: dict) -> bool:
    """Whether the targets are meant for a run of these options."""
    meant = TARGET_SETTINGS[settings["device"].type]
    return {name: settings[name] for name in meant} == meant


class Aim(NamedTuple):
    """formula, of the rows' entries, is to be ≤ or ≥ (sense) the limit. rows: (name, N, mode)."""

    what: str
    sense: str
    limit: float
    rows: tuple[tuple[str, int, str], ...]
    formula: Callable[..., float | None]


def aims(settings: dict, ceilings: dict[str, float]) -> list[Aim]:
    """What this project aims at on the run's device."""
    if settings["device"].type == "cpu":
        return cpu_aims(settings["table"])
    convolution = 2 * 9 * settings["channels"] ** 2 * settings["size"] ** 2
    work = 2 * (settings["steps"] + 1) * settings["table"] * convolution
    return gpu_aims(settings["table"], floor=work / ceilings["matmul"])


def cpu_aims(n: int) -> list[Aim]:
    def rows(*names: str) -> tuple:
        return tuple((name, n, FORWARD) for name in names)

    return [
        Aim("IFR Broyden / stack, latency", "≤", 11, rows(IFR, BASE), latency),
        Aim("as released / IFR Broyden, latency", "≥", 2.2, rows(RELEASED, IFR), latency),
        Aim("share of IFR Broyden that is not F", "≤", 0.1, rows(F_ALONE, IFR), lambda f, ifr: 1 - latency(f, ifr)),
        Aim("bf16 history / as released, peak memory", "≤", 1 / 3, rows(BF16_HISTORY, RELEASED), memory),
    ]


def gpu_aims(n: int, floor: float) -> list[Aim]:
    """floor: seconds that the solve's convolutions of n samples take at the rate of a large bfloat16 product."""

    def rows(*names: str, mode: str = FORWARD) -> tuple:
        return tuple((name, n, mode) for name in names)

    def overhead(eager: dict, graph: dict) -> float | None:
        """A replay runs no operators that a profiler sees: its convolutions are those of the same solve run eagerly."""
        alone = sum(c["count"] * c["alone"] for c in eager["convolutions"])
        return 1 - alone / graph["median"] if alone else None

    def per_sample(a: dict, b: dict) -> float:
        return latency(a, b) * b["n"] / a["n"]

    large = tuple((name, 512, BACKWARD) for name in (BF16, BF16_STACK))
    sizes = (GRAPH, 512, FORWARD), (GRAPH, 128, FORWARD)
    forth_and_back = rows(RELEASED, GRAPH, mode=BACKWARD)
    return [
        Aim("graph / floor of its convolutions, latency", "≤", 1.6, rows(GRAPH), lambda a: a["median"] / floor),
        Aim("share of graph that is not convolution", "≤", 0.3, rows(BF16, GRAPH), overhead),
        Aim("as released / graph, latency", "≥", 20, rows(RELEASED, GRAPH), latency),
        Aim("torchdeq in bf16 / graph, latency", "≥", 8, rows(TORCHDEQ_BF16, GRAPH), latency),
        Aim("stopping early / stack, latency", "≤", 1.2, rows(EARLY, BASE), latency),
        Aim("stopping early / compiled bf16 stack, latency", "≤", 3, rows(EARLY, COMPILED_STACK), latency),
        Aim("as released / graph, latency forward+backward", "≥", 15, forth_and_back, latency),
        Aim("eager / bf16 stack, peak memory forward+backward, N = 512", "≤", 1, large, memory),
        Aim("graph, latency per sample, N = 512 / N = 128", "≤", 1, sizes, per_sample),
    ]


def latency(a: dict, b: dict) -> float:
    return a["median"] / b["median"]


def memory(a: dict, b: dict) -> float:
    return a["peak_extra_bytes"] / b["peak_extra_bytes"]


def targets(entries: list[dict], aims: list[Aim]) -> list[dict]:
    """The aims and what came of them. "met" is None where a row is missing."""
    table = {(e["name"], e["n"], e["mode"]): e for e in entries if "unavailable" not in e}
    found = []
    for aim in aims:
        there = all(row in table for row in aim.rows)
        value = aim.formula(*(table[row] for row in aim.rows)) if there else None
        met = None if value is None else value <= aim.limit if aim.sense == "≤" else value >= aim.limit
        found.append({"what": aim.what, "bound": f"{aim.sense} {aim.limit:.3g}", "value": value, "met": met})
    return found


HEADER = (
    "row", "N", "pass", "median ms", "quartiles ms", "runs", "× stack", "× own convs", "convs", "extra MiB",
    "residual median", "worst", "parameters",
)  # fmt: skip


def print_report(found: dict) -> None:
    """The table, then the targets, where there are any."""
    lines = [HEADER, *(cells(entry) for entry in found["rows"])]
    measured = [line for line in lines if len(line) == len(HEADER)]
    widths = [max(len(line[i]) for line in measured) for i in range(len(HEADER))]
    widths[0] = max(len(line[0]) for line in lines)
    previous = None
    for line in lines:
        if line[1:3] != previous:
            print()
        previous = line[1:3]
        left = {0, 2, 3} if len(line) < len(HEADER) else {0, 2}
        print("  ".join(f"{cell:{'<' if i in left else '>'}{widths[i]}}" for i, cell in enumerate(line)).rstrip())
    print()
    for name, note in {e["name"]: e["note"] for e in found["rows"] if e["note"]}.items():
        print(f"{name}: {note}")
    for name, rate in found["ceilings"].items():
        print(f"{name}: {rate / 1e12:.4g} {'TFLOP/s' if name == 'matmul' else 'TB/s'}")
    for target in found["targets"]:
        verdict = {True: "met", False: "missed", None: "not measured"}[target["met"]]
        value = "" if target["value"] is None else f"{target['value']:.3g}, "
        print(f"{target['what']}: {value}target {target['bound']}: {verdict}")
    print(f"took {found['elapsed_seconds']:.0f} s")


def cells(entry: dict) -> list[str]:
    start = [entry["name"], str(entry["n"]), entry["mode"]]
    if "unavailable" in entry:
        return [*start, entry["unavailable"]]

    def number(key: str, form: str) -> str:
        return "–" if entry[key] is None else format(entry[key], form)

    return [
        *start,
        milliseconds(entry["median"]),
        "–".join(milliseconds(q) for q in entry["quartiles"]),
        str(len(entry["seconds"])),
        number("ratio_to_stack", ".2f"),
        number("ratio_to_convolutions", ".2f"),
        str(sum(c["count"] for c in entry["convolutions"])),
        f"{entry['peak_extra_bytes'] / MIB:.1f}",
        number("residual_median", ".1e"),
        number("residual_worst", ".1e"),
        f"{entry['parameters']:,}",
    ]


def milliseconds(seconds: float) -> str:
    """Three figures at least."""
    value = seconds * 1e3
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def save_picture(path: Path, found: dict) -> None:
    """Latency over N for the sweep's rows, and the ratio to the stack of the table's."""
    entries = [e for e in found["rows"] if "unavailable" not in e]
    table = [e for e in entries if e["in_table"]]
    figure = Figure(figsize=(13, 9.5), layout="constrained", dpi=110)
    upper, lower = figure.subfigures(2, 1, height_ratios=[1, 1.3])
    curves, charts = upper.subplots(1, 2, sharey=True), lower.subplots(1, 2, sharey=True)
    for mode, axes, chart in zip((FORWARD, BACKWARD), curves, charts, strict=True):
        plot_latency(axes, [e for e in entries if e["in_sweep"] and e["mode"] == mode])
        axes.set_title(mode)
        rows = [e for e in table if e["mode"] == mode]
        plot_ratios(chart, rows, list(dict.fromkeys(e["name"] for e in table)))
        chart.set_title(f"{mode}, N = {rows[0]['n']}")
    curves[0].set_ylabel("median latency, ms")
    upper.legend(*curves[0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path)


def plot_latency(axes: Axes, entries: list[dict]) -> None:
    for name in dict.fromkeys(e["name"] for e in entries):
        points = [e for e in entries if e["name"] == name]
        axes.plot([e["n"] for e in points], [e["median"] * 1e3 for e in points], marker="o", label=name)
    sizes = sorted({e["n"] for e in entries})
    axes.set(xscale="log", yscale="log", xlabel="N")
    axes.set_xticks(sizes, [str(n) for n in sizes], rotation=90 if len(sizes) > 5 else 0)
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def plot_ratios(axes: Axes, entries: list[dict], names: list[str]) -> None:
    """One bar a row, those of `names` from top to bottom."""
    for e in entries:
        if e["ratio_to_stack"] is not None:
            colour = "tab:blue" if "IFR" in e["name"] else "tab:gray"
            bar = axes.barh(names.index(e["name"]), e["ratio_to_stack"], color=colour)
            axes.bar_label(bar, fmt="%.2f", padding=3)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel("latency / that of 4 float32 convolutions in NCHW")
