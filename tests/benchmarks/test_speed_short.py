"""speed.py's short form, and what it leaves when it is cut off."""

import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import speed
from benchmarks.timing import contenders, measure
from benchmarks.timing.contenders import BASE, BF16, BF16_STACK, CONVERGED, EARLY, GRAPH, RELEASED, Setting
from benchmarks.timing.targets import FORWARD

CPU = torch.device("cpu")
TOY = [
    "--device",
    "cpu",
    "--threads",
    "1",
    "--channels",
    "8",
    "--size",
    "6",
    "--steps",
    "3",
    "--n",
    "2",
    "3",
    "--table",
    "3",
]


def test_the_short_form_has_the_same_rows_for_every_batch(tmp_path):
    found = speed.main(["--short", *TOY, "--budget", "1", "--out", str(tmp_path)])
    assert json.loads(json.dumps(found)) == json.loads((tmp_path / "speed.json").read_text())
    rows = [(e["n"], e["name"]) for e in found["rows"]]
    assert rows == [(n, name) for n in (2, 3) for name in (BASE, BF16_STACK, BF16, RELEASED)]
    for entry in found["rows"]:
        assert entry["mode"] == FORWARD
        assert entry["ratio_to_convolutions"][1] > 0
        assert (entry["residual_worst"] is not None) == (entry["name"] in (BF16, RELEASED))
    assert found["convolutions"] == []


def test_on_a_gpu_it_has_every_backend_both_ways(monkeypatch, seed):
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    setting = Setting(8, 3, seed, CPU)
    x = speed.smooth_features(3, 8, 6, torch.Generator().manual_seed(seed))
    names = {c.name for c in [*contenders.contenders(setting), *contenders.gpu_contenders(setting, x)] if c.in_short}
    ways = {f"IFR Broyden, {b} kernels, NHWC, bf16" + g for b in ("triton", "cuda", "eager") for g in ("", ", graph")}
    ways |= {f"IFR Broyden, 8-bit history, {b}, NHWC, bf16, graph" for b in ("triton", "cuda")}
    assert names == {BASE, BF16_STACK, BF16, GRAPH, CONVERGED, EARLY, RELEASED, *ways}


def test_its_batches_are_those_the_paper_model_tells_apart():
    assert speed.parse(["--device", "cpu", "--short"]).n == [86, 100, 256]


def test_a_row_has_the_history_of_its_name(monkeypatch, seed):
    """And the tolerance. A row that is refused says why, and is not another one's."""
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    made = {}

    def noting(setting, name, solver, adjoint, options=None, **fields):
        made[name] = solver, adjoint, options
        return contenders.Contender(name, note=fields.get("note", ""))

    def serving(name, device, dtype, history=torch.float32):
        if name == "cuda" and history == torch.float8_e5m2:
            raise ValueError("cuda keeps no such history")
        return SimpleNamespace(__name__="package.triton")

    monkeypatch.setattr(contenders, "by_ifr", noting)
    monkeypatch.setattr(contenders.choose, "kernels", serving)
    setting = Setting(8, 3, seed, CPU)
    rows = {c.name: c for c in contenders.gpu_contenders(setting, speed.smooth_features(3, 8, 6, torch.Generator()))}
    words = "IFR Broyden, 8-bit history, {}, NHWC, bf16, graph"
    refused, (solver, adjoint, options) = rows[words.format("cuda")], made[words.format("triton")]
    assert refused.unavailable == "cuda keeps no such history"
    assert refused.forward is None
    assert solver.history_dtype == adjoint["history_dtype"] == torch.float8_e5m2
    assert (solver.rtol, solver.max_iter, options) == (0, 3, {"backend": "triton", "cuda_graphs": True})
    assert all(("8-bit" in name) == (of[0].history_dtype == torch.float8_e5m2) for name, of in made.items())
    solver, adjoint, options = made[CONVERGED]
    assert (solver.rtol, solver.max_iter, options) == (1e-2, 3, {"cuda_graphs": True})
    assert (made[GRAPH][0].rtol, made[GRAPH][2]) == (0, options)
    assert rows[GRAPH].note.startswith("triton kernels; ")  # what "auto" stands for


@pytest.mark.parametrize("after", [1, 5, 12])
def test_a_run_that_is_cut_off_leaves_what_it_has(after, tmp_path, monkeypatch):
    """In any place of the first rounds, and while rows are warmed up."""
    taken, take = [], measure.Timed.take

    def cut_off(self, round, device):
        if len(taken) == after:
            raise KeyboardInterrupt
        taken.append(self)
        take(self, round, device)

    monkeypatch.setattr(measure.Timed, "take", cut_off)
    monkeypatch.setattr(speed, "SELDOM", 0)
    monkeypatch.setattr(speed, "save_picture", lambda *_: None)
    with pytest.raises(KeyboardInterrupt):
        speed.main(["--short", *TOY, "--out", str(tmp_path)])
    found = json.loads((tmp_path / "speed.json").read_text())
    timed = [e for e in found["rows"] if "unavailable" not in e]
    assert len(found["rows"]) == 8
    assert len(timed) == min(after, 8)
    assert {e["unavailable"] for e in found["rows"] if "unavailable" in e} <= {"not timed yet"}
    assert all(len(e["seconds"]) == 1 for e in timed)
