"""integrations.towers: which towers are chosen, what is refused, and what a new head takes over."""

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from ifr_fast import IFRHead, Unroll
from ifr_fast.integrations.layers import read_layer
from ifr_fast.integrations.towers import replace_towers

C = 8
QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def conv(channels_in=C, channels_out=C, kernel=3, padding=1, **kwargs):
    return nn.Conv2d(channels_in, channels_out, kernel, padding=padding, **kwargs)


def block(*channels):
    return nn.Sequential(conv(*channels), nn.GroupNorm(2, channels[1] if channels else C), nn.ReLU())


def tower():
    return nn.Sequential(*(layer for _ in range(4) for layer in block()))


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.convs = nn.ModuleList(block() for _ in range(4))
        self.last = conv(C, 3, 1, 0)

    def forward(self, x):
        for layer in self.convs:
            x = layer(x)
        return self.last(x)


class Levels(Loop):
    """A feature pyramid's output convolutions."""

    def forward(self, x):
        return [self.convs[i](x) for i in range(4)]


def heads(model):
    return [m for m in model.modules() if isinstance(m, IFRHead)]


def test_parameters_are_counted():
    model = nn.Sequential(*(block() for _ in range(4)))
    whole = sum(p.numel() for p in model.parameters())
    (replacement,) = replace_towers(model, **QUICK)
    assert replacement.parameters_before == whole == 4 * (C * C * 9 + C + 2 * C)
    assert replacement.parameters_after == sum(p.numel() for p in model.parameters())
    assert f"{whole:,} → {replacement.parameters_after:,}" in str(replacement)


def test_convolution_that_changes_the_width_stays_with_its_norm():
    model = nn.Sequential(*block(4, C), *block(), *block(), conv(C, 3))
    first, norm, relu, last = model[0], model[1], model[2], model[-1]
    report = replace_towers(model, **QUICK)
    assert [name for name, _ in model.named_children()] == ["0", "1", "2", "3", "9"]
    assert (model[0], model[1], model[2], model[4]) == (first, norm, relu, last)
    assert [(s.path, s.reason) for s in report.skipped] == [
        ("0", "a 3×3 convolution with 4 → 8 channels"),
        ("9", "a 3×3 convolution with 8 → 3 channels"),
    ]
    assert model(torch.randn(1, 4, 6, 6)).shape == (1, 3, 6, 6)


def test_two_convolutions_must_be_left_after_a_change_of_width():
    with pytest.raises(ValueError, match=r"3: left alone, a single 3×3 convolution: 0 is a 3×3 convolution with 4"):
        replace_towers(nn.Sequential(*block(4, C), *block()), **QUICK)


@pytest.mark.parametrize("odd", [conv(stride=2), conv(kernel=1, padding=0), nn.ConvTranspose2d(C, C, 2, 2)])
def test_other_convolutions_are_left_alone_and_said_so(odd):
    model = nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU(), odd)
    report = replace_towers(model, **QUICK)
    assert [name for name, _ in model.named_children()] == ["0", "4"]
    assert model[1] is odd
    assert [(skipped.path, skipped.reason) for skipped in report.skipped] == [("4", read_layer(odd).ends)]


BETWEEN = [nn.Dropout2d, lambda: nn.Upsample(scale_factor=2), lambda: nn.MaxPool2d(3, 1, 1), nn.Softmax2d]


@pytest.mark.parametrize("between", BETWEEN)
def test_what_stands_between_two_towers_stays(between):
    middle = between()
    model = nn.Sequential(conv(), conv(), nn.ReLU(), middle, conv(), conv()).eval()
    x = torch.randn(1, C, 6, 6)
    shape = model(x).shape
    report = replace_towers(model, **QUICK)
    assert [r.path for r in report] == ["0", "4"]
    assert model[1] is middle
    assert model(x).shape == shape


@pytest.mark.parametrize("between", BETWEEN)
def test_a_layer_between_two_single_convolutions_is_named_in_the_refusal(between):
    middle = between()
    with pytest.raises(ValueError, match=f"0: left alone, a single 3×3 convolution: 2 is an? {type(middle).__name__}"):
        replace_towers(nn.Sequential(conv(), nn.ReLU(), middle, conv()), **QUICK)


