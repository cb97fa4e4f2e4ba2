"""integrations.torchvision: every detector refined, run, trained, saved and loaded."""

import copy
import io
import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import detection
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads

from ifr_fast import IFRHead
from ifr_fast.integrations.torchvision import refine
from ifr_fast.integrations.towers import replace_towers

README = (Path(__file__).parents[2] / "integrations/README.md").read_text()
ROI_HEADS = {
    "rpn_pre_nms_top_n_train": 8,
    "rpn_post_nms_top_n_train": 8,
    "rpn_post_nms_top_n_test": 4,
    "box_batch_size_per_image": 4,
    "box_detections_per_img": 2,
    "box_score_thresh": 0.0,
}
BRANCHES = ["head.classification_head.conv.0", "head.regression_head.conv.0"]
# Constructor: its arguments, where its IFRHeads come to stand, and their channels.
DETECTORS = {
    "maskrcnn_resnet50_fpn": (ROI_HEADS, ["roi_heads.mask_head.0"], 256),
    "maskrcnn_resnet50_fpn_v2": (ROI_HEADS, ["roi_heads.mask_head.0"], 256),
    "keypointrcnn_resnet50_fpn": (ROI_HEADS, ["roi_heads.keypoint_head.2"], 512),
    "fasterrcnn_resnet50_fpn_v2": (ROI_HEADS, ["roi_heads.box_head.0"], 256),
    "retinanet_resnet50_fpn": ({}, BRANCHES, 256),
    "retinanet_resnet50_fpn_v2": ({}, BRANCHES, 256),
    "fcos_resnet50_fpn": ({}, BRANCHES, 256),
}
SOLVER = {"type": "Broyden", "max_iter": 3}


def build(name, **kwargs):
    return getattr(detection, name)(
        weights=None,
        weights_backbone=None,
        num_classes=2,
        min_size=64,
        max_size=64,
        **DETECTORS[name][0],
        **kwargs,
    )


def pictures_and_targets():
    boxes = torch.tensor([[8.0, 8.0, 40.0, 48.0], [24.0, 16.0, 60.0, 60.0]])
    masks = torch.zeros(2, 64, 64, dtype=torch.uint8)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = 1
    points = torch.cat([boxes.view(2, 2, 2).mean(1, keepdim=True).expand(2, 17, 2), torch.ones(2, 17, 1)], 2)
    target = {"boxes": boxes, "labels": torch.tensor([1, 1]), "masks": masks, "keypoints": points}
    return list(torch.rand(2, 3, 64, 64)), [target, target]


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.full if name.endswith("_v2") else []) for name in DETECTORS]
)
def test_detector(name):
    _, paths, channels = DETECTORS[name]
    model = build(name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    images, targets = pictures_and_targets()
    with torch.no_grad():
        fields = [d.keys() for d in model.eval()(images)]

    assert refine(model, solver=SOLVER, adjoint="JacobianFree") is model

    heads = {path: m for path, m in model.named_modules() if isinstance(m, IFRHead)}
    assert list(heads) == paths
    assert {h.block.conv1.in_channels for h in heads.values()} == {channels}
    towers = tuple(path.rpartition(".")[0] for path in paths)
    outside = {k: v for k, v in model.state_dict().items() if not k.startswith(towers)}
    assert outside.keys() == {k for k in before if not k.startswith(towers)}
    assert all(torch.equal(v, before[k]) for k, v in outside.items())

    with torch.no_grad():
        detections = model(images)
    assert [d.keys() for d in detections] == fields
    if "masks" in fields[0]:
        assert [d["masks"].shape for d in detections] == [(len(d["boxes"]), 1, 64, 64) for d in detections]

    losses = model.train()(images, targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    for path, head in heads.items():
        for parameter, p in head.named_parameters():
            assert p.grad is not None, f"{path}.{parameter} has no gradient"
            assert p.grad.isfinite().all(), f"{path}.{parameter}"
            assert p.grad.abs().sum() > 0, f"{path}.{parameter}"


@pytest.mark.parametrize("name", ["maskrcnn_resnet50_fpn", "retinanet_resnet50_fpn"])
def test_refined_detector_is_saved_loaded_and_copied(name):
    """Both remap the keys of old checkpoints on loading, which must not touch an IFRHead's."""
    model = refine(build(name), solver=SOLVER).eval()
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = refine(build(name), solver=SOLVER).eval()
    loaded.load_state_dict(torch.load(file))
    features = torch.randn(2, 256, 14, 14)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for other in (loaded, copied):
            for path in DETECTORS[name][1]:
                assert torch.equal(other.get_submodule(path)(features), model.get_submodule(path)(features))


def test_mask_head_has_55_percent_of_its_parameters():
    model = detection.maskrcnn_resnet50_fpn(weights=None, weights_backbone=None)  # 91 classes

    def mask_branch():
        modules = (model.roi_heads.mask_head, model.roi_heads.mask_predictor)
        return sum(p.numel() for m in modules for p in m.parameters())

    assert mask_branch() == 4 * (256 * 256 * 9 + 256) + (256 * 256 * 4 + 256) + (91 * 256 + 91)  # 2.64 M
    refine(model)
    assert mask_branch() == 2 * (256 * 256 * 9 + 256) + 6 * 256 + (256 * 256 * 4 + 256) + (91 * 256 + 91)  # 1.46 M


def test_models_with_own_heads():
    """A 16-channel head in which the first convolution changes the width."""
    model = build("maskrcnn_resnet50_fpn", mask_head=MaskRCNNHeads(256, [16] * 4, 1))
    refine(model, groups=4)
    assert [type(m) for m in model.roi_heads.mask_head.children()][1:] == [IFRHead]
    assert model.roi_heads.mask_head(torch.randn(2, 256, 14, 14)).shape == (2, 16, 14, 14)


def test_dilated_mask_head_is_refused():
    model = build("maskrcnn_resnet50_fpn", mask_head=MaskRCNNHeads(256, [256] * 4, 2))
    with pytest.raises(ValueError, match=r"roi_heads\.mask_head.*\n.*mask_head\.0: left alone, .*dilation 2"):
        refine(model)


def test_box_head_without_convolutions_is_refused():
    model = detection.fasterrcnn_mobilenet_v3_large_fpn(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=r"roi_heads\.box_head.* no conv tower .*TwoMLPHead"):
        refine(model)


@pytest.mark.parametrize("model", [nn.Sequential(nn.Conv2d(3, 3, 3)), "maskrcnn"])
def test_other_models_are_refused(model):
    with pytest.raises(ValueError, match=f"MaskRCNN, .*FCOS, got {type(model).__name__}; .*replace_towers"):
        refine(model)


def test_readme_shows_how():
    (shown,) = (block for block in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "model = refine(" in block)
    scope = {}
    with torch.device("meta"):
        exec(shown.replace('weights="DEFAULT"', "weights=None, weights_backbone=None"), scope)
    assert isinstance(scope["model"].roi_heads.mask_head[0], IFRHead)


def test_readme_shows_a_report():
    (shown,) = re.findall(r"```text\n(.*?)```", README, re.DOTALL)
    with torch.device("meta"):
        report = replace_towers(detection.fasterrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None))
    for line, said in zip(shown.splitlines(), str(report).splitlines(), strict=True):
        assert said.startswith(line.removesuffix("…"))
