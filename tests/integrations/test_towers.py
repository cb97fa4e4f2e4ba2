"""integrations.towers: every layout of a tower is replaced, and what is refused."""

import re

import pytest
import torch
import torchvision
from foreign_layouts import C, ConvModule
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from ifr_fast import IFRHead, Unroll
from ifr_fast.integrations.towers import replace_towers

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


class Levels(Loop):
    """A feature pyramid's output convolutions."""

    def forward(self, x):
        return [self.convs[i](x) for i in range(4)]


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


def test_residual_blocks_are_no_tower():
    model = torchvision.models.resnet18(num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"no conv tower .* in ResNet"):
        replace_towers(model, groups=32)
    assert list(model.state_dict()) == keys


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


def test_a_list_whose_use_cannot_be_read_needs_to_be_named():
    scope = {"nn": nn}
    exec("class Hidden(nn.Module):\n def forward(self, x):\n  for m in self.convs: x = m(x)\n  return x", scope)
    model = scope["Hidden"]()
    model.convs = nn.ModuleList(conv() for _ in range(3))
    with pytest.raises(
        ValueError, match=r"convs: left alone, an unknown use, name it with `where`: Hidden.forward has no source"
    ):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs", **QUICK)] == ["convs.0"]


def test_a_container_with_a_forward_put_on_it_needs_to_be_named():
    model = nn.Sequential(conv(), conv(), conv())
    model.forward = model[1].forward
    with pytest.raises(
        ValueError, match=r"the model itself: left alone, an unknown use, .*: Sequential has a forward put on it"
    ):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "0", **QUICK)] == ["0"]


def test_branches_of_a_list_each_get_their_own_head():
    """As in mmdet's YOLOXHead, whose levels are passed to another function."""
    model = Levels()
    model.convs = nn.ModuleList(tower() for _ in range(4))
    with pytest.raises(ValueError, match=r"convs\.3: left alone, an unknown use"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs.*", **QUICK)] == [f"convs.{i}.0" for i in range(4)]


class TapsBelow(nn.Module):
    """An owner's owner that taps a Sequential."""

    def __init__(self):
        super().__init__()
        self.net = nn.Module()
        self.net.features = tower()

    def forward(self, x):
        outs = []
        for i, m in enumerate(self.net.features):
            x = m(x)
            if i in (2, 8):
                outs.append(x)
        return outs


class AlsoHandedOn(Loop):
    def levels(self, xs):
        return run(self.convs, xs)


def run(convs, xs):
    return [convs[i](x) for i, x in enumerate(xs)]


class AlsoAliased(Loop):
    def levels(self, xs):
        convs = self.convs
        return [convs[i](x) for i, x in enumerate(xs)]


class Unpacked(nn.Module):
    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(*(conv() for _ in range(4)))

    def forward(self, x):
        a, b, c, d = self.seq
        return d(c(b(a(x))))


@pytest.mark.parametrize(
    ("build", "where", "reason"),
    [
        (TapsBelow, None, r"not applied one after the other: TapsBelow\.forward: `for i, m in enumerate"),
        (TapsBelow, "net.features", r"not applied one after the other: TapsBelow\.forward: `for i, m in enumerate"),
        (AlsoHandedOn, None, r"unknown use, name it with `where`: AlsoHandedOn\.levels: `run\(self\.convs, xs\)`"),
        (AlsoAliased, None, r"unknown use, name it with `where`: AlsoAliased\.levels: `convs = self\.convs`"),
        (Unpacked, None, r"not applied one after the other: Unpacked\.forward: `a, b, c, d = self\.seq`"),
        (Unpacked, "seq", r"not applied one after the other: Unpacked\.forward: `a, b, c, d = self\.seq`"),
    ],
)
def test_what_is_not_understood_is_left_alone(build, where, reason):
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"left alone, .*{reason}"):
        replace_towers(model, where, **QUICK)
    assert list(model.state_dict()) == keys


class Residual(ConvModule):
    def forward(self, x):
        return x + super().forward(x)


def test_wrappers_that_may_do_more_need_to_be_named():
    model = Loop(*(Residual() for _ in range(4)))
    with pytest.raises(ValueError, match=r"convs\.0: left alone, a Residual that may be more .*x \+ super"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs", **QUICK)] == ["convs.0"]


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


def shared_with_an_attribute():
    model = Loop()
    model.first = model.convs[0].conv
    return model, None


def shared_with_own_norms():
    """mmdet's RTMDetSepBNHead: one set of convolutions, norms of its own for each level."""
    convs = [conv(), conv(), conv()]
    return nn.ModuleDict({k: nn.Sequential(*(nn.Sequential(c, nn.BatchNorm2d(C)) for c in convs)) for k in "ab"}), None


def shared_parameter():
    model = nn.Sequential(conv(), conv(), conv(), nn.Flatten(), conv(kernel=1, padding=0))
    model[4].bias = model[0].bias
    return model, None


def shared_by_two_containers(where=None):
    layers = [conv(), conv(), conv()]
    return nn.ModuleDict({"a": nn.Sequential(*layers), "b": nn.Sequential(*layers)}), where


@pytest.mark.parametrize(
    "build",
    [
        shared_with_an_attribute,
        shared_with_own_norms,
        shared_parameter,
        shared_by_two_containers,
        lambda: shared_by_two_containers("a"),
    ],
)
def test_towers_that_share_with_the_rest_are_refused(build):
    model, where = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="left alone, it shares parameters with"):
        replace_towers(model, where, **QUICK)
    assert list(model.state_dict()) == keys


def test_towers_with_hooks_are_refused():
    model = tower()
    model[3].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a Conv2d in it has hooks"):
        replace_towers(model, **QUICK)
