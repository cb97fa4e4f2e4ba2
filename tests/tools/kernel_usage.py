"""What every GPU kernel of a solve takes of a multiprocessor, without a GPU: benchmarks/results/paper/.

    python tests/tools/kernel_usage.py [90 …] [--output FOLDER]

A solve of 100 RoIs and its gradient run on meta tensors, through the package's own code, once for each backend and
history. Every launch is written down and its kernel compiled: Triton's by Triton (compile_triton.py), csrc/cuda by nvcc
(recorded_cuda.py; left out where there is none). Launches that differ in nothing are one row. The bytes are those of
benchmarks/timing/traffic.py. Writes usage.json, which benchmarks/timing/model.py reads, and README.md, a page of it.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import recorded_cuda
import torch
import triton
from compile_triton import BF16, CHIPS, Recorder, compiled
from torch import Tensor
from triton.runtime.jit import JITFunction

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.timing.kernel_cases import ROIS
from benchmarks.timing.traffic import traffic
from ifr_fast import Broyden, _native
from ifr_fast.engine.linearise import BlockMap
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import contract, fields, gpu

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks/results/paper"
SIZE, STEPS = ROIS[0], 15
HISTORIES = (torch.bfloat16, torch.float8_e5m2)
SWEPT = ("gram_row", "combine", "cluster_step")
# What a solve's launches are called in kernel_cases, where it is not the kernel's name.
FAMILIES = {
    ("forward", "norm_tail"): "tail + residual",
    ("backward", "residual"): "residual of total",
    ("backward", "norm_vjp"): "norm_relu_vjp",
    ("parameters", "norm_vjp"): "norm_relu_vjp",
}
# The same on all these chips: registers, warps and blocks of a multiprocessor. Shared memory is not.
REGISTERS, WARPS, BLOCKS = 65_536, 64, 32
SHARED = {80: 164 << 10, 90: 228 << 10, 100: 228 << 10}
RESERVED = 1024  # bytes of shared memory that the driver takes of every block


class Launch(NamedTuple):
    """family: as in kernel_cases, where it has the kernel. number: which of the family's launches in its phase."""

    phase: str
    family: str
    number: int
    kernel: Any
    blocks: int
    threads: int
    shared: int = 0  # dynamic


class Used(NamedTuple):
    registers: int
    local: int
    shared: int


def blocks_per_sm(threads: int, used: Used, arch: int) -> int:
    """Resident blocks of a multiprocessor. Registers are given to a warp in units of 256, to four warps at a time."""
    warps = -(-threads // 32)
    by_registers = REGISTERS // (-(-used.registers * 32 // 256) * 256) // 4 * 4 // warps
    by_shared = SHARED[arch] // (-(-used.shared // 128) * 128 + RESERVED)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS)


class Notes:
    """The launches so far, each with its phase and family."""

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.phase = ""
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, name: str, kernel: Any, blocks: int, threads: int, shared: int = 0) -> None:
        """name: of the kernel, or of the function that launched it."""
        self.counts[self.phase, name] += 1
        number = self.counts[self.phase, name]
        family = FAMILIES.get((self.phase, name), name)
        if name == "combine" and number > STEPS:
            family = "finish"
        self.launches.append(Launch(self.phase, family, number, kernel, blocks, threads, shared))


