"""benchmarks/speed.py: what it compares, what it reports, a run of seconds."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import speed
from benchmarks.timing import contenders, convolutions, measure, speed_report, targets
from benchmarks.timing.contenders import (
    BASE,
    BF16,
    BF16_HISTORY,
    BF16_STACK,
    COMPILED_STACK,
    CONVERGED,
    EARLY,
    GRAPH,
    IFR,
    IFR_DIRECT,
    QUARTER,
    RELEASED,
    TORCHDEQ_ANDERSON,
    TORCHDEQ_BF16,
    WINOGRAD_STACK,
    Setting,
)
from benchmarks.timing.measure import Convolution
from benchmarks.timing.targets import BACKWARD, FORWARD
from benchmarks.timing.winograd import WinogradConvolution
from ifr_fast import Broyden, _native, reference

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MIB = 1 << 20


def row(name: str, seed: int, steps: int = 3, channels: int = 8) -> contenders.Contender:
    return next(c for c in contenders.contenders(Setting(channels, steps, seed, CPU)) if c.name == name)


def features(n: int, size: int, seed: int, channels: int = 8) -> torch.Tensor:
    return speed.smooth_features(n, channels, size, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("name", "kind"), [(IFR, WinogradConvolution), (IFR_DIRECT, Convolution), (RELEASED, Convolution)]
)
def test_rows_evaluate_f_once_more_than_they_step(name, kind, seed):
    call = row(name, seed, channels=32).forward(features(2, 8, seed, channels=32))
    found = measure.profile(call, CPU).convolutions
    assert sum(found.values()) == 2 * (3 + 1)
    assert {type(c) for c in found} == {kind}


def test_the_stack_by_winograd_is_the_stack(seed):
    """Values and all gradients, in the steps of float32."""
    x = features(2, 9, seed, channels=32).requires_grad_()
    cotangent = torch.randn(x.shape)
    stack, ours = (row(name, seed, channels=32).backward(x, cotangent)() for name in (BASE, WINOGRAD_STACK))
    torch.testing.assert_close(ours[0], stack[0], rtol=0, atol=1e-5 * stack[0].abs().max().item())
    for found, expected in zip(ours[1], stack[1], strict=True):
        # A value that rounds to the other side of ReLU's corner changes the gradient by the share of its path.
        assert (found - expected).norm() < 1e-2 * expected.norm()


def test_the_stack_by_winograd_needs_fitting_channels(seed):
    assert row(WINOGRAD_STACK, seed).unavailable == "8 channels are no multiple of 32"


def test_the_released_gradient_is_ours(seed):
    """Two independent ways to the same equilibrium's gradient, at a step count where both converge."""
    x = features(2, 6, seed).mul_(4).requires_grad_()
    cotangent = torch.randn(x.shape)
    found = [row(name, seed, steps=40).backward(x, cotangent)()[1][0] for name in (IFR, RELEASED)]
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-2 * found[0].abs().max().item())


def test_features_are_smooth_and_of_unit_size(seed):
    x = features(4, 14, seed)
    assert x.square().mean().item() == pytest.approx(1, rel=1e-5)
    centred = x - x.mean()
    assert (centred[..., 1:] * centred[..., :-1]).mean() > 0.5 * centred.square().mean()


