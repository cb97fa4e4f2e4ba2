"""timing/profile_solve.py and timing/smoke.py, as far as they go without a GPU."""

import json

import pytest
import torch

from benchmarks.timing import profile_solve, smoke

TOY = ["--n", "2", "--channels", "32", "--size", "6", "--steps", "3"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_solve_on_a_cpu_is_profiled_by_operator(tmp_path, capsys):
    profile_solve.main([*TOY, "--backend", "eager", "--out", str(tmp_path / "profile.json")])
    found = json.loads((tmp_path / "profile.json").read_text())
    fixed, loose = found["solves"]
    assert (fixed["evaluations"], fixed["iterations"]) == (4, [3, 3])
    assert loose["evaluations"] <= 4
    for entry in found["solves"]:
        assert entry["profile"]["evaluations_run"] == entry["evaluations"]  # a CPU knows when its samples have stopped
        assert 0 < entry["residual_median"] <= entry["residual_worst"] < 1
        assert len(entry["seconds"]) == len(entry["processor_seconds"]) == profile_solve.TIMED
        profile = entry["profile"]
        kernels = {k["name"]: k for k in profile["kernels"]}
        assert sum(k["count"] for k in kernels.values()) == profile["launches"]
        assert profile["busy"] == pytest.approx(sum(k["total"] for k in kernels.values()))
        assert profile["busy"] + profile["idle"] == pytest.approx(profile["span"], rel=1e-3)
        # Two convolutions an evaluation, and no operator that calls others.
        convolutions = [k["count"] for name, k in kernels.items() if name == "aten::mkldnn_convolution"]
        assert not convolutions or convolutions == [2 * entry["evaluations"]]
        assert not any(name.startswith(("ifr_fast::", "aten::convolution")) for name in kernels)
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1].startswith("wall: ")
    assert any("aten::copy_" in line for line in printed)
    assert "  evaluations: the slowest sample needed 4, 4 of at most 4 were run" in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_history_in_8_bits_is_profiled(tmp_path, capsys):
    """By the kernels that serve it, which it names."""
    profile_solve.main([*TOY, "--history", "float8_e5m2", "--out", str(tmp_path / "profile.json")])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert (found["settings"]["backend"], found["settings"]["history"]) == ("eager", "float8_e5m2")
    assert all(0 < entry["residual_worst"] < 1 for entry in found["solves"])
    assert capsys.readouterr().out.startswith("eager, 8-bit history, eager, N = 2, in 3 steps: wall ")


def test_a_gpus_trace():
    """A mark, operators on the host, and what the device did: copies too, on two streams that overlap."""

    def event(name: str, cat: str, ts: float, dur: float, **args) -> dict:
        return {"ph": "X", "name": name, "cat": cat, "ts": ts, "dur": dur, "args": args}

    mark = profile_solve.MARK + "in 3 steps"
    events = [
        event(mark, "user_annotation", 1000.0, 500.0),
        event(mark, "gpu_user_annotation", 1100.0, 300.0),
        event("ifr_fast::solve", "cpu_op", 1001.0, 90.0, **{"External id": 1}),
        *(event("aten::convolution", "cpu_op", 1009.0 + 30.0 * i, 25.0) for i in range(8)),
        event("aten::cudnn_convolution", "cpu_op", 1010.0, 20.0, **{"External id": 2}),
        event("cudaLaunchKernel", "cuda_runtime", 1011.0, 2.0, correlation=7),
        event("before the mark", "kernel", 900.0, 5.0, **{"External id": 1}),
        event("sm90_gemm", "kernel", 1100.0, 40.0, grid=[2, 1, 1], stream=7, **{"External id": 2}),
        event("_norm", "kernel", 1150.0, 10.0, **{"External id": 1}),
        event("Memcpy DtoD", "gpu_memcpy", 1155.0, 15.0, **{"External id": 1}),
        event("sm90_gemm", "kernel", 1190.0, 50.0, **{"External id": 2}),
        event("another process's", "kernel", 1600.0, 5.0),
    ]
    found = profile_solve.profiled(list(reversed(events)), "in 3 steps")
    assert (found["device"], found["launches"]) == ("gpu", 4)
    assert (found["busy"], found["span"]) == (115.0, 140.0)
    assert (found["idle"], found["idle_per_evaluation"], found["longest_idle"]) == (30.0, 7.5, 20.0)
    assert found["convolutions"] == 90.0
    gemm, *others = found["kernels"]
    assert [k["name"] for k in others] == ["Memcpy DtoD", "_norm"]
    assert (gemm["name"], gemm["operator"], gemm["convolution"]) == ("sm90_gemm", "aten::cudnn_convolution", True)
    assert (gemm["count"], gemm["total"], gemm["mean"], gemm["least"], gemm["most"]) == (2, 90.0, 45.0, 40.0, 50.0)
    assert (gemm["idle_before"], gemm["grid"]) == (20.0, [2, 1, 1])
    assert not any(k["convolution"] for k in others)
    assert found["evaluations_run"] == 4


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["rule_kernel"] * 8 + ["gram_row_kernel"] * 7, 8),
        (["void cluster_kernel<(Method)0, __nv_bfloat16>(Solver)"] * 3 + ["void rule_kernel<(Method)0>(Solver)"], 4),
        (["_norm", "elementwise_kernel"], None),
    ],
)
def test_a_replays_evaluations_are_counted_by_what_judges_them(names, expected):
    """No operator launches its kernels. Where none of ours is among them nothing tells."""
    mark = {"ph": "X", "name": profile_solve.MARK + "to 1e-2", "cat": "user_annotation", "ts": 0.0, "dur": 1e3}
    kernels = [{"ph": "X", "name": name, "cat": "kernel", "ts": 10.0 * i, "dur": 5.0} for i, name in enumerate(names)]
    found = profile_solve.profiled([mark, *kernels], "to 1e-2")
    assert found["evaluations_run"] == expected
    assert found["idle_per_evaluation"] == (pytest.approx(found["idle"] / expected) if expected else None)


