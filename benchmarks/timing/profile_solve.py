"""Where the time of a solve goes: every kernel by name, and the device's idle time between them.

    python benchmarks/timing/profile_solve.py
    python benchmarks/timing/profile_solve.py --backend cuda --graph --history float8_e5m2

Two forward solves, one of a fixed number of steps and one that stops at a residual of 1e-2, each profiled once by
PyTorch's profiler after calls that compile and record; eagerly or, with --graph, as replays. "wall": the median of
calls that no profiler slows. "evaluations": how many the slowest sample needed, and how many were run, since on a GPU a
solve may end later than its samples. "idle": of the device between the solve's first and last kernel, which while
profiled is more than else where kernels are launched one by one. "before": the idle time right before a kernel. "conv"
marks what convolutions run. On a CPU, operators stand in for kernels. Writes its JSON when the calls are timed, and
when they are profiled.
"""

import argparse
import json
import re
import statistics
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, record_function

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.report.environment import environment
from benchmarks.report.files import write_json
from benchmarks.timing import measure
from benchmarks.timing.contenders import Setting, block_residual, specified
from benchmarks.timing.features import smooth_features
from benchmarks.timing.measure import Call
from ifr_fast import Broyden, backends
from ifr_fast.kernels import choose

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
CONVOLUTION = re.compile(r"conv|cudnn|xmma|cutlass|fprop|implicit_gemm", re.IGNORECASE)
JUDGES = re.compile(r"\b(rule|cluster)_kernel\b")  # the GPU backends' kernels that judge an evaluation
MARK = "solve: "
TIMED = 15  # calls
PRINTED = 7  # kernels of a solve


def trace(calls: dict[str, Call], device: torch.device) -> list[dict]:
    """The profiler's events of the calls, one after another, each under a mark with its name."""

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize()
    with torch.profiler.profile(activities=activities, acc_events=True) as profiler:
        next(iter(calls.values()))()  # the first launches under a profiler take longer
        for name, call in calls.items():
            synchronize()
            with record_function(MARK + name):
                call()
                synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        return [event for event in json.loads(path.read_bytes())["traceEvents"] if event.get("ph") == "X"]


def evaluations_run(operators: Sequence[dict], kernels: Sequence[dict]) -> int | None:
    """How many evaluations these operators or launches are of: two convolutions, and one kernel that judges. None where
    nothing tells."""
    convolved = sum(e["name"] == "aten::convolution" for e in operators) // 2  # none are launched by a replay
    return convolved or sum(k["count"] for k in kernels if JUDGES.search(k["name"])) or None


