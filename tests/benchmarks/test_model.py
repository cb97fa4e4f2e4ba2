"""benchmarks/timing/model.py and launch_model.py: a solve's predicted time."""

import json
import random
from dataclasses import replace

import pytest

from benchmarks.timing import launch_model, model
from benchmarks.timing.model import BEST, CHIPS, ENDINGS, Run

H100 = CHIPS["H100"]
# The first model took these µs as given. Its solves, in µs.
GIVEN = {"norm_relu": 10.0, "tail + residual": 15.0, "rule": 7.0}
FIRST = [
    ({}, 3201),
    (dict(bucket=104), 3286),
    (dict(stop=8), 2461),
    (dict(stop=8, running=0.5), 2794),
    (dict(history=1), 2820),
]


@pytest.mark.parametrize(("options", "expected"), FIRST, ids=str)
def test_first_model_is_reproduced_by_what_it_assumed(options, expected):
    assert model.microseconds(Run(given=GIVEN, **options), H100) == pytest.approx(expected, rel=0.02)


def test_first_models_step():
    """Its table of a mean step: MB from memory and L2."""
    steps = [model.total(model.evaluation(Run(), H100, k)) for k in range(15)]
    moved = {f: (sum(s[f].memory for s in steps) / 15e6, sum(s[f].l2 for s in steps) / 15e6) for f in steps[0]}
    assert moved["norm_relu"] == pytest.approx((0, 20), abs=0.5)
    assert moved["tail + residual"] == pytest.approx((30, 20), abs=0.5)
    assert moved["gram_row"] == pytest.approx((70, 10), abs=0.5)
    assert moved["combine"] == pytest.approx((88, 32), abs=0.5)
    assert moved["convolution"] == pytest.approx((0, 2 * 272), abs=1)


def test_convolutions_run_in_whole_waves():
    one, two = (model.convolution(Run(n=n), H100).us for n in (86, 87))
    assert model.convolution(Run(n=64), H100).us == one < two == model.convolution(Run(n=172), H100).us


@pytest.mark.parametrize(
    ("stop", "segments", "lag", "expected"),
    [(8, 4, 0, 8), (8, 4, 1, 12), (8, 4, 3, 16), (9, 4, 0, 12), (7, 3, 0, 11), (8, 1, 0, 16), (None, 4, 0, 16)],
)
def test_solve_ends_with_a_segment(stop, segments, lag, expected):
    run = Run(stop=stop, segments=segments, lag=lag)
    assert run.evaluations() == expected
    assert replace(run, running=0.1).evaluations() == 16


def test_whatever_is_saved_makes_a_solve_shorter():
    slow = Run(backend="cuda", bucket=104, **ENDINGS["all stopped by step 8"])
    run, before = slow, model.microseconds(slow, H100)
    savings = [("bucket", None), ("history", 1), ("programmatic", True), ("segments", 4)]
    random.shuffle(savings)
    for name, value in savings:
        run = replace(run, **{name: value})
        after = model.microseconds(run, H100)
        assert after <= before, name
        before = after


def test_kernels_share_the_solve():
    for name, ending in ENDINGS.items():
        run = replace(BEST, history=2, halves=False, **ending)
        parts, evaluations = model.solve(run, H100), run.evaluations()
        launches = {family: part.launches for family, part in parts.items()}
        expected = {"convolution": 2 * evaluations, "norm_relu": evaluations, "tail + residual": evaluations}
        expected |= {"cluster_step": min(15, evaluations), "gaps": 0, "setup": 0}
        expected |= {"rule": 1} if evaluations == 16 else {}  # the last residual is judged only
        assert launches == expected, name


def test_half_of_the_samples_is_worth_its_copies():
    """From the middle on, if no more than half run: the convolutions of half, after one move of the history."""
    half = Run(segments=4, **ENDINGS["half stopped by step 7"])
    saved = model.microseconds(half, H100) - model.microseconds(replace(half, halves=True), H100)
    convolved = 2 * 8 * (model.convolution(half, H100).us - model.convolution(half, H100, half=True).us)
    moved = model.solve(replace(half, halves=True), H100)["halving"]
    assert saved == pytest.approx(convolved - moved.us)
    assert saved > 0.02 * model.microseconds(half, H100)
    assert moved.memory > 2 * 15 * 50 * 256 * 196 * 2
    for running in (0.51, 1.0):
        more = replace(half, running=running)
        assert model.microseconds(more, H100) == model.microseconds(replace(more, halves=True), H100)


def test_occupancy_counts_where_blocks_wait(monkeypatch):
    original, times = launch_model.compiled, []
    for blocks in (1, 2, 3, 4):
        row = original(Run(), H100, "norm_relu", 1) | {"blocks_per_sm": blocks}
        monkeypatch.setattr(launch_model, "compiled", lambda *_, row=row: row)
        times.append(model.kernel(Run(), H100, "norm_relu", 1, 1.0).us)
    assert times == sorted(times, reverse=True)
    assert times[0] > 1.5 * times[-1]


def test_a_kernel_needs_the_memorys_time():
    """Whatever its occupancy: 5 rows of 16 bits and 40 bytes an unknown."""
    elements = 100 * 256 * 196
    found = model.kernel(Run(), H100, "combine", 5, 1.0, cold=True)
    assert found.memory == elements * (5 * 2 + 8)
    assert found.us >= found.memory / H100.memory * 1e6 + model.LAUNCH


def test_program_prints_predictions_beside_measurements(tmp_path, capsys):
    solve, row = random.uniform(1e-3, 5e-3), random.uniform(1e-5, 9e-5)
    common = {"size": "100×256×14×14", "dtype": "bfloat16", "history": "bfloat16", "backend": "triton"}
    narrow, large = {"history": "float8_e5m2"}, {"history": "float32", "dtype": "float32"}
    cases = [
        common | {"family": "forward solve", "variant": "", "seconds": solve},
        common | {"family": "gram_row", "variant": "K = 8", "seconds": row},
        common | narrow | {"family": "gram_row", "variant": "8-bit history, K = 8", "seconds": row},
        common | narrow | {"family": "forward solve", "backend": "cuda", "variant": "one kernel", "seconds": solve},
        common | {"family": "forward solve", "backend": "cuda", "variant": "three kernels", "seconds": solve},
        common | {"family": "gram_row", "variant": "K = 4", "error": "RuntimeError"},
        common | large | {"family": "gram_row", "variant": "K = 15", "seconds": row},
    ]
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps({"cases": cases}))
    model.main(["--measured", str(path)])
    text = capsys.readouterr().out
    assert text.startswith("Predicted on paper for an H100, not measured")
    lines = [line for line in text.splitlines() if line.startswith(("| triton", "| cuda"))]
    expected = [
        (solve, model.microseconds(Run(), H100)),
        (row, model.kernel(Run(), H100, "gram_row", 8, 1.0, cold=True).us),
        (row, model.kernel(Run(history=1), H100, "gram_row", 8, 1.0, cold=True).us),
        (solve, model.microseconds(Run(backend="cuda", history=1, one_sweep=True), H100)),
        (solve, model.microseconds(Run(backend="cuda"), H100)),
    ]
    for line, (seconds, predicted) in zip(lines, expected, strict=True):
        assert line.split(" | ")[1:3] == [f"{seconds * 1e6:.1f}", f"{predicted:.1f}"]
    heads = [line for line in text.splitlines() if "µs" in line or "ms of" in line]
    assert all("predicted" in line for line in heads)
