"""Frozen ImageNet features of the objects in a folder of COCO format, for mask heads that are trained alone."""

import hashlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.transforms.v2.functional import normalize
from tqdm import tqdm

from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.quality.efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLite0Features, imagenet_state
from benchmarks.report.files import write_whole

BLOCKS = {2: 4, 4: 8, 10: 16, 15: 32}  # of EfficientNet-Lite0, counted from 0 → stride
POOLED = 14  # side of an object's features, as in Mask R-CNN
PREDICTED = 28  # of the mask that is learnt
FINE = 112  # of the mask that is compared with


@dataclass(frozen=True)
class Objects:
    """Objects with their boxes scaled to squares.

    features: (n, 496, 14, 14) float16, of four blocks side by side. masks: (n, 112, 112) bool. images: (n,) int64,
    the images' ids.
    """

    features: Tensor
    masks: Tensor
    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index) -> "Objects":
        return Objects(self.features[index], self.masks[index], self.images[index])

    @property
    def counts(self) -> dict[str, int]:
        """How many images these are from, and how many objects they are."""
        return {"images": len(self.images.unique()), "objects": len(self)}

    def to(self, device: torch.device) -> "Objects":
        return Objects(*(value.to(device) for value in vars(self).values()))

    def split(self, share: float) -> tuple["Objects", "Objects"]:
        """Those of all but `share` of the images, and those of the others; always the same ones."""
        ids = self.images.unique()
        order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
        held_out = torch.isin(self.images, ids[order[: max(1, round(share * len(ids)))]])
        return self[~held_out], self[held_out]


def load_objects(dataset: CocoFolder, cache: Path, *, min_area: int) -> Objects:
    """The objects of at least min_area pixels, no crowds, made once and kept in the folder `cache`.

    Raises DataError where there are none.
    """
    recipe = repr((sorted(dataset.coco.anns.items()), sorted(dataset.coco.imgs.items()), min_area, BLOCKS))
    path = cache / f"objects-{hashlib.sha256(recipe.encode()).hexdigest()[:16]}.pt"
    if not path.exists():
        write_whole(path, partial(torch.save, vars(_make_objects(dataset, min_area))))
    # Mapped: processes that train side by side share the pages.
    return Objects(**torch.load(path, mmap=True, weights_only=True))


@torch.inference_mode()
def _make_objects(dataset: CocoFolder, min_area: int) -> Objects:
    backbone = EfficientNetLite0Features().eval()
    backbone.load_state_dict(imagenet_state())
    found = []
    for index in tqdm(range(len(dataset)), "features of objects", dynamic_ncols=True):
        image, target = dataset[index]
        large = target["masks"].flatten(1).sum(1) >= min_area
        if not large.any():
            continue
        boxes, masks = target["boxes"][large], target["masks"][large]
        x = normalize(image, IMAGE_MEAN, IMAGE_STD)[None]
        levels = []
        for position, layer in enumerate(backbone):
            x = layer(x)
            if position - 1 in BLOCKS:  # the stem comes before block 0
                levels.append(roi_align(x, [boxes], POOLED, 1 / BLOCKS[position - 1], sampling_ratio=2, aligned=True))
        own = torch.cat([torch.arange(len(boxes))[:, None], boxes], 1)
        fine = roi_align(masks[:, None].float(), own, FINE, aligned=True)[:, 0] > 0.5
        found.append(Objects(torch.cat(levels, 1).half(), fine, torch.full((len(boxes),), target["image_id"])))
    if not found:
        raise DataError(f"data: no object of {min_area} pixels or more in {dataset.folder}")
    return Objects(*(torch.cat(parts) for parts in zip(*(vars(o).values() for o in found), strict=True)))
