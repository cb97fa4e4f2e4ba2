"""benchmarks/results/paper: what the compiled kernels take, as committed and as compiled now."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.timing import model
from benchmarks.timing.traffic import traffic

ROOT = Path(__file__).parents[2]
PAPER = ROOT / "benchmarks/results/paper"
PROGRAM = ROOT / "tests/tools/kernel_usage.py"
TABLE = json.loads((PAPER / "usage.json").read_text())
KERNELS = TABLE["kernels"]
ARCHS = (80, 90, 100)
# What the model expects of resident blocks: with fewer, a kernel waits where it should move bytes.
LEAST_BLOCKS = {"norm_relu": 3, "tail + residual": 3, "gram_row": 5, "combine": 3, "norm_relu_vjp": 2}
EXACT = ("blocks", "threads", "launches", "bytes")
FEW_REGISTERS = 4  # by which another compiler's release may differ


def select(**wanted):
    return [row for row in KERNELS if all(row[name] == value for name, value in wanted.items())]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_table_has_every_kernel_of_a_solve(arch, backend):
    """With as many launches, and with the bytes that kernels.py counts."""
    rows = select(arch=arch, backend=backend, history="bfloat16")
    elements = TABLE["n"] * 256 * 14 * 14
    evaluations, steps = TABLE["steps"] + 1, TABLE["steps"]
    expected = {
        ("forward", "norm_relu"): evaluations, ("forward", "tail + residual"): evaluations,
        ("forward", "gram_row"): steps, ("forward", "rule"): evaluations, ("forward", "combine"): steps,
        ("linearise", "norm_tail"): 1, ("backward", "norm_tail_vjp"): steps, ("backward", "norm_relu_vjp"): steps,
        ("backward", "residual of total"): evaluations, ("backward", "gram_row"): steps,
        ("backward", "combine"): steps,
    }  # fmt: skip
    for (phase, family), launches in expected.items():
        found = [row for row in rows if (row["phase"], row["family"]) == (phase, family)]
        assert sum(row["launches"] for row in found) == launches, (phase, family)
        swept = range(1, launches + 1) if family in ("gram_row", "combine") else [1] * launches
        moved = sum(sum(traffic(elements, 2, 2, k)[family].values()) for k in swept)
        assert sum(row["bytes"] for row in found) == moved, (phase, family)
    sweeps = [row for row in rows if row["family"] == "cluster_step"]
    assert bool(sweeps) == (arch == 90 and backend == "cuda")


@pytest.mark.parametrize("row", KERNELS, ids=lambda row: f"{row['kernel']}-{row['numbers'][0]}")
def test_kernels_fit_their_chip(row):
    assert row["local"] == 0, "spills"
    assert row["blocks_per_sm"] >= 1
    assert row["registers"] * row["threads"] * row["blocks_per_sm"] <= 65_536
    assert row["threads"] * row["blocks_per_sm"] <= 2048
    assert row["shared"] * row["blocks_per_sm"] <= ({80: 164}.get(row["arch"], 228) << 10)


@pytest.mark.parametrize("family", LEAST_BLOCKS)
def test_enough_blocks_are_resident(family):
    rows = select(family=family)
    assert rows
    for row in rows:
        assert row["blocks_per_sm"] >= LEAST_BLOCKS[family], row


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("rows", [4, 8, 15])
def test_memory_bounds_the_sweeps(backend, rows):
    """A sweep whose blocks wait longer than memory needs is cut wrongly."""
    run, chip = model.Run(backend=backend), model.CHIPS["H100"]
    for family in ("gram_row", "combine"):
        found = model.kernel(run, chip, family, rows, 1.0)
        moving = (found.memory / chip.memory + found.l2 / chip.l2) * 1e6
        assert found.us == pytest.approx(model.LAUNCH + moving)


def run_program(*arguments):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, PROGRAM, *map(str, arguments)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


def test_page_shows_the_table():
    text = (PAPER / "README.md").read_text()
    lines = [line.split(" | ") for line in text.splitlines() if line.startswith(("| triton", "| cuda"))]
    shown = [(line[3], int(line[4]), int(line[5]), int(line[7]), int(line[10])) for line in lines]
    names = ("kernel", "launches", "blocks", "registers", "blocks_per_sm")
    assert shown == [tuple(row[name] for name in names) for row in KERNELS]


def by_launch(kernels):
    """Rows by (backend, history, phase, family, number of the launch)."""
    return {
        (*(row[name] for name in ("backend", "history", "phase", "family")), number): row
        for row in kernels
        for number in range(row["numbers"][0], row["numbers"][1] + 1)
    }


@pytest.mark.full
@pytest.mark.parametrize("arch", ARCHS)
def test_table_is_that_of_the_kernels_now(arch, tmp_path):
    pytest.importorskip("triton")
    run = run_program(arch, "--output", tmp_path)
    assert run.returncode == 0, run.stderr
    found = by_launch(json.loads((tmp_path / "usage.json").read_text())["kernels"])
    nvcc = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
    committed = by_launch(row for row in select(arch=arch) if nvcc or row["backend"] == "triton")
    assert found.keys() == committed.keys(), "run tests/tools/kernel_usage.py"
    for launch, row in found.items():
        before = committed[launch]
        assert row["local"] == 0, launch
        assert [row[name] for name in EXACT] == [before[name] for name in EXACT], launch
        assert abs(row["registers"] - before["registers"]) <= FEW_REGISTERS, launch
        assert abs(row["blocks_per_sm"] - before["blocks_per_sm"]) <= 1, launch
