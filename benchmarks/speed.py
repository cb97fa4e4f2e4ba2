"""What the equilibrium costs beside the four convolutions it replaces: latency and peak memory, in one table.

    python benchmarks/speed.py
    python benchmarks/speed.py --device cpu --threads 2 --n 1 16 --budget 300

All rows are timed in turns within one run, so that whatever slows the machine slows them all. "ms": the median of the
wall time; "CPU ms": of the processor time of all threads (on a GPU, of the launching). "× stack": the time over that of
four float32 convolutions in NCHW at the same N in the same round, median and quartiles of the rounds. "× convs": over
the convolutions that the call itself runs, in the shapes, layouts and dtypes in which it runs them, each timed alone in
the same round. "MiB": the peak memory of one call beyond what was there before, results included. "residual": the
relative residual ‖F(z) - z‖ / ‖F(z)‖ of what the call returned, median and worst of the samples; taken of every row in
float32 by the specification, ifr_fast/reference.py. Inputs resemble RoI features (smooth, non-negative, rms 1) and are
drawn anew for every round. A line below the tables says whether the machine was too busy for the figures to mean
anything.

On a CPU, "MiB" leaves out what Winograd's convolutions keep between calls: weights and a workspace. Another table has
convolutions by themselves, with all instructions and with AVX2: timing/convolutions.py says what is in it. On a GPU
there are more rows, among them solves replayed as CUDA graphs, and in the same turns a large matrix product and a large
copy: what the device reaches at most. Writes speed.json and speed.png.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parents[1]))  # behind an installed ifr_fast

from benchmarks.report.environment import environment
from benchmarks.report.files import write_json
from benchmarks.timing import measure
from benchmarks.timing.contenders import BASE, Contender, Setting, contenders, gpu_contenders
from benchmarks.timing.features import smooth_features
from benchmarks.timing.measure import AnyConvolution, Call, Timed
from benchmarks.timing.speed_picture import save_picture
from benchmarks.timing.speed_report import Row, print_report, report
from benchmarks.timing.targets import BACKWARD, FORWARD
from ifr_fast import backends
from ifr_fast.kernels.convolutions import MULTIPLE

BACK_TO_BACK = 10  # runs of a lone convolution at most: a short one takes less than its launch, or to wake the threads
LEAST_SECONDS = 0.01  # that they take together on a CPU
SELDOM = 5  # seconds between reports of an unfinished run
CONVOLUTIONS = Path(__file__).with_name("timing") / "convolutions.py"
CONVOLUTIONS_SHARE = 0.1  # of the budget, for each table of convolutions by themselves
AVX2 = {"IFR_FAST_ISA": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line with its defaults filled in. Exits with a message where a value cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="(cuda where there is one)")
    add("--n", type=int, nargs="+", help="batch sizes of the sweep (1 4 16; on a GPU 1 8 32 64 100 128 256 512)")
    add("--table", type=int, help="batch size at which every row is timed (16; on a GPU 100)")
    add("--n-backward", type=int, help="largest batch size of forward+backward (4; on a GPU 512)")
    add("--channels", type=int, default=256, help="(%(default)s)")
    add("--size", type=int, default=14, help="height and width (%(default)s)")
    add("--short", action="store_true", help="only the rows that matter most, forward, for every N (86 100 256)")
    add("--steps", type=int, default=15, help="of every solver, forward and backward (%(default)s)")
    add("--threads", type=int, default=torch.get_num_threads(), help="on a CPU (%(default)s)")
    add("--budget", type=float, default=150, help="seconds in all, where 3 runs of each fit (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    add("--out", type=Path, default=Path("runs/speed"), help="folder for the results (%(default)s)")
    options = parser.parse_args(arguments)
    has_gpu = torch.cuda.is_available()
    if options.device == "cuda" and not has_gpu:
        parser.error("--device: expected cpu, as torch finds no GPU here, got cuda")
    gpu = has_gpu and options.device != "cpu"
    options.device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    defaults = {
        "table": 100 if gpu else 16,
        "n_backward": 512 if gpu else 4,
        "n": [86, 100, 256] if options.short else [1, 8, 32, 64, 100, 128, 256, 512] if gpu else [1, 4, 16],
    }
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("table", "n_backward", "channels", "size", "steps", "threads", "budget"):
        value = getattr(options, name)
        if not value > 0:
            parser.error(f"--{name.replace('_', '-')}: expected a positive number, got {value}")
    if min(options.n) < 1:
        parser.error(f"--n: expected batch sizes of at least 1, got {min(options.n)}")
    return options


class Inputs:
    """Features X and gradients of the output, the same numbers in every layout and dtype; renewed in place."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.generator = torch.Generator(options.device).manual_seed(options.seed)
        self.drawn: dict[int, tuple[Tensor, Tensor]] = {}
        self.variants: dict[tuple, tuple[Tensor, Tensor]] = {}

    def of(self, contender: Contender, n: int) -> tuple[Tensor, Tensor]:
        """X, which requires a gradient, and the gradient of the output."""
        key = n, contender.dtype, contender.layout
        if n not in self.drawn:
            self.drawn[n] = self._draw(n)
        if key not in self.variants:
            x, cotangent = (t.to(contender.dtype, memory_format=contender.layout, copy=True) for t in self.drawn[n])
            self.variants[key] = x.requires_grad_(), cotangent
        return self.variants[key]

    @torch.no_grad()
    def renew(self) -> None:
        self.drawn = {n: self._draw(n) for n in self.drawn}
        for (n, *_), variant in self.variants.items():
            for tensor, drawn in zip(variant, self.drawn[n], strict=True):
                tensor.copy_(drawn)

    def _draw(self, n: int) -> tuple[Tensor, Tensor]:
        features = smooth_features(n, self.options.channels, self.options.size, self.generator)
        return features, torch.randn(features.shape, generator=self.generator, device=features.device)


