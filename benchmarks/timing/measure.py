"""Seconds, peak memory and convolutions of a call, many calls timed in turns, and what a GPU reaches at most."""

import ast
import gc
import json
import math
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.timing.winograd import WinogradConvolution, noted

Call = Callable[[], Any]

LEAST, MOST = 3, 30  # runs of a call
CEILING_RUNS = 5  # of a ceiling's work, back to back

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler would report as an error that there is no GPU

DTYPES = {"float": torch.float32, "double": torch.float64, "c10::BFloat16": torch.bfloat16, "c10::Half": torch.float16}


# On weights packed beforehand, which have no strides; alone it is timed as the convolution that it stands for.
PACKED = "mkldnn::_convolution_pointwise"
DIRECT = "aten::mkldnn_convolution"  # called by itself, or by aten's convolution, which is then the one that counts


class Operand(NamedTuple):
    """A tensor's shape, strides and dtype."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype

    def normal(self, device: torch.device) -> Tensor:
        """Such a tensor, of normal deviates; of an expanded one too, whose elements share memory."""
        extent = 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))
        return torch.randn(extent, device=device).to(self.dtype).as_strided(self.shape, self.strides)


class Convolution(NamedTuple):
    """A call of aten's convolution or convolution_backward; its arguments, tensors as Operands."""

    name: str
    arguments: tuple[Any, ...]

    def alone(self, device: torch.device) -> Call:
        """The same call on random tensors."""
        arguments = [a.normal(device) if isinstance(a, Operand) else a for a in self.arguments]
        return partial(getattr(torch.ops.aten, self.name).default, *arguments)

    def __str__(self) -> str:
        operands = [a for a in self.arguments if isinstance(a, Operand)]
        shapes = ", ".join(f"{a.shape} strides {a.strides}" for a in operands)
        return f"{self.name} of {shapes} {operands[0].dtype}"


AnyConvolution = Convolution | WinogradConvolution


@dataclass(frozen=True)
class Profile:
    """A call's result, the most memory that it held beyond what was allocated before it, and the convolutions that it
    ran."""

    result: Any
    peak_bytes: int
    convolutions: Counter[AnyConvolution]


def profile(call: Call, device: torch.device) -> Profile:
    """Run `call` once under PyTorch's profiler.

    peak_bytes counts what PyTorch's allocators hand out, results and oneDNN's scratch space included: on a GPU the
    caching allocator's own maximum; on a CPU the largest running sum of the profiler's allocations and releases. What
    C++ containers and Python objects take besides is not in it, nor what Winograd's convolutions keep between calls:
    weights (ifr_fast.weight_cache) and a workspace. tests/benchmarks/test_measure.py compares it with the
    process's own peak (VmHWM): the released solver takes 103 MiB by this count and 110 MiB by that one.
    """
    if device.type == "cuda":
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    with (
        noted() as by_winograd,
        torch.autograd.profiler.profile(profile_memory=True, record_shapes=True) as profiler,
    ):
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_bytes())["traceEvents"]
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        peak = _highest([e for e in events if e.get("name") == "[memory]" and e["args"]["Device Type"] == 0])
    found = [e for e in events if e.get("name") in ("aten::convolution", "aten::convolution_backward", PACKED)]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in found]
    for event in events:
        if event.get("name") == DIRECT and not any(start <= event["ts"] <= end for start, end in spans):
            found.append(event)
    return Profile(result, peak, Counter(map(_convolution, found)) + by_winograd)


def _highest(events: list[dict]) -> int:
    """The largest running sum; releases of what was there before (an old tensor collected meanwhile) do not count."""
    held = highest = 0
    live = set()
    for event in sorted(events, key=lambda e: e["ts"]):
        address, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            live.add(address)
        elif address not in live:
            continue
        else:
            live.remove(address)
        held += size
        highest = max(highest, held)
    return highest


def _convolution(event: dict) -> Convolution:
    a = event["args"]
    columns = zip(a["Input Dims"], a["Input Strides"], a["Input type"], a["Concrete Inputs"], strict=True)
    arguments = []
    for shape, strides, kind, value in columns:
        if kind in DTYPES:
            arguments.append(Operand(tuple(shape), tuple(strides), DTYPES[kind]))
        else:
            value = ast.literal_eval(value) if value else None
            arguments.append(tuple(value) if isinstance(value, list) else value)
    if event["name"] in (PACKED, DIRECT):
        x, weight, bias, padding, stride, dilation, groups, *_ = arguments
        if event["name"] == PACKED:
            format = torch.channels_last if x.strides[1] == 1 else torch.contiguous_format
            strides = torch.empty(weight.shape, device="meta").to(memory_format=format).stride()
            weight = weight._replace(strides=strides)
        return Convolution("convolution", (x, weight, bias, stride, padding, dilation, False, (0, 0), groups))
    return Convolution(event["name"].removeprefix("aten::"), tuple(arguments))


class Sample(NamedTuple):
    """Seconds of one run: passed, and spent by the process's threads together (on a GPU, until all is launched)."""

    wall: float
    processor: float


