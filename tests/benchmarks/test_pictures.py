"""benchmarks/report/pictures.py: masks are drawn where they are, in the colour of their object; no panel is lost."""

import numpy as np
import pytest
from coco_shapes import HEIGHT, WIDTH
from pycocotools import mask as rle

from benchmarks.quality.coco import CocoFolder
from benchmarks.report import pictures

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


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


def test_predictions_stand_side_by_side_with_the_ground_truth(shapes):
    dataset = CocoFolder(shapes, "val")
    first = dataset.image_ids[0]
    perfect = [
        {**annotation, "segmentation": dataset.coco.annToRLE(annotation), "score": 0.6}
        for annotation in dataset.annotations(first)
    ]
    unsure = [{**entry, "score": 0.4} for entry in perfect]
    figure = pictures.draw_predictions(dataset, {"right": perfect, "unsure": unsure}, pictures=2)
    panels = [axes.get_images()[0].get_array() for axes in figure.axes]
    assert len(panels) == 2 * 4
    assert [axes.get_title() for axes in figure.axes[:4]] == ["image", "ground truth", "right", "unsure"]
    image, truth, right, nothing = panels[:4]
    assert np.array_equal(right, truth)
    assert np.array_equal(nothing, image / 255)
    assert not np.array_equal(truth, nothing)


def test_features_of_every_object_and_head_have_their_panel(seed):
    random = np.random.default_rng(seed)
    objects = [(f"object {i}", random.integers(0, 256, (5 + i, 8, 3), dtype=np.uint8)) for i in range(2)]
    maps = {
        head: [pictures.Refined(*(random.random((side, side)) for side in (14, 14, 28))) for _ in objects]
        for head in ("stack", "ifr", "none")
    }
    figure = pictures.draw_features(objects, maps)
    panels = [axes.get_images()[0].get_array() for axes in figure.axes]
    expected = []
    for i, (_, picture) in enumerate(objects):
        expected.append(picture)
        for found in maps.values():
            expected += [found[i].coarse, found[i].refined, found[i].mask]
    for panel, values in zip(panels, expected, strict=True):
        assert np.array_equal(panel, values)
