"""replace_towers on code as others write it: elements in local names, shared activations, paths that reports print."""

import linecache

import pytest
import torch
from detectron2_layouts import C
from small_towers import QUICK, conv, heads, tower
from torch import nn
from torch.nn import functional as F

from ifr_fast.integrations.towers import replace_towers
from ifr_fast.integrations.towers.uses import read_use


class Lists(nn.Module):
    number, few = 4, 3

    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(conv() for _ in range(4))
        self.relus = nn.ModuleList(nn.ReLU() for _ in range(4))
        self.gelus = nn.ModuleList(nn.GELU() for _ in range(4))
        self.relu = nn.ReLU(inplace=True)


def with_forward(body, base=Lists):
    """A subclass of base whose forward has this body, with its source at hand."""
    source = "def forward(self, x, xs=(), n=0):\n    " + body.replace("\n", "\n    ") + "\n"
    name = f"<{abs(hash(body))}>"
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    scope = {"F": F, "torch": torch, "run": None}
    exec(compile(source, name, "exec"), scope)
    return type("Written", (base,), {"forward": scope["forward"]})


CHAINS = [
    "for i in range(0, len(self.convs)):\n    x = self.convs[i](x)\nreturn x",
    "for i in range(0, 4, 1):\n    x = self.convs[i](x)\nreturn x",
    "for i in range(self.number):\n    conv = self.convs[i]\n    x = conv(x)\nreturn x",
    "for i in range(4):\n    y = self.convs[i](x)\n    x = self.relus[i](y)\nreturn x",
    "for conv, act in zip(self.convs, self.relus):\n    x = act(conv(x))\nreturn x",
    "for i, (conv, act) in enumerate(zip(self.convs, self.relus)):\n    y = conv(x)\n    x = act(y)\nreturn x",
    "for conv in self.convs:\n    x = conv(x)\n    x = F.relu(x, inplace=True)\nreturn x",
    "for conv in self.convs:\n    out = conv(x)\n    self.relu(out)\n    x = out\nout = x\nreturn out",
    "for conv in list(self.convs):\n    x = conv(x).relu()\nreturn x",
]
LEVELS = [
    "for conv in self.convs:\n    x = conv(x)\n    if n:\n        return x\nreturn x",
    "outs = []\nfor i in range(len(self.convs)):\n    conv = self.convs[i]\n    outs.append(conv(xs[i]))\nreturn outs",
    "outs = []\nfor i, x in enumerate(xs):\n    conv = self.convs[i]\n    outs.append(conv(x))\nreturn outs",
    "outs = []\nfor i, x in enumerate(xs):\n    x = self.convs[i](x)\n    outs.append(x)\nreturn outs",
    "outs = []\nfor x, conv in zip(xs, self.convs):\n    y = conv(x)\n    outs.append(F.relu(y))\nreturn outs",
    "return [conv(x) for conv, x in zip(self.convs, xs)]",
    "return {i: self.convs[i](x) for i, x in enumerate(xs)}",
    "convs = self.convs\nreturn [convs[i](x) for i, x in enumerate(xs)]",
    "conv = self.convs[n]\nreturn conv(x)",
    "i = 0\nouts = []\nwhile i < 4:\n    outs.append(self.convs[i](xs[i]))\n    i += 1\nreturn outs",
    "outs = []\nfor conv in self.convs:\n    x = conv(x)\n    outs += [x]\nreturn outs",
    "for conv in self.convs:\n    last = x\n    x = conv(x)\nreturn last",
    "for conv in self.convs:\n    y = conv(x)\n    x = F.relu(y)\nreturn y",
]
NOT_ALONE = [
    "for conv in self.convs:\n    x = x + conv(x)\nreturn x",
    "for conv in self.convs:\n    y = x\n    x = conv(x)\n    x += y\nreturn x",
    "for i in range(4):\n    x = self.gelus[i](self.convs[i](x))\nreturn x",
    "for i in range(self.few):\n    x = self.convs[i](x)\nreturn x",
    "for conv in self.convs:\n    x = conv(x, n)\nreturn x",
    "for conv in self.convs:\n    x = conv(F.pad(x, [1, 1]))\nreturn x",
]
UNKNOWN = [
    "for i in range(n):\n    x = self.convs[i](x)\nreturn x",
    "i = 0\nwhile i < 4:\n    x = self.convs[i](x)\n    i += 1\nreturn x",
    "walk = self.convs\nfor conv in walk:\n    x = conv(x)\nreturn x",
    "for conv in self.convs:\n    x = run(conv, x) if self.training else conv(x)\nreturn x",
    "for i, conv in enumerate(self.convs):\n    x = F.relu(conv(x)) if i < 3 else conv(x)\nreturn x",
    "for conv in self.convs[1:]:\n    x = conv(x)\nreturn x",
]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.Sequential])
@pytest.mark.parametrize("body", CHAINS)
def test_chains_are_replaced_and_give_what_is_left_of_them(body, kind):
    model = with_forward(body)()
    model.convs = kind(*[model.convs]) if kind is nn.ModuleList else kind(*model.convs)
    use = read_use(model, "convs")
    assert use.in_order, use.reason
    (replacement,) = replace_towers(model, **QUICK)
    assert (replacement.path, replacement.convolutions) == ("convs.0", 4)
    x = torch.randn(1, C, 6, 6)
    expected = heads(model)[0](x)
    assert torch.equal(model(x), F.relu(expected) if "relu" in body or "act" in body else expected)


