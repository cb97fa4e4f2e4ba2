"""integrations.towers: a tower in every layout is replaced, everything else stays as it was."""

import itertools
import re

import pytest
import torch
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ifr_fast import IFRHead, Unroll
from ifr_fast.integrations.towers import replace_towers

C = 8
QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


def block(*channels, **kwargs):
    return nn.Sequential(conv(*channels, **kwargs), nn.GroupNorm(2, channels[1] if channels else C), nn.ReLU())


class Wrapper(nn.Module):
    """Like mmcv's ConvModule."""

    def __init__(self, layer=None, norm=None):
        super().__init__()
        self.conv = layer or conv()
        self.bn = norm or nn.BatchNorm2d(C)
        self.activate = nn.ReLU()

    def forward(self, x):
        return self.activate(self.bn(self.conv(x)))


class NormedConv(nn.Conv2d):
    """Like detectron2's Conv2d."""

    def __init__(self):
        super().__init__(C, C, 3, padding=1)
        self.norm, self.activation = nn.BatchNorm2d(C), F.relu

    def forward(self, x):
        return self.activation(self.norm(super().forward(x)))


class FrozenNorm2d(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1, C, 1, 1), 2.0))

    def forward(self, x):
        return x * self.scale


class Loop(nn.Module):
    def __init__(self, *layers, convs=None):
        super().__init__()
        self.convs = nn.ModuleList(layers or (Wrapper() for _ in range(4))) if convs is None else convs
        self.last = conv(C, 3, 1, 0)

    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        return self.last(x)


class BareLoop(Loop):
    """Like mmdet's MaskIoUHead: plain convolutions, the activation outside."""

    def __init__(self):
        super().__init__(*(conv() for _ in range(4)))
        self.relu = nn.ReLU()

    def forward(self, x):
        for layer in self.convs:
            x = self.relu(layer(x))
        return self.last(x)


class RangeLoop(Loop):
    """Like mmdet's FusedSemanticHead."""

    num_convs = 4

    def forward(self, x):
        for i in range(self.num_convs):
            x = self.convs[i](x)
        return self.last(x)


class ZipLoop(Loop):
    """Like mmdet's DecoupledSOLOHead."""

    def __init__(self):
        super().__init__()
        self.others = nn.ModuleList(conv(kernel=1, padding=0) for _ in range(4))

    def forward(self, x):
        y = x
        for layer, other in zip(self.convs, self.others, strict=True):
            x = layer(x)
            y = other(y)
        return self.last(x + y)


class ListOfLists(nn.Module):
    """Like mmdet's RetinaSepBNHead."""

    def __init__(self):
        super().__init__()
        self.levels = nn.ModuleList(nn.ModuleList(Wrapper() for _ in range(4)) for _ in range(1))

    def forward(self, x):
        for i in range(1):
            for layer in self.levels[i]:
                x = layer(x)
        return x


class NamedLayers(nn.Sequential):
    """Like detectron2's MaskRCNNConvUpsampleHead."""

    def __init__(self):
        super().__init__()
        for k in range(4):
            self.add_module(f"mask_fcn{k + 1}", NormedConv())
        self.deconv = nn.ConvTranspose2d(C, C, 2, stride=2)
        self.add_module("deconv_relu", nn.ReLU())
        self.predictor = conv(C, 3, 1, 0)

    def layers(self, x):
        for layer in self:
            x = layer(x)
        return x

    def forward(self, x):
        return {"mask": self.layers(x)}["mask"]


class CallableList(nn.ModuleList):
    def forward(self, x):
        for layer in self:
            x = layer(x)
        return x


class ForeignList(torch.nn.modules.container.ModuleList):
    """Like mmengine's ModuleList."""


def weight_normed():
    return torch.nn.utils.parametrizations.weight_norm(conv())


