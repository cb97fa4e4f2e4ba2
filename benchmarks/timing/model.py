"""A solve's time on a GPU as predicted on paper, from the kernels as compiled. No figure here is measured.

    python benchmarks/timing/model.py
    python benchmarks/timing/model.py --chip H200 --measured runs/kernels/kernels.json

launch_model.py predicts each launch; a solve is their sum. --measured prints what benchmarks/timing/kernels.py found
beside what is predicted.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.report.formats import table
from benchmarks.timing.launch_model import (
    CHIPS,
    GAP,
    GAP_PROGRAMMATIC,
    LAUNCH,
    MICRO,
    PADDING,
    RESULTS,
    SETUP,
    WAITS,
    Chip,
    Predicted,
    Run,
    convolution,
    forward,
    halving,
    kernel,
    usage,
)


def evaluation(run: Run, chip: Chip, k: int) -> Iterator[tuple[str, Predicted]]:
    """The launches of evaluation k, and the gaps before them."""
    last, share = k == run.steps, run.share(k)
    if k == run.middle() and run.halved(k):
        yield "halving", halving(run, chip)
    sweeps = ("rule",) if last else run.sweeps()
    for family in ("convolution", "norm_relu", "convolution", "tail + residual", *sweeps):
        if family == "convolution":
            yield family, convolution(run, chip, half=run.halved(k))
        else:
            yield family, kernel(run, chip, family, k + 1, share)
        early = run.programmatic and family != "convolution"
        yield "gaps", Predicted(0, us=GAP_PROGRAMMATIC if early else GAP)


def once(run: Run, chip: Chip) -> Iterator[tuple[str, Predicted]]:
    """Launches that a solve has beside its evaluations': an 8-bit history's first scale takes some."""
    rows, gap = forward(run, chip), GAP_PROGRAMMATIC if run.programmatic else GAP
    tails = sum(r["launches"] for r in rows if r["family"] == "tail + residual") - usage()["steps"] - 1
    for _ in range(tails):
        yield "tail + residual", kernel(run, chip, "tail + residual", 1, 1.0)
        yield "gaps", Predicted(0, us=gap)
    for row in (r for r in rows if r["family"] not in (*WAITS, "finish")):
        yield row["family"], Predicted(row["launches"], us=row["launches"] * LAUNCH)
        yield "gaps", Predicted(0, us=row["launches"] * gap)


def total(predictions: Iterator[tuple[str, Predicted]]) -> dict[str, Predicted]:
    found: dict[str, Predicted] = {}
    for family, predicted in predictions:
        found[family] = found.get(family, Predicted()) + predicted
    return found


def solve(run: Run, chip: Chip) -> dict[str, Predicted]:
    """By kernel."""

    def everything() -> Iterator[tuple[str, Predicted]]:
        yield "setup", Predicted(0, us=SETUP + (PADDING if (run.bucket or run.n) > run.n else 0))
        yield from once(run, chip)
        for k in range(run.evaluations()):
            yield from evaluation(run, chip, k)

    return total(everything())


def microseconds(run: Run, chip: Chip) -> float:
    return sum(predicted.us for predicted in solve(run, chip).values())


PLAIN = Run(bucket=104)  # as it was when buckets were coarser and every step was taken
TRITON = Run(segments=4, programmatic=True, halves=True)
CUDA = Run(backend="cuda", segments=4, halves=True)
BEST = replace(CUDA, one_sweep=True, history=1)
ENDINGS = {
    "15 fixed steps": {},
    "all stopped by step 8": dict(stop=8),
    "half stopped by step 7": dict(stop=8, running=0.5),
}
CONFIGURATIONS = {
    "Triton, bf16 history, bucket of 104, all steps": PLAIN,
    "… bucket of 100": Run(),
    "… ends early": Run(segments=4),
    "… goes on with half": Run(segments=4, halves=True),
    "… and early starts": TRITON,
    "… and an 8-bit history": replace(TRITON, history=1),
    "CUDA, 8-bit history, three sweeps": replace(CUDA, history=1),
    "CUDA, bf16 history, one sweep": replace(CUDA, one_sweep=True),
    "CUDA, 8-bit history, one sweep": BEST,
    "… where a segment is queried too late": replace(BEST, lag=1),
}


def by_kernel(run: Run, chip: Chip) -> str:
    """The mean step, as its kernels share it."""
    steps = [total(evaluation(run, chip, k)) for k in range(run.steps)]
    lines = []
    for family in steps[0]:
        mean = sum((step[family] for step in steps), Predicted())
        n = len(steps)
        moved = f"{mean.memory / n / 1e6:.0f} / {mean.l2 / n / 1e6:.0f}"
        lines.append([family, f"{mean.launches / n:.0f}", moved, f"{mean.us / n:.0f}"])
    lines.append(["sum", "", "", f"{sum(sum(p.us for p in step.values()) for step in steps) / len(steps):.0f}"])
    return table(["a mean step", "launches", "memory / L2 MB", "predicted µs"], lines)


def sums(chip: Chip) -> str:
    lines = [
        [name, *(f"{microseconds(replace(run, **ending), chip) / 1e3:.2f}" for ending in ENDINGS.values())]
        for name, run in CONFIGURATIONS.items()
    ]
    return table(["predicted ms of a solve", *ENDINGS], lines)


def beside(measured: dict[str, Any], chip: Chip) -> str:
    """Measured and predicted µs of what kernels.py timed at this size. It keeps a kernel's tensors out of L2."""
    lines = []
    for case in measured["cases"]:
        if case["size"] != usage()["size"] or case["dtype"] != "bfloat16" or "seconds" not in case:
            continue
        run = Run(backend=case["backend"], history=1 if case["history"].startswith("float8") else 2)
        family, (_, _, rows) = case["family"], case["variant"].partition("K = ")
        if family == "convolution":
            predicted = convolution(run, chip).us
        elif family == "forward solve" and run.backend != "eager":
            predicted = microseconds(replace(run, one_sweep="one kernel" in case["variant"]), chip)
        elif family in WAITS and run.backend in ("triton", "cuda"):
            predicted = kernel(run, chip, family, int(rows or 1), 1.0, cold=True).us
        else:
            continue
        found = case["seconds"] * MICRO
        name = " ".join(filter(None, (case["backend"], family, case["variant"])))
        lines.append([name, f"{found:.1f}", f"{predicted:.1f}", f"{found / predicted:.2f}"])
    return table(["", "measured µs", "predicted µs", "measured / predicted"], lines)


def measurements() -> Path | None:
    """kernels.json of the GPU here, if it is among the results."""
    import torch

    if not torch.cuda.is_available():
        return None
    from benchmarks.report.environment import environment

    gpu = environment(torch.device("cuda", 0))["gpu"]
    for path in RESULTS.glob("*/kernels.json"):
        if json.loads(path.read_text())["environment"].get("gpu") == gpu:
            return path
    return None


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--chip", choices=CHIPS, default="H100", help="(%(default)s)")
    parser.add_argument("--measured", type=Path, help="kernels.json of kernels.py (that of the GPU here, if there is)")
    options = parser.parse_args(arguments)
    chip = CHIPS[options.chip]
    print(f"Predicted on paper for an {options.chip}, not measured: {usage()['size']} in bfloat16, 15 steps of Broyden")
    for name, run in (("Triton, bf16 history, bucket of 100", Run()), ("CUDA, one sweep, 8-bit history", BEST)):
        print(f"\n{name}\n{by_kernel(run, chip)}")
    print(f"\n{sums(chip)}")
    if path := options.measured or measurements():
        print(f"\n{path}\n{beside(json.loads(path.read_text()), chip)}")


if __name__ == "__main__":
    main()
