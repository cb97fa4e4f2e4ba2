"""What speed.py found: as JSON, as a table, and whether the machine was quiet enough for it."""

import math
from collections import Counter
from dataclasses import dataclass, field

from torch import Tensor

from benchmarks.timing.contenders import BASE, IFR, Contender
from benchmarks.timing.measure import AnyConvolution, Ceiling, Timed, quartiles, ratios
from benchmarks.timing.targets import FORWARD, aims, has_targets, targets

MIB = 1 << 20
LEAST_SHARE = 0.85  # of the processor that the stack's threads want; 0.97 to 1 on a quiet machine
MOST_SPREAD = 0.1  # of the rounds' ratios IFR / stack, between their quartiles


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
    convolutions: Counter[AnyConvolution] = field(default_factory=Counter)
    residual: Tensor | None = None

    @property
    def was_timed(self) -> bool:
        return self.timed is not None and bool(self.timed.samples)

    @property
    def label(self) -> str:
        return f"{self.contender.name}, N = {self.n}, {self.mode}"


def report(
    rows: list[Row],
    lone: dict[AnyConvolution, Timed],
    ceilings: dict[str, Ceiling],
    convolutions: list[dict],
    settings: dict,
    facts: dict[str, str],
    elapsed: float,
) -> dict:
    """All that speed.json holds, by now. Times in seconds, memory in bytes, ceilings in FLOP or bytes a second.
    convolutions: what timing/convolutions.py found, by instruction set."""
    stacks = {(r.n, r.mode): r.timed for r in rows if r.contender.name == BASE and r.was_timed}
    lone = {convolution: timed for convolution, timed in lone.items() if timed.samples}
    entries = [describe(row, lone, stacks.get((row.n, row.mode))) for row in rows]
    everything = [*entries, *(row for found in convolutions for row in found["rows"])]
    rates = {name: ceiling.rate for name, ceiling in ceilings.items() if ceiling.timed.samples}
    ready = has_targets(settings) and rates.keys() == ceilings.keys()
    return {
        "settings": {k: v if isinstance(v, int | float | list) else str(v) for k, v in settings.items()},
        "environment": facts,
        "elapsed_seconds": elapsed,
        "noise": noise(entries, settings),
        "ceilings": rates,
        "rows": entries,
        "convolutions": convolutions,
        "targets": targets(everything, aims(settings, rates)) if ready else [],
    }


def describe(row: Row, lone: dict[AnyConvolution, Timed], stack: Timed | None) -> dict:
    """A row of the report. Ratios are (first quartile, median, third quartile) of the rounds' own ratios."""
    entry = {"name": row.contender.name, "n": row.n, "mode": row.mode, "in_table": row.in_table}
    entry["note"] = row.contender.note
    if not row.was_timed:
        return {**entry, "unavailable": row.unavailable or "not timed yet"}
    samples, residual = row.timed.samples, row.residual
    of_stack = ratios(row.timed.walls, stack.walls) if stack else []
    convolutions = row.convolutions if row.convolutions.keys() <= lone.keys() else {}
    of_convolutions = ratios(row.timed.walls, alone(row, lone)) if convolutions else []
    return {
        **entry,
        "median": row.timed.median,
        "processor_median": quartiles(sample.processor for sample in samples.values())[1],
        "rounds": list(samples),
        "seconds": [sample.wall for sample in samples.values()],
        "ratio_to_stack": quartiles(of_stack) if of_stack else None,
        "ratio_to_convolutions": quartiles(of_convolutions) if of_convolutions else None,
        "convolutions": [
            {"call": str(c), "count": count, "alone": lone[c].median} for c, count in convolutions.items()
        ],
        "peak_extra_bytes": row.peak_bytes,
        "residual_median": None if residual is None else residual.median().item(),
        "residual_worst": None if residual is None else residual.max().item(),
        "parameters": row.contender.parameters,
    }


def alone(row: Row, lone: dict[AnyConvolution, Timed]) -> dict[int, float]:
    """What the row's convolutions take by themselves, in each round that timed them all."""
    rounds = set.intersection(*(set(lone[c].samples) for c in row.convolutions))
    return {i: sum(count * lone[c].samples[i].wall for c, count in row.convolutions.items()) for i in sorted(rounds)}


def noise(entries: list[dict], settings: dict) -> dict:
    """What tells a busy machine from a quiet one, at the table's N. "share": on a CPU, the processor time that the
    stack's threads got of its wall time; None on a GPU. "spread": of the rounds' ratios IFR / stack, between the
    quartiles, over their median. None where a row is missing."""
    table = {e["name"]: e for e in entries if e["in_table"] and e["mode"] == FORWARD and "unavailable" not in e}
    share = spread = None
    if BASE in table and settings["device"].type == "cpu":
        share = table[BASE]["processor_median"] / table[BASE]["median"] / settings["threads"]
    if IFR in table and table[IFR]["ratio_to_stack"]:
        low, middle, high = table[IFR]["ratio_to_stack"]
        spread = (high - low) / middle
    busy = (share is not None and share < LEAST_SHARE) or (spread is not None and spread > MOST_SPREAD)
    return {"share": share, "spread": spread, "busy": busy}