def test_residual_blocks_are_no_tower():
    model = torchvision.models.resnet18(num_classes=2)
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=r"no conv tower .* in ResNet"):
        replace_towers(model, groups=32)
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("where", [None, "convs"])
def test_a_list_not_walked_in_order_is_refused(where):
    model = Levels()
    keys = list(model.state_dict())
    reason = r"not applied one after the other: Levels\.forward: `self\.convs\[i\]\(x\)`"
    with pytest.raises(ValueError, match=f"convs: left alone, its elements are {reason}"):
        replace_towers(model, where, **QUICK)
    assert list(model.state_dict()) == keys


class ResizedAt(Loop):
    """mmdet's SOLOHead: resized before one of the convolutions."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def forward(self, x):
        for i, layer in enumerate(self.convs):
            if i == self.at:
                x = F.interpolate(x, scale_factor=2.0)
            x = layer(x)
        return x


@pytest.mark.parametrize(("at", "paths"), [(0, ["convs.0"]), (1, ["convs.1"]), (2, ["convs.0", "convs.2"])])
def test_a_resize_inside_the_loop_splits_the_tower(at, paths):
    model = ResizedAt(at)
    assert [r.path for r in replace_towers(model, **QUICK)] == paths
    assert model(torch.randn(1, C, 3, 3)).shape == (1, C, 6, 6)


def test_a_list_whose_use_cannot_be_read_needs_to_be_named():
    scope = {"nn": nn}
    exec("class Hidden(nn.Module):\n def forward(self, x):\n  for m in self.convs: x = m(x)\n  return x", scope)
    model = scope["Hidden"]()
    model.convs = nn.ModuleList(conv() for _ in range(3))
    with pytest.raises(ValueError, match=r"convs: left alone, no source shows .*name it with `where`"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "convs", **QUICK)] == ["convs.0"]


def test_a_container_with_a_forward_put_on_it_needs_to_be_named():
    model = nn.Sequential(conv(), conv())
    model.forward = model[1].forward
    with pytest.raises(ValueError, match="the model itself: left alone, no source shows"):
        replace_towers(model, **QUICK)
    assert [r.path for r in replace_towers(model, "0", **QUICK)] == ["0"]


@pytest.mark.parametrize("where", [None, "convs"])
def test_branches_of_a_list_each_get_their_own_head(where):
    """As in mmdet's YOLOXHead, whose levels are passed to another function."""
    model = nn.Module()
    model.convs = nn.ModuleList(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()) for _ in range(3))
    report = replace_towers(model, where, **QUICK)
    assert [r.path for r in report] == ["convs.0.0", "convs.1.0", "convs.2.0"]
    assert len(heads(model)) == 3


def test_a_container_reached_by_two_paths_is_replaced_once():
    model = nn.Module()
    model.a = nn.ModuleDict({"tower": nn.Sequential(*block(), *block())})
    model.b = model.a
    (replacement,) = replace_towers(model, **QUICK)
    assert (replacement.path, replacement.also_at) == ("a.tower.0", ("b.tower.0",))
    assert model.b.tower[0] is model.a.tower[0] is heads(model)[0]


def test_layers_shared_by_two_containers_share_the_head():
    layers = [*block(), *block()]
    model = nn.ModuleDict({"cls": nn.Sequential(*layers), "reg": nn.Sequential(*layers)})
    (replacement,) = replace_towers(model, **QUICK)
    assert replacement.also_at == ("reg.0",)
    assert model["cls"][0] is model["reg"][0]


def test_a_stack_tied_to_itself_is_a_tower():
    tied, relu = conv(), nn.ReLU()
    (replacement,) = replace_towers(nn.Sequential(tied, relu, tied, relu, tied, relu), **QUICK)
    assert replacement.convolutions == 3
    assert replacement.parameters_before == C * C * 9 + C


def shared_with_an_attribute():
    model = Loop()
    model.first = model.convs[0][0]
    return model, None


def shared_with_own_norms():
    """mmdet's RTMDetSepBNHead: one set of convolutions, norms of its own for each level."""
    convs = [conv(), conv()]
    return nn.ModuleDict({k: nn.Sequential(*(nn.Sequential(c, nn.BatchNorm2d(C)) for c in convs)) for k in "ab"}), None


def shared_parameter():
    model = nn.Sequential(conv(), conv(), nn.Flatten(), conv(kernel=1, padding=0))
    model[3].bias = model[0].bias
    return model, None


