"""replace_towers against an oracle: loops put together at random, whose towers' own layers, applied in order where the
IFRHeads are, must give what the model gave."""

import copy
import importlib.util
import itertools
import random

import pytest
import torch
from detectron2_layouts import C
from small_towers import QUICK, block, conv
from torch import nn

from ifr_fast import IFRHead
from ifr_fast.integrations.towers import replace_towers

HEADS = (
    "for conv in self.convs:",
    "for i, conv in enumerate(self.convs):",
    "for conv in self.convs.children():",
    "for conv, act in zip(self.convs, self.acts):",
    "for i, (conv, act) in enumerate(zip(self.convs, self.acts)):",
    "for i in range(len(self.convs)):\n            conv = self.convs[i]",
    "for i in range(0, 4):\n            conv, act = self.convs[i], self.acts[i]",
)
STATEMENTS = (
    *["x = conv(x)"] * 6,
    *["y = conv(x)", "x = y"] * 2,
    *["x = F.relu(conv(x))", "x = act(conv(x))", "x = act(x)", "x = x.relu()", "F.relu_(x)"],
    *[
        "x, y = conv(x), x",
        "y = conv(y)",
        "y = x",
        "x = x + y",
        "x = y + conv(x)",
        "x = self.gate(x)",
        "x = x.flip(-1)",
    ],
    *["taps.append(x)", "taps.append(conv(x))", "x[:, 0] = 0", "x *= 2", "x.add_(1)", "n = self.gate(x)", "x = act(y)"],
    *["if i == 2: x = up(x)", "if i == 1: y = x", "if i > 0: x = F.relu(x)", "if i == 1: continue", "if i == 3: break"],
    *["if self.scaled: x = x * 2", "if self.training: x = conv(x)", "x = conv(x) if i else conv(conv(x))"],
    *["for _ in range(2): x = conv(x)", "with torch.no_grad(): x = conv(x)", "x = conv(up(x)) if i == 2 else conv(x)"],
    *["x = self.convs[0](x)", "n = x.mean()", "x = x * n", "x = (z := conv(x))", "x = x + z"],
)
TAILS = (*["return x, taps"] * 5, "return x + y", "return y", "return x, self.convs[1](x)")
CLASS = """
class Model{n}(Base):
    def forward(self, x):
        y, n, z, taps = x, 1, 0, []
        {head}
            {body}
        {tail}
"""
BASE = """
import torch
from torch import nn
from torch.nn import functional as F

def up(x):
    return F.interpolate(x, scale_factor=2)

class Base(nn.Module):
    def __init__(self, convs, gate):
        super().__init__()
        self.convs, self.gate, self.scaled = convs, gate, False
        self.acts = nn.ModuleList(nn.ReLU() for _ in range(4))
"""


class InOrder(nn.Module):
    def __init__(self, layers, with_relu):
        super().__init__()
        self.layers, self.with_relu = nn.ModuleList(layers), with_relu

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).relu() if self.with_relu else layer(x)
        return x


def outputs(model, x):
    found = model(x.clone())
    return (
        [x for part in found for x in (part if isinstance(part, list) else [part])]
        if isinstance(found, tuple)
        else [found]
    )


def agree(one, other):
    return len(one) == len(other) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-4 * a.abs().max().item())
        for a, b in zip(one, other, strict=True)
    )


def swapped(model, original, report, with_relu):
    """The refined model with its towers' own layers in place of the IFRHeads."""
    model, original = copy.deepcopy(model), copy.deepcopy(original)
    for new in report:
        path, _, name = new.path.rpartition(".")
        layers = [original.get_submodule(layer) for layer in new.layers]
        setattr(model.get_submodule(path), name, InOrder(layers, with_relu).train(model.training))
    assert not any(isinstance(module, IFRHead) for module in model.modules())
    return model


@pytest.fixture
def models(tmp_path, seed):
    """(code, class) of random models."""
    chooser = random.Random(seed)

    def build(count):
        codes = [
            CLASS.format(
                n=n,
                head=chooser.choice(HEADS),
                body="\n            ".join(chooser.choices(STATEMENTS, k=chooser.randint(1, 3))),
                tail=chooser.choice(TAILS),
            )
            for n in range(count)
        ]
        file = tmp_path / f"random_models_{seed}.py"
        file.write_text(BASE + "".join(codes))
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return [(code, getattr(module, f"Model{n}")) for n, code in enumerate(codes)]

    return build


@pytest.mark.parametrize("count", [300, pytest.param(5000, marks=pytest.mark.full)])
def test_a_random_loop_is_replaced_only_by_what_it_computes(models, count):
    replaced = 0
    kinds = itertools.cycle([(nn.ModuleList, None), (nn.Sequential, "convs"), (nn.ModuleList, "*")])
    for (code, cls), (container, where) in zip(models(count), kinds, strict=False):
        layers = [block() if len(code) % 2 else conv() for _ in range(4)]
        original = cls(container(layers) if container is nn.ModuleList else container(*layers), conv(C, C, 1, 0))
        x, wrong = torch.randn(2, C, 6, 6), []
        refined = copy.deepcopy(original)
        try:
            expected = outputs(original, x)
        except (TypeError, NameError, RuntimeError, IndexError):  # no code that runs
            continue
        try:
            report = replace_towers(refined, where, **QUICK)
            replace_towers(copy.deepcopy(original), **QUICK)
        except ValueError:  # no tower; or one that only a name makes so, which is trusted
            continue
        replaced += 1
        for with_relu in (False, True):
            try:
                wrong.append(not agree(expected, outputs(swapped(refined, original, report, with_relu), x)))
            except (RuntimeError, IndexError):
                wrong.append(True)
        assert not all(wrong), f"{code}\n{container.__name__}, where={where!r}\n{report}"
    assert replaced > count / 100