HEADER = ("row", "ms", "CPU ms", "× stack", "quartiles", "× convs", "MiB", "residual, worst")


def print_report(found: dict) -> None:
    """A table for every N and pass, then notes, the machine's noise, and the targets where there are any."""
    lines = {}
    for entry in found["rows"]:
        lines.setdefault((entry["mode"], entry["n"]), []).append(cells(entry))
    everything = [HEADER, *(line for of in lines.values() for line in of)]
    full = [line for line in everything if len(line) == len(HEADER)]
    widths = [max(map(len, column)) for column in zip(*full, strict=True)]
    widths[0] = max(len(line[0]) for line in everything)
    for (mode, n), of in lines.items():
        print(f"\n{mode}, N = {n}")
        for line in (HEADER, *of):
            aligned = (f"{cell:{'>' if i and len(line) > 2 else '<'}{widths[i]}}" for i, cell in enumerate(line))
            print(" ".join(aligned).rstrip()[:120])
    for of_processor in found["convolutions"]:
        print_convolutions(of_processor)
    print()
    for name, note in {e["name"]: e["note"] for e in found["rows"] if e["note"]}.items():
        print(f"{name}: {note}")
    for name, rate in found["ceilings"].items():
        print(f"{name}: {rate / 1e12:.4g} {'TFLOP/s' if name == 'matmul' else 'TB/s'}")
    for target in found["targets"]:
        verdict = {True: "met", False: "missed", None: "not measured"}[target["met"]]
        value = "" if target["value"] is None else f"{target['value']:.3g}, "
        print(f"{target['what']}: {value}target {target['bound']}: {verdict}")
    print(verdict_on(found["noise"]))
    print(f"took {found['elapsed_seconds']:.0f} s")


def verdict_on(noise: dict) -> str:
    """Whether the machine was quiet enough, in a line."""
    facts = []
    if noise["share"] is not None:
        facts.append(f"threads ran {noise['share']:.0%} of the time (≥ {LEAST_SHARE:.0%})")
    if noise["spread"] is not None:
        facts.append(f"IFR / stack spread {noise['spread']:.0%} (≤ {MOST_SPREAD:.0%})")
    if not facts:
        return "nothing here tells whether the machine was quiet"
    return ("TOO BUSY to mean anything: " if noise["busy"] else "quiet: ") + ", ".join(facts)


def cells(entry: dict) -> list[str]:
    if "unavailable" in entry:
        return [entry["name"], entry["unavailable"]]
    low, ratio, high = map(figures, entry["ratio_to_stack"] or [math.nan] * 3)
    of_convolutions = entry["ratio_to_convolutions"]
    residual = entry["residual_median"]
    return [
        entry["name"],
        figures(entry["median"] * 1e3),
        figures(entry["processor_median"] * 1e3),
        ratio,
        f"{low}–{high}",
        figures(of_convolutions[1]) if of_convolutions else "–",
        f"{entry['peak_extra_bytes'] / MIB:.1f}",
        "–" if residual is None else f"{residual:.0e}, {entry['residual_worst']:.0e}",
    ]


def figures(value: float) -> str:
    """Three significant figures at least."""
    if not value > 0 or math.isinf(value):
        return "–"
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


CONVOLUTION_HEADER = (
    "N×C×H×W", "direct ms", "CPU ms", "GFLOP/s", "of peak", "Winograd ms", "CPU ms", "GFLOP/s", "direct / W",
    "quartiles", "weights ms",
)  # fmt: skip


def print_convolutions(found: dict) -> None:
    """A table of what timing/convolutions.py found, which also says what its columns are."""
    lines = [CONVOLUTION_HEADER, *map(convolution_cells, found["rows"])]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    peak = max(found["peaks"], key=found["peaks"].get)
    rate = f"{peak}, {found['peaks'][peak] / 1e9:.0f} GFLOP/s a core"
    print(f"\none 3×3 convolution, {found['isa']}, threads: {found['threads']}; peak: {rate}")
    for line in lines:
        print(" ".join(f"{cell:{'>' if i else '<'}{widths[i]}}" for i, cell in enumerate(line)))


def convolution_cells(row: dict) -> list[str]:
    def cells(of: dict) -> list[str]:
        return [figures(of["median"] * 1e3), figures(of["processor_median"] * 1e3), f"{of['rate'] / 1e9:.0f}"]

    low, ratio, high = map(figures, row["ratio"])
    share, weights = f"{row['share_of_peak']:.0%}", figures(row["weights"]["median"] * 1e3)
    found = [*cells(row["direct"]), share, *cells(row["winograd"]), ratio, f"{low}–{high}", weights]
    return [f"{row['n']}×{row['name']}", *found]
