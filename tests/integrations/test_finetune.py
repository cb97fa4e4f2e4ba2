"""The example of integrations/README.md, "From Monday to Friday": its commands, on drawn shapes."""

import re
from pathlib import Path

import draw_shapes
import pytest
import torch
from PIL import Image

pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: the [onnx] extra has it")

from ifr_fast.integrations import finetune


@pytest.mark.full
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning", "ignore::UserWarning")
def test_from_a_folder_to_onnx(monkeypatch, tmp_path, capsys):
    def run(*command):
        monkeypatch.setattr("sys.argv", ["finetune", *map(str, command)])
        finetune.main()
        return capsys.readouterr().out

    monkeypatch.chdir(tmp_path)
    data, folder = Path("shapes"), Path("run")  # as in the README
    draw_shapes.draw(data, train=4, val=2)
    said = run("train", data, folder, "--epochs", 1, "--batch", 2, "--size", 64, "--lr", 1e-5, "--scratch")
    assert re.search(r"epoch 1: loss \d+\.\d+; \d+ samples \(.*\), worst relative residual \S+$", said, re.MULTILINE)

    model = torch.load(folder / "model.pt", weights_only=False)
    model.roi_heads.detections_per_img = 3  # fewer equal scores, whose order may differ
    torch.save(model, folder / "model.pt")
    said = run("evaluate", data, folder)
    assert said.count("Average Precision  (AP) @[ IoU=0.50:0.95 | area=   all | maxDets=100 ] = ") == 2
    assert Image.open(folder / "detections.png").size == (646, 244)

    said = run("export", data, folder)
    assert re.search(r"^\d+ steps of the solver", said, re.MULTILINE)
    differences = dict(re.findall(r"^(\w+) \(3,.*\): (\S+)$", said, re.MULTILINE))
    assert differences.keys() == {"boxes", "labels", "scores", "masks"}
    assert all(float(difference) < 0.01 for difference in differences.values())

    readme = (Path(__file__).parents[2] / "integrations/README.md").read_text()
    (shown,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "detector.onnx" in block)
    names = {}
    exec(shown, names)
    assert names["masks"].shape == (3, 1, 144, 192)