def run(kernels: ModuleType, history: torch.dtype, notes: Notes) -> None:
    """A solve, the linearisation at its end, the adjoint's solve, and the parameters' gradients."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        format = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=format)

    shape, channels = (SIZE.n, SIZE.channels, SIZE.height, SIZE.width), SIZE.channels
    solver = Broyden(STEPS, history_dtype=history).resolve(BF16)
    weight, norm = tensor(channels, channels, 3, 3), [tensor(channels), tensor(channels)]
    params = [weight, *norm, weight, *norm, *norm]
    block = BlockMap(tensor(*shape, dtype=BF16), params, "released", SIZE.groups, kernels, BF16)
    notes.phase = "forward"
    solve(block, tensor(*shape), solver, kernels, from_zero=True)
    notes.phase = "linearise"
    linearised = block.linearise(tensor(*shape))
    notes.phase = "backward"
    w, grad = tensor(*shape), tensor(*shape)

    def adjoint(w: Tensor, state: Any) -> Any:
        return linearised.affine(w, grad, state)

    solve(adjoint, w, solver, kernels, from_zero=True, first=grad, affine=True)
    notes.phase = "parameters"
    linearised.vjp_params(w)


@contextmanager
def replaced(owner: Any, **values: Any):
    old = {name: getattr(owner, name) for name in values if hasattr(owner, name)}
    for name, value in values.items():
        setattr(owner, name, value)
    yield
    for name in values:
        setattr(owner, name, old[name]) if name in old else delattr(owner, name)


def triton_launches(recorder: Recorder, history: torch.dtype) -> list[tuple[Launch, str, Used]]:
    notes = Notes()

    def record() -> None:
        keep, start = JITFunction._do_compile, JITFunction.run

        def noting(function, key, signature, device, constants, options, *rest):
            keep(function, key, signature, device, constants, options, *rest)
            stem = re.sub(r"_(whole|apply|kernel)$", "", function.__name__)
            notes.add(stem, (function, key), grids[-1], 32 * options.num_warps)

        def launched(function, *args, grid, warmup, **kwargs):
            size = grid(kwargs) if callable(grid) else grid
            grids.append(size[0] * (size[1] if len(size) > 1 else 1) * (size[2] if len(size) > 2 else 1))
            return start(function, *args, grid=grid, warmup=warmup, **kwargs)

        grids: list[int] = []
        with replaced(JITFunction, _do_compile=noting, run=launched):
            run(importlib.import_module("ifr_fast.kernels.triton"), history, notes)

    recorder.record(record)
    keys = list(dict.fromkeys(launch.kernel for launch in notes.launches))
    variants = [recorder.variants[key] for key in keys]
    found = {}
    for key, (variant, usage) in zip(keys, compiled(variants, recorder.target), strict=True):
        if isinstance(usage, str):
            raise RuntimeError(f"{variant} {usage}")
        found[key] = Used(usage.registers, usage.local, usage.shared)
    return [(launch, launch.kernel[0].__name__, found[launch.kernel]) for launch in notes.launches]


class Native:
    """_native.cuda's functions. Each notes the launches that it makes under its name."""

    def __init__(self, module: ModuleType, notes: Notes) -> None:
        self.module, self.notes = module, notes

    def __getattr__(self, name: str) -> Any:
        found = getattr(self.module, name)
        if isinstance(found, type):
            return found

        def call(*args: Any, **kwargs: Any) -> Any:
            result = found(*args, **kwargs)
            for launch in self.module.take_launches():
                self.notes.add(name, *launch)
            return result

        return call


def cuda_launches(
    recorder: Recorder, built: tuple[ModuleType, dict], history: torch.dtype, one_kernel: bool
) -> list[tuple[Launch, str, Used]]:
    module, resources = built
    notes = Notes()

    def record() -> None:
        _native.cuda = Native(module, notes)
        for name in [name for name in sys.modules if name.startswith("ifr_fast.kernels.cuda")]:
            del sys.modules[name]
        cuda = importlib.import_module("ifr_fast.kernels.cuda")
        # Meta tensors have no addresses. Null would mean that there is no tensor.
        for owner in (contract, fields, gpu, cuda.norms, cuda.solver):
            owner.address = lambda *_: 4096
        cuda.device.stream = lambda device: 0
        if not one_kernel:
            cuda.solver.one_kernel = lambda *_: False
        with replaced(Tensor, data_ptr=lambda tensor: 4096):
            run(cuda, history, notes)

    recorder.record(record)
    # What ptxas reports for sm_90 and newer has the driver's part in it.
    reserved = 0 if recorder.target.arch < 90 else RESERVED
    found = []
    for launch in notes.launches:
        used = resources[launch.kernel]
        shared = used.shared - reserved + launch.shared
        found.append((launch, recorded_cuda.demangled(launch.kernel), Used(used.registers, used.local, shared)))
    return found


def rows(launches: Iterable[tuple[Launch, str, Used]], history: torch.dtype, arch: int) -> list[dict[str, Any]]:
    """Launches that differ in nothing but their bytes and shared memory (the most is given) are one row."""
    merged: dict[tuple, dict[str, Any]] = {}
    for launch, kernel, used in launches:
        resident = blocks_per_sm(launch.threads, used, arch)
        key = (*launch[:2], kernel, *launch[4:6], used[:2], resident)
        swept = launch.number if launch.family in SWEPT else 0
        moved = traffic(SIZE.elements, BF16.itemsize, history.itemsize, swept).get(launch.family, {})
        row = merged.setdefault(key, {
            "phase": launch.phase, "family": launch.family, "kernel": kernel, "numbers": [launch.number, 0],
            "launches": 0, "blocks": launch.blocks, "threads": launch.threads, "registers": used.registers,
            "local": used.local, "shared": 0, "blocks_per_sm": resident, "bytes": 0,
        })  # fmt: skip
        row["numbers"][1] = launch.number
        row["launches"] += 1
        row["shared"] = max(row["shared"], used.shared)
        row["bytes"] += sum(moved.values())
    return list(merged.values())


