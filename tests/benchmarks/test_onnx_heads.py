"""timing/onnx_heads.py: every row is timed at every N, and exported ones compute what their modules do."""

import json

import pytest

pytest.importorskip("onnxscript", reason="onnx, onnxscript, onnxruntime are not installed: the [onnx] extra has them")
pytest.importorskip("onnxruntime")

from benchmarks.timing import onnx_heads


@pytest.mark.parametrize("few", [True, pytest.param(False, marks=pytest.mark.full)])
def test_rows(few, tmp_path, monkeypatch, capsys):
    if few:
        everything = onnx_heads.modules
        wanted = (onnx_heads.STACK, "IFR Picard")
        monkeypatch.setattr(onnx_heads, "modules", lambda s: [m for m in everything(s) if m[0] in wanted])
    options = ["--channels", "8", "--size", "5", "--steps", "2", "--threads", "1", "--budget", "0.1", "--n", "1", "3"]
    found = onnx_heads.main([*options, "--out", str(tmp_path)])
    assert json.loads((tmp_path / "onnx.json").read_text())["rows"] == json.loads(json.dumps(found["rows"]))
    rows = found["rows"]
    assert [row["n"] for row in rows] == sorted([1, 3] * (len(rows) // 2))
    assert len(rows) == 2 * (4 if few else 12)
    for row in rows:
        assert len(row["seconds"]) >= 3
        assert bool(row["file"]) == ("difference" in row) == ("ONNX" in row["name"])
        assert row.get("difference", 0) < 1e-4
        assert ("residual" in row) == ("convolutions" not in row["name"] or "IFR" in row["name"])
        if row["name"] == onnx_heads.STACK:
            assert row["ratio"] == (1, 1, 1)
    assert capsys.readouterr().out.count("\n|") == len(rows) + 1
