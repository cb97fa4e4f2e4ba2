"""mmdet's heads with IFR: `IFR` before the class name in a configuration, nothing else changed.

    custom_imports = dict(imports=["ifr_fast.integrations.mmdet"], allow_failed_imports=False)
    mask_head = dict(type="IFRFCNMaskHead", ifr=dict(solver=dict(type="Broyden", max_iter=15)), ...)

Registers IFR + the name of every class in TOWERS, and IFRHook (integrations/mmengine.py). CONFIGS is the folder of
the configurations that come with the package, one for each of the paper's systems in mmdet.
"""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from mmdet.models import dense_heads, roi_heads
from mmdet.registry import MODELS
from torch import nn

from ifr_fast import IFRHead

from .mmengine import IFRHook
from .towers import replace_towers

CONFIGS = Path(__file__).with_name("configs")

_MASK = {"mask": ["convs"]}
_BRANCHES = {"cls": ["cls_convs"], "reg": ["reg_convs"]}
_MASK_FEATURES = {"mask": ["mask_feature_head.conv_branch"]}
# The towers of each head, by what `where` calls them.
TOWERS: dict[type[nn.Module], dict[str, list[str]]] = {
    roi_heads.FCNMaskHead: _MASK,
    roi_heads.HTCMaskHead: _MASK,
    dense_heads.SOLOHead: {"mask": ["mask_convs"], "cls": ["cls_convs"]},
    dense_heads.DecoupledSOLOHead: {"mask": ["mask_convs_x", "mask_convs_y"], "cls": ["cls_convs"]},
    dense_heads.SOLOV2Head: {"mask": ["kernel_convs"], "cls": ["cls_convs"]},
    dense_heads.CondInstBboxHead: _BRANCHES,
    dense_heads.CondInstMaskHead: _MASK_FEATURES,
    dense_heads.BoxInstBboxHead: _BRANCHES,
    dense_heads.BoxInstMaskHead: _MASK_FEATURES,
    dense_heads.RetinaHead: _BRANCHES,
    dense_heads.FreeAnchorRetinaHead: _BRANCHES,
    dense_heads.FCOSHead: _BRANCHES,
    dense_heads.RepPointsHead: _BRANCHES,
}


class IFRTowers(nn.Module):
    """Puts IFRHeads in place of the conv towers of the mmdet head that it is mixed into.

    Args:
        ifr: options of IFRHead, all but channels, and `where`: "cls", "reg" or "mask" as the head has them, a list of
            these, or "both" for all. Without `where` the paper's choice: the mask branch where there is one, else all.
    All other arguments are the head's own.

    Attributes: replaced, the Report of replace_towers.

    A first convolution that changes the number of channels stays (SOLO: 258 → 256), and so does a deformable one.
    A block without weight norm starts as the head's init_cfg says of Conv2d; with it, as IFRHead does.

    Raises ValueError that names the option: for one that IFRHead or the head does not have, a value that IFRHead
    refuses, and a tower that cannot be replaced.
    """

    towers: ClassVar[dict[str, list[str]]]

    def __init__(self, *args: Any, ifr: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        options = self._options(ifr)
        super().__init__(*args, **kwargs)
        self.replaced = replace_towers(self, **options)

    def _options(self, ifr: Mapping[str, Any] | None) -> dict[str, Any]:
        """The arguments of replace_towers that `ifr` stands for."""
        if not isinstance(ifr, Mapping | None):
            raise ValueError(f"ifr={ifr!r}: expected a dict of IFRHead's options and `where`")
        known = {"where", *inspect.signature(IFRHead).parameters} - {"channels"}
        for name in ifr or {}:
            if name not in known:
                raise ValueError(f"ifr has no option {name!r}: expected some of {', '.join(sorted(known))}")
        options = dict(ifr or {})
        where = options.get("where")
        if where is None:
            where = "mask" if "mask" in self.towers else "both"
        names = list(self.towers) if where == "both" else [where] if isinstance(where, str) else where
        if not isinstance(names, list | tuple) or not names or not all(name in list(self.towers) for name in names):
            has = ", ".join(map(repr, self.towers))
            raise ValueError(f"ifr.where={where!r}: expected 'both' or some of {type(self).__name__}'s towers, {has}")
        return options | {"where": [path for name in names for path in self.towers[name]]}


for _head, _towers in TOWERS.items():
    _name = f"IFR{_head.__name__}"
    _members = {"towers": _towers, "__module__": __name__, "__doc__": f"{_head.__name__} with IFR: see IFRTowers."}
    globals()[_name] = MODELS.register_module(module=type(_name, (IFRTowers, _head), _members))

__all__ = ["CONFIGS", "TOWERS", "IFRHook", "IFRTowers", *(f"IFR{head.__name__}" for head in TOWERS)]
