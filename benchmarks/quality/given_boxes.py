"""Masks in given boxes: what a detector's mask head is worth, whatever the rest of the detector finds.

COCO's AP counts boxes and classes too, and says little of masks where a short training finds few objects.
"""

import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from tqdm import tqdm

from benchmarks.analysis.resampling import Evaluation
from benchmarks.quality.coco import CocoFolder
from benchmarks.quality.training import autocast


@torch.inference_mode()
def mask_ious(model: MaskRCNN, dataset: CocoFolder, *, bf16: bool = False) -> Evaluation:
    """How well the annotated objects' masks are found, each in its annotated box and for its class.

    Returns "images", the ids of those with objects, with each one's number of "objects" and the sum of their IoUs in
    the image's pixels, "iou_sums". Crowds are left out.
    """
    model.eval()
    device = next(model.parameters()).device
    images, objects, iou_sums = [], [], []
    for index in tqdm(range(len(dataset)), "masks in given boxes", dynamic_ncols=True):
        image, target = dataset[index]
        boxes, labels, masks = (target[key].to(device) for key in ("boxes", "labels", "masks"))
        if not len(labels):
            continue
        with autocast(device, bf16):
            *_, probabilities = mask_branch(model, image.to(device), boxes, labels)
        pasted = paste_masks_in_image(probabilities[:, None].float(), boxes, tuple(image.shape[1:]))[:, 0] > 0.5
        common, either = (pasted & (masks > 0)).sum((1, 2)), (pasted | (masks > 0)).sum((1, 2))
        images.append(target["image_id"])
        objects.append(len(labels))
        iou_sums.append(round((common / either).sum().item(), 4))
    return {"images": images, "objects": objects, "iou_sums": iou_sums}


def mask_branch(model: MaskRCNN, image: Tensor, boxes: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RoI features (n, C, h, w) before and after the refinement, and the masks' probabilities (n, 2h, 2w).

    image (3, H, W) in 0…1; boxes (n, 4), corners in its pixels; labels (n,).
    """
    heads = model.roi_heads
    images, (target,) = model.transform([image], [{"boxes": boxes, "labels": labels}])
    coarse = heads.mask_roi_pool(model.backbone(images.tensors), [target["boxes"]], images.image_sizes)
    refined = heads.mask_head(coarse)
    logits = heads.mask_predictor(refined)
    return coarse, refined, logits[torch.arange(len(labels)), labels].sigmoid()
