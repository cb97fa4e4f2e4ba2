"""Rows, targets and picture of benchmarks/speed.py."""

import math
import os
import platform
import shutil
import subprocess
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from contenders import BASE, BF16_HISTORY, F_ALONE, IFR, RELEASED, Contender
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from measure import Convolution, Timed
from torch import Tensor

from ifr_fast import backends

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


def environment(device: torch.device) -> dict[str, str]:
    """What the figures depend on: machine, versions, clocks, kernels."""
    found = {"device": device.type, "cpu": f"{cpu_name()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"}
    found["cpu instructions"] = torch.backends.cpu.get_cpu_capability()
    found["load before"] = ", ".join(f"{value:.2f}" for value in os.getloadavg())
    found["torch"] = torch.__version__
    for package in ("ifr-fast", "torchdeq"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    found["python"] = platform.python_version()
    found["kernels"] = "; ".join(f"{name}: {b.reason}" for name, b in backends().items() if b.available)
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
        found["cuda"], found["cudnn"] = torch.version.cuda, str(torch.backends.cudnn.version())
        found["float32 convolutions"] = "TF32" if torch.backends.cudnn.allow_tf32 else "IEEE"
        found |= nvidia_smi(device)
    return found


def cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def nvidia_smi(device: torch.device) -> dict[str, str]:
    """The driver and the clocks in force, where nvidia-smi is at hand."""
    if shutil.which("nvidia-smi") is None:
        return {"driver": "unknown, there is no nvidia-smi"}
    fields = ("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.limit")
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    query = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = subprocess.run(query, capture_output=True, text=True)
    if answer.returncode:
        return {"driver": f"unknown, nvidia-smi says {answer.stdout.strip() or answer.stderr.strip()}"}
    return dict(zip(fields, (value.strip() for value in answer.stdout.split(",")), strict=True))


def report(
    rows: list[Row],
    lone: dict[Convolution, Timed],
    settings: dict,
    facts: dict[str, str],
    elapsed: float,
) -> dict:
    """All that speed.json holds. Times in seconds, memory in bytes."""
    stacks = {(r.n, r.mode): r.timed.median for r in rows if r.contender.name == BASE and not r.unavailable}
    entries = [describe(row, lone, stacks.get((row.n, row.mode))) for row in rows]
    return {
        "settings": {k: v if isinstance(v, int | float | list) else str(v) for k, v in settings.items()},
        "environment": facts,
        "elapsed_seconds": elapsed,
        "rows": entries,
        "targets": targets(entries) if has_targets(settings) else [],
    }


def describe(row: Row, lone: dict[Convolution, Timed], stack: float | None) -> dict:
    entry = {"name": row.contender.name, "n": row.n, "mode": row.mode, "in_table": row.in_table}
    entry["in_sweep"] = row.contender.in_sweep
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


# What the targets are for. On a GPU, with other threads or at other sizes the same ratios have other values.
TARGET_SETTING = {"threads": 2, "table": 16, "channels": 256, "size": 14, "steps": 15}


def has_targets(settings: dict) -> bool:
    """Whether the targets are meant for a run of these options."""
    chosen = {name: settings[name] for name in TARGET_SETTING}
    return settings["device"].type == "cpu" and chosen == TARGET_SETTING


def targets(entries: list[dict]) -> list[dict]:
    """What this project aims at in the forward pass under TARGET_SETTING. "met" is None where a row is missing."""
    table = {e["name"]: e for e in entries if e["in_table"] and e["mode"] == FORWARD and "unavailable" not in e}

    def latency(a: dict, b: dict) -> float:
        return a["median"] / b["median"]

    aims = (
        ("IFR Broyden / stack, latency", "≤", 11, (IFR, BASE), latency),
        ("as released / IFR Broyden, latency", "≥", 2.2, (RELEASED, IFR), latency),
        ("share of IFR Broyden that is not F", "≤", 0.1, (F_ALONE, IFR), lambda f, ifr: 1 - latency(f, ifr)),
        (
            "bf16 history / as released, peak memory",
            "≤",
            1 / 3,
            (BF16_HISTORY, RELEASED),
            lambda a, b: a["peak_extra_bytes"] / b["peak_extra_bytes"],
        ),
    )
    found = []
    for what, sense, limit, names, formula in aims:
        value = met = None
        if all(name in table for name in names):
            value = formula(*(table[name] for name in names))
            met = value <= limit if sense == "≤" else value >= limit
        found.append({"what": what, "bound": f"{sense} {limit:.3g}", "value": value, "met": met})
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
