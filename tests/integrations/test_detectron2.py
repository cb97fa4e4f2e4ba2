"""integrations.detectron2 against detectron2 itself: every shipped configuration, options, errors, LazyConfig."""

import importlib
import re
import shutil
import sys
from pathlib import Path

import adelaidet_layouts
import detectron2_layouts
import pytest
import torch
from torch import nn

from ifr_fast import Broyden, IFRHead, Picard

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "integrations/configs/detectron2"
full = pytest.mark.full
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

# What each refines, and how many parameters of detectron2's are gone.
ONE = 4 * (256 * 256 * 9 + 256)
SYSTEMS = {
    "ifr_mask_rcnn_R_50_FPN_1x.yaml": ({"roi_heads.mask_head.mask_fcn1"}, ONE),
    "ifr_keypoint_rcnn_R_50_FPN_1x.yaml": ({"roi_heads.keypoint_head.conv_fcn2"}, 7 * (512 * 512 * 9 + 512)),
    "ifr_retinanet_R_50_FPN_1x.yaml": ({"head.cls_subnet.0", "head.bbox_subnet.0"}, 2 * ONE),
    "ifr_fcos_R_50_FPN_1x.py": ({"head.cls_subnet.0", "head.bbox_subnet.0"}, 2 * ONE),
    "ifr_mask_rcnn_R_50_FPN_1x.py": ({"roi_heads.mask_head.mask_fcn1"}, ONE),
    "ifr_keypoint_rcnn_R_50_FPN_1x.py": ({"roi_heads.keypoint_head.conv_fcn2"}, 7 * (512 * 512 * 9 + 512)),
    "ifr_retinanet_R_50_FPN_1x.py": ({"head.cls_subnet.0", "head.bbox_subnet.0"}, 2 * ONE),
    "box head": ({"roi_heads.box_head.conv1"}, ONE),
    "IFR": ({"roi_heads.mask_head.mask_fcn1"}, ONE),
}
MASKS = "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml"
BOXES = {"MODEL__ROI_BOX_HEAD__NUM_CONV": 4, "MODEL__MASK_ON": False}
ELSEWHERE = {  # configurations for other repositories' folders: the architecture there, and the layout that is refined
    "blendmask_R_50_1x": ("BlendMask", {"basis_module": adelaidet_layouts.ProtoNet}, "basis_module.tower.0"),
    "bmask_rcnn_R_50_FPN_1x": (
        "GeneralizedRCNN",
        {"roi_heads": nn.Module, "roi_heads.mask_head": detectron2_layouts.BoundaryPreservingHead},
        "roi_heads.mask_head.mask_fcn1",
    ),
}


def pair(d2, system):
    """A system and what it is without IFR, both with new weights."""
    if system.endswith(".py"):
        (zoo,) = re.findall(r'get_config\("(.+?)"\)', (CONFIGS / system).read_text())
        return d2.lazy_model(CONFIGS / system), d2.lazy_model(d2.zoo(zoo))
    if system == "box head":
        path, changes, base = d2.zoo(MASKS), BOXES, BOXES
        changes = changes | {"MODEL__ROI_BOX_HEAD__NAME": "IFRFastRCNNConvFCHead"}
        base = base | {"MODEL__ROI_BOX_HEAD__NAME": "FastRCNNConvFCHead"}
    elif system == "IFR":
        path, base = d2.zoo(MASKS), {}
        where = {"MODEL__IFR__WHERE": ["roi_heads.mask_head"], "MODEL__IFR__META_ARCHITECTURE": "GeneralizedRCNN"}
        changes = where | {"MODEL__META_ARCHITECTURE": "IFR"}
    else:
        path, changes = CONFIGS / system, {}
        base = {
            "MODEL__ROI_MASK_HEAD__NAME": "MaskRCNNConvUpsampleHead",
            "MODEL__ROI_KEYPOINT_HEAD__NAME": "KRCNNConvDeconvUpsampleHead",
            "MODEL__META_ARCHITECTURE": "RetinaNet" if "retinanet" in system else "GeneralizedRCNN",
        }
    return tuple(d2.build_model(d2.configuration(path, **c)) for c in (changes, base))


def count(module):
    return sum(p.numel() for p in module.parameters())


