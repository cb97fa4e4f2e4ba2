"""integrations.towers.layers: what one layer is to a tower."""

from functools import partial

import pytest
import torch
import torchvision
from adelaidet_layouts import DFConv2d, ModuleListDial
from detectron2_layouts import C, Conv2d, FrozenBatchNorm2d
from mmdet1_layouts import ConvModule, DeformConvPack
from torch import nn
from torch.nn import functional as F

from ifr_fast import IFRHead
from ifr_fast.integrations.towers.layers import read_layer


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


def normed(norm=None, activation=F.relu):
    return Conv2d(C, C, 3, padding=1, norm=norm or nn.BatchNorm2d(C), activation=activation)


def wrapped(layer=None, norm=None):
    module = ConvModule()
    module.conv, module.gn = layer or module.conv, norm or module.gn
    return module


class Upscaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = conv()

    def forward(self, x):
        return F.interpolate(self.conv(x), scale_factor=2.0)


class NeedsMore(ConvModule):
    def forward(self, x, mask):
        return super().forward(x)


class Residual(ConvModule):
    def forward(self, x):
        return x + super().forward(x)


class ResidualConv(Conv2d):
    def forward(self, x):
        return torch.add(x, super().forward(x))


class InPlaceResidual(ConvModule):
    def forward(self, x):
        out = self.conv(x)
        return out.add_(x)


class ByAMethod(ConvModule):
    def forward(self, x):
        return self.apply_all(x)

    def apply_all(self, x):
        return x + self.conv(x)


class ByALambda(ConvModule):
    forward = lambda self, x: self.conv(x)  # noqa: E731


class OrderedConvModule(ConvModule):
    """The shape of mmcv 2's forward, whose sums are of positions."""

    def forward(self, x, activate=True, norm=True):
        layer_index = 0
        while layer_index < len(self.order):
            layer = self.order[layer_index]
            if layer == "conv":
                if layer_index + 1 < len(self.order) and self.order[layer_index + 1] == "act":
                    layer_index += 1
                x = self.conv(x)
            elif layer == "norm" and norm:
                x = self.norm(x)
            elif layer == "act" and activate:
                x = self.activate(x)
            layer_index += 1
        return x


class Dial(ModuleListDial):
    """With something besides its norms."""

    def forward(self, x):
        return F.avg_pool2d(super().forward(x), 2)


def with_a_forward_put_on_it(module):
    module.forward = module[0].forward
    return module


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
    "mmdet 1's ConvModule": (ConvModule, 1),
    "mmcv 2's ConvModule": (OrderedConvModule, 1),
    "detectron2's Conv2d": (normed, 1),
    "detectron2's Conv2d, frozen, with an activation of its own": (lambda: normed(FrozenBatchNorm2d(), nn.PReLU()), 1),
    "ConvModule of detectron2's Conv2d": (lambda: wrapped(normed()), 1),
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
BETWEEN += [lambda: ModuleListDial([nn.BatchNorm2d(C), nn.BatchNorm2d(C)])]


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
    (lambda: DeformConvPack(C, C, 3), "a DeformConvPack"),
    (lambda: DFConv2d(C, C), "a DFConv2d"),
    (lambda: wrapped(DeformConvPack(C, C, 3)), "a ConvModule: a DeformConvPack"),
    (lambda: wrapped(conv(stride=2)), "a ConvModule: a 3×3 convolution with stride 2"),
    (lambda: wrapped(norm=nn.Dropout2d()), "a ConvModule: a Dropout2d"),
    (lambda: normed(nn.Dropout2d()), "a Conv2d holding a Dropout2d"),
    (
        lambda: normed(activation=partial(F.interpolate, scale_factor=2)),
        "a Conv2d that may be more than a convolution (`self.activation(x)`)",
    ),
    (lambda: nn.Sequential(conv(stride=2), nn.ReLU()), "a 3×3 convolution with stride 2"),
    (Upscaling, "an Upscaling that may be more than a convolution (`F.interpolate("),
    (NeedsMore, "a NeedsMore that may be more than a convolution (forward(self, x, mask))"),
    (Residual, "a Residual that may be more than a convolution (`x + super().forward(x)`)"),
    (
        lambda: ResidualConv(C, C, 3, padding=1),
        "a ResidualConv that may be more than a convolution (`torch.add(x, super().forward(x))`)",
    ),
    (InPlaceResidual, "an InPlaceResidual that may be more than a convolution (`out.add_(x)`)"),
    (ByALambda, "a ByALambda that may be more than a convolution (its forward has no source)"),
    (ByAMethod, "a ByAMethod that may be more than a convolution (`x + self.conv(x)`)"),
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
        (lambda: nn.ModuleList([nn.BatchNorm2d(C), nn.BatchNorm2d(C)]), "a ModuleList"),
        (lambda: ModuleListDial([nn.BatchNorm2d(C), nn.Dropout2d()]), "a ModuleListDial"),
        (lambda: with_a_forward_put_on_it(nn.Sequential(conv(), conv())), "a Sequential"),
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


@pytest.mark.parametrize("trusted", [False, True])
def test_a_module_of_norms_whose_forward_does_more_ends_a_tower(trusted):
    layer = read_layer(Dial([nn.BatchNorm2d(C)]), trusted)
    assert layer.ends.startswith("a Dial that may be more than a norm or activation (`F.avg_pool2d(")
    assert not layer.is_convolution
