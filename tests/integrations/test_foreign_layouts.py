"""replace_towers on heads of other code bases: what is replaced, that nothing else is skipped or changed."""

import copy
import re
from collections import Counter
from functools import partial
from pathlib import Path

import adelaidet_layouts as adelaidet
import detectron2_layouts as detectron2
import mmdet1_layouts as mmdet1
import pytest
import torch
from detectron2_layouts import C
from torch import nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from ifr_fast import IFRHead, Unroll
from ifr_fast.integrations.towers import replace_towers

QUICK = {"groups": 4, "solver": Unroll(steps=1)}


def roi():
    return (torch.randn(2, C, 7, 7),)


def narrow_roi():
    return (torch.randn(2, 4, 7, 7),)


def two_rois():
    return torch.randn(2, C, 7, 7), torch.randn(2, C, 14, 14)


def levels():
    return ([torch.randn(2, C, 8, 8), torch.randn(2, C, 4, 4)],)


def named_levels():
    return ({"p3": torch.randn(2, C, 8, 8), "p4": torch.randn(2, C, 4, 4), "p5": torch.randn(2, C, 2, 2)},)


# name: the model, its inputs, where, and at each path how many convolutions are replaced
REPLACED = {
    "Mask R-CNN": (detectron2.MaskRCNNConvUpsampleHead, roi, None, {"mask_fcn1": 4}),
    "Mask R-CNN without norms": (lambda: detectron2.MaskRCNNConvUpsampleHead(norm=""), roi, None, {"mask_fcn1": 4}),
    "Mask R-CNN, widening": (lambda: detectron2.MaskRCNNConvUpsampleHead(4), narrow_roi, None, {"mask_fcn2": 3}),
    "Faster R-CNN, 4conv": (detectron2.FastRCNNConvFCHead, roi, None, {"conv1": 4}),
    "Faster R-CNN, 4conv, detectron2 0.1": (detectron2.FirstFastRCNNConvFCHead, roi, None, {"conv1": 4}),
    "Keypoint R-CNN, detectron2 0.1": (detectron2.KRCNNConvDeconvUpsampleHead, narrow_roi, None, {"conv_fcn2": 3}),
    "RetinaNet": (detectron2.RetinaNetHead, levels, None, {"cls_subnet.0": 4, "bbox_subnet.0": 4}),
    "RetinaNet, GN": (
        lambda: detectron2.RetinaNetHead(partial(nn.GroupNorm, 4)),
        levels,
        None,
        {"cls_subnet.0": 4, "bbox_subnet.0": 4},
    ),
    "RetinaNet, FrozenBN": (
        lambda: detectron2.RetinaNetHead(detectron2.FrozenBatchNorm2d),
        levels,
        None,
        {"cls_subnet.0": 4, "bbox_subnet.0": 4},
    ),
    "RetinaNet, BN for each level": (
        lambda: detectron2.RetinaNetHead(partial(detectron2.CycleBatchNormList, 2)),
        levels,
        "cls_subnet",
        {"cls_subnet.0": 4},
    ),
    "FCOS": (adelaidet.FCOSHead, levels, None, {"cls_tower.0": 4, "bbox_tower.0": 4}),
    "FCOS without norms": (lambda: adelaidet.FCOSHead(None), levels, None, {"cls_tower.0": 4, "bbox_tower.0": 4}),
    "FCOS, BN for each level": (
        lambda: adelaidet.FCOSHead("BN"),
        levels,
        None,
        {"cls_tower.0": 4, "bbox_tower.0": 4},
    ),
    "FCOS, shared tower": (
        lambda: adelaidet.FCOSHead(shared=4),
        levels,
        None,
        {"cls_tower.0": 4, "bbox_tower.0": 4, "share_tower.0": 4},
    ),
    "FCOS, last deformable": (
        lambda: adelaidet.FCOSHead(deformable="last"),
        levels,
        None,
        {"cls_tower.0": 3, "bbox_tower.0": 3},
    ),
    "MEInst": (adelaidet.MEInstHead, levels, None, {"cls_tower.0": 4, "bbox_tower.0": 4, "mask_tower.0": 4}),
    "MEInst, last deformable": (lambda: adelaidet.MEInstHead("last"), levels, "mask_tower", {"mask_tower.0": 3}),
    "CondInst": (adelaidet.MaskBranch, named_levels, None, {"tower.0": 4}),
    "CondInst, seg_head named": (adelaidet.MaskBranch, named_levels, "seg_head", {"seg_head.0": 2}),
    "BlendMask": (adelaidet.ProtoNet, named_levels, None, {"tower.0": 3}),
    "BMask R-CNN": (detectron2.BoundaryPreservingHead, two_rois, None, {"mask_fcn1": 4}),
    "BMask R-CNN, both named": (
        detectron2.BoundaryPreservingHead,
        two_rois,
        ["mask_fcn1", "boundary_fcn1"],
        {"mask_fcn1": 4, "boundary_fcn1": 2},
    ),
    "SipMask": (mmdet1.SipMaskHead, levels, None, {"cls_convs.0": 3, "reg_convs.0": 4}),
    "SipMask, last deformable": (
        lambda: mmdet1.SipMaskHead(dcn_on_last_conv=True),
        levels,
        None,
        {"cls_convs.0": 3, "reg_convs.0": 3},
    ),
}