def test_what_was_timed_is_kept_where_the_profiler_fails(tmp_path, monkeypatch, capsys):
    def broken(*_):
        raise OSError("no profiler here")

    monkeypatch.setattr(profile_solve, "trace", broken)
    profile_solve.main([*TOY, "--out", str(tmp_path / "profile.json")])
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["profiler"] == "OSError: no profiler here"
    assert len(found["solves"]) == 2
    assert "no profiler here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--n 0", "--n: expected a positive number"),
        ("--backend gpu", "--backend: gpu cannot serve: expected one of"),
        ("--backend cpu --history float8_e5m2", "--history: float8_e5m2 is refused: backend='cpu' serves"),
    ],
)
def test_a_bad_option_is_named(options, message, capsys):
    with pytest.raises(SystemExit):
        profile_solve.parse(options.split())
    assert message in capsys.readouterr().err


def test_smoke_tests(tmp_path, capsys):
    path = tmp_path / "smoke.json"
    assert smoke.main(["--backends", "eager", "--n", "1", "3", "--out", str(path)]) == 0, capsys.readouterr().out
    found = json.loads(path.read_text())
    assert found["backends"]["eager"] == ""
    assert {(case["dtype"], case["n"]) for case in found["cases"] if case["way"] == "eager"} == {
        ("float32", 1), ("float32", 3), ("bfloat16", 1), ("bfloat16", 3),
    }  # fmt: skip
    errors = {case["dtype"]: case["output"] for case in found["cases"]}
    assert 0 < errors["float32"] < 1e-5 < errors["bfloat16"]  # each in its own precision
    assert len(found["cases"][0]["gradients"]) == 11


@pytest.mark.parametrize("wrong", ["output", "gradient", "nan"])
def test_a_wrong_result_is_found(wrong, monkeypatch):
    exact_both = smoke.both

    def both(head, x, grad):
        y, *gradients = exact_both(head, x, grad)
        if x.dtype == torch.float32:
            y = 1.001 * y if wrong == "output" else y
            gradients[3] = gradients[3] * {"gradient": 1.01, "nan": torch.nan}.get(wrong, 1)
        return y, *gradients

    monkeypatch.setattr(smoke, "both", both)
    entries = list(smoke.cases("eager", "float32", [2]))
    assert entries
    assert not any(entry["passed"] for entry in entries)
    assert "FAILED" in smoke.in_words(entries[0])


def test_a_case_that_fails_is_told(monkeypatch, capsys):
    def broken(*_):
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(smoke, "error", broken)
    (entry, *_) = smoke.cases("eager", "float32", [2])
    assert entry["error"] == "ArithmeticError: on purpose"
    assert smoke.in_words(entry).endswith("FAILED: ArithmeticError: on purpose")
    assert "on purpose" in capsys.readouterr().err


def test_a_process_that_dies_is_told(tmp_path, monkeypatch, capsys):
    """As one does whose kernels the device refuses."""
    monkeypatch.setattr(smoke, "__file__", str(tmp_path / "dies.py"))
    (tmp_path / "dies.py").write_text("import os; print('its last words', flush=True); os.abort()")
    path = tmp_path / "smoke.json"
    assert smoke.main(["--backends", "eager", "--dtypes", "float32", "--out", str(path)]) == 1
    assert json.loads(path.read_text())["died"] == ["eager float32: exit status -6"]
    assert "its last words" in capsys.readouterr().out
