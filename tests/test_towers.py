"""integrations.towers: every layout of a tower is replaced, what is refused, what a new head takes over."""

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
from ifr_fast.integrations.layers import read_layer
from ifr_fast.integrations.towers import replace_towers

C = 8
QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


def block(*channels):
    return nn.Sequential(conv(*channels), nn.GroupNorm(2, channels[1] if channels else C), nn.ReLU())


def tower():
    return nn.Sequential(*(layer for _ in range(4) for layer in block()))


def heads(model):
    return [m for m in model.modules() if isinstance(m, IFRHead)]


class ConvModule(nn.Module):
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

    def __init__(self, norm=None):
        super().__init__(C, C, 3, padding=1)
        self.norm, self.activation = norm or nn.BatchNorm2d(C), F.relu

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
    "wrappers": lambda: nn.Sequential(*(ConvModule() for _ in range(4))),
    "normed convolutions": lambda: nn.Sequential(*(NormedConv() for _ in range(4))),
    "frozen norms": lambda: nn.Sequential(*itertools.chain(*((conv(), FrozenNorm2d()) for _ in range(4)))),
    "weight norm": lambda: nn.Sequential(*(weight_normed() for _ in range(4))),
    "named layers": NamedLayers,
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
        return super().forward(x)


class Residual(ConvModule):
    def forward(self, x):
        return x + super().forward(x)


class ResidualConv(NormedConv):
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


class OrderedConvModule(nn.Module):
    """The shape of mmcv's forward, whose sums are of positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.activate = conv(), nn.BatchNorm2d(C), nn.ReLU()
        self.order = ("conv", "norm", "act")

    @property
    def norm(self):
        return self.bn

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


class GuardedConv(NormedConv):
    """The shape of detectron2's forward."""

    def forward(self, x):
        if not torch.jit.is_scripting() and x.numel() == 0 and self.training:
            assert not isinstance(self.norm, nn.SyncBatchNorm)
        x = F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


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
    "ConvModule": (ConvModule, 1),
    "ConvModule of a NormedConv": (lambda: ConvModule(NormedConv(nn.Identity())), 1),
    "mmcv's ConvModule": (OrderedConvModule, 1),
    "detectron2's Conv2d": (lambda: GuardedConv(nn.BatchNorm2d(C)), 1),
    "NormedConv": (lambda: NormedConv(FrozenNorm2d()), 1),
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
BETWEEN += [lambda: nn.SyncBatchNorm(C), FrozenNorm2d, lambda: nn.Sequential(nn.BatchNorm2d(C), nn.ReLU())]


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
    (Upscaling, "an Upscaling that may be more than a convolution (`F.interpolate("),
    (NeedsMore, "a NeedsMore that may be more than a convolution (forward(self, x, mask)): name it with `where`"),
    (Residual, "a Residual that may be more than a convolution (`x + super().forward(x)`)"),
    (ResidualConv, "a ResidualConv that may be more than a convolution (`torch.add(x, super().forward(x))`)"),
    (InPlaceResidual, "an InPlaceResidual that may be more than a convolution (`out.add_(x)`)"),
    (ByAMethod, "a ByAMethod that may be more than a convolution (`self.apply_all(x)`)"),
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


def test_parameters_are_counted():
    model = nn.Sequential(*(block() for _ in range(4)))
    whole = sum(p.numel() for p in model.parameters())
    (replacement,) = replace_towers(model, **QUICK)
    assert replacement.parameters_before == whole == 4 * (C * C * 9 + C + 2 * C)
    assert replacement.parameters_after == sum(p.numel() for p in model.parameters())
    assert f"{whole:,} → {replacement.parameters_after:,}" in str(replacement)


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


def test_two_convolutions_are_replaced_only_where_named():
    model = nn.Sequential(*block(4, C), *block(), *block())
    with pytest.raises(ValueError, match=r"3: left alone, two convolutions, as many as an IFRHead has: name it"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "3", **QUICK)] == ["3"]