@full
@pytest.mark.parametrize("system", SYSTEMS)
def test_system(system, d2, tmp_path):
    """Everything but the towers is detectron2's; it detects, trains three steps and comes back from its checkpoint."""
    model, base = pair(d2, system)
    expected, before = SYSTEMS[system]
    assert d2.places(model) == expected
    heads = [model.get_submodule(path) for path in expected]
    assert count(base) - count(model) == before - sum(map(count, heads))
    report = model.load_state_dict(base.state_dict(), strict=False)
    new = tuple(f"{path}.block." for path in expected)
    assert all(key.startswith(new) for key in report.missing_keys)
    assert len(report.missing_keys) == sum(len(head.state_dict()) for head in heads)
    assert not {key for key in report.unexpected_keys if not re.search(r"mask_fcn|conv_fcn|conv\d|_subnet", key)}

    images = d2.batch(1 if "keypoint" in system else 80)
    found = d2.predictions(model, images)
    assert "fcos" in system or any(len(fields["scores"]) for fields in found)  # its untrained boxes may be empty
    assert ("pred_masks" in found[0]) == ("mask" in system or system == "IFR")

    weights = [head.block.conv1.weight.detach().clone() for head in heads]
    storage = d2.train(model.train(), images, d2.ours.IFRHook(warmup_iters=1, interval=1)).storage
    logged = {name: values.values() for name, values in storage.histories().items()}
    assert len(logged["total_loss"]) == 3
    for name in ("ifr_residual", "ifr_iterations", "ifr_spectral_radius"):
        assert [iteration for _, iteration in logged[name]] == [1, 2]  # the first was unrolled
        assert all(0 < value < 100 for value, _ in logged[name])
    assert not [w for w, head in zip(weights, heads, strict=True) if torch.equal(w, head.block.conv1.weight)]

    d2.DetectionCheckpointer(model, str(tmp_path)).save("model")
    again, _ = pair(d2, system)
    d2.DetectionCheckpointer(again).load(str(tmp_path / "model.pth"))
    for one, other in zip(d2.predictions(model, images), d2.predictions(again, images), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


@full
@pytest.mark.parametrize("name", ELSEWHERE)
def test_configuration_for_another_repository(name, d2, tmp_path, monkeypatch):
    """Beside the file that it inherits, which lives in that repository, as the model does."""
    from detectron2.modeling import META_ARCH_REGISTRY

    architecture, parts, path = ELSEWHERE[name]

    def build(cfg):
        model = nn.Module()
        for part, kind in parts.items():
            owner, _, last = part.rpartition(".")
            setattr(model.get_submodule(owner), last, kind())
        return model

    monkeypatch.setitem(META_ARCH_REGISTRY._obj_map, architecture, build)
    shutil.copy(CONFIGS / f"ifr_{name}.yaml", tmp_path)
    (tmp_path / f"{name.removeprefix('blendmask_')}.yaml").write_text("MODEL: {MASK_ON: True}\n")
    cfg = d2.configuration(tmp_path / f"ifr_{name}.yaml", MODEL__IFR__GROUPS=4)
    assert cfg.MODEL.MASK_ON
    assert d2.places(d2.build_model(cfg)) == {path}


@full
def test_every_configuration_is_tested():
    names = {path.name for path in CONFIGS.glob("*.*")}
    assert names == {name for name in SYSTEMS if "." in name} | {f"ifr_{name}.yaml" for name in ELSEWHERE}


@full
def test_configuration_without_the_node_is_refused(d2):
    from detectron2.config import get_cfg
    from detectron2.layers import ShapeSpec

    with pytest.raises(ValueError, match=r"no MODEL\.IFR: call add_ifr_config\(cfg\)"):
        d2.ours.IFRMaskRCNNConvUpsampleHead(get_cfg(), ShapeSpec(channels=16))


@full
def test_arguments_beside_a_configuration_win(d2):
    """As for any class that detectron2 calls configurable."""
    from detectron2.layers import ShapeSpec

    options = {"num_classes": 3, "conv_dims": [256] * 5, "ifr": {"groups": 16, "solver": "picard"}}
    head = d2.ours.IFRMaskRCNNConvUpsampleHead(d2.defaults(), ShapeSpec(channels=256), **options)
    assert head.predictor.out_channels == 3
    assert (head.mask_fcn1.solver, head.mask_fcn1.block.groups) == (Picard(), 16)


@full
def test_lazy_config_refines_any_model(d2):
    from detectron2.config import LazyCall
    from detectron2.model_zoo import get_config

    model = get_config("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.py").model
    solver = LazyCall(Broyden)(max_iter=7)
    refined = LazyCall(d2.ours.refine)(
        model=model, where=["roi_heads.mask_head"], solver=solver, adjoint={"type": "shine"}
    )
    head = d2.instantiate(refined).roi_heads.mask_head.mask_fcn1
    assert (head.solver, type(head.adjoint).__name__) == (Broyden(max_iter=7), "Shine")


@full
def test_lazy_config_on_the_command_line(d2):
    """The zoo's own configuration: a head's class and its options, as the README shows."""
    from detectron2.model_zoo import get_config

    ((key, head, option),) = re.findall(r"`(model\.head\._target_)` \| `(\S+)`.*`(model\.head\.ifr\S+)`", readme())
    shown = [f"{key}={head}", option]
    model = d2.LazyConfig.apply_overrides(get_config("COCO-Detection/fcos_R_50_FPN_1x.py"), shown).model
    model.head.norm = ""
    head = d2.instantiate(model.head)
    assert [tower[0].block.groups for tower in (head.cls_subnet, head.bbox_subnet)] == [16, 16]


def readme():
    return (ROOT / "integrations/README.md").read_text().split("## detectron2")[1].split("\n## ")[0]


@full
def test_readmes_configuration(d2, tmp_path):
    (shown,) = re.findall(r"```yaml\n(.*?)```", readme(), re.DOTALL)
    (tmp_path / "shown.yaml").write_text(shown)
    model = d2.build_model(d2.configuration(tmp_path / "shown.yaml"))
    assert d2.places(model) == {"roi_heads.mask_head.mask_fcn1"}


@full
def test_readme_loads_an_authors_checkpoint(d2, tmp_path, make_head):
    """One with the layout of a released one: detectron2's names, the block under repeat_block, four groups."""
    released = make_head(256)
    block = {
        key.replace(".parametrizations.weight.original0", ".weight_g"): v
        for key, v in released.block.state_dict().items()
    }
    block = {key.replace(".parametrizations.weight.original1", ".weight_v"): v for key, v in block.items()}
    cfg = d2.configuration(CONFIGS / "ifr_mask_rcnn_R_50_FPN_1x.yaml")
    state = d2.build_model(cfg).state_dict()
    state = {key: value for key, value in state.items() if "mask_fcn" not in key}
    state |= {f"roi_heads.mask_head.repeat_block.{key}": value for key, value in block.items()}
    torch.save({"model": state, "iteration": 89999}, tmp_path / "mask_rcnn_ifr.pth")

    (shown,) = (found for found in re.findall(r"```python\n(.*?)```", readme(), re.DOTALL) if "from_released" in found)
    shown = shown.replace("mask_rcnn_ifr.pth", str(tmp_path / "mask_rcnn_ifr.pth"))
    names = {"model": d2.build_model(cfg), "torch": torch, "IFRHead": IFRHead}
    names["DetectionCheckpointer"] = d2.DetectionCheckpointer
    exec(compile(shown, "README.md", "exec"), names)
    head = names["model"].roi_heads.mask_head
    assert [name for name, _ in head.named_children()] == ["mask_fcn1", "deconv", "deconv_relu", "predictor"]
    assert torch.equal(head.deconv.weight, state["roi_heads.mask_head.deconv.weight"])
    x = torch.randn(2, 256, 14, 14)
    released.solver = head.mask_fcn1.solver
    with torch.no_grad():
        assert torch.equal(head.mask_fcn1(x), released(x))


def test_without_detectron2_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2", None)
    monkeypatch.setitem(sys.modules, "detectron2.config", None)
    monkeypatch.delitem(sys.modules, "ifr_fast.integrations.detectron2", raising=False)
    with pytest.raises(ModuleNotFoundError, match=r"needs detectron2 0\.6 or newer.*'ifr-fast\[detectron2\]'.*github"):
        importlib.import_module("ifr_fast.integrations.detectron2")
