"""integrations.towers.uses: which loops pass one value through a list's elements in order, read from their source."""

import pytest
import torch
from loop_owners import OneForEachLevel, Owner, Plain
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers.uses import read_use


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


class InPlaceReLU(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True)
        return x


class ReLUAndMore(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x), inplace=True) + F.relu(x)
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


class LeftOver(Owner):
    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return conv(x)


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


class HandedOn(Plain):
    def levels(self, xs):
        return run(self.convs, xs)


def run(convs, xs):
    return [conv(x) for conv, x in zip(convs, xs)]  # noqa: B905


class ByGetattr(Plain):
    def tap(self, x):
        return getattr(self, "convs")[0](x)  # noqa: B009


class TappedByBase(OneForEachLevel):
    """The base's forward may be called: every method counts."""

    def forward(self, x):
        for conv in self.convs:
            x = conv(x)
        return x


class Setup(Plain):
    """What only the construction reaches runs before any input."""

    def __init__(self):
        super().__init__()
        self._fill()

    def _fill(self):
        self.convs[0].weight.data.zero_()
        self._fill_rest()

    def _fill_rest(self):
        [conv.weight.data.zero_() for conv in self.convs[1:]]

    def init_weights(self):
        nn.init.zeros_(self.convs[-1].bias)


class Asked(Plain):
    def describe(self):
        return None if self.convs is None else len(self.convs)


class ZippedShort(Owner):
    def __init__(self):
        super().__init__()
        self.others = self.others[:2]

    def forward(self, x):
        for conv, other in zip(self.convs, self.others):  # noqa: B007, B905
            x = conv(x)
        return x


class Renumbered(Owner):
    def forward(self, x):
        for i, conv in enumerate(self.convs, 1):
            if i == 2:
                x = F.max_pool2d(x, 2)
            x = conv(x)
        return x


class ChangedByAnotherName(Owner):
    """What doubles an element's input in place would double an IFRHead's output."""

    def forward(self, x):
        y = x
        for conv in self.convs:
            x = y
            y = conv(x)
            x *= 2
        return y


class TurnsCounted(Owner):
    def forward(self, x):
        turns = 0
        for conv in self.convs:
            x = conv(x)
            turns += 1
        return x, turns


IN_ORDER = [Plain, OutsideReLU, FunctionalReLU, InPlaceReLU, Enumerated, Length, Number, Zipped, Setup, Asked]
IN_ORDER += [TurnsCounted]
OTHERWISE = [OneForEachLevel, PickedByIndex, Branches, ZippedWithLevels, Collected, LastByItself, Counted, LeavesEarly]
OTHERWISE += [ReLUAndMore, LeftOver, OtherNorms, OutsideGELU, Residual, ChangedAfter, TappedByBase]
OTHERWISE += [ChangedByAnotherName]
UNKNOWN = [PassedOn, Unused, AllButOne, HandedOn, ByGetattr]


@pytest.mark.parametrize(
    ("kind", "in_order"),
    [(kind, True) for kind in IN_ORDER] + [(kind, False) for kind in OTHERWISE] + [(kind, None) for kind in UNKNOWN],
)
def test_use(kind, in_order):
    use = read_use(kind(), "convs")
    assert use.in_order is in_order, use.reason
    assert not use.breaks
    assert bool(use.reason) is (in_order is not True)


@pytest.mark.parametrize("kind", [ZippedShort, Renumbered])
def test_near_misses_are_not_taken_for_in_order(kind):
    assert not read_use(kind(), "convs").in_order


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (
            Branches,
            "its elements are not applied one after the other: Branches.forward: `(conv(x) for conv in self.convs)`",
        ),
        (HandedOn, "an unknown use, name it with `where`: HandedOn.levels: `run(self.convs, xs)`"),
        (Unused, "no source shows how its elements are applied: name it with `where`"),
    ],
)
def test_reason_names_the_method_and_the_line(kind, reason):
    assert read_use(kind(), "convs").reason.startswith(reason)


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
    use = read_use(kind(), "convs")
    assert use.in_order
    assert use.breaks == breaks


class Unreadable(Owner):
    exec("def forward(self, x):\n    for conv in self.convs:\n        x = conv(x)\n    return x")


def test_without_source_nothing_is_known():
    assert read_use(Unreadable(), "convs").in_order is None