def sample(call: Call, device: torch.device) -> Sample:
    """One run; the wall time is a GPU's own clock's on a GPU."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        start.record()
    processor, clock = time.process_time(), time.perf_counter()
    result = call()
    wall, processor = time.perf_counter() - clock, time.process_time() - processor
    if device.type == "cuda":
        end.record()
        end.synchronize()
        wall = start.elapsed_time(end) / 1e3
    del result  # freed outside the timing
    return Sample(wall, processor)


def seconds(call: Call, device: torch.device) -> float:
    """Of one run."""
    return sample(call, device).wall


@dataclass
class Timed:
    """A call and its samples, by the round in which each was taken.

    prepare(), untimed, gives the call. runs: how often the call does what is to be timed. every_round: others are
    compared with it within each round.
    """

    prepare: Callable[[], Call]
    runs: int = 1
    every_round: bool = False
    samples: dict[int, Sample] = field(default_factory=dict)

    def take(self, round: int, device: torch.device) -> None:
        self.samples[round] = Sample(*(value / self.runs for value in sample(self.prepare(), device)))

    @property
    def walls(self) -> dict[int, float]:
        return {round: sample.wall for round, sample in self.samples.items()}

    @property
    def median(self) -> float:
        return statistics.median(self.walls.values())


def ratios(walls: dict[int, float], others: dict[int, float]) -> list[float]:
    """Of the rounds that have both: what slows the machine for a round slows both."""
    return [wall / others[round] for round, wall in walls.items() if round in others]


def quartiles(values: Iterable[float]) -> tuple[float, float, float]:
    """The first, the median, the third. ValueError where there are no values."""
    values = list(values)
    if len(values) == 1:
        return (values[0],) * 3
    return tuple(statistics.quantiles(values, n=4, method="inclusive"))


def back_to_back(call: Call, times: int) -> Call:
    """Many runs as one: on a GPU a short call's launch takes longer than its work."""

    def calls() -> None:
        for _ in range(times):
            call()

    return calls


@dataclass(frozen=True)
class Ceiling:
    """What the device reaches on large random data: work (FLOP, or bytes read and written) a run of what is timed."""

    timed: Timed
    work: float

    @property
    def rate(self) -> float:
        """Work per second."""
        return self.work / self.timed.median


def ceilings(device: torch.device, *, side: int = 8192, copied: int = 1 << 30) -> dict[str, Ceiling]:
    """The two rates that bound every kernel: "matmul", a bfloat16 product of `side`³, and "copy", of `copied` bytes."""
    a, b = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(copied // 4, device=device)
    target = torch.empty_like(source)
    found = {}
    for name, call, work in (
        ("matmul", partial(torch.mm, a, b, out=product), 2 * side**3),
        ("copy", partial(target.copy_, source), 2 * source.nbytes),
    ):
        call()
        runs = back_to_back(call, CEILING_RUNS)
        found[name] = Ceiling(Timed(lambda runs=runs: runs, CEILING_RUNS), work)
    return found


def time_in_turns(
    timed: Sequence[Timed],
    device: torch.device,
    budget: float,
    *,
    before_round: Call = lambda: None,
    after_run: Call = lambda: None,
) -> None:
    """Time all calls in `budget` seconds, each at least LEAST times whatever the budget.

    The first round runs every call, and tells how many more runs there is time for. In the rounds that follow the calls
    keep their order, and slow ones sit out most rounds, evenly.
    """
    deadline = time.perf_counter() + budget

    def run_round(round: int, indices: Iterable[int]) -> list[float]:
        before_round()
        costs = []
        for i in indices:
            start = time.perf_counter()
            if len(timed[i].samples) < LEAST or start < deadline:
                timed[i].take(round, device)
            costs.append(time.perf_counter() - start)
            after_run()
            bar.update()
        return costs

    with tqdm(total=LEAST * len(timed), desc="timing in turns", dynamic_ncols=True) as bar:
        costs = run_round(0, range(len(timed)))
        counts = repeats(costs, deadline - time.perf_counter(), LEAST - 1, MOST - 1)
        most = max(counts)
        counts = [most if t.every_round else count for t, count in zip(timed, counts, strict=True)]
        bar.total = len(timed) + sum(counts)
        for round, indices in enumerate(rounds(counts), 1):
            run_round(round, indices)


def repeats(costs: Sequence[float], budget: float, least: int, most: int) -> list[int]:
    """How often to run calls of these costs in `budget` (seconds both): an equal share of the time for each, within
    `least` to `most` times."""

    def counts(share: float) -> list[int]:
        return [min(most, max(least, math.floor(share / cost))) for cost in costs]

    low, high = 0.0, most * max(costs)
    for _ in range(40):
        share = (low + high) / 2
        total = sum(count * cost for count, cost in zip(counts(share), costs, strict=True))
        low, high = (share, high) if total <= budget else (low, share)
    return counts(low)


def rounds(counts: Sequence[int]) -> Iterator[list[int]]:
    """What to run in each of max(counts) rounds: index i in counts[i] of them, evenly spread."""
    total = max(counts)
    for j in range(total):
        yield [i for i, count in enumerate(counts) if (j + 1) * count // total > j * count // total]
