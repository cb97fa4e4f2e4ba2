"""Small towers for tests of replace_towers."""

from detectron2_layouts import C
from mmdet1_layouts import ConvModule
from torch import nn

from ifr_fast import IFRHead, Unroll

QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


def block(*channels):
    return nn.Sequential(conv(*channels), nn.GroupNorm(2, channels[1] if channels else C), nn.ReLU())


def tower():
    return nn.Sequential(*(layer for _ in range(4) for layer in block()))


def heads(model):
    return [m for m in model.modules() if isinstance(m, IFRHead)]


class Loop(nn.Module):
    def __init__(self, *layers, convs=None):
        super().__init__()
        self.convs = nn.ModuleList(layers or (ConvModule() for _ in range(4))) if convs is None else convs
        self.last = conv(C, 3, 1, 0)

    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        return self.last(x)


class Called(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.Sequential(*(conv() for _ in range(4)))


class Averages(Called):
    def forward(self, x):
        return self.convs(x) / len(self.convs)


class Wrapper(nn.Module):
    """A convolution and a norm that has the name of a tensor's method."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = conv(), nn.GroupNorm(2, C), nn.ReLU()


class Named(Wrapper):
    def forward(self, x):
        return self.act(self.norm(self.conv(x)))
