"""The configurations that come with the package for detectron2, at the size of a test, and random images for them.

The fixture `d2` (conftest.py) is this module, once detectron2 is there.
"""

from itertools import cycle
from pathlib import Path

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.engine import SimpleTrainer
from detectron2.model_zoo import get_config_file as zoo
from detectron2.modeling import build_model
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from torch import nn

from ifr_fast import IFRHead
from ifr_fast.integrations import detectron2 as ours

HEIGHT, WIDTH = 64, 96
# Untrained weights score low everywhere, and make a backbone with constant norms overflow. Else fewer proposals, RoIs
# and detections, and solves cut short.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 60,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 60,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.SCORE_THRESH_TEST": 0.0,
    "MODEL.RETINANET.TOPK_CANDIDATES_TEST": 20,
    "TEST.DETECTIONS_PER_IMAGE": 4,
    "SOLVER.BASE_LR": 1e-3,
    "MODEL.IFR.SOLVER.MAX_ITER": 4,
    "MODEL.IFR.ADJOINT.MAX_ITER": 4,
}


def defaults() -> CfgNode:
    """detectron2's defaults with the node MODEL.IFR."""
    cfg = get_cfg()
    ours.add_ifr_config(cfg)
    return cfg


def configuration(path: Path | str, **changes: object) -> CfgNode:
    """A yaml file's configuration, small. In changes, __ stands for the dots of a key."""
    cfg = defaults()
    cfg.merge_from_file(str(path))
    for key, value in {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}.items():
        cfg.merge_from_list([key, value])
    return cfg


def lazy_model(path: Path | str) -> nn.Module:
    """The model of a lazy configuration, small."""
    model = LazyConfig.load(str(path)).model
    model.backbone.bottom_up.stem.norm = model.backbone.bottom_up.stages.norm = "GN"
    if "head" in model:
        model.head.norm = ""  # 0.6 tries a GroupNorm of one channel, which newer releases of torch refuse
        model.update(test_score_thresh=0.0, test_topk_candidates=20, max_detections_per_image=4)
    else:
        model.proposal_generator.update(pre_nms_topk=(60, 60), post_nms_topk=(20, 10))
        model.roi_heads.batch_size_per_image = 16
        model.roi_heads.box_predictor.update(test_score_thresh=0.0, test_topk_per_image=4)
    return instantiate(model)


def batch(classes: int = 80) -> list[dict]:
    """Two random images with two instances each, as detectron2's data loader gives them."""
    images = []
    for _ in range(2):
        corner, size = 30 * torch.rand(2, 2), 15 + 15 * torch.rand(2, 2)
        boxes = torch.cat([corner, corner + size], 1)
        x0, y0, x1, y1 = boxes.double().T.numpy()
        triangles = [[polygon] for polygon in zip(x0, y1, x1, y1, (x0 + x1) / 2, y0, strict=True)]
        inside = corner[:, None] + size[:, None] * torch.rand(2, 17, 2)
        found = Instances((HEIGHT, WIDTH), gt_boxes=Boxes(boxes), gt_classes=torch.randint(classes, (2,)))
        found.gt_masks = PolygonMasks(triangles)
        found.gt_keypoints = Keypoints(torch.cat([inside, torch.full((2, 17, 1), 2.0)], 2))
        image = torch.randint(256, (3, HEIGHT, WIDTH), dtype=torch.uint8)
        images.append({"image": image, "instances": found, "height": HEIGHT, "width": WIDTH})
    return images


def predictions(model: nn.Module, images: list[dict]) -> list[dict[str, torch.Tensor]]:
    """Of every image: the tensors detected."""
    model.eval()
    with torch.no_grad():
        found = [result["instances"].get_fields() for result in model(images)]
    return [{name: getattr(value, "tensor", value) for name, value in fields.items()} for fields in found]


def train(model: nn.Module, images: object, hook: object, steps: int = 3, start: int = 0) -> SimpleTrainer:
    """detectron2's plain training loop over one batch, from iteration `start` to `steps`."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    trainer = SimpleTrainer(model, cycle([images]), optimizer)
    trainer.register_hooks([hook])
    trainer.train(start, steps)
    return trainer


def places(model: nn.Module) -> set[str]:
    """The paths of the IFRHeads."""
    return {path for path, module in model.named_modules() if isinstance(module, IFRHead)}


__all__ = ["DetectionCheckpointer", "LazyConfig", "batch", "build_model", "configuration", "defaults", "instantiate"]
__all__ += ["lazy_model", "ours", "places", "predictions", "train", "zoo"]