def count_calls(model):
    """How often each module, by its path, is called from here on."""
    calls = Counter()
    for path, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, path=path: calls.update([path]))
    return calls


def is_below(path, layers):
    return any(path == layer or path.startswith(f"{layer}.") for layer in layers)


@pytest.fixture(params=REPLACED)
def replaced(request):
    """The original, the same with IFRHeads, the report, inputs, and what is expected of the report."""
    build, make_inputs, where, expected = REPLACED[request.param]
    original = build()
    model = copy.deepcopy(original)
    report = replace_towers(model, where, **QUICK)
    return original, model, report, make_inputs(), expected


def test_the_towers_are_found(replaced):
    original, model, report, _, expected = replaced
    assert {r.path: r.convolutions for r in report} == expected
    assert {r.channels for r in report} == {C}
    assert {path for path, m in model.named_modules() if isinstance(m, IFRHead)} == set(expected)
    layers = [layer for r in report for layer in r.layers]
    kept = {key: value for key, value in original.state_dict().items() if not is_below(key, layers)}
    after = {key: value for key, value in model.state_dict().items() if not is_below(key, expected)}
    assert after.keys() == kept.keys()
    assert all(torch.equal(after[key], kept[key]) for key in kept)


def test_the_rest_of_the_function_stays(replaced, monkeypatch):
    original, model, report, inputs, expected = replaced
    layers = [layer for r in report for layer in r.layers]
    calls, calls_before = count_calls(model), count_calls(original)
    for layer in layers:
        original.get_submodule(layer).forward = lambda x: x
    monkeypatch.setattr(IFRHead, "forward", lambda self, x: x)

    out, expected_out = tree_leaves(model(*copy.deepcopy(inputs))), tree_leaves(original(*inputs))

    assert len(out) == len(expected_out)
    assert all(map(torch.equal, out, expected_out))
    gone = [*layers, *expected]
    assert {p: n for p, n in calls.items() if not is_below(p, gone)} == {
        p: n for p, n in calls_before.items() if not is_below(p, gone)
    }
    assert {r.path: calls[r.path] for r in report} == {r.path: calls_before[r.layers[0]] for r in report}


def test_shapes_stay_and_gradients_reach_every_parameter(replaced):
    original, model, _, inputs, _ = replaced
    out = tree_leaves(model(*copy.deepcopy(inputs)))
    assert [o.shape for o in out] == [o.shape for o in tree_leaves(original(*inputs))]
    sum(o.square().mean() for o in out).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
    unmoved = [
        f"{path}.{name}"
        for path, head in model.named_modules()
        if isinstance(head, IFRHead)
        for name, p in head.named_parameters()
        if not p.grad.any()
    ]
    assert unmoved == []


