"""integrations.towers: wrappers and loops that once were read wrong."""

import pytest
import torch
from small_towers import QUICK, Averages, Called, Loop, Named, Wrapper, conv
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers import replace_towers


class ResidualNamed(Wrapper):
    def forward(self, x):
        return x + self.norm(self.conv(x))


class GateNamed(Wrapper):
    def forward(self, x):
        x = x * self.norm(self.conv(x)).sigmoid()
        return F.relu(x)


def test_a_child_named_norm_is_no_reduction():
    (new,) = replace_towers(Loop(*(Named() for _ in range(4))), **QUICK)
    assert new.convolutions == 4


@pytest.mark.parametrize("where", [None, "convs"])
@pytest.mark.parametrize("kind", [ResidualNamed, GateNamed])
def test_a_child_named_norm_hides_no_residual(kind, where):
    with pytest.raises(ValueError, match="more than a convolution"):
        replace_towers(Loop(*(kind() for _ in range(4))), where, **QUICK)


class WritesInto(Loop):
    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
            x[:, 0] = 0
        return self.last(x)


@pytest.mark.parametrize("where", [None, "convs"])
def test_writing_into_a_part_of_x_is_more_than_a_layer(where):
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(WritesInto(), where, **QUICK)


class CallsAgain(Loop):
    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        else:
            x = layer(x)
        return self.last(x)


class ByModules(Called):
    def forward(self, x):
        return self.convs(x) + self.convs._modules["0"](x)


@pytest.mark.parametrize("kind", [CallsAgain, ByModules])
def test_layers_read_behind_the_loop_or_by_their_names_are_no_tower(kind):
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(kind(), **QUICK)


def test_a_length_that_is_read_stays():
    model = Averages()
    replace_towers(model, **QUICK)
    assert len(model.convs) == 4


class NoiseReLU(nn.Module):
    def forward(self, x):
        return F.relu(x + 0.1 * torch.randn(len(x), 1, *x.shape[-2:]))


class TransposedReLU(nn.Module):
    def forward(self, x):
        return F.relu(x).mT


SMOOTH = nn.AvgPool2d(3, 1, 1)


class SmoothReLU(nn.Module):
    def forward(self, x):
        return F.relu(SMOOTH(x))


class HiddenReLU(nn.Module):
    def __init__(self):
        super().__init__()
        self.__dict__["smooth"] = nn.AvgPool2d(3, 1, 1)

    def forward(self, x):
        return F.relu(self.smooth(x))


class PlacedNorm(nn.Module):
    def forward(self, x):
        return x + torch.linspace(-1, 1, x.shape[-1])


@pytest.mark.parametrize("where", [None, "convs"])
@pytest.mark.parametrize("kind", [NoiseReLU, PlacedNorm, TransposedReLU, SmoothReLU, HiddenReLU])
def test_what_mixes_or_marks_places_is_no_activation(kind, where):
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(Loop(*(layer for _ in range(4) for layer in (conv(), kind()))), where, **QUICK)


class Skips(Wrapper):
    """Stochastic depth: some calls give what they got."""

    def forward(self, x):
        if self.training and torch.rand(1) < 0.5:
            return x
        return self.act(self.conv(x))


class SkipsSmall(Wrapper):
    def forward(self, x):
        if x.shape[-1] < 8:
            return x
        return self.act(self.conv(x))


@pytest.mark.parametrize("where", [None, "convs"])
@pytest.mark.parametrize("kind", [Skips, SkipsSmall])
def test_a_wrapper_that_may_return_its_input_is_no_layer(kind, where):
    with pytest.raises(ValueError, match="more than a convolution"):
        replace_towers(Loop(*(kind() for _ in range(4))), where, **QUICK)


class TapsByName(Called):
    """As networks that give the features of chosen layers are written."""

    def forward(self, x):
        taps = []
        for name, layer in self.convs._modules.items():
            x = layer(x)
            if name in "13":
                taps.append(x)
        return taps


class AddsToChildren(Called):
    def forward(self, x):
        for layer in self.convs.children():
            x = layer(x) + x
        return x


class WalksItsModules(nn.Sequential):
    def forward(self, x):
        for _, layer in self._modules.items():
            x = layer(x) + x
        return x


class WalksItsChildren(Called):
    def forward(self, x):
        for _, layer in self.convs.named_children():
            x = layer(x)
        return x


@pytest.mark.parametrize("build", [TapsByName, AddsToChildren, lambda: WalksItsModules(*(conv() for _ in range(4)))])
@pytest.mark.parametrize("where", [None, "*"])
def test_loops_over_modules_and_children_are_read(build, where):
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(build(), where, **QUICK)


def test_a_chain_of_children_is_a_tower():
    (new,) = replace_towers(WalksItsChildren(), **QUICK)
    assert new.convolutions == 4


class InPlaceAhead(Loop):
    """Its result has negative numbers: a ReLU that stays in the loop would take them from an IFRHead's."""

    def forward(self, x):
        for layer in self.convs:
            F.relu_(x)
            x = layer(x)
        return self.last(x)


class TwoChains(Loop):
    """A ReLU that stays in one of the two would be none of the other's."""

    def forward(self, x):
        y = x
        for layer in self.convs:
            y = layer(y)
            x = F.relu(layer(x))
        return self.last(x + y)


@pytest.mark.parametrize("where", [None, "convs"])
@pytest.mark.parametrize("kind", [InPlaceAhead, TwoChains])
def test_a_relu_elsewhere_than_behind_a_layer_is_more_than_a_layer(kind, where):
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(kind(*(conv() for _ in range(4))), where, **QUICK)


class CountsTurns(Called):
    def forward(self, x):
        turns = 0
        for layer in self.convs:
            x = layer(x)
            turns += 1
        return x / turns


def test_a_loop_that_counts_its_turns_keeps_their_number():
    model = CountsTurns()
    replace_towers(model, **QUICK)
    assert len(model.convs) == 4
