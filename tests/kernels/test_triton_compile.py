"""compile_triton.py, in a process of its own: this one may interpret Triton's kernels."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


def compile_triton(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).parents[1] / "tools/compile_triton.py"
    return subprocess.run(
        [sys.executable, program, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "arguments", [(90, "--few"), *(pytest.param((arch,), marks=pytest.mark.full) for arch in (80, 90, 100))], ids=str
)
def test_every_kernel_compiles_within_the_chip(arguments):
    run = compile_triton(*arguments)
    print(run.stdout)
    assert run.returncode == 0, run.stdout[run.stdout.rfind("sm_") :] + run.stderr[-2000:]


KERNEL = """
import torch
import triton
import triton.language as tl


@triton.jit
def planted(x, y, SIZE: tl.constexpr, STAGES: tl.constexpr):
    i = tl.arange(0, SIZE)
    at = i[:, None] * SIZE + i[None, :]
    total = tl.zeros((SIZE, SIZE), tl.float32)
    for k in range(64):
        a = tl.load(x + k * SIZE * SIZE + at)
        b = tl.load(y + k * SIZE * SIZE + at)
        total = tl.dot(a, b, total)
    tl.store(x + at, total.to(tl.bfloat16))


operand = torch.empty(64, 128, 128, dtype=torch.bfloat16, device="meta")
planted[(1,)](operand, operand, SIZE={size}, STAGES={stages}, num_stages={stages}, num_warps={warps})
"""


@pytest.mark.parametrize(
    ("size", "stages", "warps", "fault"),
    [
        (64, 3, 4, None),
        pytest.param(128, 2, 1, "bytes of local memory a thread", marks=pytest.mark.full),
        (128, 8, 8, "bytes of shared memory, more than"),
        pytest.param(64, 2, 2, "mma.sync", marks=pytest.mark.full),
        (100, 2, 4, "does not compile"),
    ],
)
def test_faults_are_found(tmp_path, size, stages, warps, fault):
    launches = tmp_path / "launches.py"
    launches.write_text(KERNEL.format(size=size, stages=stages, warps=warps))
    run = compile_triton(90, "--launches", launches)
    assert "sm_90: 1 variants" in run.stdout, run.stderr
    assert run.returncode == (0 if fault is None else 1)
    assert (fault or "no fault") in run.stdout


def test_a_file_that_launches_nothing_is_a_fault(tmp_path):
    launches = tmp_path / "launches.py"
    launches.write_text("")
    assert compile_triton(90, "--launches", launches).returncode == 1
