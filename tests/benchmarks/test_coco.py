"""benchmarks/quality/coco.py: a folder's splits, samples for training, the order in which they come, COCO's metrics."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from coco_shapes import HEIGHT, WIDTH, edit, encode, shared, write_dataset
from PIL import Image

from benchmarks.quality import coco

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shapes"))


@pytest.mark.parametrize("layout", ["split", "shared", "year"])
def test_finds_annotations_and_images(tmp_path, layout):
    root = write_dataset(tmp_path / "data", layout, train=3, val=2)
    assert [len(coco.CocoFolder(root, split)) for split in ("train", "val")] == [3, 2]


def test_images_are_taken_by_what_is_labelled_in_them(tmp_path):
    root = write_dataset(tmp_path / "data", train=3)

    def label(content):
        for number, image in enumerate(content["images"]):
            image["labelled"] = "persons" if number % 2 else "all"

    edit(root, label)
    whole, part = coco.CocoFolder(root, "train"), coco.CocoFolder(root, "train", labelled="all")
    assert part.image_ids == whole.image_ids[::2]
    assert {entry["image_id"] for entry in part.coco.dataset["annotations"]} <= set(part.image_ids)
    assert part.categories == whole.categories
    with pytest.raises(coco.DataError, match='no image has "labelled": "cars"'):
        coco.CocoFolder(root, "train", labelled="cars")


@pytest.mark.parametrize("encoding", ["polygon", "compressed", "uncompressed"])
def test_masks_of_every_encoding(tmp_path, encoding):
    root = write_dataset(tmp_path / "data", train=2)
    expected = np.zeros((HEIGHT, WIDTH), np.uint8)
    expected[10:30, 20:50] = 1
    corners = [20, 10, 50, 10, 50, 30, 20, 30]
    shape = [corners] if encoding == "polygon" else encode(expected, encoding)
    bare = {"id": 1, "image_id": 100, "category_id": 90, "segmentation": shape}
    edit(root, lambda content: content.update(annotations=[bare]))
    _, target = coco.CocoFolder(root, "train")[0]
    assert np.array_equal(target["masks"][0].numpy(), expected)
    assert target["boxes"].tolist() == [[20, 10, 50, 30]]
    assert target["labels"].tolist() == [2]


def test_image_without_objects(shapes):
    dataset = coco.CocoFolder(shapes, "train")
    image, target = dataset[len(dataset) - 2]
    assert image.shape == (3, HEIGHT, WIDTH)
    assert {key: tuple(target[key].shape) for key in ("boxes", "labels", "masks")} == {
        "boxes": (0, 4),
        "labels": (0,),
        "masks": (0, HEIGHT, WIDTH),
    }


def test_crowds_are_not_trained_on(shapes):
    dataset = coco.CocoFolder(shapes, "train")
    _, target = dataset[len(dataset) - 1]
    assert len(dataset.annotations(target["image_id"])) == 2
    assert len(target["boxes"]) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content.pop("categories"), "categories missing"),
        (lambda content: content["annotations"][0].update(image_id=5), "image_id 5"),
        (lambda content: content["annotations"][0].update(category_id=5), "category_id 5"),
        (lambda content: content["annotations"][0].update(segmentation=[]), "annotation 1"),
        (lambda content: content["annotations"][0].update(segmentation=[[1, 2, 3, 4]]), "three points"),
        (
            lambda content: content["annotations"][0].update(segmentation={"size": [2, 2], "counts": [4]}),
            r"size \[64, 80\], got \[2, 2\]",
        ),
        (lambda content: content["images"][1].update(file_name="lost.png"), "lacks 1 .* lost.png"),
        (lambda content: content["images"][0].update(file_name="lost.png"), "lost.png.* in none of"),
    ],
)
def test_unusable_annotations_are_named(tmp_path, change, message):
    root = write_dataset(tmp_path / "data")
    edit(root, change)
    with pytest.raises(ValueError, match=message):
        coco.CocoFolder(root, "train")


def test_missing_folder_and_annotations_are_named(tmp_path):
    with pytest.raises(ValueError, match="nowhere is none"):
        coco.CocoFolder(tmp_path / "nowhere", "train")
    with pytest.raises(ValueError, match="--val-annotations"):
        coco.CocoFolder(tmp_path, "val")


def test_image_of_another_size_is_named(tmp_path):
    root = write_dataset(tmp_path / "data")
    Image.new("RGB", (8, 8)).save(root / "train" / "train0.png")
    with pytest.raises(ValueError, match=r"train0\.png: annotated as 64×80, the file is 8×8"):
        coco.CocoFolder(root, "train")[0]


def test_mirror_keeps_boxes_on_their_masks(shapes):
    image, target = coco.CocoFolder(shapes, "train")[0]
    mirrored, moved = coco.mirror(image, target)
    assert torch.equal(mirrored[:, :, 0], image[:, :, -1])
    for mask, box in zip(moved["masks"], moved["boxes"], strict=True):
        columns = mask.any(0).nonzero()
        assert abs(columns.min() - box[0]) <= 1
        assert abs(columns.max() + 1 - box[2]) <= 1


def test_stream_shows_every_image_once_an_epoch(shapes):
    dataset = coco.CocoFolder(shapes, "train")
    stream = coco.TrainingStream(dataset, seed=3)
    shown = [stream[position][1]["image_id"] for position in range(2 * len(dataset))]
    first, second = shown[: len(dataset)], shown[len(dataset) :]
    assert sorted(first) == sorted(second) == dataset.image_ids


def test_stream_depends_on_seed_and_position_only(shapes):
    dataset = coco.CocoFolder(shapes, "train")
    forward, backward = coco.TrainingStream(dataset, seed=5), coco.TrainingStream(dataset, seed=5)
    there = [forward[position][0] for position in range(15)]
    back = [backward[position][0] for position in reversed(range(15))][::-1]
    assert all(torch.equal(a, b) for a, b in zip(there, back, strict=True))


def perfect(dataset: coco.CocoFolder) -> list[dict]:
    """The ground truth, crowds left out, passed through the detector's output format."""
    entries = []
    for image_id, (_, target) in zip(dataset.image_ids, dataset, strict=True):
        output = {key: target[key] for key in ("boxes", "labels")}
        output |= {"scores": torch.ones(len(target["labels"])), "masks": target["masks"][:, None].float()}
        entries += coco.detections(dataset, image_id, output)
    return entries