LAYOUTS = {
    "flat": lambda: nn.Sequential(*itertools.chain(*((conv(), nn.ReLU()) for _ in range(4)))),
    "AdelaiDet": lambda: nn.Sequential(*itertools.chain(*(block().children() for _ in range(4)))),
    "bare": lambda: nn.Sequential(*(conv(padding="same") for _ in range(4))),
    "Conv2dNormActivation": lambda: nn.Sequential(
        *(torchvision.ops.Conv2dNormActivation(C, C) for _ in range(4)), nn.Flatten()
    ),
    "nested": lambda: nn.Sequential(*(nn.Sequential(block()) for _ in range(4))),
    "one inside": lambda: nn.Sequential(nn.Sequential(*(block() for _ in range(4))), nn.ReLU()),
    "nested pairs": lambda: nn.Sequential(*(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()) for _ in "ab")),
    "wrappers": lambda: nn.Sequential(*(Wrapper() for _ in range(4))),
    "normed convolutions": lambda: nn.Sequential(*(NormedConv() for _ in range(4))),
    "frozen norms": lambda: nn.Sequential(*itertools.chain(*((conv(), FrozenNorm2d()) for _ in range(4)))),
    "weight norm": lambda: nn.Sequential(*(weight_normed() for _ in range(4))),
    "named layers": NamedLayers,
    "callable list": lambda: CallableList(conv() for _ in range(4)),
    "loop": Loop,
    "loop over a subclass": lambda: Loop(convs=ForeignList(Wrapper() for _ in range(4))),
    "loop over a Sequential": lambda: Loop(convs=nn.Sequential(*(Wrapper() for _ in range(4)))),
    "bare loop": BareLoop,
    "range": RangeLoop,
    "zip": ZipLoop,
    "list of lists": ListOfLists,
}


def heads(model):
    return [m for m in model.modules() if isinstance(m, IFRHead)]


def replaced_key(key, report):
    return any(key.startswith(f"{layer}.") for r in report for layer in r.layers)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gets_one_head_and_keeps_the_rest(layout):
    model = LAYOUTS[layout]().eval()
    containers = {name: type(m) for name, m in model.named_modules()}
    lengths = {name: len(m) for name, m in model.named_modules() if isinstance(m, nn.ModuleList)}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    x = torch.randn(2, C, 5, 6)
    shape = model(x).shape

    report = replace_towers(model, **QUICK)

    (replacement,) = report
    assert heads(model) == [model.get_submodule(replacement.path)]
    assert (replacement.channels, replacement.convolutions) == (C, 4)
    assert model(x).shape == shape
    after = model.state_dict()
    outside = {k for k in before if not replaced_key(k, report)}
    assert {k for k in after if not k.startswith(f"{replacement.path}.")} == outside
    assert all(torch.equal(after[k], before[k]) for k in outside)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Sequential, nn.ModuleList)) and not name.startswith(replacement.path):
            assert type(module) is containers[name]
            assert len(module) == lengths.get(name, len(module))


LETTERS = {
    "c": conv,
    "r": nn.ReLU,
    "n": lambda: nn.GroupNorm(2, C),
    "d": nn.Dropout2d,
    "p": lambda: nn.AvgPool2d(2, ceil_mode=True),
    "u": lambda: nn.Upsample(scale_factor=2),
    "k": lambda: conv(kernel=1, padding=0),
    "s": lambda: conv(stride=2),
}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text("ccccrrnndpuks", min_size=1, max_size=4), min_size=1, max_size=5), st.booleans())
def test_random_layouts(groups, as_list):
    """Flat layers among nested Sequentials of tower layers: runs are what a regular expression finds."""
    flat = []
    for group in groups:
        layers = [LETTERS[letter]() for letter in group]
        inside = len(layers) > 1 and not set(group) - set("crn")
        flat += [(nn.Sequential(*layers), group)] if inside else list(zip(layers, group, strict=True))
    container = nn.ModuleList if as_list else nn.Sequential
    model = Loop(convs=container([m for m, _ in flat]) if as_list else container(*(m for m, _ in flat))).eval()
    text = "".join(letters for _, letters in flat)
    runs = [run.group() for run in re.finditer(r"c[crn]*", text) if run.group().count("c") > 1]
    x = torch.randn(1, C, 4, 4)
    shape = model(x).shape
    before = {k: v.clone() for k, v in model.state_dict().items()}

    if not runs:
        with pytest.raises(ValueError, match="no conv tower"):
            replace_towers(model, **QUICK)
        assert model.state_dict().keys() == before.keys()
        return
    report = replace_towers(model, **QUICK)
    assert sum(r.convolutions for r in report) == sum(run.count("c") for run in runs)
    assert len(report) == len(runs) == len(heads(model))
    after = model.state_dict()
    outside = [k for k in before if not replaced_key(k, report)]
    assert all(torch.equal(before[k], after[k]) for k in outside)
    assert len(outside) == len([k for k in after if not any(k.startswith(f"{r.path}.") for r in report)])
    assert model(x).shape == shape