def measure(arch: int) -> Iterator[dict[str, Any]]:
    """All rows of an architecture. In a process of its own: what is chosen for one chip is remembered."""
    recorder = Recorder(arch)
    with tempfile.TemporaryDirectory() as folder:
        triton.knobs.cache.dir = folder
        built = recorded_cuda.build(arch, Path(folder)) if recorded_cuda.find_nvcc() else None
        if built is None:
            print(f"sm_{arch}, cuda: left out. There is no nvcc.", file=sys.stderr)
        for history in HISTORIES:
            name = str(history).removeprefix("torch.")
            try:
                Broyden(STEPS, history_dtype=history)
            except ValueError as error:
                print(f"sm_{arch}, {name}: left out. {error}", file=sys.stderr)
                continue
            found = [("triton", row) for row in rows(triton_launches(recorder, history), history, arch)]
            if built:
                launches = cuda_launches(recorder, built, history, one_kernel=False)
                # Where the device has it, a step's three sweeps are one kernel; the other kernels stay.
                launches += [
                    found for found in cuda_launches(recorder, built, history, one_kernel=True)
                    if found[0].family == "cluster_step"
                ]  # fmt: skip
                found += [("cuda", row) for row in rows(launches, history, arch)]
            for backend, row in found:
                yield {"arch": arch, "backend": backend, "history": name} | row


def measured(archs: Iterable[int]) -> list[dict[str, Any]]:
    found = []
    for arch in archs:
        command = [sys.executable, __file__, str(arch), "--rows"]
        found += json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return found


def page(table: dict[str, Any]) -> str:
    """usage.json in Markdown: one table for each chip."""
    versions = ", ".join(f"{name} {version}" for name, version in table["versions"].items())
    parts = [
        "# What the GPU kernels take of a chip",
        f"Made by `python tests/tools/kernel_usage.py`; compiled with {versions}, not run. {table['size']}, bfloat16, "
        f"{table['steps']} steps of Broyden. Blocks an SM: how many fit beside each other. Waves: blocks over all that "
        "fit the chip. MB: of a mean launch, every input and output once. A row for launches of a solve (forward), of "
        "its linearisation, of the adjoint's solve (backward) and of the parameters' gradients.",
    ]
    head = ["backend", "history", "phase", "kernel", "launches", "blocks", "threads", "registers", "spilled bytes"]
    head += ["shared KB", "blocks an SM", "waves", "MB"]
    for arch in dict.fromkeys(row["arch"] for row in table["kernels"]):
        lines = [head, ["---"] * len(head)]
        for row in (row for row in table["kernels"] if row["arch"] == arch):
            waves = row["blocks"] / row["blocks_per_sm"] / CHIPS[arch][1]
            cells = [row[name] for name in ("backend", "history", "phase", "kernel", "launches", "blocks", "threads")]
            cells += [row["registers"], row["local"], f"{row['shared'] / 1024:.1f}", row["blocks_per_sm"]]
            cells += [f"{waves:.1f}", f"{row['bytes'] / row['launches'] / 1e6:.0f}"]
            lines.append(list(map(str, cells)))
        parts += [f"## sm_{arch}", "\n".join(f"| {' | '.join(line)} |" for line in lines)]
    return "\n\n".join(parts) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archs", nargs="*", type=int, help=f"(all: {', '.join(map(str, CHIPS))})")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder (%(default)s)")
    parser.add_argument("--rows", action="store_true", help="print the rows of one architecture instead")
    options = parser.parse_args()
    if options.rows:
        print(json.dumps(list(measure(options.archs[0]))))
        return
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    if recorded_cuda.find_nvcc():
        versions["nvcc"] = recorded_cuda.version()
    table = {"versions": versions, "size": str(SIZE), "n": SIZE.n, "steps": STEPS}
    table["kernels"] = measured(options.archs or CHIPS)
    options.output.mkdir(parents=True, exist_ok=True)
    text = json.dumps(table | {"kernels": ["ROWS"]}, indent=1, ensure_ascii=False)
    lines = ",\n".join("  " + json.dumps(row) for row in table["kernels"])
    (options.output / "usage.json").write_text(text.replace('  "ROWS"', lines) + "\n")
    (options.output / "README.md").write_text(page(table))
    print(f"{len(table['kernels'])} rows in {options.output}")


if __name__ == "__main__":
    main()
