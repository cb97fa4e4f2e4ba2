"""COCO-format data: finding a folder's splits, samples for training, and the COCO metrics."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch.utils.data import Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks.report.files import DataError

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


def find_annotations(root: Path, split: str) -> Path:
    """The annotation file of `split` ("train" or "val") in a folder of COCO format.

    Looks for annotations/instances_SPLIT.json, then for one with a year (instances_SPLIT2017.json).
    Raises DataError where there is none, or more than one.
    """
    exact = root / "annotations" / f"instances_{split}.json"
    found = [exact] if exact.is_file() else sorted(root.glob(f"annotations/instances_{split}[0-9]*.json"))
    if len(found) != 1:
        raise DataError(
            f"data: expected {exact} or one file annotations/instances_{split}YEAR.json, "
            f"found {[path.name for path in found] or 'neither'}; --{split}-annotations names the file"
        )
    return found[0]


def find_images(root: Path, annotations: Path, split: str, file_names: list[str]) -> Path:
    """The folder that holds `file_names`: SPLIT/, SPLIT with its year, images/SPLIT/, images/ or the root.

    Raises DataError where no folder has the first image, or where the folder that has it lacks others.
    """
    named = annotations.stem.removeprefix("instances_")
    candidates = [root / split, root / named, root / "images" / split, root / "images" / named, root / "images", root]
    for folder in candidates:
        if (folder / file_names[0]).is_file():
            missing = [name for name in file_names if not (folder / name).is_file()]
            if missing:
                raise DataError(
                    f"data: {folder} lacks {len(missing)} of the {len(file_names)} images "
                    f"that {annotations.name} names, the first being {missing[0]}"
                )
            return folder
    looked = ", ".join(str(folder) for folder in candidates)
    raise DataError(f"data: {file_names[0]}, named in {annotations.name}, is in none of: {looked}")


def load_annotations(path: Path, labelled: str | None = None) -> COCO:
    """Read and check an instances file; fills in `iscrowd`, `area` and `bbox` where they are left out.

    labelled: keep the images whose entry has this "labelled" alone, which says what is annotated in them; None: all.
    Raises DataError naming the first annotation that no mask can be made of, or where no image is left.
    """
    try:
        data = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise DataError(f"{path}: not a readable JSON file: {error}") from error
    absent = [key for key in ("images", "annotations", "categories") if not (isinstance(data, dict) and key in data)]
    if absent or not data["images"] or not data["categories"]:
        raise DataError(f"{path}: not COCO format: {', '.join(absent) or 'images or categories'} missing or empty")
    if labelled is not None:
        data["images"] = [image for image in data["images"] if image.get("labelled") == labelled]
        if not data["images"]:
            raise DataError(f'{path}: no image has "labelled": "{labelled}"')
        kept = {image["id"] for image in data["images"]}
        data["annotations"] = [entry for entry in data["annotations"] if entry.get("image_id") in kept]
    data.setdefault("info", {})
    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    for annotation in data["annotations"]:
        check_annotation(annotation, coco, path)
        encoded = coco.annToRLE(annotation)
        annotation.setdefault("iscrowd", 0)
        annotation.setdefault("area", float(rle.area(encoded)))
        annotation.setdefault("bbox", rle.toBbox(encoded).tolist())
    return coco


def check_annotation(annotation: dict, coco: COCO, path: Path) -> None:
    """Raises DataError unless image, category and segmentation of the annotation can be used."""
    where = f"{path}: annotation {annotation.get('id')}"
    if annotation.get("image_id") not in coco.imgs:
        raise DataError(f"{where}: image_id {annotation.get('image_id')} is not among the images")
    if annotation.get("category_id") not in coco.cats:
        raise DataError(f"{where}: category_id {annotation.get('category_id')} is not among the categories")
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        image = coco.imgs[annotation["image_id"]]
        size = [image["height"], image["width"]]
        if "counts" not in segmentation or list(segmentation.get("size", [])) != size:
            raise DataError(f"{where}: expected a run-length mask of size {size}, got {segmentation.get('size')}")
    elif not segmentation or not all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in segmentation):
        raise DataError(f"{where}: expected a run-length mask or polygons of at least three points")


class CocoFolder(Dataset):
    """One split of a folder in COCO format.

    `dataset[i]` is `(image, target)`: image (3, H, W) float32 in 0…1; target for torchvision's detectors:
    `boxes` (n, 4) float32 corners in pixels, `labels` (n,) int64 from 1 (see `categories`), `masks`
    (n, H, W) uint8, `image_id`. Crowds, and objects thinner than a pixel, are left out.

    labelled: as for load_annotations. Raises DataError where annotations or images cannot be found or used.
    """

    def __init__(
        self, root: str | Path, split: str, annotations: str | Path | None = None, labelled: str | None = None
    ) -> None:
        root = Path(root)
        if not root.is_dir():
            raise DataError(f"data: expected a folder in COCO format, {root} is none")
        path = Path(annotations) if annotations else find_annotations(root, split)
        self.coco = load_annotations(path, labelled)
        self.image_ids = sorted(self.coco.imgs)
        self.categories = {id: self.coco.cats[id]["name"] for id in sorted(self.coco.cats)}
        self.labels = {id: label for label, id in enumerate(self.categories, start=1)}
        names = [self.coco.imgs[id]["file_name"] for id in self.image_ids]
        self.folder = find_images(root, path, split, names)

    def __len__(self) -> int:
        return len(self.image_ids)

    def image(self, image_id: int) -> torch.Tensor:
        """(3, H, W) uint8. Raises DataError where the file's size is not the annotated one."""
        entry = self.coco.imgs[image_id]
        pixels = pil_to_tensor(Image.open(self.folder / entry["file_name"]).convert("RGB"))
        if pixels.shape[1:] != (entry["height"], entry["width"]):
            raise DataError(
                f"{entry['file_name']}: annotated as {entry['height']}×{entry['width']}, "
                f"the file is {pixels.shape[1]}×{pixels.shape[2]}"
            )
        return pixels

    def annotations(self, image_id: int) -> list[dict]:
        return self.coco.imgToAnns[image_id]

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict]:
        image_id = self.image_ids[index]
        image = self.image(image_id)
        height, width = image.shape[1:]
        boxes, labels, masks = [], [], []
        for annotation in self.annotations(image_id):
            x, y, w, h = annotation["bbox"]
            box = [max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)]
            mask = self.coco.annToMask(annotation)
            if annotation["iscrowd"] or box[2] - box[0] < 1 or box[3] - box[1] < 1 or not mask.any():
                continue
            boxes.append(box)
            labels.append(self.labels[annotation["category_id"]])
            masks.append(mask)
        target = {
            "boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels, dtype=torch.int64),
            "masks": torch.from_numpy(np.stack(masks)) if masks else torch.zeros(0, height, width, dtype=torch.uint8),
            "image_id": image_id,
        }
        return image.float() / 255, target


