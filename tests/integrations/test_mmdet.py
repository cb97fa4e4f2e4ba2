"""integrations.mmdet: every shipped configuration and every head, against mmdet's own."""

import copy
import re
from pathlib import Path

import pytest
import torch
from mmdet_systems import QUIET, SYSTEMS, base_config, build, config, inputs, parts, refined
from mmengine.config import Config, ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import HOOKS, init_default_scope

from ifr_fast import Anderson, IFRHead, Phantom
from ifr_fast.integrations.mmdet import MODELS, TOWERS, IFRHook
from ifr_fast.integrations.towers import replace_towers

pytestmark = QUIET
HEADS = {head.__name__: towers for head, towers in TOWERS.items()}
# One residual block: two convolutions without bias, their weight norm's gains, three GroupNorms.
BLOCK = 2 * (256 * 256 * 9 + 256) + 6 * 256


@pytest.fixture(autouse=True)
def mmdet_scope():
    """Other tests' runners leave their own default scope behind."""
    init_default_scope("mmdet")


def count(module):
    return sum(p.numel() for p in module.parameters())


def mask_head(**kwargs):
    return MODELS.build({"type": "IFRFCNMaskHead", "in_channels": 16, "conv_out_channels": 16, **kwargs})


def fcos_head(**kwargs):
    return MODELS.build({"type": "IFRFCOSHead", "num_classes": 3, "in_channels": 32, "feat_channels": 32, **kwargs})


def places(head):
    return [path for path, module in head.named_modules() if isinstance(module, IFRHead)]


@pytest.fixture(scope="module")
def table(request):
    """Rows of the table of parameters that these tests print, whether they pass or fail."""
    rows = [f"{'parameters of the towers that IFR replaces':<56}    mmdet      IFR"]
    yield rows
    with request.config.pluginmanager.get_plugin("capturemanager").global_and_fixture_disabled():
        print("", *rows, sep="\n")


@pytest.mark.parametrize(
    "system", [pytest.param(system, marks=[] if "ifr-mask-" in system else pytest.mark.full) for system in SYSTEMS]
)
def test_system(system, table):
    base, model = build(base_config(system)), build(config(system))
    replaced = [(path, tower) for path, head in refined(model).items() for tower in head.replaced]

    old = tuple(f"{path}.{layer}." for path, tower in replaced for layer in tower.layers)
    new = tuple(f"{path}.{tower.path}.block." for path, tower in replaced)
    weights = base.state_dict()
    report = model.load_state_dict(weights, strict=False)
    assert set(report.unexpected_keys) == {key for key in weights if key.startswith(old)} != set()
    assert set(report.missing_keys) == {key for key in model.state_dict() if key.startswith(new)} != set()

    before = sum(tower.parameters_before for _, tower in replaced)
    after = sum(tower.parameters_after for _, tower in replaced)
    table.append(f"{system:<56} {before / 1e6:6.3f} M {after / 1e6:6.3f} M  {after / before:4.0%}")
    assert after < before
    assert count(base) - count(model) == before - after

    with torch.no_grad():
        results = model.eval().test_step(inputs(system))
    found = [s.pred_instances if "pred_instances" in s else s[0].pred_track_instances for s in results]
    assert any(len(instances) for instances in found)

    optimizer = build_optim_wrapper(model, config(system).optim_wrapper)
    data = model.train().data_preprocessor(inputs(system), True)
    loss, _ = model.parse_losses(model(**data, mode="loss"))
    assert loss.isfinite()
    optimizer.backward(loss)
    towers = {name: p for name, p in model.named_parameters() if name.startswith(new)}
    for name, p in towers.items():
        assert p.grad is not None, f"{name} has no gradient"
        assert p.grad.isfinite().all(), name
        assert p.grad.count_nonzero(), name
    weights = {name: p.detach().clone() for name, p in towers.items()}
    optimizer.step()
    assert not [name for name, p in towers.items() if torch.equal(p, weights[name])]