def shared_with_what_where_leaves():
    layers = [conv(), conv()]
    return nn.ModuleDict({"a": nn.Sequential(*layers), "b": nn.Sequential(*layers)}), "a"


@pytest.mark.parametrize(
    "build",
    [shared_with_an_attribute, shared_with_own_norms, shared_parameter, shared_with_what_where_leaves],
)
def test_towers_that_share_with_the_rest_are_refused(build):
    model, where = build()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match="left alone, it shares parameters with"):
        replace_towers(model, where, **QUICK)
    assert list(model.state_dict()) == keys


def test_towers_with_hooks_are_refused():
    model = nn.Sequential(*block(), *block())
    model[3].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="a Conv2d in it has hooks"):
        replace_towers(model, **QUICK)


def two_heads():
    return nn.ModuleDict({"cls_head": Loop(), "reg_head": Loop(), "backbone": tower()})


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("*_head.convs", ["cls_head.convs.0", "reg_head.convs.0"]),
        ("reg_head", ["reg_head.convs.0"]),
        ("reg_head.convs.0", ["reg_head.convs.0"]),
        (["backbone", "cls*"], ["cls_head.convs.0", "backbone.0"]),
        (lambda path, module: isinstance(module, nn.ModuleList), ["cls_head.convs.0", "reg_head.convs.0"]),
        (lambda path, module: path == "backbone", ["backbone.0"]),
    ],
)
def test_where_selects(where, paths):
    model = two_heads()
    assert [r.path for r in replace_towers(model, where, **QUICK)] == paths
    assert len(heads(model)) == len(paths)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (
            "mask_head",
            "'mask_head' leads to no conv tower of ModuleDict; its towers are at cls_head.convs.0, ",
        ),
        (["backbone", "REG_head"], "'REG_head' leads to no"),
        ("reg_head.last", r"'reg_head.last' leads to no .*\(it is a Conv2d\)"),
        (lambda path, module: False, "leads to no"),
        ([], "where: expected None, a glob"),
        ([3], "where: expected None, a glob"),
        (7, "where: expected None, a glob"),
    ],
)
def test_where_that_selects_nothing_is_an_error_and_changes_nothing(where, message):
    model = two_heads()
    with pytest.raises(ValueError, match=message):
        replace_towers(model, where, **QUICK)
    assert not heads(model)


def test_model_must_be_a_module():
    with pytest.raises(ValueError, match=r"model: expected an nn\.Module, got list"):
        replace_towers([conv(), conv()])


def test_nothing_is_changed_where_one_head_cannot_be_built():
    model = nn.ModuleDict({"a": tower(), "b": nn.Sequential(conv(6, 6), conv(6, 6))})
    with pytest.raises(ValueError, match=r"b\.0, 6 channels: .*groups"):
        replace_towers(model, **QUICK)
    assert not heads(model)


def test_a_refined_model_holds_no_tower():
    model = Loop()
    replace_towers(model, **QUICK)
    with pytest.raises(ValueError, match="no conv tower"):
        replace_towers(model, **QUICK)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtype_is_kept(dtype):
    model = tower().to(dtype)
    replace_towers(model, **QUICK)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert model(torch.randn(1, C, 4, 4, dtype=dtype)).dtype == dtype


def test_device_is_kept():
    model = tower().to("meta")
    replace_towers(model, **QUICK)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_memory_format_is_kept():
    model = tower().to(memory_format=torch.channels_last)
    replace_towers(model, **QUICK)
    weights = [p for p in model.parameters() if p.dim() == 4 and p.shape[1:] != (1, 1, 1)]
    assert weights
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)
    x = torch.randn(2, C, 5, 5).to(memory_format=torch.channels_last)
    assert model(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("training", [True, False])
def test_mode_is_kept_and_new_parameters_are_trainable(training):
    model = tower().train(training).requires_grad_(False)
    replace_towers(model, **QUICK)
    assert all(m.training is training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_ifr_kwargs_reach_the_head():
    model = tower()
    replace_towers(model, groups=2, solver={"type": "Anderson", "max_iter": 3}, warmup_steps=5)
    (head,) = heads(model)
    assert head.solver.max_iter == 3
    assert head.warmup_steps == 5
    assert head.block.gn1.num_groups == 2
