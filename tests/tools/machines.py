"""Runs the quick tests of what a processor can change as other machines would, and ends with a table.

    python tests/tools/machines.py [options of pytest]

Every machine is a process of its own, with the switches of ATen, oneDNN, MKL, OpenMP and ifr_fast._native set. They
only lower what is there: a processor without AVX-512 stands in for fewer machines. A switch without effect is a
failure, except MKL's, which MKL obeys on Intel's processors alone. All machines draw the same inputs, from the seed
that is printed; IFR_FAST_SEED=… repeats it. What torch.compile writes is its own concern and takes long: left out.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).resolve().parents[1]
# Those of the arithmetic.
FILES = [
    *(f"kernels/test_{name}.py" for name in ("kernels", "fused_norms", "fused_step", "winograd", "winograd_head")),
    *(
        f"core/test_{name}.py"
        for name in (
            "loop", "solvers", "adjoints", "fixed_point", "equilibria", "head", "altered", "transforms", "reference",
            "diagnostics", "fuzz",
        )
    ),
]  # fmt: skip
ANY_X86 = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "IFR_FAST_ISA": "generic"}
LAPTOP = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "IFR_FAST_ISA": "avx2"}
MACHINES = {
    "any x86-64, 1 thread": ANY_X86 | {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "OMP_NUM_THREADS": "1"},
    "laptop of 2013, 2 threads": LAPTOP | {"MKL_ENABLE_INSTRUCTIONS": "AVX2", "OMP_NUM_THREADS": "2"},
    "without AMX, another MKL": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16", "MKL_CBWR": "COMPATIBLE"},
    # By itself MKL, and torch with it, takes no more threads than there are cores.
    "this one, 4 threads": {"OMP_NUM_THREADS": "4", "MKL_DYNAMIC": "FALSE"},
    "this one, 1 thread": {"OMP_NUM_THREADS": "1"},
}
# What PROBE prints under a switch.
EFFECTS = {
    ("ATEN_CPU_CAPABILITY", "default"): "ATen DEFAULT",
    ("ATEN_CPU_CAPABILITY", "avx2"): "ATen AVX2",
    ("ONEDNN_MAX_CPU_ISA", "SSE41"): "isa:Intel SSE4.1\n",
    ("ONEDNN_MAX_CPU_ISA", "AVX2"): "isa:Intel AVX2\n",
    ("IFR_FAST_ISA", "generic"): "cpu generic",
    ("IFR_FAST_ISA", "avx2"): "cpu avx2",
    ("OMP_NUM_THREADS", "1"): "1 threads",
    ("OMP_NUM_THREADS", "2"): "2 threads",
    ("OMP_NUM_THREADS", "4"): "4 threads",
}
PROBE = """
import torch
from ifr_fast import _native
torch.conv2d(torch.ones(8, 64, 28, 28), torch.ones(64, 64, 3, 3))  # makes oneDNN say which instructions it uses
print("ATen", torch.backends.cpu.get_cpu_capability())
print("cpu", _native.isa())
print(torch.get_num_threads(), "threads")
"""


class Result(NamedTuple):
    """Of one machine: tests passed and failed, switches without effect, seconds, and all that pytest printed."""

    passed: int
    failed: int
    ineffective: list[str]
    seconds: float
    output: str

    @property
    def good(self) -> bool:
        return self.passed > 0 and not self.failed and not self.ineffective


def run(arguments: list[str], variables: dict[str, str]) -> str:
    """What Python prints, run in the folder of the tests: so the installed package is imported, not the source tree."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=TESTS,
        env=os.environ | variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ).stdout


def run_as(switches: dict[str, str], options: list[str]) -> Result:
    start = time.perf_counter()
    seen = run(["-c", PROBE], switches | {"ONEDNN_VERBOSE": "1"})
    ineffective = [name for name, value in switches.items() if EFFECTS.get((name, value), "") not in seen]
    tests = [*FILES, "-k", "not compil and not distributed"]
    # Threads that wait for others at the end of a loop leave the processor to them.
    output = run(["-m", "pytest", "-q", *tests, *options], switches | {"OMP_WAIT_POLICY": "PASSIVE"})
    counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)\b", output)}
    passed = counts.pop("passed", 0)
    return Result(passed, sum(counts.values()), ineffective, time.perf_counter() - start, output)


def main(options: list[str]) -> int:
    seed = os.environ.setdefault("IFR_FAST_SEED", str(random.SystemRandom().randrange(2**31)))
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda switches: run_as(switches, options), MACHINES.values()))
    for (name, switches), result in zip(MACHINES.items(), results, strict=True):
        if not result.good:
            print(f"\n{name}: {' '.join(f'{key}={value}' for key, value in switches.items())}\n{result.output}")
    print(f"\nIFR_FAST_SEED={seed}\n{'machine':28}{'passed':>8}{'failed':>8}{'seconds':>9}")
    for name, result in zip(MACHINES, results, strict=True):
        words = f"  without effect: {', '.join(result.ineffective)}" if result.ineffective else ""
        print(f"{name:28}{result.passed:8}{result.failed:8}{result.seconds:9.0f}{words}")
    return 0 if all(result.good for result in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