def test_every_head_has_a_configuration():
    used = {part.get("type") for system in SYSTEMS for part in parts(config(system).model)}
    assert {f"IFR{name}" for name in HEADS} - used == {"IFRCondInstBboxHead", "IFRBoxInstBboxHead"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "FCNMaskHead" else pytest.mark.full) for name in HEADS]
)
def test_head_with_all_its_towers(name):
    """CondInst's and BoxInst's box heads, which the configurations leave alone as the paper does, among them."""
    bases = (part for system in SYSTEMS for part in parts(base_config(system).model))
    settings = next(part for part in bases if part.get("type") == name)
    ifr = {"where": "both", "solver": {"type": "Broyden", "max_iter": 2}}
    base = MODELS.build(copy.deepcopy(settings))
    head = MODELS.build({**settings, "type": f"IFR{name}", "ifr": ifr})
    paths = [path for tower in HEADS[name].values() for path in tower]
    assert sorted(path.rpartition(".")[0] for path in places(head)) == sorted(paths)
    pyramid = [torch.randn(1, 256, size, size) for size in (32, 16, 8, 4, 2)]
    if hasattr(head, "mask_feature_head") and name != "SOLOV2Head":
        base, head, features = base.mask_feature_head, head.mask_feature_head, pyramid[1:4]
    else:
        features = torch.randn(2, 256, 14, 14) if "convs" in paths else pyramid
    with torch.no_grad():
        expected, outputs = base.eval()(features), head.eval()(features)
    shapes = torch.utils._pytree.tree_map(lambda tensor: tensor.shape, (expected, outputs))
    assert shapes[0] == shapes[1]


def test_mask_head_has_55_percent_of_its_parameters(table):
    base, head = (MODELS.build({"type": kind}) for kind in ("FCNMaskHead", "IFRFCNMaskHead"))
    rest = (256 * 256 * 4 + 256) + (80 * 256 + 80)
    assert count(base) == 4 * (256 * 256 * 9 + 256) + rest  # 2.64 M
    assert count(head) == BLOCK + rest  # 1.46 M
    assert round((4 * BLOCK + rest) / 1e6, 1) == 5.0  # what the paper's 30 % compares with
    table.append(f"{'Mask R-CNN, the whole mask head':<56}  2.643 M  1.464 M   55%")
    table.append(f"{'  against four unshared residual blocks (Table 6)':<56}  5.001 M  1.464 M   29%")


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, ["cls_convs.0", "reg_convs.0"]),
        ("both", ["cls_convs.0", "reg_convs.0"]),
        ("reg", ["reg_convs.0"]),
        (["cls"], ["cls_convs.0"]),
    ],
)
def test_where_chooses_the_towers(where, expected):
    assert places(fcos_head(ifr={} if where is None else {"where": where})) == expected


def test_mask_branch_is_the_default():
    assert places(MODELS.build({"type": "IFRSOLOHead", "num_classes": 3, "in_channels": 32, "feat_channels": 32})) == [
        "mask_convs.1"
    ]


def test_options_reach_the_head():
    solver, adjoint = {"type": "Anderson", "max_iter": 4}, {"type": "Phantom", "steps": 2}
    block = {"form": "plain", "groups": 8, "mid_channels": 32, "weight_norm": False, "post_gain": 0.5}
    more = {"backend": "eager"}
    head = mask_head(ifr=ConfigDict(solver=solver, adjoint=adjoint, **block, **more)).convs[0]
    assert head.solver == Anderson(max_iter=4)
    assert head.adjoint == Phantom(steps=2)
    block = head.block
    assert (block.form, block.groups, block.backend) == ("plain", 8, "eager")
    assert block.conv1.weight.shape == (32, 16, 3, 3)
    assert "weight" in dict(block.conv1.named_parameters())
    assert (block.gn3.weight == 0.5).all()


@pytest.mark.parametrize(
    ("ifr", "message"),
    [
        ("Broyden", "ifr='Broyden': expected a dict"),
        ({"solvr": "broyden"}, "ifr has no option 'solvr': expected some of adjoint, .*, where"),
        ({"channels": 16}, "ifr has no option 'channels'"),
        ({"where": "cls"}, r"ifr\.where='cls': expected 'both' or some of IFRFCNMaskHead's towers, 'mask'"),
        ({"where": [["mask"]]}, r"ifr\.where=\[\[.mask.\]\]: expected"),
        ({"where": []}, r"ifr\.where=\[\]: expected"),
        ({"groups": 5}, "groups=5 does not divide channels=16"),
        ({"form": "eq5"}, "form='eq5': expected"),
        ({"solver": "newton"}, "solver='newton': expected one of"),
        ({"solver": {"type": "Broyden", "steps": 3}}, "solver=.*Broyden takes .*max_iter"),
        ({"adjoint": {"type": "Phantom", "steps": 0}}, "steps=0"),
        ({"solver": "picard", "adjoint": "shine"}, "adjoint=Shine"),
        ({"backend": "tpu"}, "backend='tpu'"),
    ],
)
def test_bad_options_are_named(ifr, message):
    with pytest.raises(ValueError, match=message):
        mask_head(ifr={"groups": 4, **ifr} if isinstance(ifr, dict) else ifr)


