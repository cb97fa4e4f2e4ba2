"""What every kernel of the GPU backends takes, beside the rates that the device reaches on a large copy and product.

    python benchmarks/timing/kernels.py
    python benchmarks/timing/kernels.py --backends cuda --budget 60

A kernel is launched many times from a CUDA graph, on so many sets of random tensors that they exceed the L2 cache
several times over. Its time is the median replay's, divided by the launches. GB/s counts every input once and every
output once; "of copy" and "of product" are shares of what the device reaches on a large copy and product. "share": the
time of all its launches in a forward solve over that solve's. Triton's and CUDA's kernels are timed with a history in 8
bits too. Where CUDA's would take a step by one kernel, steps and solves by three are timed beside it. Writes
kernels.json after every measurement. --dry runs everything once at toy sizes, under Triton's interpreter where there is
no GPU.
"""

import argparse
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.report.environment import environment
from benchmarks.report.files import write_json
from benchmarks.timing import measure
from benchmarks.timing.kernel_cases import ROIS, Bench, Case, Setting, Size, convolution_cases
from benchmarks.timing.kernel_report import print_tables, rate
from benchmarks.timing.measure import Call
from ifr_fast import backends
from ifr_fast.kernels.contract import RUNNING

BACKENDS = ("triton", "cuda", "eager")
SOLVED = {"forward solve", "backward solve"}
BLOCK = {"F", "vjp of F", *SOLVED}
CACHES = 4  # how many times the sets of tensors exceed the L2 cache
MOST_SETS = 64
SPAN, MOST_LAUNCHES, REPLAYS = 2e-3, 256, 7  # of a graph: seconds, launches, how often it is timed


BF16, E5M2 = torch.bfloat16, torch.float8_e5m2
PLAN = [Setting(ROIS[0], BF16, BF16), Setting(ROIS[0], BF16, E5M2), Setting(ROIS[1], BF16, BF16)]
PLAN += [Setting(ROIS[1], BF16, E5M2), Setting(Size(2, 256, 100, 152, 32), BF16, BF16)]
PLAN += [Setting(ROIS[2], BF16, BF16), Setting(ROIS[3], BF16, BF16), Setting(ROIS[0], torch.float32, torch.float32)]
# Small, and on every path: whole tiles and a step in one kernel; tiles that are cut. Nothing is a power of two.
TOYS = [Setting(Size(2, 256, 9, 8, 32), BF16, history) for history in (BF16, E5M2)]
TOYS += [Setting(Size(1, 24, 61, 53, 1), torch.float32, torch.float32)]