@pytest.mark.parametrize(
    ("build", "skipped"),
    [
        (detectron2.MaskRCNNConvUpsampleHead, {"deconv": "a ConvTranspose2d", "predictor": "a 1×1 convolution"}),
        (
            lambda: detectron2.MaskRCNNConvUpsampleHead(4),
            {
                "mask_fcn1": "a 3×3 convolution with 4 → 8 channels",
                "deconv": "a ConvTranspose2d",
                "predictor": "a 1×1 convolution",
            },
        ),
        (lambda: adelaidet.FCOSHead(deformable="last"), {"cls_tower.9": "a DFConv2d", "bbox_tower.9": "a DFConv2d"}),
        (
            adelaidet.MaskBranch,
            {
                "refine": "its elements are not applied one after the other: MaskBranch.forward: "
                "`self.refine[i](features[f])`",
                "tower.4": "a 1×1 convolution",
                "seg_head.0": "two convolutions, as many as an IFRHead has: name it with `where`",
            },
        ),
        (
            detectron2.BoundaryPreservingHead,
            {"boundary_fcn1": "two convolutions, as many as an IFRHead has: name it with `where`"},
        ),
        (lambda: mmdet1.SipMaskHead(dcn_on_last_conv=True), {"reg_convs.3": "a ConvModule: a DeformConvPack"}),
    ],
)
def test_what_is_left_alone_is_said(build, skipped):
    assert {s.path: s.reason for s in replace_towers(build(), **QUICK).skipped} == skipped


def resizes_in_an_activation():
    """detectron2's Conv2d takes any callable for its activation."""
    model = detectron2.BoundaryPreservingHead()
    model.mask_fcn2.activation = partial(F.interpolate, scale_factor=2)
    return model


@pytest.mark.parametrize(
    ("build", "where", "reason"),
    [
        (resizes_in_an_activation, None, r"mask_fcn2: .* may be more than a convolution \(`self\.activation\(x\)`\)"),
        (detectron2.MaskHeadThatWalksItsList, None, "an unknown use"),
        (detectron2.MaskHeadThatWalksItsList, "mask_fcn1", "its layers may be read from conv_norm_relus, too"),
        (lambda: adelaidet.FCOSHead(deformable="all"), None, r"cls_tower\.0: left alone, a DFConv2d"),
        (lambda: adelaidet.FCOSHead(deformable="all"), "cls_tower", r"cls_tower\.0: left alone, a DFConv2d"),
        (adelaidet.FCOSHead, "share_tower", r"'share_tower' leads to no conv tower .*\(it is a Sequential\)"),
        (detectron2.FPN, None, "output_convs: left alone, its elements are not applied one after the other"),
        (detectron2.FPN, "fpn_output_p5", "output_convs: left alone, its elements are not applied one after the other"),
        (adelaidet.MaskBranch, "refine", "its elements are not applied one after the other"),
        (mmdet1.SipMaskHead, "feat_align", r"'feat_align' leads to no conv tower .*\(it is a FeatureAlign\)"),
    ],
)
def test_refusals_give_the_reason_and_change_nothing(build, where, reason):
    model = build()
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=reason):
        replace_towers(model, where, **QUICK)
    assert str(model) == str(before)


def test_plain_lists_of_the_layers_follow():
    model = detectron2.MaskRCNNConvUpsampleHead()
    replace_towers(model, **QUICK)
    assert model.conv_norm_relus == [model.mask_fcn1]

    model = detectron2.BoundaryPreservingHead()
    boundary = list(model.boundary_fcns)
    replace_towers(model, **QUICK)
    assert model.mask_fcns == [model.mask_fcn1, model.mask_fcn2, model.mask_fcn3, model.mask_fcn4]
    assert [type(layer) for layer in model.mask_fcns] == [IFRHead, nn.Identity, nn.Identity, nn.Identity]
    assert model.boundary_fcns == boundary


class TwoLists(nn.Module):
    """Which hold the same layers; forward reads neither."""

    def __init__(self):
        super().__init__()
        for k in range(4):
            self.add_module(f"conv{k}", detectron2.conv2d())
        self.odd, self.convs = [self.conv1, self.conv3], list(self.children())

    def forward(self, x):
        for child in self.children():
            x = child(x)
        return x


def test_layers_in_two_lists_are_replaced_once():
    model = TwoLists()
    report = replace_towers(model, lambda path, container: True, **QUICK)
    assert [r.layers for r in report] == [("conv1", "conv3")]
    assert [(s.path, s.reason) for s in report.skipped] == [
        ("conv0", "its layers are those of the tower at conv1, too")
    ]
    assert model.convs == list(model.children())
    assert model.odd == [model.conv1, model.conv3]


def test_readme_names_these_layouts():
    readme = (Path(__file__).parents[2] / "integrations/README.md").read_text()
    expressions = re.findall(r"\| `\"(.+)\"` \|", readme)
    assert len(expressions) == 6
    for word in (word for expression in expressions for word in expression.split(" or ")):
        assert any(word in f"[{name}" for name in REPLACED), word
