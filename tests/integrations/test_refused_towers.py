"""integrations.towers: what is left alone, and what must be named."""

import pytest
import torch
import torch.utils.checkpoint
import torchvision
from detectron2_layouts import C
from mmdet1_layouts import ConvModule
from small_towers import QUICK, Loop, conv, tower
from torch import nn

from ifr_fast.integrations.towers import replace_towers


class Levels(Loop):
    """A feature pyramid's output convolutions."""

    def forward(self, x):
        return [self.convs[i](x) for i in range(4)]


def test_residual_blocks_are_no_tower():
    model = torchvision.models.resnet18(num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"no conv tower .* in ResNet"):
        replace_towers(model, groups=32)
    assert list(model.state_dict()) == keys


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
        (AlsoAliased, None, r"not applied one after the other: AlsoAliased\.levels: `convs\[i\]\(x\)`"),
        (AlsoAliased, "convs", r"not applied one after the other: AlsoAliased\.levels: `convs\[i\]\(x\)`"),
        (Unpacked, None, r"called one by one, not in one loop: Unpacked\.forward: `a, b, c, d = self\.seq`"),
        (Unpacked, "seq", r"called one by one, not in one loop: Unpacked\.forward: `a, b, c, d = self\.seq`"),
    ],
)
def test_what_is_not_understood_is_left_alone(build, where, reason):
    model = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=f"left alone, .*{reason}"):
        replace_towers(model, where, **QUICK)
    assert list(model.state_dict()) == keys


class Checked(ConvModule):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(super().forward, x)


def test_wrappers_that_may_do_more_need_to_be_named():
    model = Loop(*(Checked() for _ in range(4)))
    with pytest.raises(ValueError, match=r"convs\.0: left alone, a Checked that may be more .*checkpoint.*: name it"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs", **QUICK)] == ["convs.0"]


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
