"""integrations.detectron2's node MODEL.IFR: options from a command line, and errors that name the key."""

import inspect
import re

import pytest
import torch

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Picard, Unroll

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


def small_head(d2, *overrides):
    """A mask head of 16 channels from detectron2's defaults and a command line's overrides."""
    from detectron2.layers import ShapeSpec
    from detectron2.modeling.roi_heads import build_mask_head

    cfg = d2.defaults()
    small = ["MODEL.ROI_MASK_HEAD.CONV_DIM", "16", "MODEL.ROI_MASK_HEAD.NUM_CONV", "4", "MODEL.IFR.GROUPS", "4"]
    cfg.merge_from_list([*small, "MODEL.ROI_MASK_HEAD.NAME", "IFRMaskRCNNConvUpsampleHead", *overrides])
    return build_mask_head(cfg, ShapeSpec(channels=16, width=14, height=14)).mask_fcn1


def on_command_line(**options):
    """In options, __ stands for the dots below MODEL.IFR."""
    return [word for key, value in options.items() for word in (f"MODEL.IFR.{key.replace('__', '.')}", str(value))]


def test_the_node_has_ifrheads_options_and_defaults(d2):
    node = d2.defaults().MODEL.IFR
    options = inspect.signature(IFRHead).parameters
    assert set(node) == {name.upper() for name in options if name != "channels"} | {"WHERE", "META_ARCHITECTURE"}
    head, plain = small_head(d2), IFRHead(16, groups=4)
    assert (head.solver, head.adjoint) == (plain.solver, plain.adjoint)
    assert head.call(torch.float32) == plain.call(torch.float32)
    assert head.block.state_dict().keys() == plain.block.state_dict().keys()


@pytest.mark.parametrize(
    ("overrides", "solver", "adjoint"),
    [
        ({"SOLVER__MAX_ITER": 10}, Broyden(max_iter=10), Implicit()),
        ({"SOLVER__RTOL": 1e-2, "SOLVER__WORKSPACE": 10**6}, Broyden(rtol=1e-2, workspace=10**6), Implicit()),
        ({"SOLVER__RTOL": 0}, Broyden(rtol=0), Implicit()),
        ({"SOLVER__HISTORY_DTYPE": "bfloat16"}, Broyden(history_dtype=torch.bfloat16), Implicit()),
        ({"SOLVER__TYPE": "anderson", "SOLVER__M": 3}, Anderson(m=3), Implicit()),
        ({"SOLVER__TYPE": "Unroll", "SOLVER__STEPS": 3}, Unroll(steps=3), Implicit()),
        ({"ADJOINT__MAX_ITER": 5}, Broyden(), Implicit(max_iter=5)),
        ({"ADJOINT__TYPE": "Phantom", "ADJOINT__DAMPING": 0.3}, Broyden(), Phantom(damping=0.3)),
        ({"ADJOINT__TYPE": "JacobianFree", "SOLVER__TYPE": "Picard"}, Picard(), JacobianFree()),
        (
            {"ADJOINT__SOLVER__TYPE": "Anderson", "ADJOINT__SOLVER__MAX_ITER": 20},
            Broyden(),
            Implicit(solver=Anderson(max_iter=20)),
        ),
    ],
)
def test_solver_and_adjoint_on_the_command_line(overrides, solver, adjoint, d2):
    head = small_head(d2, *on_command_line(**overrides))
    assert (head.solver, head.adjoint) == (solver, adjoint)


def test_options_of_the_block_on_the_command_line(d2):
    options = {"FORM": "plain", "GROUPS": 8, "MID_CHANNELS": 32, "WEIGHT_NORM": False, "POST_GAIN": 0.5}
    more = {"BACKEND": "eager", "CONVOLUTION": "direct", "CUDA_GRAPHS": True}
    head = small_head(d2, *on_command_line(**options, **more))
    assert (head.block.form, head.block.groups, head.block.backend) == ("plain", 8, "eager")
    assert (head.convolution, head.cuda_graphs) == ("direct", True)
    assert dict(head.block.named_parameters())["conv1.weight"].shape == (32, 16, 3, 3)
    assert (head.block.gn3.weight == 0.5).all()


