"""detectron2's heads with IFR, a meta-architecture that refines any other, and a training hook.

README.md in this folder says how they are configured. CONFIGS is the folder of the configurations that come with the
package.
"""

import inspect
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Picard, Shine, Unroll, Unrolled

from .towers import replace_towers
from .training import TrainingHook

try:
    from detectron2.config import CfgNode, configurable
    from detectron2.engine import HookBase
    from detectron2.modeling import META_ARCH_REGISTRY, RetinaNet, roi_heads
    from detectron2.modeling.meta_arch.fcos import FCOSHead
    from detectron2.modeling.meta_arch.retinanet import RetinaNetHead
    from detectron2.utils import comm
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"{error}. ifr_fast.integrations.detectron2 needs detectron2 0.6 or newer, which is not on PyPI: "
        "pip install 'ifr-fast[detectron2]', then pip install --no-deps --no-build-isolation "
        "git+https://github.com/facebookresearch/detectron2",
        name=error.name,
    ) from error

CONFIGS = Path(__file__).with_name("configs") / "detectron2"

_OPTIONS = {name: p.default for name, p in inspect.signature(IFRHead).parameters.items() if name != "channels"}
_METHODS = (Broyden, Anderson, Picard)
_CHOICES = {"SOLVER": (*_METHODS, Unroll), "ADJOINT": (Implicit, Phantom, JacobianFree, Shine, Unrolled)}
_log = logging.getLogger("detectron2.ifr_fast")  # below the logger that detectron2's setup_logger prepares


def add_ifr_config(cfg: CfgNode) -> None:
    """Adds the node MODEL.IFR: IFRHead's options in capitals, WHERE and META_ARCHITECTURE.

    SOLVER and ADJOINT are nodes: TYPE is the name of a class, and the other keys are the options of all classes, where
    None means the class's default. ADJOINT.SOLVER is Implicit's own solver; with TYPE None it has none. WHERE (globs,
    as for replace_towers; none: all towers) and META_ARCHITECTURE are for the meta-architecture IFR.
    """
    options = {name.upper(): default for name, default in _OPTIONS.items()}
    for key, kinds in _CHOICES.items():
        options[key] = _declared(kinds, type(options[key]).__name__)
    options["ADJOINT"]["SOLVER"] = _declared(_METHODS, None)
    cfg.MODEL.IFR = CfgNode({**options, "WHERE": [], "META_ARCHITECTURE": ""})


def _declared(kinds: Sequence[type], default: str | None) -> dict[str, Any]:
    return {"TYPE": default, **{field.name.upper(): None for kind in kinds for field in fields(kind)}}


def _chosen(node: CfgNode, key: str, kinds: Sequence[type]) -> Any:
    """The solver or adjoint that a node asks for."""
    options = {k: _chosen(v, f"{key}.{k}", _METHODS) if isinstance(v, CfgNode) else v for k, v in node.items()}
    name = options.pop("TYPE")
    given = {option.lower(): value for option, value in options.items() if value is not None}
    if name is None and not given:
        return None
    for kind in kinds:
        if kind.__name__.lower() == str(name).lower():
            try:
                return kind(**given)
            except (TypeError, ValueError) as error:
                raise _named(error, key, node) from error
    raise ValueError(f"{key}.TYPE={name!r}: expected one of {', '.join(kind.__name__ for kind in kinds)}")


def _named(error: Exception, key: str, node: CfgNode) -> ValueError:
    """The error with the configuration's key ahead: that of the option which its words name first."""
    names = "|".join(name for name, value in node.items() if value != [])  # where no WHERE is given, none is at fault
    found = re.search(rf"\b({names})\b['=:]", str(error), re.IGNORECASE)
    if found:
        key, node = f"{key}.{found[1].upper()}", node[found[1].upper()]
        key = f"{key}.TYPE={node.TYPE!r}" if isinstance(node, CfgNode) else f"{key}={node!r}"
    return ValueError(f"{key}: {error}")


def _node(cfg: CfgNode) -> CfgNode:
    if "IFR" not in cfg.MODEL:
        raise ValueError("cfg has no MODEL.IFR: call add_ifr_config(cfg) after get_cfg()")
    return cfg.MODEL.IFR


