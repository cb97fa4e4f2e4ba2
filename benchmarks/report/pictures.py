"""Pictures of predicted masks beside the ground truth, and of RoI features before and after their refinement."""

import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from pycocotools import mask as rle

from benchmarks.quality.coco import CocoFolder

COLOURS = matplotlib.colormaps["tab10"].colors
UNMATCHED = (0.1, 0.1, 0.1)
CROWD = (0.6, 0.6, 0.6)
SQUARE = (0, 1, 1, 0)  # left, right, bottom, top


def evenly_spaced(items: Sequence, count: int) -> list:
    """`count` of the items from the first to the last, or all where there are not so many."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)]


def draw_predictions(
    dataset: CocoFolder, predictions: dict[str, list[dict]], *, pictures: int = 4, min_score: float = 0.5
) -> Figure:
    """A row for each of some evenly spaced images: image, ground truth, and a column for each of the predictions.

    predictions: title → detections in COCO's results format. Those of at least `min_score` are drawn, each in the
    colour of the object it overlaps most, black where it overlaps none by half (IoU); crowds are grey.
    """
    chosen = evenly_spaced(dataset.image_ids, pictures)
    titles = ("image", "ground truth", *predictions)
    images = [dataset.image(image_id).permute(1, 2, 0).numpy() for image_id in chosen]
    heights = [0.3 + 3.2 * min(1.2, image.shape[0] / image.shape[1]) for image in images]
    figure = Figure(figsize=(3.3 * len(titles), sum(heights) + 0.4), layout="constrained", dpi=110)
    grid = figure.subplots(len(chosen), len(titles), squeeze=False, height_ratios=heights)
    for row, image, image_id in zip(grid, images, chosen, strict=True):
        truth = dataset.annotations(image_id)
        objects = [annotation for annotation in truth if not annotation["iscrowd"]]
        crowds = [annotation for annotation in truth if annotation["iscrowd"]]
        object_masks = [dataset.coco.annToRLE(annotation) for annotation in objects]
        crowd_masks = [dataset.coco.annToRLE(annotation) for annotation in crowds]
        colours = [COLOURS[i % len(COLOURS)] for i in range(len(objects))]

        show(row[0], image, dataset.coco.imgs[image_id]["file_name"])
        shown = overlay(image, crowd_masks + object_masks, [CROWD] * len(crowds) + colours)
        show(row[1], shown, count(dataset, objects) + (f" and {len(crowds)} crowd" if crowds else ""))
        for axes, entries in zip(row[2:], predictions.values(), strict=True):
            found = [entry for entry in entries if entry["image_id"] == image_id and entry["score"] >= min_score]
            found.sort(key=lambda entry: entry["score"])
            masks = [entry["segmentation"] for entry in found]
            shown = overlay(image, masks, matching_colours(masks, object_masks, colours))
            show(axes, shown, count(dataset, found))
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=10)
    figure.supxlabel(f"detections of score ≥ {min_score} in the colours of their objects; black: IoU < 0.5", fontsize=8)
    return figure


@dataclass(frozen=True)
class Refined:
    """What a mask head makes of an object: its RoI feature's size at each place, before and after the refinement,
    each (H, W), and the mask's probabilities (2H, 2W)."""

    coarse: np.ndarray
    refined: np.ndarray
    mask: np.ndarray


def draw_features(objects: list[tuple[str, np.ndarray]], heads: dict[str, list[Refined]]) -> Figure:
    """A row for each object: its box cut out of the image, then three columns for each head, all stretched to squares.

    objects: caption and picture (h, w, 3) of each. heads: title → what it makes of each object. A feature is drawn
    from its own least (dark) to its own greatest value (bright), a mask from 0 to 1.
    """
    titles = [f"{head}:\n{field}" for head in heads for field in ("RoI feature", "refined", "mask")]
    figure = Figure(figsize=(1.5 * (1 + len(titles)), 1.75 * len(objects) + 0.4), layout="constrained", dpi=110)
    grid = figure.subplots(len(objects), 1 + len(titles), squeeze=False)
    for row, (caption, picture), *found in zip(grid, objects, *heads.values(), strict=True):
        show(row[0], picture, caption, width=22, extent=SQUARE)
        for axes, head in zip(row[1:].reshape(-1, 3), found, strict=True):
            show(axes[0], head.coarse, extent=SQUARE, cmap="inferno")
            show(axes[1], head.refined, extent=SQUARE, cmap="inferno")
            show(axes[2], head.mask, extent=SQUARE, cmap="gray", vmin=0, vmax=1)
    for axes, title in zip(grid[0], ("image and\nground truth", *titles), strict=True):
        axes.set_title(title, fontsize=9)
    figure.supxlabel("features: L2 norm over the channels, each from its least to its greatest", fontsize=8)
    return figure


def show(axes: Axes, image: np.ndarray, caption: str = "", *, width: int = 55, **kwargs: Any) -> None:
    """Draw an image without ticks, over its caption in lines of `width` letters, two at most."""
    axes.imshow(image, **kwargs)
    axes.set_xticks([])
    axes.set_yticks([])
    shortened = textwrap.shorten(caption, 2 * width, placeholder=" …")
    axes.set_xlabel(textwrap.fill(shortened, width), fontsize=8)


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