def test_deformable_convolution_stays():
    head = fcos_head(dcn_on_last_conv=True)
    assert [type(layer).__name__ for layer in head.cls_convs] == ["IFRHead", "Identity", "Identity", "ConvModule"]


def test_deformable_tower_is_refused():
    features = {"feat_channels": 32, "start_level": 0, "end_level": 3, "out_channels": 32}
    head = {"type": "IFRSOLOV2Head", "num_classes": 3, "in_channels": 32, "feat_channels": 32}
    with pytest.raises(ValueError, match=r"(?s)where: 'kernel_convs' leads to no conv tower.*DCN|Deform"):
        MODELS.build({**head, "mask_feature_head": ConfigDict(features), "dcn_cfg": {"type": "DCNv2"}})


def test_initialisation_leaves_the_blocks_as_they_start():
    """mmengine's Normal(std=0.01) for every Conv2d of a head would else reach those of a block."""
    head = fcos_head()
    start = copy.deepcopy([head.get_submodule(path).state_dict() for path in places(head)])
    head.init_weights()
    for path, before in zip(places(head), start, strict=True):
        after = head.get_submodule(path).state_dict()
        assert all(torch.equal(after[key], value) for key, value in before.items())


def test_state_dict_loads_where_solver_and_adjoint_differ():
    saved = mask_head(ifr={"groups": 4})
    other = mask_head(ifr={"groups": 4, "solver": "anderson", "adjoint": "phantom"})
    other.load_state_dict(saved.state_dict(), strict=True)
    other.convs[0].solver = saved.convs[0].solver
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(other(x), saved(x))


def test_state_dict_of_another_form_is_refused():
    with pytest.warns(UserWarning, match="no equilibrium"):
        paper = mask_head(ifr={"groups": 4, "form": "paper"})
    with pytest.raises(RuntimeError, match=r"convs\.0\.block\.gn3"):
        mask_head(ifr={"groups": 4}).load_state_dict(paper.state_dict())


def test_copies_work_alike():
    head = mask_head(ifr={"groups": 4}).eval()
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        assert torch.equal(copy.deepcopy(head)(x), head(x))


def test_readme_shows_a_configuration(tmp_path):
    """mmdet's Mask R-CNN with what the README says to add."""
    readme = (Path(__file__).parents[2] / "integrations/README.md").read_text()
    (shown,) = (block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "custom_imports" in block)
    path = tmp_path / "config.py"
    path.write_text(f'_base_ = "mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"\n{shown}')
    settings = Config.fromfile(path)
    model = MODELS.build(settings.model)
    assert places(model) == ["roi_head.mask_head.convs.0"]
    assert isinstance(HOOKS.build(settings.custom_hooks[0]), IFRHook)


def test_readme_lists_the_configurations():
    readme = (Path(__file__).parents[2] / "integrations/README.md").read_text()
    listed = re.findall(r"\| `(ifr-[\w-]+)` \|", readme)
    assert [[system for system in SYSTEMS if name in system][1:] for name in listed] == [[]] * len(SYSTEMS)
    assert {system for system in SYSTEMS for name in listed if name in system} == set(SYSTEMS)


def test_replace_towers_serves_heads_without_a_class_of_their_own():
    """HTC's semantic head goes through range(num_convs), so that all of its places must stay filled."""
    settings = base_config("ifr-htc_r50_fpn_1x_coco").model.roi_head.semantic_head
    base, head = MODELS.build(settings), MODELS.build(settings)
    (tower,) = replace_towers(head, where="convs", solver={"type": "Broyden", "max_iter": 2})
    assert (tower.path, tower.convolutions) == ("convs.0", 4)
    features = [torch.randn(1, 256, size, size) for size in (32, 16, 8, 4, 2)]
    with torch.no_grad():
        assert [out.shape for out in head(features)] == [out.shape for out in base(features)]
