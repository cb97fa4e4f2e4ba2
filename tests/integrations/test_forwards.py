"""integrations.towers.forwards: whether a module is more than a layer of a tower is read from what it computes."""

from functools import partial

import pytest
import torch
from detectron2_layouts import C
from mmdet1_layouts import ConvModule
from small_towers import Loop, conv
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers import replace_towers
from ifr_fast.integrations.towers.layers import Layer, read_layer


def swish(x):
    return x * torch.sigmoid(x)


def halved(x):
    return F.max_pool2d(x, 2)


class Swish(nn.Module):
    def forward(self, x):
        return swish(x)


class HardSwish(nn.Module):
    def forward(self, x):
        y = F.relu6(x + 3) / 6
        return y * x


class PixelNorm(nn.Module):
    def forward(self, x):
        mean = (x * x).mean(1, keepdim=True)
        return x * torch.rsqrt(mean + 1e-6)


class ChannelNorm(nn.Module):
    """Statistics over the channels of each pixel, as detectron2's and ConvNeXt's LayerNorm."""

    def __init__(self, channels=C):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class LastAxisNorm(nn.LayerNorm):
    """torchvision's and timm's LayerNorm2d."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class SyncedNorm(nn.BatchNorm2d):
    """The shape of detectron2's NaiveSyncBatchNorm."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        vector = torch.cat([torch.mean(x, dim=[0, 2, 3]), torch.mean(x * x, dim=[0, 2, 3])], dim=0)
        mean, square = torch.split(vector, x.shape[1])
        scale = self.weight * torch.rsqrt(square - mean * mean + self.eps)
        return x * scale.reshape(1, -1, 1, 1) + (self.bias - mean * scale).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    "build", [Swish, HardSwish, PixelNorm, ChannelNorm, lambda: LastAxisNorm(C), lambda: SyncedNorm(C), nn.PReLU]
)
def test_norms_and_activations_of_any_name_stand_between(build):
    assert read_layer(build()) == Layer()


class PoolReLU(nn.Module):
    def forward(self, x):
        return F.relu(F.max_pool2d(x, 2))


class GlobalNorm(nn.Module):
    def forward(self, x):
        return x.mean((2, 3), keepdim=True)


class GatedReLU(nn.Module):
    def forward(self, x):
        a, b = x.chunk(2, 1)
        return F.relu(a) * b


class CReLU(nn.Module):
    def forward(self, x):
        return torch.cat([F.relu(x), F.relu(-x)], 1)


