"""A refined Mask R-CNN, from a folder in COCO's format to an ONNX file: README.md's page "From Monday to Friday".

    python -m ifr_fast.integrations.finetune {train,evaluate,export} --help

Every command is a function to copy from. Labels are the category ids of the data.
"""

import argparse
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.data import DataLoader
from torchvision.datasets import CocoDetection, wrap_dataset_for_transforms_v2
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNPredictor
from torchvision.transforms import v2
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid, save_image
from tqdm import tqdm

from ifr_fast import Broyden, IFRHead, Implicit
from ifr_fast.integrations.torchvision import refine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load(data: Path, split: str) -> CocoDetection:
    """DATA/annotations/instances_SPLIT*.json with its images in DATA/SPLIT*. Crowds are no targets of a training."""
    (annotations,) = data.glob(f"annotations/instances_{split}*.json")
    steps = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
    if split == "train":
        steps += [v2.RandomHorizontalFlip(), v2.SanitizeBoundingBoxes()]
    folder = data / annotations.stem.removeprefix("instances_")
    dataset = CocoDetection(folder, annotations, transforms=v2.Compose(steps))
    if split == "train":
        objects = dataset.coco.imgToAnns
        for id in dataset.ids:
            objects[id] = [entry for entry in objects[id] if not entry["iscrowd"]]
        dataset.ids = [id for id in dataset.ids if objects[id]]
    return dataset


def build(classes: int, size: int, scratch: bool) -> nn.Module:
    """Mask R-CNN for labels below `classes`, its mask branch refined; pretrained on COCO, or from scratch."""
    start = {"weights": None, "weights_backbone": None} if scratch else {"weights": "DEFAULT"}
    model = maskrcnn_resnet50_fpn(**start, min_size=size, max_size=size * 5 // 3, box_batch_size_per_image=64)
    model.roi_heads.box_predictor = FastRCNNPredictor(1024, classes)
    model.roi_heads.mask_predictor = MaskRCNNPredictor(256, 256, classes)
    # Looser than by default, forward and backward: fewer steps. Solve as far in training as when it is used.
    return refine(model, solver=Broyden(rtol=1e-1), adjoint=Implicit(rtol=1e-1))


def train(data: Path, run: Path, epochs: int, batch: int, lr: float, size: int, scratch: bool) -> None:
    """Trains, and writes the model to RUN/model.pt. Prints after each epoch what the head's solver reached."""
    dataset = load(data, "train")
    targets = wrap_dataset_for_transforms_v2(dataset, target_keys=("boxes", "labels", "masks"))
    batches = DataLoader(targets, batch, shuffle=True, drop_last=True, collate_fn=lambda b: tuple(zip(*b, strict=True)))
    model = build(max(dataset.coco.cats) + 1, size, scratch).to(DEVICE).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * len(batches), pct_start=0.1)
    for epoch in range(epochs):
        total = 0.0
        for images, targets in tqdm(batches, desc=f"epoch {epoch + 1}", leave=False):
            targets = [{name: value.to(DEVICE) for name, value in target.items()} for target in targets]
            loss = sum(model([image.to(DEVICE) for image in images], targets).values())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1}: loss {total / len(batches):.3f}; {head_of(model).last_solution}")
    run.mkdir(parents=True, exist_ok=True)
    torch.save(model.cpu().eval(), run / "model.pt")


def head_of(model: nn.Module) -> IFRHead:
    return next(module for module in model.modules() if isinstance(module, IFRHead))