def stray(image_id: int, left: int, top: int, score: float) -> dict:
    """A detection of an ellipse, 8 pixels wide."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top : top + 8, left : left + 8] = 1
    entry = {"image_id": image_id, "category_id": 90, "score": score, "bbox": [left, top, 8, 8]}
    return {**entry, "segmentation": encode(mask, "compressed")}


def test_metrics_of_the_ground_truth_are_perfect(shapes):
    dataset = coco.CocoFolder(shapes, "val")
    metrics = coco.coco_metrics(dataset.coco, perfect(dataset))
    assert metrics["segm"]["AP"] == pytest.approx(1)
    assert metrics["bbox"]["AP"] == pytest.approx(1)


def test_metrics_of_nothing_are_zero(shapes):
    metrics = coco.coco_metrics(coco.CocoFolder(shapes, "val").coco, [])
    assert (metrics["segm"]["AP"], metrics["bbox"]["AP"]) == (0, 0)
    assert metrics["segm"]["APl"] is None  # no shape is larger than 96² pixels


def test_a_detection_inside_a_crowd_is_ignored_and_one_elsewhere_is_not(tmp_path):
    root = write_dataset(tmp_path / "data")
    path = root / "annotations" / "instances_val.json"
    content = json.loads(path.read_text())
    for annotation in content["annotations"]:
        annotation["category_id"] = 90
    path.write_text(json.dumps(content))
    dataset = coco.CocoFolder(root, "val")
    empty, crowded = dataset.image_ids[-2:]
    found = perfect(dataset)
    for entry in found:
        entry["score"] = 0.5
    ignored = coco.coco_metrics(dataset.coco, [*found, stray(crowded, 60, 20, 0.9)])
    counted = coco.coco_metrics(dataset.coco, [*found, stray(empty, 60, 20, 0.9)])
    assert ignored["segm"]["AP"] == pytest.approx(1)
    assert counted["segm"]["AP"] < 0.95


@pytest.mark.parametrize(("split", "images", "crowds"), [("train", 342, 32), ("val", 206, 21)])
def test_coco_small(split, images, crowds):
    dataset = coco.CocoFolder(shared("coco_small"), split)
    assert len(dataset) == images
    assert len(dataset.categories) == 80
    assert sum(annotation["iscrowd"] for annotation in dataset.coco.dataset["annotations"]) == crowds
    trained = sum(len(dataset[index][1]["labels"]) for index in range(20))
    expected = sum(not annotation["iscrowd"] for id in dataset.image_ids[:20] for annotation in dataset.annotations(id))
    assert 0.95 * expected <= trained <= expected
