"""A folder in COCO format full of triangles and ellipses, and benchmarks/quality/accuracy.py run on one."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from pycocotools import mask as rle

from benchmarks.quality import accuracy

SHARED_DATA = Path(__file__).parents[3] / "shared" / "data"
HEIGHT, WIDTH = 64, 80
CATEGORIES = {7: "triangle", 90: "ellipse"}
TINY = ["--backbone", "mobilenet_v3_small", "--channels", "16", "--image-size", "64", "--rois-per-image", "16"]
TINY += ["--detections-per-image", "5", "--batch-size", "2", "--workers", "0", "--device", "cpu"]


def encode(mask: np.ndarray, encoding: str) -> dict:
    """A mask as COCO's compressed or uncompressed run-length code."""
    if encoding == "compressed":
        encoded = rle.encode(np.asfortranarray(mask))
        return {**encoded, "counts": encoded["counts"].decode()}
    flat = mask.flatten(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat, [1 - flat[-1]]])))
    return {"size": list(mask.shape), "counts": np.diff(np.concatenate([[0], edges])).tolist()}


def draw_shapes(random: np.random.Generator, count: int) -> tuple[Image.Image, list[dict]]:
    """`count` coloured triangles and ellipses side by side on noise, with their annotations."""
    image = Image.fromarray(random.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    annotations = []
    for slot in range(count):
        left, top = slot * WIDTH // count + 2, int(random.integers(2, 12))
        right, bottom = left + WIDTH // count - 6, HEIGHT - int(random.integers(4, 16))
        category = int(random.choice(list(CATEGORIES)))
        stencil = Image.new("L", (WIDTH, HEIGHT))
        if category == 7:
            corners = [(left, bottom), (right, bottom), ((left + right) // 2, top)]
            ImageDraw.Draw(stencil).polygon(corners, fill=1)
            segmentation = [[float(value) for corner in corners for value in corner]]
        else:
            ImageDraw.Draw(stencil).ellipse((left, top, right, bottom), fill=1)
            segmentation = encode(np.array(stencil), str(random.choice(["compressed", "uncompressed"])))
        image.paste((230, 60, 40) if category == 7 else (40, 90, 230), mask=stencil.point(lambda value: 255 * value))
        box = [left, top, right - left, bottom - top]
        annotations.append({"category_id": category, "segmentation": segmentation, "iscrowd": 0, "bbox": box})
    return image, annotations


def write_areas(root: Path) -> Path:
    """Adds to a folder of shapes the areas that other frameworks' metrics read; returns the folder."""
    for path in (root / "annotations").glob("*.json"):
        content = json.loads(path.read_text())
        for annotation in content["annotations"]:
            annotation["area"] = annotation["bbox"][2] * annotation["bbox"][3] / 2
        path.write_text(json.dumps(content))
    return root


def write_dataset(root: Path, layout: str = "split", train: int = 6, val: int = 4) -> Path:
    """A folder of shapes; each split's last two images hold nothing, and a shape beside a crowd."""
    seed = int(os.environ.get("IFR_FAST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"shapes drawn with IFR_FAST_SEED={seed}")
    random = np.random.default_rng(seed)
    (root / "annotations").mkdir(parents=True)
    year = "2017" if layout == "year" else ""
    for split, number in (("train", train), ("val", val)):
        folder = root / ("images" if layout == "shared" else split + year)
        folder.mkdir(exist_ok=True)
        images, annotations = [], []
        for index in range(number):
            name = f"{split}{index}.png"
            shapes = 0 if index == number - 2 else 2 if index == number - 1 else int(random.integers(1, 4))
            image, found = draw_shapes(random, shapes)
            if index == number - 1:
                mask = np.zeros((HEIGHT, WIDTH), np.uint8)
                mask[8:56, WIDTH // 2 :] = 1
                found[-1] |= {"iscrowd": 1, "segmentation": encode(mask, "uncompressed")}
                found[-1]["bbox"] = [WIDTH // 2, 8, WIDTH // 2, 48]
            image.save(folder / name)
            images.append({"id": 100 + index, "file_name": name, "height": HEIGHT, "width": WIDTH})
            annotations += [{**shape, "image_id": 100 + index} for shape in found]
        for id, annotation in enumerate(annotations, start=1):
            annotation["id"] = id
        categories = [{"id": id, "name": name} for id, name in CATEGORIES.items()]
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations" / f"instances_{split}{year}.json").write_text(json.dumps(content))
    return root


def edit(root: Path, change) -> None:
    """Apply `change` to the training annotations of a folder."""
    path = root / "annotations" / "instances_train.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def run_accuracy(data: Path, output: Path, *arguments: str) -> tuple[torch.nn.Module, dict]:
    """Train and evaluate the smallest detector; returns it and the report."""
    return accuracy.main([str(data), *TINY, "--output", str(output), *arguments])


def losses(report: dict) -> list[float]:
    """Of a report, one an iteration."""
    return [entry["loss"] for entry in report["history"]]


def shared(name: str) -> Path:
    """A folder of real pictures; the test is skipped where it is absent."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the folder shared/data beside the repository")
    return folder