class TrainingStream(Dataset):
    """The endless sequence of training samples: epoch after epoch, each shuffled, half the images mirrored.

    Sample `position` depends on nothing but the seed and the position, so neither workers, nor the number of
    processes that share a batch, nor an interruption changes what is trained on.
    """

    def __init__(self, dataset: CocoFolder, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed
        self.epoch = -1

    def __getitem__(self, position: int) -> tuple[torch.Tensor, dict]:
        epoch, offset = divmod(position, len(self.dataset))
        if epoch != self.epoch:
            random = np.random.default_rng((self.seed, epoch))
            self.order = random.permutation(len(self.dataset))
            self.mirrored = random.random(len(self.dataset)) < 0.5
            self.epoch = epoch
        image, target = self.dataset[int(self.order[offset])]
        return mirror(image, target) if self.mirrored[offset] else (image, target)


def mirror(image: torch.Tensor, target: dict) -> tuple[torch.Tensor, dict]:
    """Left and right exchanged in the image (3, H, W), its boxes and its masks."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = image.shape[-1] - boxes[:, [2, 0]]
    return image.flip(-1), {**target, "boxes": boxes, "masks": target["masks"].flip(-1)}


def detections(dataset: CocoFolder, image_id: int, output: dict[str, torch.Tensor]) -> list[dict]:
    """What torchvision's Mask R-CNN found in an image, as entries of COCO's results format.

    output: `boxes` (n, 4) corners, `labels` (n,), `scores` (n,), `masks` (n, 1, H, W) probabilities.
    """
    category_ids = list(dataset.categories)
    corners = output["boxes"].cpu()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    masks = (output["masks"][:, 0] > 0.5).to("cpu", torch.uint8).numpy()
    entries = []
    scores, labels = output["scores"].tolist(), output["labels"].tolist()
    for box, score, label, mask in zip(boxes, scores, labels, masks, strict=True):
        encoded = rle.encode(np.asfortranarray(mask))
        encoded["counts"] = encoded["counts"].decode()
        entry = {"image_id": image_id, "category_id": category_ids[label - 1], "score": score}
        entries.append({**entry, "bbox": box, "segmentation": encoded})
    return entries


def coco_metrics(coco: COCO, entries: list[dict]) -> dict[str, dict[str, float | None]]:
    """COCO's twelve figures for boxes ("bbox") and masks ("segm"), each in 0…1.

    A figure is None where the ground truth has no object of that size.
    """
    metrics = {}
    for kind in ("bbox", "segm"):
        evaluation = matched(coco, entries, kind)
        with contextlib.redirect_stdout(io.StringIO()):
            evaluation.accumulate()
            evaluation.summarize()
        figures = [None if value < 0 else float(value) for value in evaluation.stats]
        metrics[kind] = dict(zip(METRICS, figures, strict=True))
    return metrics


def matched(coco: COCO, entries: list[dict], kind: str) -> COCOeval:
    """Detections' boxes ("bbox") or masks ("segm") matched with the ground truth, image by image."""
    keys = ("image_id", "category_id", "score", "bbox" if kind == "bbox" else "segmentation")
    with contextlib.redirect_stdout(io.StringIO()):
        found = load_results(coco, [{key: entry[key] for key in keys} for entry in entries])
        evaluation = COCOeval(coco, found, kind)
        evaluation.evaluate()
    return evaluation


def load_results(coco: COCO, entries: list[dict]) -> COCO:
    """`COCO.loadRes`, which fails on an empty list, for any number of entries."""
    if entries:
        return coco.loadRes(entries)
    found = COCO()
    found.dataset = {**coco.dataset, "annotations": []}
    found.createIndex()
    return found