def test_rows_of_one_round_get_the_same_numbers_and_other_rounds_get_others(seed):
    options = speed.parse(["--device", "cpu", "--channels", "8", "--size", "6", "--seed", str(seed)])
    inputs = speed.Inputs(options)
    plain, narrow = row(BASE, seed), row(BF16_STACK, seed)
    x = inputs.of(plain, 2)[0].detach()
    before = x.clone()
    for _ in range(2):
        inputs.renew()
        other = inputs.of(narrow, 2)[0]
        assert other.dtype == torch.bfloat16
        assert other.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(other.detach(), x.bfloat16(), rtol=0, atol=0)
    assert not torch.equal(x, before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--budget -1", "--budget: expected a positive number, got -1"),
        ("--n 4 0", "--n: expected batch sizes of at least 1, got 0"),
        ("--device foo", "--device: invalid choice: 'foo'"),
        ("--device cuda", "--device: expected cpu, as torch finds no GPU here, got cuda"),
    ],
)
def test_a_bad_option_is_named(options, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        speed.parse(options.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", [IFR, QUARTER])
def test_residuals_are_those_of_the_specification_in_float32(name, seed):
    """Near the equilibrium, where a bfloat16 F or another width gives residuals of other magnitudes."""
    setting = Setting(8, 30, seed, CPU)
    head = setting.head(solver=Broyden(max_iter=30, rtol=0), **(setting.quarter if name == QUARTER else {}))
    params = [t.detach() for t in head.block.tensors()]
    x = features(2, 6, seed).mul_(4)
    with torch.no_grad():
        z = head(x)
        value = reference.residual_block(z, x, params, groups=head.block.groups)
    found = row(name, seed).residual(x, z)
    expected = (value - z).flatten(1).norm(dim=1) / value.flatten(1).norm(dim=1)
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-6)
    narrow = row(BF16, seed).residual(x.bfloat16(), z.bfloat16())
    widened = row(RELEASED, seed).residual(x.bfloat16().float(), z.bfloat16().float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow, widened)


@pytest.mark.parametrize(
    ("threads", "ratios", "busy"), [(2, [9.9, 10, 10.1], False), (3, [9.9, 10, 10.1], True), (2, [9, 10, 11], True)]
)
def test_a_busy_machine_is_told_from_a_quiet_one(threads, ratios, busy):
    """By threads that waited for a processor, or by ratios that differ from round to round."""
    common = {"mode": FORWARD, "in_table": True, "ratio_to_stack": ratios}
    entries = [{"name": BASE, "median": 1.0, "processor_median": 1.9, **common}, {"name": IFR, **common}]
    noise = speed_report.noise(entries, {"device": CPU, "threads": threads})
    assert noise["busy"] == busy
    assert speed_report.verdict_on(noise).startswith("TOO BUSY" if busy else "quiet")
    assert speed_report.noise([], {"device": CPU}) == {"share": None, "spread": None, "busy": False}


def test_targets_say_what_was_missed():
    quantities = {
        (BASE, 16, FORWARD): (1.0, 1),
        (IFR, 16, FORWARD): (4.0, 50),
        (RELEASED, 16, FORWARD): (18.0, 120),
        (TORCHDEQ_ANDERSON, 16, FORWARD): (9.0, 120),
        (BF16_HISTORY, 16, FORWARD): (4.0, 30),
        (BASE, 1, FORWARD): (0.1, 1),
        (IFR, 1, FORWARD): (0.5, 1),
        (BASE, 4, BACKWARD): (1.0, 1),
        (IFR, 4, BACKWARD): (3.0, 1),
    }
    entries = [
        {"name": name, "n": n, "mode": mode, "seconds": [median], "rounds": [0], "peak_extra_bytes": peak}
        | {"ratio_to_convolutions": (1.2, 1.6, 1.7)}
        for (name, n, mode), (median, peak) in quantities.items()
    ]
    ratios = {("256×14×14", 16): 2.4, ("256×14×14", 4): 2.0, ("128×14×14", 16): 3.0, ("256×100×152", 2): 2.9}
    entries += [
        {"name": name, "n": n, "mode": "convolution, avx512", "ratio": (1, ratio, 9)}
        for (name, n), ratio in ratios.items()
    ]
    aims = targets.cpu_aims(16)
    found = targets.targets(entries, aims)
    values = [4, 5, 3, 4.5, 2.25, 0.375, 0.25, 2.4, 2, None, 3, 2.9, None]
    assert [target["value"] for target in found] == [None if v is None else pytest.approx(v) for v in values]
    met = [True, False, True, True, False, False, True, False, True, None, True, True, None]
    assert [target["met"] for target in found] == met
    assert [target["met"] for target in targets.targets(entries[:2], aims)][:4] == [True, None, None, None]


def test_a_gpus_targets():
    """Each ratio is formed the right way round, of the right rows."""
    milliseconds = {
        (GRAPH, 100, FORWARD): 2.0,
        (BF16, 100, FORWARD): 4.0,
        (RELEASED, 100, FORWARD): 50.0,
        (EARLY, 100, FORWARD): 1.5,
        (CONVERGED, 100, FORWARD): 1.1,
        (TORCHDEQ_BF16, 100, FORWARD): 12.0,
        (BASE, 100, FORWARD): 1.0,
        (COMPILED_STACK, 100, FORWARD): 0.5,
        (RELEASED, 100, BACKWARD): 120.0,
        (GRAPH, 100, BACKWARD): 6.0,
        (GRAPH, 128, FORWARD): 2.0,
        (GRAPH, 512, FORWARD): 6.0,
        (BF16, 512, BACKWARD): 9.0,
        (BF16_STACK, 512, BACKWARD): 9.0,
    }
    convolutions = [{"count": 16, "alone": 5e-5}, {"count": 16, "alone": 4e-5}]
    entries = [
        {"name": name, "n": n, "mode": mode, "median": value / 1e3, "seconds": [value / 1e3], "rounds": [0]}
        | {"convolutions": convolutions, "peak_extra_bytes": 1}
        | {"residual_worst": 0.02 if name == CONVERGED else 1e-3}
        for (name, n, mode), value in milliseconds.items()
    ]
    entries[-1]["peak_extra_bytes"] = 2
    settings = {"device": torch.device("cuda"), "table": 100, "channels": 256, "size": 14, "steps": 15}
    aims = targets.aims(settings, {"matmul": 32 * 100 * 0.231211008e9 / 1e-3, "copy": 3e12})
    found = targets.targets(entries, aims)
    assert [t["value"] for t in found] == pytest.approx([2, 2, 0.28, 25, 6, 1.1, 0.02, 1.5, 3, 20, 0.5, 0.75])
    assert [t["met"] for t in found] == [True, False, True, True, False, True, False, False, True, True, True, True]
    bounds = ["≤ 2.6", "≤ 1.6", "≤ 0.3", "≥ 15", "≥ 8", "≤ 1.2", "≤ 0.011", "≤ 1.2", "≤ 3", "≥ 15", "≤ 1", "≤ 1"]
    assert [t["bound"] for t in found] == bounds
    for entry in entries:
        entry["convolutions"] = []
    assert targets.targets(entries, aims)[2]["met"] is None


def test_targets_are_for_one_setting_alone():
    def has_targets(*options: str) -> bool:
        return targets.has_targets(vars(speed.parse(["--device", "cpu", "--threads", "2", *options])))

    assert has_targets()
    assert has_targets("--n", "1", "--budget", "20", "--seed", "3")
    for other in ("--threads 1", "--table 4", "--channels 128", "--size 7", "--steps 10"):
        assert not has_targets(*other.split()), other


@pytest.fixture
def gpu_rows(monkeypatch, seed):
    """A GPU's rows on a CPU, by name."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    x = features(3, 6, seed)
    return {c.name: c for c in contenders.gpu_contenders(Setting(8, 3, seed, CPU), x)}


def test_a_gpus_rows_compute(gpu_rows, seed):
    """All of them, forward and backward, in the dtypes and layouts that they ask for."""
    assert {GRAPH, CONVERGED, EARLY, COMPILED_STACK, TORCHDEQ_BF16} < set(gpu_rows)
    assert len(gpu_rows) == 16
    for name, contender in gpu_rows.items():
        if (name == TORCHDEQ_BF16 and contender.unavailable) or "triton" in name or "cuda" in name:
            continue
        assert not contender.unavailable
        x = features(2, 6, seed).to(contender.dtype, memory_format=contender.layout)
        y = contender.forward(x)()
        assert y.shape == x.shape
        assert contender.residual is None or contender.residual(x, y).isfinite().all()
        y, grads = contender.backward(x.requires_grad_(), torch.randn_like(x))()
        assert all(g.isfinite().all() for g in grads)


def test_graphs_run_twice_before_they_are_profiled(gpu_rows, seed):
    options = speed.parse(["--device", "cpu", "--channels", "8", "--size", "6", "--seed", str(seed)])
    inputs, calls = speed.Inputs(options), []
    counted = dataclasses.replace(gpu_rows[GRAPH], forward=lambda x: lambda: calls.append(x) or x)
    speed.warm_up(speed_report.Row(counted, 2, FORWARD, in_table=True), inputs, CPU)
    assert len(calls) == 3
    assert "memory pool is not in extra MiB" in counted.note


def test_the_block_that_stops_early_has_the_spectral_radius_it_is_named_after(seed):
    setting = Setting(16, 15, seed, CPU)
    x = speed.smooth_features(4, 16, 6, torch.Generator().manual_seed(seed))
    gain, radii = contenders.calibrated(setting, x, radius=0.6)
    assert radii.median().item() == pytest.approx(0.6, abs=0.05)
    assert 0 < gain < 2


def test_a_failing_row_is_reported(seed, capsys):
    options = speed.parse(["--device", "cpu", "--channels", "8", "--size", "6"])

    def broken():
        raise ValueError("of no use\nwhatever")

    failing = speed_report.Row(contenders.Contender("broken", lambda x: broken), 1, FORWARD, in_table=True)
    speed.warm_up(failing, speed.Inputs(options), CPU)
    assert failing.unavailable == "failed: ValueError: of no use"
    assert failing.timed is None
    assert "Traceback" in capsys.readouterr().err


@pytest.fixture(scope="module")
def tiny_run(tmp_path_factory):
    """The benchmark at toy sizes, nothing compiled: its output folder, report and printed text."""
    out = tmp_path_factory.mktemp("speed")
    # Behind an installed ifr_fast, of which the source tree has no compiled part.
    script = f"import sys, torch; sys.path.append({str(ROOT)!r}); from benchmarks import speed; "
    script += "torch.compile = lambda module, **_: module; speed.main(sys.argv[1:])"
    sizes = "--n 1 2 3 --table 3 --n-backward 2 --channels 32 --size 6 --steps 3 --threads 1 --budget 1 --device cpu"
    process = subprocess.run(
        [sys.executable, "-c", script, *sizes.split(), "--out", str(out)],
        cwd=out, capture_output=True, text=True,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return out, json.loads((out / "speed.json").read_text()), process.stdout


def test_every_row_of_the_report_is_complete(tiny_run):
    _, found, _ = tiny_run
    assert found["environment"]["torch"] == torch.__version__
    for entry in found["rows"]:
        if entry["name"].startswith("torchdeq") and "unavailable" in entry:
            assert "pip install torchdeq" in entry["unavailable"]
            continue
        assert len(entry["seconds"]) >= measure.LEAST
        assert all(s > 0 for s in entry["seconds"])
        for key in ("median", "processor_median", "peak_extra_bytes", "parameters"):
            assert entry[key] > 0, (entry["name"], key)
        for key in ("ratio_to_stack", "ratio_to_convolutions"):
            low, ratio, high = entry[key]
            assert 0 < low <= ratio <= high, (entry["name"], key)
        assert (entry["ratio_to_stack"] == [1, 1, 1]) == (entry["name"] == BASE)
        solves = any(word in entry["name"] for word in ("IFR", "unroll", "released", "torchdeq"))
        assert (entry["residual_median"] is not None) == solves
        assert not solves or 0 < entry["residual_median"] <= entry["residual_worst"] < 1


def test_the_table_and_the_sweep_have_their_rows(tiny_run):
    _, found, _ = tiny_run
    names = {(mode, n): [e["name"] for e in found["rows"] if (e["mode"], e["n"]) == (mode, n)]
             for mode in (FORWARD, BACKWARD) for n in (1, 2, 3)}  # fmt: skip
    everything = names[FORWARD, 3]
    assert len(everything) == len(set(everything)) == 17
    assert names[BACKWARD, 2] == everything
    assert names[BACKWARD, 3] == []
    assert names[FORWARD, 1] == names[FORWARD, 2] == names[BACKWARD, 1]
    assert {BASE, WINOGRAD_STACK, IFR, IFR_DIRECT, RELEASED} < set(names[FORWARD, 1]) < set(everything)


def test_convolutions_are_timed_by_themselves(tiny_run):
    _, found, printed = tiny_run
    assert found["convolutions"][0]["isa"] == _native.isa()
    assert [of["isa"] for of in found["convolutions"][1:]] == ["avx2"] * (_native.isa() == "avx512")
    for of in found["convolutions"]:
        assert [(row["n"], row["name"]) for row in of["rows"]] == [
            *((n, "32×6×6") for n in (1, 2, 3)),
            (2, "32×100×152"),
        ]
        for row in of["rows"]:
            low, ratio, high = row["ratio"]
            assert 0 < low <= ratio <= high
            assert row["mode"] == f"convolution, {of['isa']}"
            work = 2 * 9 * 32 * 32 * row["n"] * (36 if row["name"] == "32×6×6" else 15200)
            assert row["direct"]["rate"] == pytest.approx(work / row["direct"]["median"])
            assert row["winograd"]["rate"] == pytest.approx(work / row["winograd"]["median"])
            assert row["share_of_peak"] == pytest.approx(row["direct"]["rate"] / max(of["peaks"].values()))
            assert row["weights"]["median"] > 0
        assert f"one 3×3 convolution, {of['isa']}, threads: 1" in printed


@pytest.mark.parametrize(
    ("size", "message"),
    [("16x256x14", "expected NxCxHxW, got '16x256x14'"), ("1x8x4x4", "channels in multiples of 32, got 1x8x4x4")],
)
def test_a_bad_size_of_a_convolution_is_named(size, message, capsys):
    with pytest.raises(SystemExit):
        convolutions.parse(["--sizes", size])
    assert message in capsys.readouterr().err


def test_the_table_is_printed_and_drawn(tiny_run):
    out, found, printed = tiny_run
    lines = printed.splitlines()
    for entry in found["rows"]:
        assert any(line.startswith(entry["name"]) for line in lines)
    table = [line for line in lines[lines.index("forward, N = 1") :] if not line.startswith("wrote ")]  # a path
    assert max(map(len, table)) <= 120
    assert any(line.startswith(("quiet: ", "TOO BUSY ")) for line in lines)
    assert found["targets"] == []
    assert "target" not in printed
    assert (out / "speed.png").read_bytes().startswith(b"\x89PNG")
