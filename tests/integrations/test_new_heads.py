"""integrations.towers: which towers `where` selects, and what a new head takes over from its tower."""

import pytest
import torch
from detectron2_layouts import C
from mmdet1_layouts import SipMaskHead
from torch import nn

from ifr_fast import IFRHead, Unroll
from ifr_fast.integrations.towers import replace_towers

QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def tower(channels=C):
    return nn.Sequential(
        *(layer for _ in range(4) for layer in (nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU()))
    )


def heads(model):
    return [m for m in model.modules() if isinstance(m, IFRHead)]


def test_parameters_are_counted():
    model = tower()
    whole = sum(p.numel() for p in model.parameters())
    (replacement,) = replace_towers(model, **QUICK)
    assert replacement.parameters_before == whole == 4 * (C * C * 9 + C)
    assert replacement.parameters_after == sum(p.numel() for p in model.parameters())
    assert f"{whole:,} → {replacement.parameters_after:,}" in str(replacement)


def two_heads():
    return nn.ModuleDict({"head": SipMaskHead(), "old_head": SipMaskHead(), "backbone": tower()})


@pytest.mark.parametrize(
    ("where", "paths"),
    [
        ("*.reg_convs", ["head.reg_convs.0", "old_head.reg_convs.0"]),
        ("head", ["head.cls_convs.0", "head.reg_convs.0"]),
        ("head.reg_convs.0", ["head.reg_convs.0"]),
        (["backbone", "*.cls*"], ["head.cls_convs.0", "old_head.cls_convs.0", "backbone.0"]),
        (lambda path, module: isinstance(module, nn.Sequential), ["backbone.0"]),
        (lambda path, module: path == "old_head.cls_convs", ["old_head.cls_convs.0"]),
    ],
)
def test_where_selects(where, paths):
    model = two_heads()
    assert [r.path for r in replace_towers(model, where, **QUICK)] == paths
    assert len(heads(model)) == len(paths)


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("mask", "'mask' leads to no conv tower of ModuleDict; its towers are at head.cls_convs.0, "),
        (["backbone", "HEAD"], "'HEAD' leads to no"),
        ("head.fcos_cls", r"'head.fcos_cls' leads to no .*\(it is a Conv2d\)"),
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
        replace_towers([nn.Conv2d(C, C, 3, padding=1)])


def test_a_tower_that_ifr_head_refuses_is_skipped_unless_named():
    model = nn.ModuleDict({"a": tower(), "b": tower(6)})
    with pytest.raises(ValueError, match=r"b\.0, 6 channels: .*groups"):
        replace_towers(model, ["a", "b"], **QUICK)
    assert not heads(model)
    report = replace_towers(model, **QUICK)
    assert [r.path for r in report] == ["a.0"]
    (skipped,) = report.skipped
    with pytest.raises(ValueError, match="groups") as refusal:
        IFRHead(6, **QUICK)
    assert (skipped.path, skipped.reason) == ("b.0", f"6 channels: {refusal.value}")


def test_a_refined_model_holds_no_tower():
    model = SipMaskHead()
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
    replace_towers(model, groups=2, solver={"type": "Anderson", "max_iter": 3}, post_gain=0.5)
    (head,) = heads(model)
    assert head.solver.max_iter == 3
    assert (head.block.gn3.weight == 0.5).all()
    assert head.block.gn1.num_groups == 2
