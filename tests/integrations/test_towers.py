"""integrations.towers: every layout of a tower is replaced, and the rest stays."""

import re

import pytest
import torch
import torchvision
from detectron2_layouts import C
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mmdet1_layouts import ConvModule
from small_towers import QUICK, Loop, block, conv, heads, tower
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers import replace_towers


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


class ForeignList(torch.nn.modules.container.ModuleList):
    """Like mmengine's ModuleList."""


def weight_normed():
    return torch.nn.utils.parametrizations.weight_norm(conv())


LAYOUTS = {
    "bare": lambda: nn.Sequential(*(conv(padding="same") for _ in range(4))),
    "Conv2dNormActivation": lambda: nn.Sequential(
        *(torchvision.ops.Conv2dNormActivation(C, C) for _ in range(4)), nn.Flatten()
    ),
    "nested": lambda: nn.Sequential(*(nn.Sequential(block()) for _ in range(4))),
    "one inside": lambda: nn.Sequential(nn.Sequential(*(block() for _ in range(4))), nn.ReLU()),
    "nested pairs": lambda: nn.Sequential(*(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()) for _ in "ab")),
    "wrappers": lambda: nn.Sequential(*(ConvModule() for _ in range(4))),
    "weight norm": lambda: nn.Sequential(*(weight_normed() for _ in range(4))),
    "loop": Loop,
    "loop over a subclass": lambda: Loop(convs=ForeignList(ConvModule() for _ in range(4))),
    "loop over a Sequential": lambda: Loop(convs=nn.Sequential(*(ConvModule() for _ in range(4)))),
    "bare loop": BareLoop,
    "range": RangeLoop,
    "zip": ZipLoop,
}


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
    assume("".join(groups).count("u") <= 4)  # each makes the map four times as large
    flat = []
    for group in groups:
        layers = [LETTERS[letter]() for letter in group]
        inside = len(layers) > 1 and not set(group) - set("crn")
        flat += [(nn.Sequential(*layers), group)] if inside else list(zip(layers, group, strict=True))
    container = nn.ModuleList if as_list else nn.Sequential
    model = Loop(convs=container([m for m, _ in flat]) if as_list else container(*(m for m, _ in flat))).eval()
    text = "".join(letters for _, letters in flat)
    runs = [run.group() for run in re.finditer(r"c[crn]*", text) if run.group().count("c") > 2]
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


def test_convolution_that_changes_the_width_stays_with_its_norm():
    model = nn.Sequential(*block(4, C), *block(), *block(), *block(), conv(C, 3))
    first, norm, relu, last = model[0], model[1], model[2], model[-1]
    report = replace_towers(model, **QUICK)
    assert [name for name, _ in model.named_children()] == ["0", "1", "2", "3", "12"]
    assert (model[0], model[1], model[2], model[4]) == (first, norm, relu, last)
    assert [(s.path, s.reason) for s in report.skipped] == [
        ("0", "a 3×3 convolution with 4 → 8 channels"),
        ("12", "a 3×3 convolution with 8 → 3 channels"),
    ]
    assert model(torch.randn(1, 4, 6, 6)).shape == (1, 3, 6, 6)


STANDING = [nn.Dropout2d, lambda: nn.Upsample(scale_factor=2), lambda: nn.MaxPool2d(3, 1, 1), nn.Softmax2d]


@pytest.mark.parametrize("between", STANDING)
def test_what_stands_between_two_towers_stays(between):
    middle = between()
    model = nn.Sequential(*(conv() for _ in "abc"), middle, *(conv() for _ in "abc")).eval()
    x = torch.randn(1, C, 6, 6)
    shape = model(x).shape
    report = replace_towers(model, **QUICK)
    assert [r.path for r in report] == ["0", "4"]
    assert model[1] is middle
    assert model(x).shape == shape


class ResizedAt(Loop):
    """mmdet's SOLOHead: resized before one of the convolutions."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        for i, layer in enumerate(self.convs):
            if i == self.at:
                x = F.interpolate(x, scale_factor=2.0)
            x = layer(x)
        return x


@pytest.mark.parametrize(("at", "paths"), [(0, ["convs.0"]), (1, ["convs.1"]), (3, ["convs.0"])])
def test_a_resize_inside_the_loop_splits_the_tower(at, paths):
    model = ResizedAt(at)
    assert [r.path for r in replace_towers(model, **QUICK)] == paths
    assert model(torch.randn(1, C, 3, 3)).shape == (1, C, 6, 6)


def test_a_container_reached_by_two_paths_is_replaced_once():
    model = nn.Module()
    model.a = nn.ModuleDict({"tower": tower()})
    model.b = model.a
    (replacement,) = replace_towers(model, **QUICK)
    assert replacement.path == "a.tower.0"
    assert model.b.tower[0] is model.a.tower[0] is heads(model)[0]


def test_a_stack_tied_to_itself_is_a_tower():
    tied, relu = conv(), nn.ReLU()
    (replacement,) = replace_towers(nn.Sequential(tied, relu, tied, relu, tied, relu), **QUICK)
    assert replacement.convolutions == 3
    assert replacement.parameters_before == C * C * 9 + C