@pytest.mark.parametrize(
    ("body", "reason"),
    [(body, r"not applied one after the other|called one by one") for body in LEVELS]
    + [(body, "does not just apply one element after the other") for body in NOT_ALONE],
)
@pytest.mark.parametrize("where", [None, "convs", "*"])
def test_levels_taps_and_more_are_never_replaced(body, reason, where):
    with pytest.raises(ValueError, match=reason):
        replace_towers(with_forward(body)(), where, **QUICK)


@pytest.mark.parametrize("body", UNKNOWN)
def test_advice_to_name_what_is_unknown_works(body):
    model = with_forward(body)()
    with pytest.raises(ValueError, match="convs: left alone, an unknown use, name it with `where`"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs", **QUICK)] == ["convs.0"]


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.ModuleList(conv() for _ in range(4)) for name in ("cls", "reg")})


@pytest.mark.parametrize(
    "body",
    [
        "return [conv(x) for conv, x in zip(self.heads['cls'], xs)]",
        "for name in self.heads:\n    convs = self.heads[name]\n    outs = [convs[i](x) for i, x in enumerate(xs)]\n"
        "return outs",
        "for convs in self.heads.values():\n    for i, x in enumerate(xs):\n        conv = convs[i]\n"
        "        xs[i] = conv(x)\nreturn xs",
    ],
)
def test_levels_in_containers_of_containers_are_no_chain(body):
    with pytest.raises(ValueError, match=r"heads\.cls: left alone, its elements are not applied one after the other"):
        replace_towers(with_forward(body, Branches)(), "heads.cls", **QUICK)


class Shared(nn.Module):
    """One activation all over, in a plain list, too."""

    def __init__(self):
        super().__init__()
        act = nn.ReLU()
        self.cls, self.reg = (nn.Sequential(*(m for _ in range(3) for m in (conv(), act))) for _ in range(2))
        self.last = nn.Conv2d(C, C, 1)
        self.tail = [self.last, act]

    def forward(self, x):
        x, y = self.cls(x), self.reg(x)
        for layer in self.tail:
            x = layer(x)
        return x, y


@pytest.mark.parametrize("where", [None, ["cls", "reg"]])
def test_towers_may_share_an_activation(where):
    model = Shared()
    report = replace_towers(model, where, **QUICK)
    assert {r.path: r.convolutions for r in report} == {"cls.0": 3, "reg.0": 3}
    assert [type(layer) for layer in model.tail] == [nn.Conv2d, nn.ReLU]


class Weighted(nn.Sequential):
    def __init__(self):
        super().__init__(*tower())
        self.weight = 2.0

    def loss(self, x):
        return self.weight * x.mean()


class Above(nn.Module):
    """Reads attributes of a container that are no child; from_config runs before any input."""

    def __init__(self):
        super().__init__()
        self.head = Weighted()

    @classmethod
    def from_config(cls, heads):
        return {"weight": heads.head.weight, "first": heads.head[0]}

    def forward(self, x):
        x = self.head.eval()(x) if self.head.training else self.head(x)
        return self.head.loss(x) * self.head.weight


def test_attributes_that_are_no_child_show_nothing():
    (replacement,) = replace_towers(Above(), **QUICK)
    assert replacement.path == "head.0"


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.fcns = []
        for k in range(4):
            self.add_module(f"fcn{k}", conv())
            self.fcns.append(getattr(self, f"fcn{k}"))


WALKS = (
    "for layer in self.fcns:\n    x = layer(x)\nreturn x",
    "walk = self.fcns\nfor layer in walk:\n    x = layer(x)\nreturn x",
)


@pytest.mark.parametrize("body", WALKS)
@pytest.mark.parametrize("where", ["head.fcns", "head", "*.fcns", "head.*", "h*", "", "*"])
def test_where_takes_the_path_of_a_plain_list(body, where):
    model = nn.Module()
    model.head = with_forward(body, Named)()
    if where in ("", "*") and body == WALKS[1]:  # an unknown use, and nothing that names the list
        with pytest.raises(ValueError, match=r"name it with `where`: forward: `walk = self\.fcns`"):
            replace_towers(model, where, **QUICK)
        return
    (replacement,) = replace_towers(model, where, **QUICK)
    assert replacement.path == "head.fcn0"


def test_the_model_itself_can_be_named():
    model = nn.Sequential(conv(), conv(), conv())
    model.forward = model[1].forward
    with pytest.raises(ValueError, match="the model itself: left alone, an unknown use, name it with `where`"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "", **QUICK)] == ["0"]


@pytest.mark.parametrize(
    ("options", "error"),
    [({"solver": "nope"}, "solver"), ({"adjoint": 3}, "adjoint"), ({"groups": 0}, "groups"), ({"form": "no"}, "form")],
)
@pytest.mark.parametrize("where", [None, "0"])
def test_wrong_options_are_the_heads_own_error(options, error, where):
    with pytest.raises(ValueError, match=rf"^{error}|^channels=256 .*{error}") as raised:
        replace_towers(tower(), where, **options)
    assert "left alone" not in str(raised.value)
    with pytest.raises(TypeError, match="unexpected keyword argument 'steps'"):
        replace_towers(tower(), where, steps=3)


def test_options_are_checked_without_a_random_number():
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="found no conv tower"):
        replace_towers(nn.ReLU(), groups=4)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match=r"0: left alone, 8 channels: "):
        replace_towers(tower(), groups=3)
