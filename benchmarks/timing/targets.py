"""What the project aims at in speed.py, and what came of it."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

from benchmarks.timing.contenders import (
    BASE,
    BF16,
    BF16_HISTORY,
    BF16_STACK,
    COMPILED_STACK,
    CONVERGED,
    EARLY,
    GRAPH,
    IFR,
    LOOSE,
    RELEASED,
    TORCHDEQ_ANDERSON,
    TORCHDEQ_BF16,
)
from benchmarks.timing.measure import ratios

FORWARD, BACKWARD = "forward", "forward+backward"

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
    def rows(*names: str, n: int = n, mode: str = FORWARD) -> tuple:
        return tuple((name, n, mode) for name in names)

    def convolution(sample: str, n: int, limit: float, isa: str = "avx512") -> Aim:
        what = f"one convolution of {n}×{sample}, {isa}, direct / Winograd"
        return Aim(what, "≥", limit, ((sample, n, f"convolution, {isa}"),), lambda row: row["ratio"][1])

    forth_and_back = rows(IFR, BASE, n=4, mode=BACKWARD)
    return [
        Aim("IFR Broyden / stack, latency", "≤", 4.2, rows(IFR, BASE), latency),
        Aim("IFR Broyden / stack, latency, N = 1", "≤", 4, rows(IFR, BASE, n=1), latency),
        Aim("IFR Broyden / stack, latency forward+backward, N = 4", "≤", 3.9, forth_and_back, latency),
        Aim("as released / IFR Broyden, latency", "≥", 4, rows(RELEASED, IFR), latency),
        Aim("torchdeq Anderson / IFR Broyden, latency", "≥", 2.3, rows(TORCHDEQ_ANDERSON, IFR), latency),
        Aim("share of IFR Broyden that is not convolution", "≤", 0.2, rows(IFR), not_convolution),
        Aim("bf16 history / as released, peak memory", "≤", 1 / 3, rows(BF16_HISTORY, RELEASED), memory),
        convolution("256×14×14", 16, 2.5),
        convolution("256×14×14", 4, 2),
        convolution("256×14×14", 1, 1.7),
        convolution("128×14×14", 16, 2.1),
        convolution("256×100×152", 2, 2.8),
        convolution("256×14×14", 16, 2.5, isa="avx2"),
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
        Aim("graph, latency, ms", "≤", 2.6, rows(GRAPH), lambda a: a["median"] * 1e3),
        Aim("graph / floor of its convolutions, latency", "≤", 1.6, rows(GRAPH), lambda a: a["median"] / floor),
        Aim("share of graph that is not convolution", "≤", 0.3, rows(BF16, GRAPH), overhead),
        Aim("as released / graph, latency", "≥", 15, rows(RELEASED, GRAPH), latency),
        Aim("torchdeq in bf16 / graph, latency", "≥", 8, rows(TORCHDEQ_BF16, GRAPH), latency),
        Aim("converged to 1e-2 / stack, latency", "≤", 1.2, rows(CONVERGED, BASE), latency),
        # In float32, where rounding in bfloat16 has moved it by a few per cent.
        Aim("converged to 1e-2, worst residual", "≤", 1.1 * LOOSE, rows(CONVERGED), lambda a: a["residual_worst"]),
        Aim("stopping early / stack, latency", "≤", 1.2, rows(EARLY, BASE), latency),
        Aim("stopping early / compiled bf16 stack, latency", "≤", 3, rows(EARLY, COMPILED_STACK), latency),
        Aim("as released / graph, latency forward+backward", "≥", 15, forth_and_back, latency),
        Aim("eager / bf16 stack, peak memory forward+backward, N = 512", "≤", 1, large, memory),
        Aim("graph, latency per sample, N = 512 / N = 128", "≤", 1, sizes, per_sample),
    ]


def latency(a: dict, b: dict) -> float:
    """The median of the ratios within the rounds that have both."""
    return statistics.median(ratios(*(dict(zip(e["rounds"], e["seconds"], strict=True)) for e in (a, b))))


def not_convolution(a: dict) -> float | None:
    """What is left beside the same convolutions, bare and each by itself, in the same rounds."""
    return 1 - 1 / a["ratio_to_convolutions"][1] if a["ratio_to_convolutions"] else None


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
