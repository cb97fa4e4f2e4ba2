"""Compiles the package's Triton kernels ahead of time, without a GPU, and fails where one spills or overfills a block.

    python tests/tools/compile_triton.py [90 …] [--few | --launches FILE]

Solves and their gradients run on meta tensors, through the package's own wrappers, at the sizes users meet. Triton's
launcher is stopped where it would compile: what it would have compiled (types, constants, divisibility, warps, stages)
is recorded, once each, and compiled for the architectures named. So no kernel is listed here; one that no run launches
is an error. --few meets every kernel, at small sizes alone; --launches runs that Python file in place of the package.

Not under TRITON_INTERPRET: a process of its own.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import pkgutil
import re
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton
from machine_code import cuobjdump
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from ifr_fast.engine.linearise import BlockMap
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import contract, fields, gpu
from ifr_fast.kernels import triton as kernels
from ifr_fast.solvers import Anderson, Broyden, Picard, Solver

# Shared memory that a block may have, and multiprocessors: A100, H100, B200. A multiprocessor has 1 KiB more, and keeps
# as much for itself of each block's.
CHIPS = {80: (166_912, 108), 90: (232_448, 132), 100: (232_448, 148)}

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
E5M2 = torch.float8_e5m2


class Variant(NamedTuple):
    """A kernel as the launcher would compile it."""

    function: JITFunction
    signature: dict[str, str]
    constants: dict[tuple, Any]
    options: Any
    attributes: dict[tuple, Any]

    def __str__(self) -> str:
        names = list(self.signature)
        given = {names[path[0]]: value for path, value in self.constants.items() if value is not None}
        types = [t for t in self.signature.values() if t.startswith("*")]
        constants = ",".join(str(given[name]) for name in names if name in given)
        return (
            f"{self.function.__name__}({' '.join(dict.fromkeys(types))}; {constants}; {self.options.num_warps} warps)"
        )


class Usage(NamedTuple):
    """Of a compiled variant: registers a thread, bytes of local memory a thread (spills), and of shared memory; threads
    a block; bytes of global memory that a thread asks for before it may leave; does it form matrix products a warp at a
    time (mma.sync)? Does it wait for the kernels before it (griddepcontrol) before it touches global memory?"""

    registers: int
    local: int
    shared: int
    threads: int
    early: int
    by_warps: bool
    waits: bool

    def blocks_per_sm(self, arch: int) -> int:
        """How many blocks a multiprocessor has room for. It hands out registers by eights."""
        registers = 65536 // (self.threads * -(-self.registers // 8) * 8)
        return min(registers, (CHIPS[arch][0] + 1024) // (self.shared + 1024), 2048 // self.threads, 32)

    def in_flight(self, arch: int) -> int:
        """The bytes that a multiprocessor's blocks ask for at once when they start, masked ones too."""
        return self.blocks_per_sm(arch) * self.threads * self.early


class Recorder:
    """A driver without a device, and the variants that launches would have compiled."""

    def __init__(self, arch: int) -> None:
        self.target = GPUTarget("cuda", arch, 32)
        self.variants: dict[tuple[JITFunction, str], Variant] = {}

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target

    def record(self, launches: Callable[[], None]) -> list[Variant]:
        def keep(function, key, signature, device, constants, options, attributes, warmup):
            self.variants.setdefault((function, key), Variant(function, signature, constants, options, attributes))

        shared, multiprocessors = CHIPS[self.target.arch]
        properties = SimpleNamespace(
            major=self.target.arch // 10,
            minor=self.target.arch % 10,
            multi_processor_count=multiprocessors,
            shared_memory_per_block_optin=shared,
        )
        driver.set_active(self)
        # Launches are recorded on meta tensors, which have no addresses.
        for module in (contract, fields, gpu, *package_modules()):
            if hasattr(module, "address"):
                module.address = lambda *_: 0
        JITFunction._do_compile = keep
        torch.cuda.get_device_properties = lambda device=None: properties
        torch.cuda.get_device_capability = lambda device=None: (properties.major, properties.minor)
        launches()
        return list(self.variants.values())


def package_modules() -> list[ModuleType]:
    return [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]


