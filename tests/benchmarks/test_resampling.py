"""benchmarks/analysis/resampling.py: the 95 % intervals against what is known of them."""

import math

import numpy as np
import pytest

from benchmarks.analysis.resampling import average_precision, gains, paired_gain, paired_precision_gain, together
from benchmarks.quality.coco import load_annotations, matched
from benchmarks.report.files import write_json

SIDE = 40

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


@pytest.fixture
def generator(seed):
    return np.random.default_rng(seed)


def evaluation(images, ious):
    """Of objects with these IoUs in these images."""
    found, at, counts = np.unique(images, return_inverse=True, return_counts=True)
    return {"images": found.tolist(), "objects": counts.tolist(), "iou_sums": np.bincount(at, ious).tolist()}


def test_the_mean_is_over_objects_and_an_equal_gain_is_certain(generator):
    images, ious = [7, 7, 3, 9], generator.random(4)
    found = paired_gain([evaluation(images, ious + 0.25)] * 2, [evaluation(images, ious)] * 2)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    found = paired_gain([evaluation(images, [1, 1, 0, 1])], [evaluation(images, [0, 1, 0, 0])])
    assert found["mean"] == pytest.approx(0.5)


def test_objects_of_one_image_count_as_one(generator):
    """The interval is that of the images' mean, however many objects show the same thing."""
    gains = generator.normal(size=400)
    for copies in (1, 5):
        images, ious = np.arange(400).repeat(copies), gains.repeat(copies)
        found = paired_gain([evaluation(images, ious)], [evaluation(images, 0 * ious)])
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * gains.std() / 400**0.5, rel=0.15)


def test_seeds_that_differ_widen_the_interval(generator):
    images, ious = np.arange(50), generator.random(50)
    shifts = (-0.2, 0.0, 0.2)
    own = [evaluation(images, ious + shift) for shift in shifts]
    found = paired_gain(own, [evaluation(images, ious)] * 3)
    assert found["mean"] == pytest.approx(0, abs=1e-12)
    student = 4.303  # of 2 degrees of freedom
    assert found["high"] - found["low"] == pytest.approx(2 * student * np.std(shifts, ddof=1) / 3**0.5, rel=0.1)


SCATTERS = [(0.2, 0.0, 0.0), (0.1, 0.1, 0.0), (0.0, 0.1, 0.0), (0.0, 0.0, 1.0), (0.05, 0.1, 0.5)]


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize(("of_seeds", "of_images", "of_both"), SCATTERS)
def test_95_in_100_intervals_hold_the_truth(generator, seeds, of_seeds, of_images, of_both):
    """Of standard errors by a seed, by all images, and of each image with each seed."""
    images, trials, held = np.arange(40), 2000, 0
    nothing = [evaluation(images, 0.0 * images)] * seeds
    for _ in range(trials):
        gains = generator.normal(0, of_seeds, (seeds, 1)) + generator.normal(0, of_images * 40**0.5, 40)
        gains = gains + generator.normal(0, of_both, (seeds, 40))
        found = paired_gain([evaluation(images, row) for row in gains], nothing)
        held += found["low"] <= 0 <= found["high"]
    assert 0.9 < held / trials < 0.98  # the truth is 0.93 to 0.96: four standard errors away or more


def test_evaluations_of_different_images_are_joined():
    joined = together(evaluation([1], [0.5]), evaluation([2, 2], [0.1, 0.2]))
    assert joined == evaluation([1, 2, 2], [0.5, 0.1, 0.2])