class TransposedNorm(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


class StridedNorm(nn.Module):
    def forward(self, x):
        return x[:, :, ::2, ::2]


class ByAFunctionReLU(nn.Module):
    def forward(self, x):
        return halved(F.relu(x))


class DropReLU(nn.Module):
    def forward(self, x):
        return F.dropout(F.relu(x), 0.5, self.training)


halving = False


class HidesAGlobalReLU(nn.Module):
    def forward(self, x):
        halving = self.training
        if halving:
            x = F.max_pool2d(x, 2)
        return F.relu(x)


class ReLUAndNorm(nn.Module):
    def forward(self, x):
        return F.relu(x), x


class TwoInputsNorm(nn.Module):
    def forward(self, x, style):
        return x * style


class MaxReLU(nn.MaxPool2d):
    """torch's forward, and that of no norm."""


class DeconvBNReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.deconv, self.norm = nn.ConvTranspose2d(C, C, 2, stride=2), nn.BatchNorm2d(C)

    def forward(self, x):
        return F.relu(self.norm(self.deconv(x)))


class PositionNorm(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(C, 8, 8))

    def forward(self, x):
        return x + self.table


class LinearReLU(nn.Linear):
    def forward(self, x):
        return F.relu(super().forward(x.transpose(1, 3)).transpose(1, 3))


class CarriedReLU(nn.Module):
    def forward(self, x):
        y = first = second = third = x.new_zeros(1)
        for step in range(4):
            if step == 3:
                y = F.max_pool2d(third, 2)
            third = second
            second = first
            first = x
        return F.relu(x) + y.mean()


MORE = [
    CarriedReLU,
    PoolReLU,
    GlobalNorm,
    CReLU,
    TransposedNorm,
    StridedNorm,
    ByAFunctionReLU,
    DropReLU,
    ReLUAndNorm,
    GatedReLU,
]
MORE += [
    HidesAGlobalReLU,
    TwoInputsNorm,
    lambda: MaxReLU(2),
    DeconvBNReLU,
    PositionNorm,
    lambda: LinearReLU(C, C),
    nn.GLU,
]


@pytest.mark.parametrize("trusted", [False, True])
@pytest.mark.parametrize("build", MORE)
def test_what_computes_more_is_no_norm_or_activation_whatever_its_name(build, trusted):
    layer = read_layer(build(), trusted)
    assert layer.ends
    assert "name it with `where`" not in layer.ends


@pytest.mark.parametrize("where", [None, "convs"])
@pytest.mark.parametrize("place", [2, 4])
@pytest.mark.parametrize("build", [PoolReLU, DeconvBNReLU, StridedNorm])
def test_it_stays_in_a_tower_and_behind_one(build, place, where):
    layers = [conv() for _ in range(4)]
    layers.insert(place, build())
    model = Loop(convs=nn.Sequential(*layers))
    x = torch.randn(1, C, 8, 8)
    shape = model(x).shape
    try:
        replace_towers(model, where, groups=4)
    except ValueError:
        assert place == 2
        assert where is None
    assert model(x).shape == shape


class Empty(nn.Conv2d):
    """The shape of detectron2 0.1's and mmcv 2's."""

    def forward(self, x):
        if x.numel() == 0 and torch.__version__ > "1":
            sides = zip(x.shape[-2:], self.padding, self.kernel_size, self.stride, strict=True)
            size = [(n + 2 * p - k) // s + 1 for n, p, k, s in sides]
            return x.new_empty([x.shape[0], self.out_channels, *size])
        return super().forward(x)


class Standardized(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean(dim=(1, 2, 3), keepdim=True)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Flagged(ConvModule):
    def __init__(self, scaled=False):
        super().__init__()
        self.scaled, self.norm_first = scaled, False

    def forward(self, x):
        if self.scaled:
            x = F.interpolate(x, scale_factor=2)
        return F.silu(super().forward(x), inplace=True)


@pytest.mark.parametrize(
    "build", [partial(Empty, C, C, 3, padding=1), partial(Standardized, C, C, 3, padding=1), Flagged]
)
def test_wrappers_and_convolutions_that_are_no_more(build):
    layer = read_layer(build())
    assert len(layer.convolutions) == 1, layer.ends


class Unpadded(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias)


class Repeated(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(x, self.weight, self.bias, *self.how)


class Kept(ConvModule):
    def forward(self, x):
        self.last = super().forward(x)
        return self.last


class Late(ConvModule):
    def forward(self, x):
        identity = x
        x = super().forward(x)
        x += identity
        return x


class Gate(ConvModule):
    def forward(self, x):
        return x * torch.sigmoid(self.conv(x))


CERTAIN = [partial(Flagged, True), Late, Gate, partial(Unpadded, C, C, 3, padding=1)]
NAMED = [Kept, partial(Repeated, C, C, 3, padding=1)]


@pytest.mark.parametrize(("build", "certain"), [(b, True) for b in CERTAIN] + [(b, False) for b in NAMED])
def test_a_name_trusts_only_what_the_source_does_not_tell(build, certain):
    untrusted, trusted = read_layer(build()), read_layer(build(), trusted=True)
    assert untrusted.ends.endswith("name it with `where`") is not certain
    assert bool(trusted.ends) is certain


def test_without_source_a_name_is_needed_and_a_tensor():
    scope = {"nn": nn}
    exec("class Hidden(nn.Module):\n def forward(self, x):\n  return x", scope)
    plain, tensor = scope["Hidden"](), scope["Hidden"]()
    tensor.register_buffer("scale", torch.ones(C))
    assert [bool(read_layer(m, t).ends) for m in (plain, tensor) for t in (False, True)] == [True, True, True, False]