def planned(options: argparse.Namespace, everything: list[Contender]) -> Iterator[Row]:
    """The rows: all contenders at the table's batch size, a few at the others. The short form has few at all sizes."""
    passes = [(FORWARD, options.n, options.table)]
    if options.short:
        everything = [contender for contender in everything if contender.in_short]
    else:
        backward_sizes = [n for n in options.n if n <= options.n_backward]
        passes.append((BACKWARD, backward_sizes, min(options.table, options.n_backward)))
    for mode, sizes, table in passes:
        for n in sorted({*sizes, table}):
            for contender in everything:
                has_mode = contender.backward if mode == BACKWARD else contender.forward
                wanted = n == table or contender.in_sweep or options.short
                if wanted and (has_mode or contender.unavailable):
                    yield Row(contender, n, mode, in_table=n == table, unavailable=contender.unavailable)


def warm_up(row: Row, inputs: Inputs, device: torch.device) -> None:
    """Run the row's call under the profiler: its memory, convolutions and residual. First runs that compile, record or
    transform weights come before. A row that fails is reported so, and the others go on.
    """
    x, cotangent = inputs.of(row.contender, row.n)
    forward = row.mode == FORWARD
    call = row.contender.forward(x.detach()) if forward else row.contender.backward(x, cotangent)
    try:
        for _ in range(2 if row.contender.graph else 1):
            call()
        profile = measure.profile(call, device)
        if row.contender.residual is not None:
            y = profile.result if forward else profile.result[0]
            row.residual = row.contender.residual(x.detach(), y).float().cpu()
    except torch.OutOfMemoryError as error:
        row.unavailable = f"out of memory: {first_line(error)}"
        return
    except Exception as error:
        kind = "torch.compile failed" if row.contender.compiled else f"failed: {type(error).__name__}"
        row.unavailable = f"{kind}: {first_line(error)}"
        print(f"{row.label}:", traceback.format_exc(), file=sys.stderr, flush=True)
        return
    row.timed = Timed(lambda: call, every_round=row.contender.name == BASE)
    row.peak_bytes, row.convolutions = profile.peak_bytes, profile.convolutions


def first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def lone_convolutions(rows: list[Row], device: torch.device) -> dict[AnyConvolution, Timed]:
    """Each convolution that any row runs, to be timed by itself."""
    return {c: lone(c, device) for c in {c: None for row in rows for c in row.convolutions}}


