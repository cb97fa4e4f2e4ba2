"""integrations.towers: layers that may be read by other ways than the attribute of their container."""

import pytest
from small_towers import QUICK, Averages, Called, conv
from torch import nn

from ifr_fast.integrations.towers import replace_towers


class ByItsPath(Called):
    def forward(self, x):
        return self.convs(x) + self.get_submodule("convs.1")(x)


class ByAString(Called):
    def forward(self, x):
        return self.convs(x) + self._modules["convs"][1](x)


class ByAName(Called):
    which = "convs"

    def forward(self, x):
        return self.convs(x) + getattr(self, self.which)[1](x)


class ByAWrittenName(Called):
    def forward(self, x):
        return self.convs(x) + self.get_submodule(f"convs.{len(x)}")(x)


class OfItsChildren(Called):
    def forward(self, x):
        return self.convs(x) + next(iter(self.children()))[1](x)


class OfItsModules(Called):
    def forward(self, x):
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                x = module(x)
        return self.convs(x)


class OfItsDict(Called):
    def forward(self, x):
        return self.convs(x) + self.__dict__["_modules"]["con" + "vs"][1](x)


class OfItsVars(Called):
    def forward(self, x):
        return self.convs(x) + vars(self)["_modules"]["con" + "vs"][1](x)


class FromAbove(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = Averages()

    def forward(self, x):
        return self.head(x) + next(iter(self.head.children()))[1](x)


AROUND = [ByItsPath, ByAString, ByAName, ByAWrittenName, OfItsChildren, OfItsModules, OfItsDict, OfItsVars, FromAbove]


@pytest.mark.parametrize("kind", AROUND)
def test_layers_that_are_read_without_their_container_s_name_are_in_doubt(kind):
    with pytest.raises(ValueError, match="an unknown use"):
        replace_towers(kind(), **QUICK)
    (new,) = replace_towers(kind(), "*convs", **QUICK)
    assert new.convolutions == 4


class ListOfNamed(nn.Module):
    """As detectron2's first heads."""

    def __init__(self):
        super().__init__()
        self.rows = [conv() for _ in range(4)]
        for i, layer in enumerate(self.rows):
            self.add_module(f"conv{i}", layer)

    def forward(self, x):
        for layer in self.rows:
            x = layer(x)
        return x


class ListByPath(ListOfNamed):
    def forward(self, x):
        return super().forward(x) + self.get_submodule("conv" + "1")(x)


class ListByName(ListOfNamed):
    def forward(self, x):
        return super().forward(x) + getattr(self, f"conv{len(x)}")(x)


@pytest.mark.parametrize("kind", [ListByPath, ListByName])
def test_layers_of_a_list_that_are_read_without_its_name_are_in_doubt(kind):
    with pytest.raises(ValueError, match="an unknown use"):
        replace_towers(kind(), **QUICK)


class SetsModes(Called):
    """As backbones with frozen norms are written, and as what gives its features by their names."""

    def train(self, mode=True):
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()

    def forward(self, x):
        return {"convs": self.convs(x)}


def test_modes_that_are_set_and_names_that_are_given_are_no_doubt():
    (new,) = replace_towers(SetsModes(), **QUICK)
    assert new.convolutions == 4


class HeldTwice(Called):
    def __init__(self, hold, again):
        super().__init__()
        self.again = again
        object.__setattr__(self, "also", hold(self.convs))

    def forward(self, x):
        return self.convs(x) + self.again(self.also)(x)


HOLDS = {
    "dict": (lambda c: {"t": c}, lambda held: held["t"][0]),
    "values": (lambda c: {"t": c}, lambda held: next(iter(held.values()))[0]),
    "tuple": (lambda c: (c,), lambda held: held[0][0]),
    "list": (lambda c: [c], lambda held: held[0][0]),
    "nested": (lambda c: {"t": [c]}, lambda held: held["t"][0][0]),
    "itself": (lambda c: c, lambda held: held[0]),
}


@pytest.mark.parametrize("how", HOLDS)
def test_a_container_held_twice_may_be_read_from_both(how):
    model = HeldTwice(*HOLDS[how])
    with pytest.raises(ValueError, match="may be read from also, too"):
        replace_towers(model, **QUICK)
    (new,) = replace_towers(model, "convs", **QUICK)
    assert new.convolutions == 4
