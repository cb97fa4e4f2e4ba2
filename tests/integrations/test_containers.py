"""integrations.towers.uses: containers called whole, walking themselves, inside others, and used from above."""

import pytest
import torch
from loop_owners import OneForEachLevel, Plain
from torch import nn

from ifr_fast.integrations.towers.uses import read_use


class Calls(nn.Module):
    """torchvision's RoIHeads, RetinaNetHead."""

    def __init__(self):
        super().__init__()
        self.seq = nn.Sequential(*(nn.Conv2d(4, 4, 3, padding=1) for _ in range(4)))

    def has_seq(self):
        return self.seq is not None

    def forward(self, x):
        return self.seq(x)


class Above(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.net, self.other = part, Calls()


class TapsALocal(Above):
    def forward(self, x):
        net = self.net
        return net.seq[0](x)


class TapsAnother(Above):
    def forward(self, x):
        return self.net(x) + self.other.seq[0](x)


@pytest.mark.parametrize(("kind", "in_order"), [(TapsALocal, None), (TapsAnother, True)])
def test_what_is_above_the_owner_counts(kind, in_order):
    assert read_use(Calls(), "seq").in_order
    assert read_use(kind(Calls()), "net.seq").in_order is in_order


class Indexed(Calls):
    def forward(self, x):
        for i in range(4):
            x = self.seq[i](x)
        return x


def test_places_of_an_indexed_sequential_count():
    use, whole = read_use(Indexed(), "seq"), read_use(Calls(), "seq")
    assert (use.in_order, use.by_place) == (True, True)
    assert (whole.in_order, whole.by_place) == (True, False)


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_inside_another_container_the_outer_use_decides(kind):
    for owner, in_order in ((Plain(), kind is nn.Sequential or None), (OneForEachLevel(), None)):
        owner.convs = nn.ModuleList(kind([nn.ReLU()]) if kind is nn.ModuleList else kind(nn.ReLU()) for _ in range(4))
        assert read_use(owner, "convs.1").in_order is in_order


class Named(nn.Sequential):
    """detectron2's MaskRCNNConvUpsampleHead."""

    def layers(self, x):
        for layer in self:
            x = layer(x)
        return x

    def forward(self, x):
        return {"mask": self.layers(x)}


class Dense(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = torch.cat([x, layer(x)], 1)
        return x


class ByName(nn.Sequential):
    def forward(self, x):
        return self.first(self.second(x))


class Children(nn.Sequential):
    def forward(self, x):
        for layer in self.children():
            x = layer(x)
        return x


class AlsoTapped(nn.Sequential):
    def first_output(self, x):
        return self[0](x)


@pytest.mark.parametrize(
    ("kind", "in_order"),
    [(nn.Sequential, True), (Named, True), (Dense, False), (ByName, None), (Children, True), (AlsoTapped, False)],
)
def test_a_container_that_walks_itself(kind, in_order):
    container = kind()
    container.add_module("first", nn.Conv2d(4, 4, 3))
    container.add_module("second", nn.Conv2d(4, 4, 3))
    assert read_use(container, "").in_order is in_order
