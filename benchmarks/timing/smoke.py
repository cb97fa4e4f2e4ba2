"""Does a small head give what float64 gives on a CPU? Forward and backward, on every backend, in seconds.

    python benchmarks/timing/smoke.py --out runs/smoke.json

Each backend and dtype has a process of its own, all at once: they compile in parallel, and one that the device refuses
costs the others nothing. Heads are called eagerly and, on a GPU, until a recorded graph is replayed. Writes its JSON
after every case. The exit status is 1 where a case failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[2]))  # behind an installed ifr_fast

from benchmarks.report.files import write_json
from ifr_fast import Broyden, IFRHead, Implicit, backends

C, GROUPS, SIZE = 32, 4, (7, 6)
EXACT = {"max_iter": 8, "rtol": 0.0}
# Of the norm of the difference over the norm: of the equilibrium, to which 8 steps converge beyond rounding, and of a
# gradient, which differs by all of an element wherever rounding takes a ReLU's input across zero.
TOLERANCE = {"float32": (2e-4, 5e-3), "bfloat16": (2e-2, 0.3)}


def heads(backend: str, device: torch.device) -> tuple[IFRHead, IFRHead]:
    """A head whose block contracts, no parameter at its initial value, and the same in float64 on the CPU."""
    options = {"groups": GROUPS, "post_gain": 0.3, "solver": Broyden(**EXACT), "adjoint": Implicit(**EXACT)}
    head = IFRHead(C, backend=backend, **options)
    for name, parameter in head.block.named_parameters():
        if "gn" in name:
            mean = 0.0 if name.endswith("bias") else 0.3 if "gn3" in name else 1.0
            torch.nn.init.normal_(parameter, mean, 0.03 if "gn3" in name else 0.1)
    exact = IFRHead(C, backend="eager", **options).double()
    exact.load_state_dict(head.state_dict())
    return head.to(device), exact


def error(actual: Tensor, expected: Tensor) -> float:
    """NaN where actual holds one."""
    actual, expected = actual.detach().double().cpu(), expected.detach()
    return ((actual - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def both(head: IFRHead, x: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The head's output, and the gradients of x and of the parameters."""
    x = x.detach().requires_grad_()
    y = head(x)
    return y, *torch.autograd.grad(y, [x, *head.parameters()], grad)


def cases(backend: str, dtype: str, sizes: list[int]) -> Iterator[dict]:
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    head, exact = heads(backend, device)
    names = ["x", *(name for name, _ in head.named_parameters())]
    for n in sizes:
        x, grad = (torch.randn(n, C, *SIZE).to(getattr(torch, dtype)) for _ in range(2))
        expected = both(exact, x.double(), grad.double())
        x, grad = (t.to(device, memory_format=torch.channels_last) for t in (x, grad))
        for way, calls in {"eager": 1, "replayed": 3}.items() if device.type == "cuda" else [("eager", 1)]:
            entry = {"backend": backend, "dtype": dtype, "n": n, "way": way, "passed": False}
            started = time.perf_counter()
            try:
                head.cuda_graphs = way == "replayed"  # the first call is eager, the second recorded, the third replayed
                for _ in range(calls):
                    y, *gradients = both(head, x, grad)
                entry["output"] = error(y, expected[0])
                errors = {name: error(a, e) for name, a, e in zip(names, gradients, expected[1:], strict=True)}
                entry["gradients"] = errors
                entry["iterations"] = head.last_solution.iterations.unique().tolist()
                most, most_of_gradients = TOLERANCE[dtype]
                entry["passed"] = entry["output"] < most and all(e < most_of_gradients for e in errors.values())
            except Exception as failure:
                entry["error"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
                traceback.print_exc()
            yield {**entry, "seconds": time.perf_counter() - started}


def in_words(entry: dict) -> str:
    words = f"{entry['backend']:7} {entry['dtype']:9} n = {entry['n']:<4} {entry['way']:9}"
    if "error" in entry:
        return f"{words} FAILED: {entry['error']}"
    verdict = "ok    " if entry["passed"] else "FAILED"
    worst = max(entry["gradients"], key=lambda name: entry["gradients"][name])
    return f"{words} {verdict} output {entry['output']:.1e}, gradient of {worst} {entry['gradients'][worst]:.1e}"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--backends", nargs="+", default=["triton", "cuda", "eager"], help="(%(default)s)")
    parser.add_argument("--dtypes", nargs="+", choices=TOLERANCE, default=list(TOLERANCE), help="(%(default)s)")
    parser.add_argument("--n", type=int, nargs="+", default=[1, 100], help="batch sizes (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/smoke.json"), help="(%(default)s)")
    parser.add_argument("--alone", action="store_true", help="in this process, a line of JSON a case")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run, print and write; the number of cases that failed."""
    options = parse(arguments)
    if options.alone:
        for backend in options.backends:
            for dtype in options.dtypes:
                for entry in cases(backend, dtype, options.n):
                    print(json.dumps(entry), flush=True)
        return 0
    reasons = {name: "" if backend.available else backend.reason for name, backend in backends().items()}
    found, lock = {"backends": reasons, "cases": [], "died": []}, Lock()
    write_json(options.out, found)

    def run(backend: str, dtype: str) -> None:
        command = [sys.executable, __file__, "--alone", "--backends", backend, "--dtypes", dtype]
        process = subprocess.Popen(
            [*command, "--n", *map(str, options.n)], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "2"},
        )  # fmt: skip
        for line in process.stdout:
            entry = json.loads(line) if line.startswith("{") else None
            with lock:
                print(in_words(entry) if entry else line.rstrip(), flush=True)
                found["cases"] += [entry] if entry else []
                write_json(options.out, found)
        if process.wait():
            with lock:
                found["died"].append(f"{backend} {dtype}: exit status {process.returncode}")
                print(f"{found['died'][-1]}, see above", flush=True)
                write_json(options.out, found)

    served = [name for name in options.backends if not reasons[name]]
    pairs = [(backend, dtype) for backend in served for dtype in options.dtypes]
    with ThreadPoolExecutor(max(1, len(pairs))) as pool:
        list(pool.map(lambda pair: run(*pair), pairs))
    failed = sum(not entry["passed"] for entry in found["cases"]) + len(found["died"])
    absent = "".join(f"; no {name}: {reasons[name]}" for name in options.backends if reasons[name])
    print(f"{len(found['cases'])} cases, {failed} failed{absent}")
    return failed


if __name__ == "__main__":
    sys.exit(1 if main() else 0)
