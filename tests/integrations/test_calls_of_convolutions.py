"""integrations.towers: a wrapper's convolution is called once, and a call runs nothing but its forward."""

import functools

import pytest
import torch
from detectron2_layouts import C
from small_towers import QUICK, Averages, Called, Loop, Named, Wrapper, conv
from torch import nn

from ifr_fast.integrations.towers import replace_towers


def doubled(forward):
    @functools.wraps(forward)
    def computed(self, x):
        return 2 * forward(self, x)

    return computed


class Twice(Wrapper):
    def forward(self, x):
        return self.act(self.conv(self.conv(x)))


class InALoop(Wrapper):
    def forward(self, x):
        for _ in range(2):
            x = self.conv(x)
        return self.act(x)


class ByAMethodTwice(Wrapper):
    def once(self, x):
        return self.norm(self.conv(x))

    def forward(self, x):
        return self.act(self.once(self.once(x)))


class OfItself(Wrapper):
    def forward(self, x):
        x = self.conv(x)
        return self.forward(x) if self.training else x


class Never(Wrapper):
    def forward(self, x):
        return self.act(self.norm(x))


class InTraining(Wrapper):
    def forward(self, x):
        if self.training:
            x = self.conv(x)
        return self.act(x)


class OrEarlier(Wrapper):
    def forward(self, x):
        if self.training:
            return self.act(x)
        return self.act(self.conv(x))


class ByAnIndexTwice(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(conv(), nn.ReLU())

    def forward(self, x):
        return self.parts[1](self.parts[0](self.parts[0](x)))


class ConvTwice(nn.Conv2d):
    def __init__(self):
        super().__init__(C, C, 3, padding=1)

    def forward(self, x):
        return super().forward(super().forward(x))


class CallsMore(Named):
    def __call__(self, x):
        return super().__call__(x) * 2


class ConvCallsMore(ConvTwice):
    forward = nn.Conv2d.forward
    __call__ = CallsMore.__call__


class Doubles(Wrapper):
    @doubled
    def forward(self, x):
        return self.act(self.conv(x))


MORE = [Twice, InALoop, ByAMethodTwice, OfItself, Never, InTraining, OrEarlier, ByAnIndexTwice, ConvTwice]
MORE += [CallsMore, ConvCallsMore, Doubles]


@pytest.mark.parametrize("kind", MORE)
def test_a_convolution_that_is_not_called_once_is_in_doubt(kind):
    with pytest.raises(ValueError, match="more than a convolution"):
        replace_towers(Loop(*(kind() for _ in range(4))), **QUICK)


class ReLUCallsMore(nn.ReLU):
    def __call__(self, x):
        return super().__call__(x[..., ::2])


class RowCallsMore(nn.Sequential):
    def __call__(self, x):
        return super().__call__(x) + self[1](x)


class RowIsCalledTwice(nn.Sequential):
    def __call__(self, x):
        return super().__call__(super().__call__(x))


@pytest.mark.parametrize("kind", [ReLUCallsMore, RowCallsMore, RowIsCalledTwice])
def test_a_call_of_its_own_is_in_doubt(kind):
    model = Called()
    if kind is ReLUCallsMore:
        model.convs = nn.Sequential(*(layer for _ in range(4) for layer in (conv(), kind())))
    else:
        model.convs = kind(*model.convs)
    model.__class__ = Averages
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(model, **QUICK)


class InOrder(Wrapper):
    """As mmcv's ConvModule."""

    order = ("conv", "norm", "act")

    def forward(self, x):
        for name in self.order:
            if name == "conv":
                x = self.conv(x)
            elif name == "norm":
                x = self.norm(x)
            else:
                x = self.act(x)
        return x


class InEitherBranch(Wrapper):
    @torch.no_grad()
    def forward(self, x):
        if self.training:
            return self.act(self.norm(self.conv(x)))
        if x.dtype == torch.half:
            x = self.conv(x.float())
        else:
            x = self.conv(x)
        return self.act(self.norm(x))


@pytest.mark.parametrize("kind", [InOrder, InEitherBranch])
def test_a_convolution_called_once_on_every_path_is_a_layer(kind):
    (new,) = replace_towers(Loop(*(kind() for _ in range(4))), **QUICK)
    assert new.convolutions == 4