@pytest.mark.parametrize("odd", [conv(stride=2), conv(kernel=1, padding=0), nn.ConvTranspose2d(C, C, 2, 2)])
def test_other_convolutions_are_left_alone_and_said_so(odd):
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), conv(), odd)
    report = replace_towers(model, **QUICK)
    assert [name for name, _ in model.named_children()] == ["0", "5"]
    assert model[1] is odd
    assert [(skipped.path, skipped.reason) for skipped in report.skipped] == [("5", read_layer(odd).ends)]


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


@pytest.mark.parametrize("where", [None, "convs"])
def test_a_list_not_walked_in_order_is_refused(where):
    model = Levels()
    keys = list(model.state_dict())
    reason = r"not applied one after the other: Levels\.forward: `self\.convs\[i\]\(x\)`"
    with pytest.raises(ValueError, match=f"convs: left alone, its elements are {reason}"):
        replace_towers(model, where, **QUICK)
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


def two_heads():
    return nn.ModuleDict({"cls_head": Loop(), "reg_head": Loop(), "backbone": tower()})


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("*_head.convs", ["cls_head.convs.0", "reg_head.convs.0"]),
        ("reg_head", ["reg_head.convs.0"]),
        ("reg_head.convs.0", ["reg_head.convs.0"]),
        (["backbone", "cls*"], ["cls_head.convs.0", "backbone.0"]),
        (lambda path, module: isinstance(module, nn.ModuleList), ["cls_head.convs.0", "reg_head.convs.0"]),
        (lambda path, module: path == "backbone", ["backbone.0"]),
    ],
)
def test_where_selects(where, paths):
    model = two_heads()
    assert [r.path for r in replace_towers(model, where, **QUICK)] == paths
    assert len(heads(model)) == len(paths)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "mask_head",
            "'mask_head' leads to no conv tower of ModuleDict; its towers are at cls_head.convs.0, ",
        ),
        (["backbone", "REG_head"], "'REG_head' leads to no"),
        ("reg_head.last", r"'reg_head.last' leads to no .*\(it is a Conv2d\)"),
        (lambda path, module: False, "leads to no"),
        ([], "where: expected None, a glob"),
        ([3], "where: expected None, a glob"),
        (7, "where: expected None, a glob"),
    ],
)
def test_where_that_selects_nothing_is_an_error_and_changes_nothing(where, message):
    model = two_heads()
    with pytest.raises(ValueError, match=message):
        replace_towers(model, where, **QUICK)
    assert not heads(model)


def test_model_must_be_a_module():
    with pytest.raises(ValueError, match=r"model: expected an nn\.Module, got list"):
        replace_towers([conv(), conv()])


def test_a_tower_that_ifr_head_refuses_is_skipped_unless_named():
    model = nn.ModuleDict({"a": tower(), "b": nn.Sequential(*(conv(6, 6) for _ in range(4)))})
    with pytest.raises(ValueError, match=r"b\.0, 6 channels: .*groups"):
        replace_towers(model, ["a", "b"], **QUICK)
    assert not heads(model)
    report = replace_towers(model, **QUICK)
    assert [r.path for r in report] == ["a.0"]
    (skipped,) = report.skipped
    with pytest.raises(ValueError, match="groups") as refusal:
        IFRHead(6, **QUICK)
    assert (skipped.path, skipped.reason) == ("b.0", f"6 channels: {refusal.value}")


def test_a_refined_model_holds_no_tower():
    model = Loop()
    replace_towers(model, **QUICK)
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(model, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = tower().to(dtype)
    replace_towers(model, **QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, C, 4, 4, dtype=dtype)).dtype == dtype


def test_device_is_kept():
    model = tower().to("meta")
    replace_towers(model, **QUICK)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_memory_format_is_kept():
    model = tower().to(memory_format=torch.channels_last)
    replace_towers(model, **QUICK)
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1:] != (1, 1, 1)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    x = torch.randn(2, C, 5, 5).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_new_parameters_are_trainable(training):
    model = tower().train(training).requires_grad_(False)
    replace_towers(model, **QUICK)
    assert all(m.training is training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_ifr_kwargs_reach_the_head():
    model = tower()
    replace_towers(model, groups=2, solver={"type": "Anderson", "max_iter": 3}, warmup_steps=5)
    (head,) = heads(model)
    assert head.solver.max_iter == 3
    assert head.warmup_steps == 5
    assert head.block.gn1.num_groups == 2