def _refined(model: nn.Module, ifr: Mapping[str, Any], where: Sequence[str] | str | None = None) -> nn.Module:
    """model with its towers replaced. ifr: IFRHead's options or, from a configuration, the node MODEL.IFR."""
    if isinstance(ifr, CfgNode):
        options = {name: ifr[name.upper()] for name in _OPTIONS}
        options |= {key.lower(): _chosen(ifr[key], f"MODEL.IFR.{key}", kinds) for key, kinds in _CHOICES.items()}
        if ifr.WHERE and where:
            raise ValueError(f"MODEL.IFR.WHERE={ifr.WHERE}: {type(model).__name__} has its own, {where}")
        try:
            report = replace_towers(model, where or ifr.WHERE or None, **options)
        except ValueError as error:
            raise _named(error, "MODEL.IFR", ifr) from error
    else:
        report = replace_towers(model, where, **ifr)
    _log.info("IFR in %s:\n%s", type(model).__name__, report)
    return model


def refine(model: nn.Module, where: Sequence[str] | str | None = None, **ifr_kwargs: Any) -> nn.Module:
    """Replaces a model's conv towers by IFRHeads, in place; returns the model. For LazyConfig: L(refine)(model=…, …).

    where: None, a glob or a list of globs. ifr_kwargs: IFRHead's options. Errors: see replace_towers.
    """
    return _refined(model, ifr_kwargs, where)


@META_ARCH_REGISTRY.register()
def IFR(cfg: CfgNode) -> nn.Module:
    """The meta-architecture of this name: builds MODEL.IFR.META_ARCHITECTURE and refines the towers at MODEL.IFR.WHERE.
    Raises ValueError that names the key."""
    name = _node(cfg).META_ARCHITECTURE
    known = sorted({name for name, _ in META_ARCH_REGISTRY} - {"IFR"})
    if name not in known:
        raise ValueError(f"MODEL.IFR.META_ARCHITECTURE={name!r}: expected one of those registered, {', '.join(known)}")
    return _refined(META_ARCH_REGISTRY.get(name)(cfg), cfg.MODEL.IFR)


class IFRTowers(nn.Module):
    """Puts IFRHeads in place of the conv towers of the head that it is mixed into.

    ifr: IFRHead's options, all but channels, or the node MODEL.IFR, whose keys errors then name. All other arguments
    are the head's own. A first convolution that changes the number of channels stays. Raises ValueError for options
    that IFRHead refuses, and for a head without a tower.
    """

    towers: ClassVar[list[str]]

    @configurable
    def __init__(self, *args: Any, ifr: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _refined(self, ifr or {}, self.towers)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: Any) -> dict[str, Any]:
        return {**super().from_config(cfg, input_shape), "ifr": _node(cfg)}


@roi_heads.ROI_MASK_HEAD_REGISTRY.register()
class IFRMaskRCNNConvUpsampleHead(IFRTowers, roi_heads.MaskRCNNConvUpsampleHead):
    towers: ClassVar[list[str]] = ["mask_fcn*"]


@roi_heads.ROI_BOX_HEAD_REGISTRY.register()
class IFRFastRCNNConvFCHead(IFRTowers, roi_heads.FastRCNNConvFCHead):
    towers: ClassVar[list[str]] = ["conv*"]


@roi_heads.ROI_KEYPOINT_HEAD_REGISTRY.register()
class IFRKRCNNConvDeconvUpsampleHead(IFRTowers, roi_heads.KRCNNConvDeconvUpsampleHead):
    towers: ClassVar[list[str]] = ["conv_fcn*"]


class IFRRetinaNetHead(IFRTowers, RetinaNetHead):
    towers: ClassVar[list[str]] = ["cls_subnet", "bbox_subnet"]


class IFRFCOSHead(IFRTowers, FCOSHead):
    towers: ClassVar[list[str]] = ["cls_subnet", "bbox_subnet"]


@META_ARCH_REGISTRY.register()
class IFRRetinaNet(RetinaNet):
    """RetinaNet with an IFRHead in place of each branch's tower."""

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict[str, Any]:
        arguments = super().from_config(cfg)
        return {**arguments, "head": _refined(arguments["head"], _node(cfg), IFRRetinaNetHead.towers)}


class IFRHook(TrainingHook, HookBase):
    """Warm-up, logging into the trainer's EventStorage and warnings. Arguments and errors: see TrainingHook.

    It must come before the trainer's PeriodicWriter, which would else miss iterations that both log.
    """

    def before_train(self) -> None:
        model = self.trainer.model
        model = model.module if isinstance(model, DistributedDataParallel) else model
        self.start(model, self.trainer.iter, "MODEL.ROI_MASK_HEAD.NAME: IFRMaskRCNNConvUpsampleHead")

    def before_step(self) -> None:
        if comm.is_main_process():
            self.listen(self.trainer.iter)

    def after_step(self) -> None:
        scalars, warnings = self.finish()
        if scalars:
            self.trainer.storage.put_scalars(smoothing_hint=False, **scalars)
        for warning in warnings:
            _log.warning(warning)