def profiled(events: Sequence[dict], name: str) -> dict:
    """What a device did under the mark of this name: by kernel the launches, times in µs, and the time idle before."""
    (mark,) = (e for e in events if e["name"] == MARK + name and e.get("cat") != "gpu_user_annotation")
    within = [e for e in events if mark["ts"] <= e["ts"] <= mark["ts"] + mark["dur"] and e is not mark]
    operators = sorted((e for e in within if e.get("cat") == "cpu_op"), key=lambda e: (e["ts"], -e["dur"]))
    launched_by = {e["args"].get("External id"): e["name"] for e in operators}
    work = sorted((e for e in within if e.get("cat") in ON_DEVICE), key=lambda e: e["ts"])
    device = "gpu" if work else "cpu"
    if not work:  # the operators that call no others
        ends = [*(e["ts"] for e in operators[1:]), float("inf")]
        work = [e for e, following in zip(operators, ends, strict=True) if following >= e["ts"] + e["dur"]]
    kernels: dict[str, dict] = {}
    end, gaps = None, []
    for event in work:
        arguments = event.get("args", {})
        operator = launched_by.get(arguments.get("External id"), "")
        gap = 0.0 if end is None else max(0.0, event["ts"] - end)
        end = event["ts"] + event["dur"] if end is None else max(end, event["ts"] + event["dur"])
        gaps.append(gap)
        if event["name"] not in kernels:
            convolution = bool(CONVOLUTION.search(f"{operator} {event['name']}"))
            kernels[event["name"]] = {"name": event["name"], "operator": operator, "convolution": convolution}
            kernels[event["name"]] |= {"count": 0, "total": 0.0, "least": float("inf"), "most": 0.0, "idle_before": 0.0}
            kept = "grid", "block", "registers per thread", "shared memory", "stream", "est. achieved occupancy %"
            kernels[event["name"]] |= {key: arguments[key] for key in kept if key in arguments}
        kernel = kernels[event["name"]]
        kernel["count"] += 1
        kernel["total"] += event["dur"]
        kernel["least"], kernel["most"] = min(kernel["least"], event["dur"]), max(kernel["most"], event["dur"])
        kernel["idle_before"] += gap
    for kernel in kernels.values():
        kernel["mean"] = kernel["total"] / kernel["count"]
    evaluations = evaluations_run(operators, kernels.values())
    return {
        "device": device,
        "evaluations_run": evaluations,
        "launches": len(work),
        "busy": sum(e["dur"] for e in work),
        "span": end - work[0]["ts"] if work else 0.0,
        "idle": sum(gaps),
        "idle_per_evaluation": sum(gaps) / evaluations if evaluations else None,
        "longest_idle": max(gaps, default=0.0),
        "convolutions": sum(k["total"] for k in kernels.values() if k["convolution"]),
        "kernels": sorted(kernels.values(), key=lambda k: -k["total"]),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--backend", default="auto", help="(%(default)s)")
    add("--graph", action="store_true", help="replay CUDA graphs")
    add("--history", choices=("bfloat16", "float8_e5m2"), default="bfloat16", help="its dtype (%(default)s)")
    add("--n", type=int, default=100, help="batch size (%(default)s)")
    add("--channels", type=int, default=256, help="(%(default)s)")
    add("--size", type=int, default=14, help="height and width (%(default)s)")
    add("--steps", type=int, default=15, help="at most (%(default)s)")
    add("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    add("--out", type=Path, default=Path("runs/profile.json"), help="(%(default)s)")
    options = parser.parse_args(arguments)
    for name in ("n", "channels", "size", "steps"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected a positive number, got {getattr(options, name)}")
    found = backends()
    if options.backend != "auto" and (options.backend not in found or not found[options.backend].available):
        why = found[options.backend].reason if options.backend in found else f"expected one of {', '.join(found)}"
        parser.error(f"--backend: {options.backend} cannot serve: {why}")
    try:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        serving = choose.kernels(options.backend, device, torch.bfloat16, getattr(torch, options.history))
        options.backend = serving.__name__.rpartition(".")[2]  # what "auto" stands for here
    except ValueError as error:
        parser.error(f"--history: {options.history} is refused: {error}")
    return options


@torch.no_grad()
def main(arguments: list[str] | None = None) -> dict:
    """Profile, print and write; returns what the JSON holds."""
    options = parse(arguments)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    setting = Setting(options.channels, options.steps, options.seed, device)
    x = smooth_features(options.n, options.channels, options.size, torch.Generator(device).manual_seed(options.seed))
    x = x.to(torch.bfloat16, memory_format=torch.channels_last)
    settings = {key: value if isinstance(value, int) else str(value) for key, value in vars(options).items()}
    found = {"settings": settings, "environment": environment(device), "solves": [], "profiler": ""}
    calls = {}
    for name, rtol in ((f"in {options.steps} steps", 0.0), ("to 1e-2", 1e-2)):
        solver = Broyden(max_iter=options.steps, rtol=rtol, history_dtype=options.history)
        head = setting.head(solver=solver, backend=options.backend, cuda_graphs=options.graph)
        for _ in range(3):  # compiles; with --graph: runs eagerly, records, replays
            y = head(x)
        residual = block_residual(specified(head), x, y)
        samples = [measure.sample(lambda head=head: head(x), device) for _ in range(TIMED)]
        iterations = head.last_solution.iterations
        entry = {"name": name, "evaluations": iterations.max().item() + 1, "iterations": iterations.tolist()}
        entry |= {"residual_median": residual.median().item(), "residual_worst": residual.max().item()}
        entry |= {"seconds": [s.wall for s in samples], "processor_seconds": [s.processor for s in samples]}
        found["solves"].append(entry)
        calls[name] = lambda head=head: head(x)
        write_json(options.out, found)
    try:
        events = trace(calls, device)
        for entry in found["solves"]:
            entry["profile"] = profiled(events, entry["name"])
        if device.type == "cuda" and any(entry["profile"]["device"] == "cpu" for entry in found["solves"]):
            found["profiler"] = "saw no kernels: these are operators on the CPU"
    except Exception as error:  # what was timed is worth keeping
        found["profiler"] = f"{type(error).__name__}: {error}"
        traceback.print_exc()
    write_json(options.out, found)
    print_tables(found)
    return found


def print_tables(found: dict) -> None:
    settings = found["settings"]
    history = ", 8-bit history" if settings["history"] == "float8_e5m2" else ""
    way = f"{settings['backend']}{history}, {'replayed' if settings['graph'] else 'eager'}, N = {settings['n']}"
    for entry in found["solves"]:
        wall, processor = (statistics.median(entry[key]) * 1e6 for key in ("seconds", "processor_seconds"))
        residual = f"residual {entry['residual_median']:.0e}, {entry['residual_worst']:.0e} at worst"
        print(f"{way}, {entry['name']}: wall {wall:.0f} µs, host {processor:.0f} µs, {residual}")
        profile = entry.get("profile")
        ran = (profile and profile["evaluations_run"]) or "an unknown number"
        at_most = settings["steps"] + 1
        print(f"  evaluations: the slowest sample needed {entry['evaluations']}, {ran} of at most {at_most} were run")
        if profile is None:
            continue
        idle = profile["idle_per_evaluation"]
        print(
            f"  {profile['launches']} launches, busy {profile['busy']:.0f} µs, convolutions"
            f" {profile['convolutions']:.0f}, idle {profile['idle']:.0f}"
            + ("" if idle is None else f" ({idle:.1f} an evaluation)")
        )
        print("  count  total µs   mean  before")
        for k in profile["kernels"][:PRINTED]:
            mark = "conv " if k["convolution"] else ""
            print(
                f"  {k['count']:5} {k['total']:9.1f} {k['mean']:6.1f} {k['idle_before'] / k['count']:7.1f}"
                f"  {mark}{k['name'][:56]}"
            )
    if found["profiler"]:
        print(f"the profiler: {found['profiler']}")
    walls = (f"{statistics.median(e['seconds']) * 1e6:.0f} µs {e['name']}" for e in found["solves"])
    print(f"wall: {', '.join(walls)}")


if __name__ == "__main__":
    main()
