"""integrations.walks: which loops pass one value through a list's elements in order, read from their source."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.walks import read_walk


class Owner(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4))
        self.others = nn.ModuleList(nn.Conv2d(4, 4, 1) for _ in range(4))
        self.number, self.at = 4, 2
        self.relu, self.gelu = nn.ReLU(), nn.GELU()


class Plain(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


class Parenthesised(Owner):
    """mmdet's SOLOHead; and a second loop that calls nothing."""

    def init_weights(self):
        for conv in self.convs:
            nn.init.zeros_(conv.weight)

    def forward(self, x):
        for conv in (self.convs):  # fmt: skip
            x = conv(x)
        return x


class OutsideReLU(Owner):
    """mmdet's MaskIoUHead."""

    def forward(self, x):
        for conv in self.convs:
            x = self.relu(conv(x))
        return x


class FunctionalReLU(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


class Enumerated(Owner):
    """mmdet's SOLOV2Head."""

    def forward(self, x):
        for i, conv in enumerate(self.convs):  # noqa: B007
            x = conv(x)
        return x


class Length(Owner):
    def forward(self, x):
        for i in range(len(self.convs)):
            x = self.convs[i](x)
        return x


class Number(Owner):
    """mmdet's FusedSemanticHead."""

    def forward(self, x):
        for i in range(self.number):
            x = self.convs[i](x)
        return x


class Zipped(Owner):
    """mmdet's DecoupledSOLOHead."""

    def forward(self, x, y):
        for other, conv in zip(self.others, self.convs):  # noqa: B905
            y = other(y)
            x = conv(x)
        return x, y


class PerLevel(Owner):
    """mmdet's retinanet: the same tower over every level."""

    def forward(self, feats):
        return [self.forward_single(x) for x in feats]

    def forward_single(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


class OneForEachLevel(Owner):
    def forward(self, x):
        return [self.convs[i](x[i]) for i in range(4)]


class Overridden(OneForEachLevel):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


class Extended(Plain):
    def forward(self, x):
        return super().forward(x) * 2


class ExtendedForEachLevel(OneForEachLevel):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return super().forward(x)


class PickedByIndex(Owner):
    """torchvision's FeaturePyramidNetwork."""

    def forward(self, x, level):
        for i, conv in enumerate(self.convs):
            if i == level:
                x = conv(x)
        return x


class Branches(Owner):
    def forward(self, x):
        return sum(conv(x) for conv in self.convs)


class ZippedWithLevels(Owner):
    """mmdet's SSDHead."""

    def forward(self, feats):
        out = []
        for x, conv in zip(feats, self.convs):  # noqa: B905
            out.append(conv(x))
        return out


class Collected(Owner):
    """mmdet's TOODHead."""

    def forward(self, x):
        stages = []
        for conv in self.convs:
            x = conv(x)
            stages.append(x)
        return torch.cat(stages, 1)


class AllButOne(Owner):
    def forward(self, x):
        for conv in self.convs[:-1]:
            x = conv(x)
        return x


class LastByItself(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x + self.convs[-1](x)


class Counted(Owner):
    def forward(self, x):
        for i in range(3):
            x = self.convs[i](x)
        return x


class LeavesEarly(Owner):
    def forward(self, x):
        for i, conv in enumerate(self.convs):
            if i == 2:
                break
            x = conv(x)
        return x


class OtherNorms(Owner):
    def forward(self, x):
        for conv, norm in zip(self.convs, self.others):  # noqa: B905
            x = norm(conv(x))
        return x


class OutsideGELU(Owner):
    """Not a ReLU: what takes a vacated place would apply it once more."""

    def forward(self, x):
        for conv in self.convs:
            x = self.gelu(conv(x))
        return x


class Residual(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = x + conv(x)
        return x


class AlsoElsewhere(Owner):
    def forward(self, x):
        first, others = x, []
        for conv in self.convs:
            x = conv(x)
            others.append(conv(first))
        return torch.stack([x, *others])


class ChangedAfter(Owner):
    def forward(self, x):
        for i, conv in enumerate(self.convs):
            x = conv(x)
            if i == 1:
                x = x * 2
        return x


class PassedOn(Owner):
    """mmdet's YOLOXHead."""

    def forward(self, feats):
        return list(map(self.forward_single, feats, self.convs))

    def forward_single(self, x, conv):
        return conv(x)


class Unused(Owner):
    def forward(self, x):
        for other in self.others:
            x = other(x)
        return x


IN_ORDER = [Plain, Parenthesised, OutsideReLU, FunctionalReLU, Enumerated, Length, Number, Zipped, PerLevel]
IN_ORDER += [Overridden, Extended]
OTHERWISE = [OneForEachLevel, ExtendedForEachLevel, PickedByIndex, Branches, ZippedWithLevels, Collected]
OTHERWISE += [AllButOne, LastByItself, Counted, LeavesEarly, OtherNorms, OutsideGELU, Residual, AlsoElsewhere]
OTHERWISE += [ChangedAfter]


@pytest.mark.parametrize(
    ("kind", "in_order"),
    [(kind, True) for kind in IN_ORDER]
    + [(kind, False) for kind in OTHERWISE]
    + [(kind, None) for kind in (PassedOn, Unused)],
)
def test_walk(kind, in_order):
    walk = read_walk(kind(), "convs", 4)
    assert walk.in_order is in_order, walk.evidence
    assert not walk.breaks


def test_evidence_names_the_method_and_the_loop():
    assert read_walk(Branches(), "convs", 4).evidence == "Branches.forward: `(conv(x) for conv in self.convs)`"


class ResizedAt(Owner):
    """mmdet's SOLOHead."""

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            if i == self.at:
                x = F.interpolate(x, scale_factor=2.0)
            x = conv(x)
        return x


class ResizedAtTwo(Owner):
    def forward(self, x):
        for i, conv in enumerate(self.convs):
            if i == 3:
                x = F.max_pool2d(x, 2)
            if i == 1:
                x = F.interpolate(x, scale_factor=2.0)
            x = conv(x)
        return x


@pytest.mark.parametrize(("kind", "breaks"), [(ResizedAt, {2}), (ResizedAtTwo, {1, 3})])
def test_breaks(kind, breaks):
    walk = read_walk(kind(), "convs", 4)
    assert walk.in_order
    assert walk.breaks == breaks


class Unreadable(Owner):
    exec("def forward(self, x):\n    for conv in self.convs:\n        x = conv(x)\n    return x")


def test_without_source_nothing_is_known():
    assert read_walk(Unreadable(), "convs", 4).in_order is None


class Levels(Owner):
    """mmdet's RetinaSepBNHead."""

    def forward(self, feats):
        out = []
        for level, x in enumerate(feats):
            for conv in self.convs[level]:
                x = conv(x)
            out.append(x)
        return out


@pytest.mark.parametrize(("depth", "in_order"), [(0, False), (1, True)])
def test_lists_inside_a_list(depth, in_order):
    assert read_walk(Levels(), "convs", 4, depth).in_order is in_order


class Named(nn.Sequential):
    """detectron2's MaskRCNNConvUpsampleHead."""

    def layers(self, x):
        for layer in self:
            x = layer(x)
        return x

    def forward(self, x):
        return {"mask": self.layers(x)}


class Super(nn.Sequential):
    def forward(self, x):
        x = super().forward(x)
        return x.flatten(1)


class Dense(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


class ByName(nn.Sequential):
    def forward(self, x):
        return self.first(self.second(x))


class Cycling(nn.ModuleList):
    """detectron2's CycleBatchNormList."""

    def forward(self, x):
        return self[0](x)


@pytest.mark.parametrize(
    ("kind", "in_order"), [(Named, True), (Super, True), (Dense, False), (ByName, False), (Cycling, False)]
)
def test_a_container_that_walks_itself(kind, in_order):
    container = kind()
    container.add_module("first", nn.Conv2d(4, 4, 3))
    container.add_module("second", nn.Conv2d(4, 4, 3))
    assert read_walk(container, None, 2).in_order is in_order
