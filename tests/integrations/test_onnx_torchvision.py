"""torchvision's refined detectors in ONNX, wherever the stock ones go: ONNX Runtime computes what torch does."""

import copy
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection

from ifr_fast import Anderson, Broyden
from ifr_fast.integrations.torchvision import refine

pytest.importorskip("onnxscript", reason="onnx, onnxscript, onnxruntime are not installed: the [onnx] extra has them")
onnxruntime = pytest.importorskip("onnxruntime")

TWO_STAGES = dict(box_score_thresh=0.0, box_detections_per_img=3, rpn_pre_nms_top_n_test=12, rpn_post_nms_top_n_test=6)
ONE_STAGE = dict(score_thresh=0.0, detections_per_img=3, topk_candidates=6)
DETECTORS = {
    "maskrcnn_resnet50_fpn": TWO_STAGES,
    "keypointrcnn_resnet50_fpn": TWO_STAGES,
    "fasterrcnn_resnet50_fpn_v2": TWO_STAGES,
    "retinanet_resnet50_fpn": ONE_STAGE,
    "fcos_resnet50_fpn": ONE_STAGE,
}


def build(name):
    options = dict(weights=None, weights_backbone=None, num_classes=2, min_size=64, max_size=64)
    return getattr(detection, name)(**options, **DETECTORS[name]).eval()


def session(model, x, path, **options):
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torchvision's and torch's own, of stock detectors too
        torch.onnx.export(model, (x,), str(path), **options)
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize(
    "solver", [Broyden(2), *(pytest.param(s, marks=pytest.mark.full) for s in (Broyden(), Anderson()))], ids=str
)
def test_the_mask_branch(solver, tmp_path):
    heads = refine(build("maskrcnn_resnet50_fpn"), solver=solver).roi_heads
    branch = nn.Sequential(heads.mask_head, heads.mask_predictor)
    options = dict(dynamo=True, verbose=False, dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    run = session(branch, torch.randn(2, 256, 14, 14), tmp_path / "branch.onnx", **options)
    for x in (torch.randn(n, 256, 14, 14) for n in (0, 1, 7)):
        with torch.no_grad():
            expected = branch(x)
        (actual,) = run.run(None, {run.get_inputs()[0].name: x.numpy()})
        assert actual.shape == expected.shape
        if len(x):
            assert (torch.from_numpy(actual) - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.full
@pytest.mark.filterwarnings("ignore:.*torch.onnx:DeprecationWarning")
@pytest.mark.parametrize("name", DETECTORS)
def test_a_whole_detector(name, tmp_path):
    """By the older exporter: the newer one refuses stock detectors, whose detections' number depends on the image."""
    model = refine(build(name), solver=Broyden(3))
    image = [torch.rand(3, 64, 64)]
    run = session(model, image, tmp_path / "detector.onnx", dynamo=False)
    for image in ([torch.rand(3, 64, 64)] for _ in range(3)):
        with torch.no_grad():
            (expected,) = model(image)
        actual = run.run(None, {run.get_inputs()[0].name: image[0].numpy()})
        actual = {name: torch.from_numpy(value) for name, value in zip(expected, actual, strict=True)}
        assert len(expected["boxes"])
        torch.testing.assert_close(actual["scores"], expected["scores"], rtol=1e-3, atol=1e-4)
        if (expected["scores"].diff().abs() < 1e-4).any():  # nearly equal scores may change places
            continue
        for key, value in expected.items():
            assert (actual[key] - value).abs().max() <= 1e-3 * value.abs().max(), key


@pytest.mark.full
@pytest.mark.parametrize("refined", [False, True])
def test_the_newer_exporter_takes_no_detector(refined, tmp_path):
    """If this fails, torch has learned it: then refined detectors are to be tried, too."""
    model = build("maskrcnn_resnet50_fpn")
    with pytest.raises(Exception, match=r"export"):
        session(
            refine(copy.deepcopy(model)) if refined else model, [torch.rand(3, 64, 64)], tmp_path / "x", dynamo=True
        )


@pytest.mark.full
def test_the_pages_commands(tmp_path, monkeypatch):
    """Of integrations/README.md, as they stand."""
    section = (Path(__file__).parents[2] / "integrations/README.md").read_text().split("## ONNX, AOTInductor")[1]
    (example,) = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(compile(example, "integrations/README.md", "exec"), names)
    assert {path.name for path in tmp_path.iterdir()} == {"branch.onnx", "branch.pt2", "branch_aoti.pt2"}
    assert names["masks"].shape == (2, 91, 28, 28)