def test_a_configuration_survives_its_dump(d2, tmp_path):
    cfg = d2.defaults()
    cfg.merge_from_list(on_command_line(SOLVER__TYPE="Anderson", SOLVER__M=3, WHERE="['a.*', 'b']", MID_CHANNELS=64))
    (tmp_path / "dumped.yaml").write_text(cfg.dump())
    again = d2.defaults()
    again.merge_from_file(str(tmp_path / "dumped.yaml"))
    assert again.MODEL.IFR == cfg.MODEL.IFR


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"SOLVR__TYPE": "Broyden"}, r"Non-existent.*MODEL\.IFR\.SOLVR\.TYPE"),
        ({"SOLVER__STEP": 3}, r"Non-existent.*MODEL\.IFR\.SOLVER\.STEP"),
        ({"GROUPS": "many"}, r"Type mismatch.*MODEL\.IFR\.GROUPS|MODEL\.IFR\.GROUPS"),
        ({"SOLVER": "Broyden"}, r"MODEL\.IFR\.SOLVER"),
        ({"SOLVER__MAX_ITER": 0}, r"^MODEL\.IFR\.SOLVER\.MAX_ITER=0: .*≥ 1"),
        ({"SOLVER__RTOL": "small"}, r"^MODEL\.IFR\.SOLVER\.RTOL='small': "),
        ({"SOLVER__TYPE": "Newton"}, r"^MODEL\.IFR\.SOLVER\.TYPE='Newton': expected one of Broyden, .*Unroll"),
        ({"SOLVER__STEPS": 3}, r"^MODEL\.IFR\.SOLVER\.STEPS=3: Broyden"),
        ({"SOLVER__M": 0, "SOLVER__TYPE": "Anderson"}, r"^MODEL\.IFR\.SOLVER\.M=0: "),
        ({"ADJOINT__TYPE": "None"}, r"^MODEL\.IFR\.ADJOINT\.TYPE="),
        ({"ADJOINT__STEPS": 0, "ADJOINT__TYPE": "Phantom"}, r"^MODEL\.IFR\.ADJOINT\.STEPS=0: "),
        ({"ADJOINT__TYPE": "Shine", "SOLVER__TYPE": "Picard"}, r"^MODEL\.IFR\.ADJOINT\.TYPE='Shine': .*Broyden"),
        ({"ADJOINT__SOLVER__MAX_ITER": 5}, r"^MODEL\.IFR\.ADJOINT\.SOLVER\.TYPE=None: expected one of Broyden"),
        ({"ADJOINT__SOLVER__TYPE": "Unroll"}, r"^MODEL\.IFR\.ADJOINT\.SOLVER\.TYPE='Unroll': expected one of Broyden"),
        ({"GROUPS": 5}, r"^MODEL\.IFR\.GROUPS=5: .*does not divide channels=16"),
        ({"FORM": "eq5"}, r"^MODEL\.IFR\.FORM='eq5': "),
        ({"MID_CHANNELS": -4}, r"^MODEL\.IFR\.MID_CHANNELS=-4: "),
        ({"BACKEND": "tpu"}, r"^MODEL\.IFR\.BACKEND='tpu': "),
        ({"CONVOLUTION": "fft"}, r"^MODEL\.IFR\.CONVOLUTION='fft': "),
        ({"WHERE": "['mask_fcn1']"}, r"^MODEL\.IFR\.WHERE=\['mask_fcn1'\]: IFRMaskRCNNConvUpsampleHead has its own"),
    ],
)
def test_wrong_keys_and_values_are_named(overrides, message, d2):
    with pytest.raises((ValueError, AssertionError, KeyError)) as raised:
        small_head(d2, *on_command_line(**overrides))
    assert re.search(message, str(raised.value)), raised.value


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({}, r"^MODEL\.IFR\.META_ARCHITECTURE='': expected one of those registered, .*GeneralizedRCNN"),
        ({"META_ARCHITECTURE": "IFR"}, r"^MODEL\.IFR\.META_ARCHITECTURE='IFR': "),
        (
            {"META_ARCHITECTURE": "RetinaNet", "WHERE": "['head.cls_subnets']"},
            r"^MODEL\.IFR\.WHERE=\['head.cls_subnets'\]: .*leads to no conv tower",
        ),
        ({"META_ARCHITECTURE": "RetinaNet", "GROUPS": 7}, r"(?s)^MODEL\.IFR\.GROUPS=7: .*does not divide"),
    ],
)
def test_wrong_architecture_or_place_is_named(overrides, message, d2):
    cfg = d2.configuration(d2.zoo("COCO-Detection/retinanet_R_50_FPN_1x.yaml"), MODEL__META_ARCHITECTURE="IFR")
    cfg.merge_from_list(on_command_line(**overrides))
    with pytest.raises(ValueError, match=message):
        d2.build_model(cfg)


@pytest.mark.parametrize("where", [5, [5], []])
def test_refine_refuses_a_where_of_another_type(d2, where):
    with pytest.raises(ValueError, match="where: expected None, a glob"):
        d2.ours.refine(torch.nn.Sequential(), where)