@torch.inference_mode()
def evaluate(data: Path, run: Path) -> None:
    """Prints COCO's metrics of RUN's model, of boxes and of masks, and draws RUN/detections.png."""
    dataset, model = load(data, "val"), torch.load(run / "model.pt", weights_only=False).to(DEVICE)
    results, pictures = [], []
    for image_id, (image, _) in zip(dataset.ids, tqdm(dataset, leave=False), strict=True):
        (found,) = model([image.to(DEVICE)])
        boxes, labels, scores, masks = (found[name].cpu() for name in ("boxes", "labels", "scores", "masks"))
        pictures.append(drawn(image, boxes, labels, scores, masks))
        boxes[:, 2:] -= boxes[:, :2]
        for box, label, score, mask in zip(boxes, labels, scores, masks, strict=True):
            encoded = rle.encode(np.asfortranarray(mask[0] > 0.5, np.uint8))
            results.append({"image_id": image_id, "category_id": int(label), "score": float(score)})
            results[-1] |= {"bbox": box.tolist(), "segmentation": encoded}
    if not results:
        raise SystemExit("nothing was detected: train longer")
    for kind in ("bbox", "segm"):
        metrics = COCOeval(dataset.coco, dataset.coco.loadRes(results), kind)
        metrics.evaluate()
        metrics.accumulate()
        metrics.summarize()
    fit = v2.Compose([v2.Resize(239, max_size=320), v2.CenterCrop((240, 320))])
    save_image(make_grid([fit(picture) for picture in pictures[:8]], nrow=4), run / "detections.png")


def drawn(image: torch.Tensor, *found: torch.Tensor) -> torch.Tensor:
    """The image (3, H, W), in 0…1, with the boxes and masks of what was found with a score above 0.7."""
    boxes, labels, _, masks = (values[found[2] > 0.7] for values in found)
    colours = [("red", "gold", "cyan", "lime", "magenta")[label % 5] for label in labels]
    image = draw_segmentation_masks(image, masks[:, 0] > 0.5, alpha=0.6, colors=colours) if len(masks) else image
    return draw_bounding_boxes(image, boxes, colors=colours) if len(boxes) else image


@torch.inference_mode()
def export(data: Path, run: Path) -> None:
    """Folds weight norm and writes RUN/detector.onnx. Runs it in ONNX Runtime on an image beside the model itself."""
    dataset, model = load(data, "val"), torch.load(run / "model.pt", weights_only=False)
    head, steps = head_of(model), 1
    for convolution in (head.block.conv1, head.block.conv2):
        parametrize.remove_parametrizations(convolution, "weight")
    for image, _ in tqdm(islice(dataset, 50), leave=False):
        (expected,) = model([image])
        steps = max(steps, int(head.last_solution.iterations.max()))
    head.solver = replace(head.solver, max_iter=steps)  # a graph takes every step: no more than images need
    names = ["boxes", "labels", "scores", "masks"]
    torch.onnx.export(
        model, ([image],), run / "detector.onnx", dynamo=False, opset_version=17, input_names=["image"],
        output_names=names, dynamic_axes={"image": [1, 2], **{name: [0] for name in names}},
    )  # fmt: skip
    session = onnxruntime.InferenceSession(run / "detector.onnx")
    print(f"{steps} steps of the solver; ONNX Runtime against torch, largest differences:")
    for name, value in zip(names, session.run(None, {"image": image.numpy()}), strict=True):
        print(f"{name} {value.shape}: {abs(value - expected[name].numpy()).max(initial=0):.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    for command in (train, evaluate, export):
        options = commands.add_parser(command.__name__, help=command.__doc__, description=command.__doc__)
        options.set_defaults(command=command)
        options.add_argument("data", type=Path, help="a folder in COCO's format")
        options.add_argument("run", type=Path, help="a folder for what the commands write")
        if command is train:
            options.add_argument("--epochs", type=int, default=12, help="(default: %(default)s)")
            options.add_argument("--batch", type=int, default=4, help="images a step (default: %(default)s)")
            options.add_argument("--lr", type=float, default=2e-4, help="of AdamW (default: %(default)s)")
            options.add_argument(
                "--size", type=int, default=800, help="pixels of the shorter side (default: %(default)s)"
            )
            options.add_argument("--scratch", action="store_true", help="without pretrained weights")
    options = vars(parser.parse_args())
    options.pop("command")(**options)


if __name__ == "__main__":
    main()