def unlaunched(variants: list[Variant]) -> list[str]:
    """The package's kernels that were not launched and that no other kernel calls."""
    found = {
        name: value for m in package_modules() for name, value in vars(m).items() if isinstance(value, JITFunction)
    }
    launched = {v.function for v in variants}
    words = {name: set(re.findall(r"\w+", f.src)) for name, f in found.items()}
    return [
        name
        for name, function in found.items()
        if function not in launched and not any(name in used for other, used in words.items() if other != name)
    ]


def train(
    channels: int,
    groups: int,
    height: int,
    width: int,
    dtype: torch.dtype,
    *,
    x_dtype: torch.dtype | None = None,
    n: int = 100,
    form: str = "released",
    rules: tuple[Solver, ...] = (Broyden(),),
) -> None:
    """A solve by every rule and the gradient of one, as a head makes them, of feature maps (n, channels, height,
    width)."""

    def tensor(*shape: int, dtype: torch.dtype = FP32) -> Tensor:
        layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
        return torch.empty(shape, dtype=dtype, device="meta").contiguous(memory_format=layout)

    x = tensor(n, channels, height, width, dtype=x_dtype or dtype)
    norms = [tensor(channels), tensor(channels)]
    weight = tensor(channels, channels, 3, 3)
    params = [weight, *norms, weight, *norms, *([] if form == "paper" else norms)]
    block = BlockMap(x, params, form, groups, kernels, dtype)
    for rule in rules:
        solve(block, tensor(*x.shape), rule.resolve(dtype), kernels, from_zero=True)
    linearised = block.linearise(tensor(*x.shape))
    w, grad = tensor(*x.shape), tensor(*x.shape)
    rule = Broyden(history_dtype=rules[0].history_dtype).resolve(dtype)
    solve(lambda w, state: linearised.affine(w, grad, state), w, rule, kernels, from_zero=True, first=grad, affine=True)
    linearised.vjp_params(w)


def train_package() -> None:
    for channels, groups in ((64, 4), (64, 32), (128, 16), (256, 4), (256, 16), (256, 32), (512, 4), (512, 32)):
        train(channels, groups, 14, 14, BF16)
    for groups in (4, 32):
        for height, width in ((7, 7), (28, 28), (100, 152)):
            train(256, groups, height, width, BF16)
        for height, width in ((14, 14), (100, 152)):
            train(256, groups, height, width, FP32)
    train(256, 32, 14, 14, FP16)
    train(256, 32, 14, 14, BF16, x_dtype=FP32)
    train(100, 5, 15, 20, BF16)  # nothing is a power of two
    for channels in (32, 96, 160, 192):  # groups of 1, 3, 5 and 6
        train(channels, 32, 14, 14, BF16)
    train(96, 32, 100, 152, BF16)
    for form in ("paper", "plain"):
        train(256, 32, 14, 14, BF16, form=form)
    for rows in (1, 2, 4, 8, 16, 32, 64):
        train(256, 32, 14, 14, BF16, rules=(Broyden(rows), Anderson(rows), Picard(rows)))
    train(256, 32, 14, 14, FP32, rules=(Broyden(32),))
    for rows in (1, 2, 4, 8, 15, 64):
        rules = tuple(kind(rows, history_dtype=E5M2) for kind in (Broyden, Anderson, Picard))
        train(256, 32, 14, 14, BF16, rules=rules)
    for shape, dtype in (((256, 32, 100, 152), BF16), ((256, 32, 14, 14), FP32), ((100, 5, 15, 20), BF16)):
        train(*shape, dtype, rules=(Broyden(history_dtype=E5M2),))
    start_anywhere()


def train_few() -> None:
    """Every kernel once or twice: channels and positions of a small map, and of one whose samples are split."""
    train(64, 4, 7, 7, BF16, n=2, rules=(Broyden(), Anderson(), Picard()))
    train(64, 4, 100, 152, BF16, n=2)
    train(64, 4, 7, 7, BF16, n=2, rules=(Broyden(history_dtype=E5M2), Picard(history_dtype=E5M2)))


def start_anywhere() -> None:
    """The fixed point of any map, from any iterate."""
    for shape, dtype in (((100, 256, 14, 14), BF16), ((7, 33), FP32)):
        z = torch.empty(shape, device="meta")
        z = z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z
        for rule in (Broyden(), Picard()):
            solve(lambda z, _: torch.empty_like(z), z, rule.resolve(dtype), kernels)


