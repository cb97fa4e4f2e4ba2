"""torchvision's detectors with IFR heads."""

from typing import Any

from torch import nn
from torchvision.models.detection import FCOS, FasterRCNN, KeypointRCNN, MaskRCNN, RetinaNet

from .towers import replace_towers

# A subclass stands before its base. Beside a mask or keypoint branch other heads stay as they are: the paper
# refines the mask branch of instance segmentation and both branches of dense detectors.
_TOWERS: dict[type[nn.Module], list[str]] = {
    MaskRCNN: ["roi_heads.mask_head"],
    KeypointRCNN: ["roi_heads.keypoint_head"],
    FasterRCNN: ["roi_heads.box_head"],
    RetinaNet: ["head.classification_head.conv", "head.regression_head.conv"],
    FCOS: ["head.classification_head.conv", "head.regression_head.conv"],
}


def refine(model: nn.Module, **ifr_kwargs: Any) -> nn.Module:
    """Replaces the conv towers of a torchvision detector's heads by IFRHeads, in place; returns the model.

    model: a MaskRCNN (the mask branch is refined: 4 × 256), KeypointRCNN (the keypoint branch: 256 → 512
      stays, then 7 × 512), RetinaNet or FCOS (both branches: 4 × 256 each), or FasterRCNN with a
      convolutional box head (4 × 256, as in fasterrcnn_resnet50_fpn_v2), with or without norms.
    ifr_kwargs: passed to IFRHead.

    Inputs, outputs and losses stay as they were; the new parameters need training. Load pretrained weights
    before this call, those of a refined model after it.

    Raises ValueError, with the model unchanged: where it is none of these (replace_towers serves any
      model), where one of its heads has no conv tower, or IFRHead refuses ifr_kwargs.
    """
    for kind, towers in _TOWERS.items():
        if isinstance(model, kind):
            replace_towers(model, where=towers, **ifr_kwargs)
            return model
    raise ValueError(
        f"model: expected one of torchvision's {', '.join(kind.__name__ for kind in _TOWERS)}, got "
        f"{type(model).__name__}; for another model use ifr_fast.integrations.towers.replace_towers"
    )
