"""The picture of speed.py: what the equilibrium takes, beside the stack and the peers."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Patch

from benchmarks.timing import contenders as names
from benchmarks.timing.targets import BACKWARD, FORWARD

STACK, OWN, OTHERS = "#808080", "#1f6fb4", "#d9822b"
# From top to bottom; what a device lacks is left out.
BARS = {
    names.BASE: ("torch's stack of four convolutions", STACK),
    names.BF16_STACK: ("stack, bfloat16", STACK),
    names.COMPILED_STACK: ("stack, bfloat16, compiled", STACK),
    names.WINOGRAD_STACK: ("stack, by our convolutions", STACK),
    names.IFR: ("ifr_fast", OWN),
    names.IFR_DIRECT: ("ifr_fast, direct convolutions", OWN),
    names.BF16: ("ifr_fast, bfloat16", OWN),
    names.GRAPH: ("ifr_fast, bfloat16, CUDA graph", OWN),
    names.QUARTER: ("ifr_fast, narrow block, 7 steps", OWN),
    names.RELEASED: ("the authors' solver", OTHERS),
    names.TORCHDEQ: ("torchdeq, Broyden", OTHERS),
    names.TORCHDEQ_ANDERSON: ("torchdeq, Anderson", OTHERS),
    names.TORCHDEQ_BF16: ("torchdeq, Broyden, bfloat16", OTHERS),
}
PALE = 0.45  # bars with the backward pass


def save_picture(path: Path, found: dict) -> None:
    """Medians of the rounds' ratios to the stack and their quartiles: forward, and with the backward pass."""
    rows = [e for e in found["rows"] if e["in_table"] and e["name"] in BARS and e.get("ratio_to_stack")]
    present = [name for name in BARS if any(e["name"] == name for e in rows)]
    sizes = {e["mode"]: e["n"] for e in rows}
    figure = Figure(figsize=(8, 0.5 * len(present) + 1.4), layout="constrained", dpi=200, facecolor="white")
    axes = figure.subplots()
    for entry in rows:
        low, ratio, high = entry["ratio_to_stack"]
        backward, colour = entry["mode"] == BACKWARD, BARS[entry["name"]][1]
        at = present.index(entry["name"]) + (0.2 if backward else -0.2)
        axes.barh(at, ratio - 1, 0.38, left=1, color=colour, alpha=PALE if backward else 1)
        axes.plot([low, high], [at, at], color="black", linewidth=1.2, marker="|", markersize=5)
        end, side, align = (low, -6, "right") if ratio < 1 else (high, 6, "left")
        place = {"textcoords": "offset points", "va": "center", "ha": align, "fontsize": 9}
        axes.annotate(f"{ratio:.3g}", (end, at), (side, 0), **place)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", ylim=(len(present) - 0.5, -0.5))
    axes.margins(x=0.12)
    low, high = axes.get_xlim()
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100) if low < tick < high]
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(present)), [BARS[name][0] for name in present])
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.set_xlabel("time, × the float32 stack's (median and quartiles of the rounds)")
    shades = {FORWARD: ("forward", 1), BACKWARD: ("forward and backward", PALE)}
    patches = [Patch(color=OWN, alpha=shades[m][1], label=f"{shades[m][0]}, {n} RoIs") for m, n in sizes.items()]
    axes.legend(handles=patches, loc="upper right", framealpha=1)
    settings, facts = found["settings"], found["environment"]
    shape, machine = f"{settings['channels']}×{settings['size']}×{settings['size']}", facts.get("gpu") or facts["cpu"]
    axes.set_title(f"RoIs of {shape}, solvers of {settings['steps']} steps; {machine}", fontsize=9, loc="right")
    figure.savefig(path)
