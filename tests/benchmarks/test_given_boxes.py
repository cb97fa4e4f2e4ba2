"""given_boxes.py: masks in annotated boxes are those that the detector itself draws, and are compared in pixels."""

import numpy as np
import pytest
import torch
from coco_shapes import TINY
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.quality import accuracy, given_boxes
from benchmarks.quality.coco import CocoFolder

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]


@pytest.fixture(scope="module")
def dataset(shapes):
    return CocoFolder(shapes, "val")


@pytest.fixture
def detector(shapes, dataset):
    options = accuracy.parse([str(shapes), *TINY, "--refine", "stack", "--iterations", "1"])
    model = accuracy.build_model(options, len(dataset.categories) + 1).eval()
    model.roi_heads.score_thresh = 0.0  # an untrained detector is sure of nothing
    torch.nn.init.normal_(model.roi_heads.mask_predictor.mask_fcn_logits.weight)  # masks of some shape
    return model


@torch.inference_mode()
def test_masks_in_the_boxes_that_a_detector_found_are_its_own(detector, dataset):
    image, _ = dataset[0]
    (found,) = detector([image])
    assert len(found["boxes"]) > 0
    *_, probabilities = given_boxes.mask_branch(detector, image, found["boxes"], found["labels"])
    pasted = paste_masks_in_image(probabilities[:, None], found["boxes"], tuple(image.shape[1:]))
    torch.testing.assert_close(pasted, found["masks"], rtol=0, atol=1e-4)
    assert (pasted > 0.5).any()
    assert (pasted <= 0.5).any()


@pytest.mark.parametrize("inverted", [False, True])
def test_the_true_mask_has_an_iou_near_one_and_its_inverse_near_zero(detector, dataset, monkeypatch, inverted):
    """The true masks, cut out of their boxes and reduced to 28×28."""
    targets = iter(target for _, target in map(dataset.__getitem__, range(len(dataset))) if len(target["labels"]))

    def true_masks(model, image, boxes, labels):
        cut = []
        for mask, (left, top, right, bottom) in zip(next(targets)["masks"], boxes.round().int().tolist(), strict=True):
            window = mask[None, None, top : max(bottom, top + 1), left : max(right, left + 1)].float()
            cut.append(torch.nn.functional.interpolate(window, (28, 28), mode="bilinear", antialias=True)[0, 0])
        return None, None, 1 - torch.stack(cut) if inverted else torch.stack(cut)

    monkeypatch.setattr(given_boxes, "mask_branch", true_masks)
    found = given_boxes.mask_ious(detector, dataset)
    ious = np.divide(found["iou_sums"], found["objects"])
    assert (ious < 0.1).all() if inverted else (ious > 0.85).all(), ious
    assert found["images"] == [id for id in dataset.image_ids if dataset.annotations(id)]
