"""integrations.layers: what belongs to a tower, what stands between, and why anything else ends one."""

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ifr_fast import IFRHead
from ifr_fast.integrations.layers import read_layer

C = 8


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


class ConvModule(nn.Module):
    """Like mmcv's."""

    def __init__(self, layer=None, norm=None):
        super().__init__()
        self.conv = layer or conv()
        self.bn = norm or nn.BatchNorm2d(C)
        self.activate = nn.ReLU()

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class NormedConv(nn.Conv2d):
    """Like detectron2's Conv2d."""

    def __init__(self, norm):
        super().__init__(C, C, 3, padding=1)
        self.norm = norm

    def forward(self, x):
        return F.relu(self.norm(super().forward(x)))


class FrozenBatchNorm2d(nn.Module):
    """Like detectron2's, which shares no class with torch's norms."""

    def forward(self, x):
        return x


class DeformConvPack(nn.Module):
    """Like mmcv's ModulatedDeformConv2dPack: weights of its own, and a convolution for the offsets."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(C, C, 3, 3))
        self.conv_offset = conv()


class Upscaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2.0)


class NeedsMore(ConvModule):
    def forward(self, x, mask):
        return super().forward(x * mask)


class BasicBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.conv2 = conv(), nn.ReLU(), conv()

    def forward(self, x):
        return x + self.conv2(self.relu(self.conv1(x)))


class Dense(nn.Sequential):
    def forward(self, x):
        return torch.cat([x, super().forward(x)], 1)


TOWER = {
    "convolution": (conv, 1),
    "padding 'same'": (lambda: conv(padding="same", bias=False), 1),
    "weight norm": (lambda: torch.nn.utils.parametrizations.weight_norm(conv()), 1),
    "Conv2dNormActivation": (lambda: torchvision.ops.Conv2dNormActivation(C, C), 1),
    "ConvModule": (ConvModule, 1),
    "ConvModule of a NormedConv": (lambda: ConvModule(NormedConv(nn.Identity())), 1),
    "NormedConv": (lambda: NormedConv(FrozenBatchNorm2d()), 1),
    "Sequential": (lambda: nn.Sequential(nn.GroupNorm(2, C), nn.SiLU(), conv(), nn.Sequential(conv())), 2),
}


@pytest.mark.parametrize("name", TOWER)
def test_layers_of_a_tower(name):
    build, convolutions = TOWER[name]
    module = build()
    layer = read_layer(module)
    assert layer.ends == ""
    assert layer.convolutions == tuple(m for m in module.modules() if isinstance(m, nn.Conv2d))
    assert len(layer.convolutions) == convolutions


BETWEEN = [nn.ReLU, nn.PReLU, nn.Hardswish, nn.Identity, lambda: nn.GroupNorm(2, C), lambda: nn.InstanceNorm2d(C)]
BETWEEN += [lambda: nn.SyncBatchNorm(C), FrozenBatchNorm2d, lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())]


@pytest.mark.parametrize("build", BETWEEN)
def test_norms_and_activations_stand_between(build):
    layer = read_layer(build())
    assert (layer.convolutions, layer.ends, layer.is_convolution) == ((), "", False)


ENDS = [
    (lambda: conv(stride=2), "a 3×3 convolution with stride 2"),
    (lambda: conv(dilation=2, padding=2), "a 3×3 convolution with dilation 2"),
    (lambda: conv(groups=C), "a 3×3 convolution with 8 groups"),
    (lambda: conv(kernel=1, padding=0), "a 1×1 convolution"),
    (lambda: conv(kernel=(3, 5), padding=(1, 2)), "a 3×5 convolution"),
    (lambda: conv(padding=0), "a 3×3 convolution with padding (0, 0)"),
    (lambda: conv(padding_mode="reflect"), "a 3×3 convolution with padding_mode 'reflect'"),
    (lambda: conv(C, 16), "a 3×3 convolution with 8 → 16 channels"),
    (lambda: nn.LazyConv2d(C, 3, padding=1), "a convolution not yet initialised: run the model once"),
    (lambda: nn.ConvTranspose2d(C, C, 3, padding=1), "a ConvTranspose2d"),
    (lambda: torchvision.ops.DeformConv2d(C, C, 3, padding=1), "a DeformConv2d"),
    (DeformConvPack, "a DeformConvPack"),
    (lambda: ConvModule(DeformConvPack()), "a ConvModule: a DeformConvPack"),
    (lambda: ConvModule(conv(stride=2)), "a ConvModule: a 3×3 convolution with stride 2"),
    (lambda: ConvModule(norm=nn.Dropout2d()), "a ConvModule: a Dropout2d"),
    (lambda: NormedConv(nn.Dropout2d()), "a NormedConv holding a Dropout2d"),
    (lambda: nn.Sequential(conv(stride=2), nn.ReLU()), "a 3×3 convolution with stride 2"),
    (Upscaling, "an Upscaling: its forward takes (1, 8, 5, 7) to (1, 8, 10, 14)"),
    (NeedsMore, "a NeedsMore: its forward cannot be tried on (1, 8, 5, 7) (TypeError"),
]


@pytest.mark.parametrize(("build", "reason"), ENDS)
def test_other_convolutions_end_a_tower(build, reason):
    layer = read_layer(build())
    assert layer.ends.startswith(reason)
    assert layer.is_convolution
    assert not layer.convolutions


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (nn.Dropout2d, "a Dropout2d"),
        (nn.Softmax2d, "a Softmax2d"),
        (nn.GLU, "a GLU"),
        (lambda: nn.MaxPool2d(3, 1, 1), "a MaxPool2d"),
        (lambda: nn.Upsample(scale_factor=2), "an Upsample"),
        (nn.ModuleList, "a ModuleList"),
        (BasicBlock, "a BasicBlock"),
        (lambda: Dense(conv(), conv()), "a Dense"),
        (lambda: nn.Sequential(conv(), nn.Dropout2d(), conv()), "a Dropout2d"),
        (lambda: nn.Sequential(conv(), conv(16, 16)), "convolutions of 8 and 16 channels"),
        (lambda: IFRHead(C, groups=4), "an IFRHead"),
    ],
)
def test_other_layers_end_a_tower(build, reason):
    layer = read_layer(build())
    assert (layer.convolutions, layer.ends, layer.is_convolution) == ((), reason, False)


def test_a_wrapper_is_tried_without_a_trace():
    module = ConvModule()
    module.activate.eval()
    before = copy.deepcopy(module.state_dict())
    read_layer(module)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert [m.training for m in module.modules()] == [True, True, True, False]
