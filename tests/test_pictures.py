"""benchmarks/pictures.py: masks are drawn where they are, in the colour of their object."""

import numpy as np
import pictures
from coco_shapes import HEIGHT, WIDTH
from pycocotools import mask as rle


def test_predictions_take_the_colour_of_their_object():
    masks = np.zeros((HEIGHT, WIDTH, 3), np.uint8, order="F")
    masks[:20, :20, 0] = masks[30:, 30:, 1] = 1
    masks[:20, :18, 2] = 1
    left, right, nearly_left = rle.encode(masks)
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0)]
    assert pictures.matching_colours([nearly_left, right], [left, right], colours) == colours
    assert pictures.matching_colours([right], [left], colours[:1]) == [pictures.UNMATCHED]


def test_masks_are_drawn_where_they_are():
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[10:30, 20:40] = 1
    image = np.full((HEIGHT, WIDTH, 3), 255, np.uint8)
    shown = pictures.overlay(image, [rle.encode(mask)], [(1.0, 0.0, 0.0)])
    assert np.array_equal((shown != 1).any(-1), mask.astype(bool))
    assert shown[20, 30].tolist() == [1, 0.5, 0.5]
