"""compile_triton.py, in a process of its own: this one may interpret Triton's kernels."""

import os
import re
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


NORMS = """
import torch

from ifr_fast.kernels import triton as kernels
from ifr_fast.kernels.contract import Norm
from ifr_fast.kernels.gpu import Tail
from ifr_fast.kernels.triton.norm import residual_tail


def tensor(*shape, dtype=torch.float32):
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device="meta").to(memory_format=layout)


norm = Norm(tensor(256), tensor(256), 32)
for side in (7, 14, 28):
    for dtype in (torch.bfloat16, torch.float32):
        y, z = tensor(100, 256, side, side, dtype=dtype), tensor(100, 256, side, side)
        state = kernels.new_state(z, rows=15, evaluations=16, history_dtype=torch.bfloat16, from_zero=True)
        kernels.norm_relu(y, norm, state=state)
        residual_tail(state, Tail(y, y, norm, norm), z, 0)
"""


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.full) for arch in (80, 100))])
def test_forward_norms_keep_a_multiprocessor_loading(tmp_path, arch):
    """Three blocks or more, which ask for all of y and the shortcut before they wait for their sample's status."""
    launches = tmp_path / "launches.py"
    launches.write_text(NORMS)
    run = compile_triton(arch, "--launches", launches)
    print(run.stdout)
    assert run.returncode == 0, run.stderr
    found = re.findall(r"(\d+) +(\d+)  (norm_\w+_whole)\(", run.stdout)
    assert len(found) == 12
    for blocks, in_flight, kernel in found:
        assert int(blocks) >= 3, kernel
        assert int(in_flight) >= 48 << 10, kernel  # 1 µs of 4 TB/s are 30 KB for each of 132 multiprocessors


def test_a_file_that_launches_nothing_is_a_fault(tmp_path):
    launches = tmp_path / "launches.py"
    launches.write_text("")
    assert compile_triton(90, "--launches", launches).returncode == 1
