"""One 3×3 convolution in float32 on a CPU: directly, by oneDNN on packed weights, and by Winograd's algorithm.

    python benchmarks/timing/convolutions.py
    python benchmarks/timing/convolutions.py --threads 1 --sizes 16x256x14x14
    IFR_FAST_ISA=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 python benchmarks/timing/convolutions.py

Both are called as a solve calls them, in turns, so often that a sample takes some milliseconds. "direct / W": the wall
time of the direct one over that of Winograd's in the same round, median and quartiles of the rounds. "GFLOP/s": of each
core; for both the operations of the direct one over the wall time. "of peak": beside the faster of a product of 1024³
and a 1×1 convolution, timed in the same rounds with the same threads. "weights": the transform of the weights, which a
cold cache costs once a convolution. CPU ms: the processor time of all threads. Writes convolutions.json.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.timing import measure
from benchmarks.timing.measure import Call, Ceiling, Timed, quartiles, ratios
from benchmarks.timing.speed_report import print_convolutions
from benchmarks.timing.winograd import WinogradConvolution
from ifr_fast import _native
from ifr_fast.kernels import cpu, winograd
from ifr_fast.kernels.convolutions import MULTIPLE
from ifr_fast.kernels.weight_cache import large_pages

# FLOP of a sample, if the budget allows: the first calls after another kernel are slower.
WORK, WORK_A_SECOND = 30e9, 1.5e9
SIDE = 1024
CPU = torch.device("cpu")


class Size(NamedTuple):
    n: int
    channels: int
    height: int
    width: int

    @property
    def work(self) -> int:
        """FLOP of the direct convolution."""
        return 2 * 9 * self.n * self.channels**2 * self.height * self.width

    @property
    def name(self) -> str:
        """Of the size of a sample, which targets.py knows it by."""
        return "×".join(map(str, self[1:]))

    def __str__(self) -> str:
        return "x".join(map(str, self))


SIZES = [*(Size(n, c, 14, 14) for c in (256, 128) for n in (1, 4, 16)), Size(2, 256, 100, 152)]


def size(text: str) -> Size:
    """16x256x14x14."""
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*){3}", text):
        raise argparse.ArgumentTypeError(f"expected NxCxHxW, got {text!r}")
    found = Size(*map(int, text.split("x")))
    if found.channels % MULTIPLE:
        raise argparse.ArgumentTypeError(f"Winograd's algorithm takes channels in multiples of {MULTIPLE}, got {text}")
    return found


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--sizes", type=size, nargs="+", default=SIZES, help=f"NxCxHxW ({' '.join(map(str, SIZES))})")
    add("--threads", type=int, default=torch.get_num_threads(), help="(%(default)s)")
    add("--budget", type=float, default=20, help="seconds in all, where 3 runs of each fit (%(default)s)")
    add("--out", type=Path, default=Path("runs/convolutions"), help="folder for the results (%(default)s)")
    return parser.parse_args(arguments)


class Case:
    """What is timed of one size, in samples of `work` FLOP."""

    def __init__(self, size: Size, work: float) -> None:
        n, channels, height, width = self.size = size
        x = torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)
        weight = torch.randn(channels, channels, 3, 3)
        self.direct = often(partial(cpu.convolution(weight, x), x), size.work, work)
        alone = WinogradConvolution(n, channels, channels, height, width).alone(CPU)
        self.winograd = often(alone, size.work, work)
        transform = partial(winograd._transform, weight, False, large_pages(4 * weight.numel()))
        self.weights = often(transform, work, work)

    def report(self, isa: str, threads: int, peak: float) -> dict:
        """Times in seconds; rates, of each core, in FLOP/s. Ratios are (first quartile, median, third quartile)."""
        found = {"name": self.size.name, "n": self.size.n, "mode": mode(isa)}
        for name in ("direct", "winograd", "weights"):
            timed = getattr(self, name)
            found[name] = {
                "median": timed.median,
                "processor_median": quartiles(sample.processor for sample in timed.samples.values())[1],
                "rounds": list(timed.samples),
                "seconds": list(timed.walls.values()),
            }
        for name in ("direct", "winograd"):
            found[name]["rate"] = self.size.work / found[name]["median"] / threads
        found["ratio"] = quartiles(ratios(self.direct.walls, self.winograd.walls))
        found["share_of_peak"] = found["direct"]["rate"] / peak
        return found


def mode(isa: str) -> str:
    """By which targets.py tells these rows from others."""
    return f"convolution, {isa}"


def often(call: Call, flop: float, work: float) -> Timed:
    """A call of `flop` FLOP, to be timed in samples of `work`."""
    call()
    times = max(1, round(work / flop))
    runs = measure.back_to_back(call, times)
    return Timed(lambda: runs, times, every_round=True)


def peaks(work: float) -> dict[str, Ceiling]:
    """What a processor's arithmetic is measured by, in samples of `work` FLOP."""
    a, b = torch.randn(SIDE, SIDE), torch.randn(SIDE, SIDE)
    product = torch.empty(SIDE, SIDE)
    x = torch.randn(16, 512, 14, 14).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(512, 512, 1, 1)
    calls: dict[str, tuple[Callable, int]] = {
        f"a product of {SIDE}³": (partial(torch.mm, a, b, out=product), 2 * SIDE**3),
        "a 1×1 convolution": (partial(F.conv2d, x, weight), 2 * 512 * x.numel()),
    }
    return {name: Ceiling(often(call, flop, work), flop) for name, (call, flop) in calls.items()}


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict:
    """Measure, print and write; returns what convolutions.json holds."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    work = min(WORK, WORK_A_SECOND * options.budget)
    cases, ceilings = [Case(size, work) for size in options.sizes], peaks(work)
    timed = [t for case in cases for t in (case.direct, case.winograd, case.weights)]
    measure.time_in_turns([*timed, *(c.timed for c in ceilings.values())], CPU, options.budget)

    rates = {name: ceiling.rate / options.threads for name, ceiling in ceilings.items()}
    isa = _native.isa()
    rows = [case.report(isa, options.threads, max(rates.values())) for case in cases]
    found = {"isa": isa, "threads": options.threads, "peaks": rates, "rows": rows}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "convolutions.json").write_text(json.dumps(found, indent=1) + "\n")
    print_convolutions(found)
    return found


if __name__ == "__main__":
    main()