def test_gains_are_those_of_common_seeds_that_did_not_fail():
    def report(seed, iou):
        return {"seed": seed, "test": evaluation([1, 2], [iou, iou]), "validation": evaluation([3], [0.0])}

    rows = {
        "4 convolutions": [report(0, 0.5), report(1, 0.6), {"seed": 2, "failed": "so"}],
        "IFR": [report(0, 0.7), report(1, 0.7), report(2, 0.1)],
        "IFR, Picard": [report(0, 0.9), {"seed": 1, "failed": "so"}],
    }
    parts = {"test": lambda of: of["test"], "all": lambda of: together(of["test"], of["validation"])}
    found = gains(rows, "4 convolutions", parts)
    assert list(found) == ["IFR"]
    assert found["IFR"]["seeds"] == 2
    assert found["IFR"]["test"]["mean"] == pytest.approx(0.15)
    assert found["IFR"]["all"]["mean"] == pytest.approx(0.1)


def boxes(generator, count):
    """Left, top, width and height (count, 4)."""
    return generator.integers([0, 0, 1, 1], SIDE // 2, (count, 4)).astype(float)


@pytest.fixture
def scene(generator, tmp_path):
    """Makes ground truth and detections of so many copies of each of 8 random images: objects of three categories,
    some of them crowds, two images without any; boxes near the objects, and others."""
    objects, found = [], []
    for image in range(8):
        for box in boxes(generator, 0 if image < 2 else generator.integers(1, 6)):
            category = int(generator.integers(1, 4))
            objects.append((image, {"category_id": category, "bbox": box.tolist(), "iscrowd": len(objects) % 5 // 4}))
            near = (box * generator.uniform(0.85, 1.15, 4)).tolist()
            found.append((image, {"category_id": category, "bbox": near, "score": generator.random()}))
        for box in boxes(generator, 3):
            category = int(generator.integers(1, 5))  # of the fourth there is no object
            found.append((image, {"category_id": category, "bbox": box.tolist(), "score": generator.random()}))

    def make(copies):
        ids = [[10 * image + copy for copy in range(count)] for image, count in enumerate(copies)]
        annotations = [{**entry, "image_id": id} for image, entry in objects for id in ids[image]]
        for number, annotation in enumerate(annotations, start=1):
            annotation |= {
                "id": number,
                "segmentation": [[0, 0, 9, 0, 9, 9]],
                "area": math.prod(annotation["bbox"][2:]),
            }
        images = [{"id": id, "height": SIDE, "width": SIDE, "file_name": "-"} for of in ids for id in of]
        categories = [{"id": id, "name": str(id)} for id in range(1, 5)]
        path = tmp_path / "instances.json"
        write_json(path, {"images": images, "annotations": annotations, "categories": categories})
        return load_annotations(path), [{**entry, "image_id": id} for image, entry in found for id in ids[image]]

    return make


def test_weighted_precision_is_that_of_copied_images(scene, generator):
    drawn = [np.bincount(generator.integers(2, 8, size=8), minlength=8) for _ in range(4)]
    weights = np.array([np.ones(8, int), np.arange(8), *drawn])
    actual = average_precision(matched(*scene(weights[0]), "bbox"), weights)
    for copies, value in zip(weights, actual, strict=True):
        evaluation = matched(*scene(copies), "bbox")
        evaluation.accumulate()
        evaluation.summarize()
        assert value == pytest.approx(evaluation.stats[0], abs=1e-9)


def test_images_without_objects_have_no_precision(scene):
    assert np.isnan(average_precision(matched(*scene([1] * 8), "bbox"), np.eye(8)[:2])).all()


def test_a_gain_in_precision_is_told_from_none(scene):
    coco, entries = scene([1] * 8)
    given = [{**a, "score": 1.0} for a in coco.dataset["annotations"]]
    some, all_found = (matched(coco, found, "bbox") for found in (entries, given))
    assert paired_precision_gain([some, all_found], [some, all_found]) == {"mean": 0, "low": 0, "high": 0}
    gain = paired_precision_gain([all_found] * 2, [some] * 2)
    assert gain["mean"] == pytest.approx(1 - average_precision(some, np.ones((1, 8)))[0])
    assert 0 < gain["low"] < gain["mean"] < gain["high"]