def lone(convolution: AnyConvolution, device: torch.device) -> Timed:
    if device.type == "cuda":
        # Its operands are made for every run: kept, those of all would fill a GPU.
        prepare = partial(repeated, convolution, device, BACK_TO_BACK)
        measure.seconds(prepare(), device)
        return Timed(prepare, BACK_TO_BACK, every_round=True)
    call = convolution.alone(device)
    call()
    times = min(BACK_TO_BACK, math.ceil(LEAST_SECONDS / measure.seconds(call, device)))
    calls = measure.back_to_back(call, times)
    return Timed(lambda: calls, times, every_round=True)


def repeated(convolution: AnyConvolution, device: torch.device, times: int) -> Call:
    return measure.back_to_back(convolution.alone(device), times)


def convolutions_alone(options: argparse.Namespace) -> list[dict]:
    """What timing/convolutions.py finds with all of the processor's instructions and, where these are more, with AVX2.
    Libraries read the variables that choose instructions when they are loaded: each takes a process of its own."""
    if options.device.type != "cpu" or options.short or not backends()["cpu"].available:
        return []
    channels = [c for c in (options.channels, options.channels // 2) if c and c % MULTIPLE == 0]
    sizes = [f"{n}x{c}x{options.size}x{options.size}" for c in channels for n in options.n]
    sizes += [f"2x{c}x100x152" for c in channels[:1]]  # a level of a feature pyramid
    if not sizes:
        return []
    variants = [{}, AVX2] if "avx512" in backends()["cpu"].reason else [{}]
    found = []
    for variables in variants:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, CONVOLUTIONS, "--out", folder, "--sizes", *sizes]
            command += ["--threads", str(options.threads), "--budget", str(options.budget * CONVOLUTIONS_SHARE)]
            subprocess.run(command, env={**os.environ, **variables}, check=True, stdout=subprocess.DEVNULL)
            found.append(json.loads(Path(folder, "convolutions.json").read_text()))
    return found


def main(arguments: list[str] | None = None) -> dict:
    """Measure, print and write; returns what speed.json holds."""
    started = time.perf_counter()
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    device = options.device
    if device.type == "cuda":
        torch.cuda.set_device(device)
    facts = environment(device)
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(f"seed: {options.seed}", flush=True)

    setting = Setting(options.channels, options.steps, options.seed, device)
    inputs = Inputs(options)
    everything = contenders(setting)
    if device.type == "cuda":
        features = smooth_features(8, options.channels, options.size, inputs.generator)
        everything += gpu_contenders(setting, features)
    convolutions = convolutions_alone(options)
    rows = list(planned(options, everything))
    alone, ceilings, path = {}, {}, options.out / "speed.json"

    def write() -> dict:
        """Also of an unfinished run, which may be killed."""
        taken = time.perf_counter() - started
        found = report(rows, alone, ceilings, convolutions, vars(options), facts, taken)
        write_json(path, found)
        return found

    write_at_times = seldom(write)
    bar = tqdm(rows, "warming up", dynamic_ncols=True)
    for row in bar:
        bar.set_postfix_str(row.label + (", compiling" if row.contender.compiled else ""), refresh=False)
        if not row.unavailable:
            warm_up(row, inputs, device)
        write_at_times()
    measured = [row for row in rows if not row.unavailable]
    alone |= lone_convolutions(measured, device)
    ceilings |= measure.ceilings(device) if device.type == "cuda" else {}
    left = options.budget - (time.perf_counter() - started)
    timed = [*(row.timed for row in measured), *alone.values(), *(c.timed for c in ceilings.values())]
    measure.time_in_turns(timed, device, left, before_round=inputs.renew, after_run=write_at_times)

    found = write()
    save_picture(options.out / "speed.png", found)
    print_report(found)
    print(f"wrote {path} and {options.out / 'speed.png'}")
    return found


def seldom(action: Callable[[], object]) -> Callable[[], None]:
    """A function that acts only where SELDOM has passed since it last did."""
    last = time.perf_counter()

    def perhaps() -> None:
        nonlocal last
        if time.perf_counter() - last > SELDOM:
            action()
            last = time.perf_counter()

    return perhaps


if __name__ == "__main__":
    main()
