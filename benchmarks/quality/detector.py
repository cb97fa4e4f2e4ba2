"""Mask R-CNN with a backbone and a mask-head refinement chosen by name."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.quality.efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLite0Features, imagenet_state
from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Picard, Shine, Unroll, Unrolled

REFINEMENTS = ("stack", "shared", "unroll", "ifr", "ifr-coarse", "ifr-narrow", "none")
SOLVERS = {"broyden": Broyden, "anderson": Anderson, "picard": Picard}
ADJOINTS = {
    "implicit": Implicit,
    "phantom": Phantom,
    "jacobian_free": JacobianFree,
    "shine": Shine,
    "unrolled": Unrolled,
}
STRIDES = (4, 8, 16, 32)


class SharedConvolution(nn.Module):
    """One 3×3 convolution with ReLU, applied four times: (N, C, H, W) → the same shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layer = MaskRCNNHeads(channels, [channels], dilation=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = self.layer(x)
        return x


def build_refinement(name: str, channels: int, *, solver: str, steps: int, adjoint: str, groups: int) -> nn.Module:
    """What stands where Mask R-CNN's four mask-head convolutions stand, (N, C, H, W) → the same shape.

    "stack": torchvision's four convolutions; "shared": one of them, applied four times; "unroll": the IFR
    block unrolled `steps` times; "ifr": its equilibrium, by `solver` within `steps` iterations;
    "ifr-coarse": the same stopped at a residual of 1e-1, as are Implicit's gradients; "ifr-narrow": the same with a
    quarter of the channels between the block's convolutions; "none": nothing.
    """
    if name == "stack":
        return MaskRCNNHeads(channels, [channels] * 4, dilation=1)
    if name == "shared":
        return SharedConvolution(channels)
    if name == "unroll":
        return IFRHead(channels, groups=groups, solver=Unroll(steps=steps))
    if name in ("ifr", "ifr-coarse", "ifr-narrow"):
        mid_channels, rtol = channels // 4 if name == "ifr-narrow" else channels, None if name == "ifr" else 1e-1
        gradient = Implicit(max_iter=steps, rtol=rtol) if adjoint == "implicit" else ADJOINTS[adjoint]()
        return IFRHead(
            channels,
            mid_channels=mid_channels,
            groups=groups,
            solver=SOLVERS[solver](max_iter=steps, rtol=rtol),
            adjoint=gradient,
        )
    if name == "none":
        return nn.Identity()
    raise ValueError(f"refine: expected one of {', '.join(REFINEMENTS)}, got {name!r}")


def build_backbone(name: str, *, imagenet: bool, channels: int) -> tuple[BackboneWithFPN, list[float], list[float]]:
    """A feature pyramid on "efficientnet_lite0" or a torchvision classifier; its images' mean and deviation.

    With ImageNet weights, batch normalisation and the layers up to stride 4 are frozen. Without, GroupNorm
    replaces batch normalisation (detectors train with few images a batch), as it does in the pyramid.

    Raises ValueError where the name is unknown or the network has no stages at strides 4, 8, 16 and 32,
    RuntimeError where torchvision's weights cannot be downloaded.
    """
    if name == "efficientnet_lite0":
        body, mean, std = EfficientNetLite0Features(), IMAGE_MEAN, IMAGE_STD
        if imagenet:
            body.load_state_dict(imagenet_state())
    elif name in torchvision.models.list_models(torchvision.models):
        weights = torchvision.models.get_model_weights(name).DEFAULT
        try:
            classifier = torchvision.models.get_model(name, weights=weights if imagenet else None)
        except OSError as error:
            raise RuntimeError(f"cannot get {weights.url}: {error}; --weights none trains from scratch") from error
        body = getattr(classifier, "features", classifier)
        preprocess = weights.transforms()
        mean, std = list(preprocess.mean), list(preprocess.std)
    else:
        raise ValueError(f"backbone: expected efficientnet_lite0 or a torchvision classifier, got {name!r}")

    stages = find_stages(body)
    if sorted(stages) != list(STRIDES):
        raise ValueError(f"backbone: {name} has no top-level stages at strides 4, 8, 16 and 32, got {sorted(stages)}")
    names = {stages[stride][0]: str(level) for level, stride in enumerate(STRIDES)}
    replace_batch_norm(body, frozen_batch_norm if imagenet else lambda norm: group_norm(norm.num_features))
    widths = [stages[stride][1] for stride in STRIDES]
    backbone = BackboneWithFPN(body, names, widths, channels, norm_layer=group_norm)
    if imagenet:
        for child_name, child in backbone.body.items():
            child.requires_grad_(False)
            if child_name == stages[4][0]:
                break
    return backbone, mean, std


@torch.no_grad()
def find_stages(body: nn.Module) -> dict[int, tuple[str, int]]:
    """stride → name and channels of the last child with that stride, for the strides of a pyramid."""
    size = 64
    x = torch.zeros(1, 3, size, size)
    body.eval()
    stages = {}
    for name, child in body.named_children():
        x = child(x)
        if x.ndim != 4 or x.shape[2] != x.shape[3] or x.shape[2] < size // STRIDES[-1]:
            break
        stride = size // x.shape[2]
        if stride in STRIDES:
            stages[stride] = (name, x.shape[1])
    body.train()
    return stages


def replace_batch_norm(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            replace_batch_norm(child, make)


def frozen_batch_norm(norm: nn.BatchNorm2d) -> FrozenBatchNorm2d:
    frozen = FrozenBatchNorm2d(norm.num_features, eps=norm.eps)
    frozen.load_state_dict(norm.state_dict())
    return frozen


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least two channels."""
    return nn.GroupNorm(math.gcd(32, channels // 2), channels)


def build_detector(
    backbone: str,
    refinement: Callable[[int], nn.Module],
    *,
    num_classes: int,
    imagenet: bool,
    image_size: int,
    channels: int = 256,
    rois_per_image: int = 512,
    detections_per_image: int = 100,
) -> MaskRCNN:
    """Mask R-CNN (He et al., ICCV 2017) as torchvision builds it, with another backbone and mask head.

    refinement: makes the module between RoI feature and mask predictor from the number of channels.
    num_classes counts the background; images are scaled to a shorter side of image_size pixels, the longer at
    most 5/3 of it. channels is the width of pyramid and heads. Under autocast boxes, scores, masks and losses
    are float32.
    """
    pyramid, mean, std = build_backbone(backbone, imagenet=imagenet, channels=channels)
    hidden = 1024
    mask_predictor = MaskRCNNPredictor(channels, channels, num_classes)
    # Torchvision's own start suits many classes; with few it gives logits of ±20 and losses of 30.
    nn.init.normal_(mask_predictor.mask_fcn_logits.weight, std=0.01)
    detector = MaskRCNN(
        pyramid,
        min_size=image_size,
        max_size=math.ceil(image_size * 5 / 3),
        image_mean=mean,
        image_std=std,
        box_predictor=FastRCNNPredictor(hidden, num_classes),
        box_batch_size_per_image=rois_per_image,
        box_detections_per_img=detections_per_image,
        mask_head=refinement(channels),
        mask_predictor=mask_predictor,
    )
    keep_geometry_in_float32(detector)
    return detector


def keep_geometry_in_float32(detector: MaskRCNN) -> None:
    """Make anchors, boxes, scores, mask probabilities and losses float32, also where autocast runs the layers in less.

    Torchvision makes anchors in the dtype of the features, and decodes boxes in that of the layer that predicts
    them. In bfloat16 a coordinate between 256 and 512 is a multiple of 2, one between 512 and 1024 of 4.
    """
    heads = detector.roi_heads
    for layer in (detector.rpn.head, heads.box_predictor, heads.mask_predictor):
        layer.register_forward_hook(lambda layer, inputs, output: in_float32(output))
    detector.rpn.anchor_generator.register_forward_pre_hook(lambda generator, inputs: in_float32(inputs))


def in_float32(value: Any) -> Any:
    """A tensor, or the tensors in lists and tuples, as float32; anything else as it is."""
    if isinstance(value, torch.Tensor):
        return value.float()
    if isinstance(value, (list, tuple)):
        return type(value)(map(in_float32, value))
    return value
