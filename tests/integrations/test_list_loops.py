"""integrations.towers.uses: plain lists that a module keeps beside its named layers."""

import pytest
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers.uses import may_be_read, read_list_use


class Lists(nn.Module):
    """A list beside the module tree."""

    def __init__(self):
        super().__init__()
        self.convs = []
        for k in range(4):
            self.add_module(f"conv{k}", nn.Conv2d(4, 4, 3, padding=1))
            self.convs.append(getattr(self, f"conv{k}"))


class Listed(Lists):
    """BMask R-CNN's head."""

    def forward(self, x):
        for conv in self.convs:
            x = F.relu(conv(x))
        return x


class ListedLevels(Listed):
    def forward(self, xs):
        return [conv(x) for conv, x in zip(self.convs, xs, strict=True)]


class ListedTapped(Listed):
    def first(self, x):
        return self.convs[0](x)


class ListedAndNamed(Listed):
    def first(self, x):
        return self.conv0(x)


class ListedAndGotten(Listed):
    def first(self, x, name):
        return getattr(self, name)(x)


class ListedAndIndexed(Listed):
    def first(self, x):
        for i in range(2):
            x = self.conv0[i](x)
        return x


class ListedChildren(Lists):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


class ListedNotWalked(Lists):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("kind", "in_order"),
    [
        (Listed, True),
        (ListedLevels, False),
        (ListedTapped, False),
        (ListedAndNamed, False),
        (ListedAndGotten, None),
        (ListedAndIndexed, None),
        (ListedChildren, None),
        (ListedNotWalked, None),
    ],
)
def test_a_plain_list_of_children(kind, in_order):
    use = read_list_use(kind(), "", "convs")
    assert use.in_order is in_order, use.reason
    assert bool(use.reason) is (in_order is not True)


class Owning(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Listed()

    def forward(self, x):
        return self.head(x)


class TapsItsList(Owning):
    def forward(self, x):
        return self.head(x) + self.head.convs[0](x)


class TapsItsChild(Owning):
    def forward(self, x):
        head = self.head
        return head(x) + head.conv0(x)


@pytest.mark.parametrize(("kind", "in_order"), [(Owning, True), (TapsItsList, False), (TapsItsChild, None)])
def test_what_is_above_the_owner_of_a_plain_list_counts(kind, in_order):
    assert read_list_use(kind(), "head", "convs").in_order is in_order


class WalksFromAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = ListedNotWalked()

    def forward(self, x):
        for conv in self.head.convs:
            x = conv(x)
        return x


@pytest.mark.parametrize(
    ("model", "path", "read"),
    [(Listed(), "", True), (ListedNotWalked(), "", False), (WalksFromAbove(), "head", True)],
)
def test_whether_a_list_is_read_at_all(model, path, read):
    assert may_be_read(model, path, "convs") is read