def measure(variant: Variant, target: GPUTarget) -> Usage:
    """Compiles the variant."""
    source = ASTSource(variant.function, variant.signature, variant.constants, variant.attributes)
    kernel = triton.compile(source, target=target, options=variant.options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text, code = (cuobjdump(switch, file.name) for switch in ("--dump-resource-usage", "--dump-sass"))
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    widths = re.findall(r"\bLDG\.E(?:\.[SU]?(8|16|64|128))?\b", re.split(r"\bEXIT\b", code)[0])
    early = sum(int(bits or 32) // 8 for bits in widths)
    local, threads = used["STACK"] + used["LOCAL"], 32 * kernel.metadata.num_warps
    by_warps = "mma.sync" in kernel.asm["ptx"]
    touched, waited = re.search(r"\b(LD|ST|ATOM|RED|LDGSTS)G?\b\.E", code), code.find("ACQBULK")
    waits = 0 <= waited < (touched.start() if touched else len(code))
    return Usage(used["REG"], local, kernel.metadata.shared, threads, early, by_warps, waits)


def violations(usage: Usage, arch: int) -> list[str]:
    found = []
    if usage.local:
        found.append(f"{usage.local} bytes of local memory a thread")
    if usage.shared > CHIPS[arch][0]:
        found.append(f"{usage.shared} bytes of shared memory, more than {CHIPS[arch][0]}")
    if usage.by_warps and arch >= 90:
        found.append("mma.sync, at half the rate of wgmma or tcgen05")
    return found


def compiled(variants: list[Variant], target: GPUTarget) -> Iterator[tuple[Variant, Usage | str]]:
    """Every variant's usage, or the compiler's words where it fails; on all processors."""
    context = multiprocessing.get_context("fork")  # variants hold functions, which cannot be sent
    with context.Pool(os.cpu_count(), _remember, (variants, target)) as pool:
        yield from zip(variants, pool.imap(_compile, range(len(variants))), strict=True)


def _remember(*work: Any) -> None:
    _compile.work = work


def _compile(index: int) -> Usage | str:
    variants, target = _compile.work
    try:
        return measure(variants[index], target)
    except Exception as error:
        return f"does not compile: {str(error)[-500:]}"


def check(arch: int, few: bool, launches: Path | None) -> bool:
    recorder = Recorder(arch)
    package = train_few if few else train_package
    variants = recorder.record(package if launches is None else lambda: runpy.run_path(str(launches)))
    faults = [] if launches else [f"{name}: no run launches it" for name in unlaunched(variants)]
    heading = f"{'regs':>5} {'local':>6} {'shared':>7} {'blocks':>6} {'flight':>7}  kernel"
    print(f"sm_{arch}: {len(variants)} variants\n{heading}")
    for variant, usage in compiled(variants, recorder.target):
        if isinstance(usage, str):
            faults.append(f"{variant} {usage}")
        else:
            resident = f"{usage.blocks_per_sm(arch):6} {usage.in_flight(arch):7}"
            print(f"{usage.registers:5} {usage.local:6} {usage.shared:7} {resident}  {variant}")
            faults += [f"{variant}: {fault}" for fault in violations(usage, arch)]
            if variant.options.launch_pdl and not usage.waits:
                faults.append(f"{variant}: touches memory before the kernels in front of it have ended")
            if launches is None and variant.options.launch_pdl != (arch >= 90):
                faults.append(f"{variant}: launch_pdl={variant.options.launch_pdl}")
    print(f"sm_{arch}: {'no fault' if not faults else ''}", *faults, sep="\n  ")
    return bool(variants) and not faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("archs", nargs="*", type=int, choices=CHIPS, help="all by default")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--few", action="store_true", help="small sizes alone")
    what.add_argument("--launches", type=Path, help="a Python file that launches kernels on meta tensors")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: interpreted kernels are not compiled")
    if len(options.archs) != 1:  # tiles chosen for one chip are remembered
        extra = ["--few"] if options.few else ["--launches", options.launches] if options.launches else []
        runs = [subprocess.run([sys.executable, __file__, str(arch), *extra]) for arch in options.archs or CHIPS]
        return max(run.returncode for run in runs)
    with tempfile.TemporaryDirectory() as cache:
        triton.knobs.cache.dir = cache
        return 0 if check(options.archs[0], options.few, options.launches) else 1


if __name__ == "__main__":
    sys.exit(main())
