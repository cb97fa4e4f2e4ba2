"""The CPU tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer.

python tests/tools/sanitize.py [pytest's arguments, such as -k expression]

Builds a copy of the package in a temporary folder, checks there that an overrun ends the process, runs the tests on it
and exits with pytest's status. Needs g++ and its libasan; minutes, so it is no part of the quick tests. IFR_FAST_ISA
chooses the variant that runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "kernels/test_fields.py",
    "kernels/test_kernels.py",
    "kernels/test_fused_norms.py",
    "kernels/test_fused_step.py",
    "kernels/test_winograd.py",
    "kernels/test_winograd_head.py",
    "kernels/test_weight_cache.py",
    "kernels/test_borders.py",
    "core/test_loop.py",
    "core/test_head.py",
    "core/test_adjoints.py",
    "core/test_fixed_point.py",
)
SWITCHES = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -g1 -O1"
# Reads one float past the end of a parameter, which the checks in ifr_fast/kernels would refuse.
OVERRUN = """
import torch
from ifr_fast import _native
y, out = torch.randn(2, 1, 8, 3, 3)
tensors = dict(y=y, out=out, first_weight=torch.randn(7), first_bias=torch.randn(8))
tensors |= dict(zip(("first_mean", "first_rstd"), torch.empty(2, 1, 2)))
null = dict.fromkeys(("shortcut", "second_weight", "second_bias", "second_mean", "second_rstd"), 0)
shape = dict(n=1, channels=8, positions=9, groups=2, eps=1e-5, channels_last=False, threads=1)
_native.norm_relu(_native.DType.f32, {**shape, **null, **{name: t.data_ptr() for name, t in tensors.items()}})
"""


def library(name: str) -> str:
    """The path of one of the compiler's sanitizer libraries."""
    path = subprocess.run(["g++", f"-print-file-name={name}"], text=True, capture_output=True, check=True).stdout
    if not os.path.isabs(path.strip()):
        raise SystemExit(f"g++ has no {name}: install its sanitizer libraries (libasan, libubsan)")
    return os.path.realpath(path.strip())


def build(folder: Path) -> None:
    """A copy of the source tree's package, tests and what builds them, with the extension built in place."""
    for name in ("csrc", "ifr_fast", "integrations", "tests", "benchmarks"):
        ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored, symlinks=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    env = {**os.environ, "CXX": "g++", "CXXFLAGS": SWITCHES, "LDFLAGS": SWITCHES, "IFR_FAST_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=folder, env=env, check=True)


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="ifr_fast_sanitized") as scratch:
        folder = Path(scratch)
        build(folder)
        env = {
            **os.environ,
            "LD_PRELOAD": f"{library('libasan.so')}:{library('libubsan.so')}",
            "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "PYTHONPATH": str(folder),
            # torch's tensors end where its allocations do, so that an overrun of one byte shows.
            "PYTHONMALLOC": "malloc",
        }
        overrun = subprocess.run([sys.executable, "-c", OVERRUN], cwd=folder, env=env, text=True, capture_output=True)
        if overrun.returncode == 0 or "heap-buffer-overflow" not in overrun.stderr:
            raise SystemExit(
                f"a deliberate overrun went unnoticed (exit status {overrun.returncode})\n{overrun.stderr}"
            )
        tests = [f"tests/{name}" for name in TESTS]
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]
        return subprocess.run(command, cwd=folder, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