def seconds(calls: list[Call], device: torch.device) -> list[float]:
    """Of one call: a figure a replay of a graph of them all, several times over."""
    if device.type == "cpu":
        return [measure.seconds(call, device) for call in calls]

    def run_all() -> None:
        for call in calls:
            call()

    run_all()
    most = max(1, MOST_LAUNCHES // len(calls))
    rounds = min(most, math.ceil(SPAN / measure.seconds(run_all, device)))
    graph = torch.cuda.CUDAGraph()
    # A capture that fails leaves its stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()), torch.cuda.graph(graph):
        # Results are kept, so that those of different launches lie in different memory.
        kept = [call() for _ in range(rounds) for call in calls]
    for _ in range(2):
        graph.replay()
    found = [measure.seconds(graph.replay, device) / len(kept) for _ in range(REPLAYS)]
    del kept, graph
    torch.cuda.empty_cache()
    return found


@torch.no_grad()
def run(case: Case, setting: Setting, bench: Bench | None, device: torch.device, dry: bool) -> dict:
    """The case's entry in kernels.json, with its traceback where it failed."""
    size, (dtype, history) = setting.size, (str(t).removeprefix("torch.") for t in (setting.dtype, setting.history))
    entry = {"family": case.family, "variant": case.variant, "backend": case.backend, "size": str(size), "n": size.n}
    entry |= {"dtype": dtype, "history": history, "traffic": case.traffic, "flop": case.flop}
    entry["per_solve"] = case.per_solve
    sets = 1
    if case.traffic and device.type == "cuda" and not dry:
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        sets = min(MOST_SETS, math.ceil(CACHES * cache / case.traffic))
    try:
        calls = [case.make() for _ in range(sets)]
        if dry:
            for call in calls:
                call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        else:
            taken = seconds(calls, device)
            entry |= {"seconds": statistics.median(taken), "fastest": min(taken), "slowest": max(taken)}
        states = bench.states if bench and bench.backend != "eager" else []
        if any((state.status != RUNNING).any() for state in states):
            raise RuntimeError("samples stopped while their kernels were timed")
    except Exception as error:
        entry["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
        entry["traceback"] = traceback.format_exc()
    if bench:
        bench.states.clear()
    return entry


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="(all that can serve here)")
    parser.add_argument("--kernels-alone", action="store_true", help="no convolution, and nothing that runs one")
    parser.add_argument("--dry", action="store_true", help="run everything once at toy sizes, time nothing")
    parser.add_argument("--steps", type=int, default=15, help="Broyden steps of a solve (%(default)s)")
    parser.add_argument(
        "--budget", type=float, default=120, help="seconds; what does not fit is left out (%(default)s)"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/kernels"), help="folder for kernels.json (%(default)s)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        if not options.dry:
            parser.error("torch finds no GPU here: only --dry runs without one")
        os.environ["TRITON_INTERPRET"] = "1"
    found = backends()
    for name in options.backends or []:
        if not found[name].available:
            parser.error(f"--backends: {name} is not available: {found[name].reason}")
    options.backends = options.backends or [name for name in BACKENDS if found[name].available]
    if options.steps < 3:
        parser.error(f"--steps: expected at least 3, got {options.steps}")
    return options


def planned(
    options: argparse.Namespace, device: torch.device, refused: list[str]
) -> Iterator[tuple[Case, Setting, Bench | None]]:
    """refused: told of settings that a backend does not serve."""
    for setting in TOYS if options.dry else PLAN:
        for name in options.backends:
            if setting.narrow and name == "eager":
                continue  # it widens each row that it reads
            try:
                bench = Bench(name, setting, options.steps, device)
            except ValueError as error:
                refused.append(f"{name}, {setting}: {error}")
                continue
            for case in bench.cases():
                if not (options.kernels_alone and case.family in BLOCK):
                    yield case, setting, bench
        if not (options.kernels_alone or setting.narrow):
            for case in convolution_cases(setting, options.steps, device):
                yield case, setting, None


def main(arguments: list[str] | None = None) -> int:
    """Measure, print and write; the number of cases that failed."""
    started = time.perf_counter()
    options = parse(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "kernels.json"
    found = {"environment": environment(device), "backends": options.backends, "ceilings": {}, "cases": []}
    found |= {"not_run": [], "refused": []}

    def write() -> None:
        rate(found)
        write_json(path, found)

    if device.type == "cuda" and not options.dry:
        ceilings = measure.ceilings(device)
        measure.time_in_turns([ceiling.timed for ceiling in ceilings.values()], device, budget=2)
        found["ceilings"] = {name: ceiling.rate for name, ceiling in ceilings.items()}
        torch.cuda.empty_cache()
    write()
    for case, setting, bench in planned(options, device, found["refused"]):
        label = f"{case.family} {case.variant} ({case.backend}), {setting}"
        if time.perf_counter() - started > options.budget:
            found["not_run"].append(label)
            continue
        entry = run(case, setting, bench, device, options.dry)
        found["cases"].append(entry)
        write()
        if "error" in entry:
            print(f"{label} failed:\n{entry['traceback']}", file=sys.stderr, flush=True)
            if device.type == "cuda":
                torch.cuda.synchronize(device)  # raises where the device answers no more: nothing else would run
    found["elapsed_seconds"] = time.perf_counter() - started
    write()
    print_tables(found)
    print(f"took {found['elapsed_seconds']:.0f} s, wrote {path}")
    return sum("error" in entry for entry in found["cases"])


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
