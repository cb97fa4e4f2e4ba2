"""A picture of predicted masks beside the ground truth."""

import textwrap
from collections import Counter
from pathlib import Path

import matplotlib
import numpy as np
from coco import CocoFolder
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as rle

COLOURS = matplotlib.colormaps["tab10"].colors
UNMATCHED = (0.1, 0.1, 0.1)
CROWD = (0.6, 0.6, 0.6)


def save_comparison(
    path: Path, dataset: CocoFolder, entries: list[dict], *, pictures: int = 4, min_score: float = 0.5
) -> None:
    """Write an image with a row for each of some evenly spaced images: image, ground truth, prediction.

    entries: detections in COCO's results format. Those of at least `min_score` are drawn, each in the colour
    of the object it overlaps most, black where it overlaps none by half (IoU); crowds are grey.
    """
    chosen = np.linspace(0, len(dataset) - 1, min(pictures, len(dataset))).round().astype(int)
    figure = Figure(figsize=(10, 3.2 * len(chosen)), layout="constrained", dpi=110)
    grid = figure.subplots(len(chosen), 3, squeeze=False)
    for row, image_id in zip(grid, (dataset.image_ids[i] for i in chosen), strict=True):
        image = dataset.image(image_id).permute(1, 2, 0).numpy()
        truth = dataset.annotations(image_id)
        found = [entry for entry in entries if entry["image_id"] == image_id and entry["score"] >= min_score]
        found.sort(key=lambda entry: entry["score"])
        objects = [annotation for annotation in truth if not annotation["iscrowd"]]
        crowds = [annotation for annotation in truth if annotation["iscrowd"]]
        object_masks = [dataset.coco.annToRLE(annotation) for annotation in objects]
        crowd_masks = [dataset.coco.annToRLE(annotation) for annotation in crowds]
        found_masks = [entry["segmentation"] for entry in found]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(objects))]

        show(row[0], image, dataset.coco.imgs[image_id]["file_name"])
        shown = overlay(image, crowd_masks + object_masks, [CROWD] * len(crowds) + colours)
        show(row[1], shown, count(dataset, objects) + (f" and {len(crowds)} crowd" if crowds else ""))
        shown = overlay(image, found_masks, matching_colours(found_masks, object_masks, colours))
        show(row[2], shown, count(dataset, found))
    titles = ("image", "ground truth", f"prediction (score ≥ {min_score}; black: IoU < 0.5)")
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    figure.savefig(path)


def show(axes: Axes, image: np.ndarray, caption: str) -> None:
    axes.imshow(image)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(textwrap.fill(textwrap.shorten(caption, 110, placeholder=" …"), 55), fontsize=8)


def count(dataset: CocoFolder, entries: list[dict]) -> str:
    counts = Counter(dataset.categories[entry["category_id"]] for entry in entries)
    return ", ".join(f"{number} {name}" for name, number in counts.most_common()) or "nothing"


def matching_colours(found: list, objects: list, colours: list) -> list:
    """For each mask found, the colour of the object it overlaps most."""
    if not found or not objects:
        return [UNMATCHED] * len(found)
    overlaps = rle.iou(found, objects, [False] * len(objects))
    return [colours[row.argmax()] if row.max() >= 0.5 else UNMATCHED for row in overlaps]


def overlay(image: np.ndarray, masks: list, colours: list) -> np.ndarray:
    """The image (H, W, 3) uint8 with each mask tinted and outlined in its colour."""
    shown = image / 255
    for encoded, colour in zip(masks, colours, strict=True):
        mask = rle.decode(encoded).astype(bool)
        inner = np.pad(mask, 2)
        inner = inner[:-4, 2:-2] & inner[4:, 2:-2] & inner[2:-2, :-4] & inner[2:-2, 4:]
        shown[mask] = 0.5 * image[mask] / 255 + 0.5 * np.array(colour)
        shown[mask & ~inner] = colour
    return shown
