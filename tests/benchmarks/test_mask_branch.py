"""benchmarks/{objects,mask_branch,strategies}.py: features of objects, and the branch that is trained on them."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks.quality import mask_branch
from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.quality.efficientnet_lite import IMAGE_MEAN, IMAGE_STD, EfficientNetLite0Features, imagenet_state
from benchmarks.quality.mask_branch import MaskBranch, Splits, train_branch
from benchmarks.quality.objects import Objects, load_objects
from benchmarks.quality.strategies import STRATEGIES, ifr
from ifr_fast import Implicit

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]


@pytest.fixture(scope="module")
def objects(shapes, tmp_path_factory):
    cache = tmp_path_factory.mktemp("features")
    return [load_objects(CocoFolder(shapes, split), cache, min_area=200) for split in ("train", "val")]


@pytest.fixture(scope="module")
def splits(objects):
    return Splits.make(*objects, torch.device("cpu"))


def parameters(row, channels=64):
    return sum(p.numel() for p in STRATEGIES[row].build(channels).parameters())


def test_objects_are_those_of_the_area_and_no_crowds(shapes, tmp_path):
    dataset = CocoFolder(shapes, "val")
    areas = [target["masks"].sum((1, 2)) for _, target in dataset]
    threshold = int(torch.cat(areas).median())
    kept = load_objects(dataset, tmp_path, min_area=threshold)
    expected = [i for i, a in zip(dataset.image_ids, areas, strict=True) for _ in range(int((a >= threshold).sum()))]
    assert kept.images.tolist() == expected


def test_masks_are_the_objects_in_their_boxes(shapes, objects):
    _, target = CocoFolder(shapes, "val")[0]
    x0, y0, x1, y1 = (int(v) for v in target["boxes"][0])
    crop = target["masks"][0, y0:y1, x0:x1].float()
    crop = nn.functional.interpolate(crop[None, None], size=(112, 112), mode="bilinear")[0, 0] > 0.5
    assert (crop == objects[1].masks[0]).float().mean() > 0.95


def test_features_are_those_of_the_four_blocks_at_the_object(shapes, objects):
    image, target = CocoFolder(shapes, "val")[0]
    backbone = EfficientNetLite0Features().eval()
    backbone.load_state_dict(imagenet_state())
    with torch.no_grad():
        x = (image - torch.tensor(IMAGE_MEAN)[:, None, None]) / torch.tensor(IMAGE_STD)[:, None, None]
        level = nn.Sequential(*list(backbone)[:4])(x[None])[0]  # stem and blocks 0 to 2: stride 4
    x0, y0, x1, y1 = (target["boxes"][0] / 4).tolist()
    grid = torch.linspace(0, 1, 57)[:-1] + 1 / 112  # four samples a cell
    ys, xs = y0 + (y1 - y0) * grid, x0 + (x1 - x0) * grid
    size = torch.tensor([level.shape[2], level.shape[1]])
    at = torch.stack(torch.meshgrid(xs, ys, indexing="xy"), -1) / size * 2 - 1
    sampled = nn.functional.grid_sample(level[None], at[None], padding_mode="border", align_corners=False)
    pooled = nn.functional.avg_pool2d(sampled, 4)[0]
    found = objects[1].features[0, : len(level)].float()
    assert ((found - pooled).norm() / pooled.norm()).item() < 0.1  # other sample points


def test_features_are_made_once(shapes, tmp_path, monkeypatch):
    dataset = CocoFolder(shapes, "val")
    first = load_objects(dataset, tmp_path, min_area=200)
    monkeypatch.setattr("benchmarks.quality.objects._make_objects", None)
    again = load_objects(dataset, tmp_path, min_area=200)
    torch.testing.assert_close(vars(again), vars(first), rtol=0, atol=0)


def test_data_without_large_objects_is_refused(shapes, tmp_path):
    with pytest.raises(DataError, match="no object of 100000 pixels or more"):
        load_objects(CocoFolder(shapes, "val"), tmp_path, min_area=100_000)


def test_no_image_is_in_two_splits():
    images = torch.arange(30).repeat_interleave(3)
    found = Objects(torch.arange(90.0), torch.arange(90), images)
    first, second = found.split(0.2)
    assert len(second) == 18
    assert not set(first.images.tolist()) & set(second.images.tolist())
    assert sorted([*first.masks.tolist(), *second.masks.tolist()]) == list(range(90))


def test_iou_is_that_of_the_fine_masks(splits):
    threshold = torch.rand(()).item()
    shape = torch.rand(28, 28) > threshold

    class Constant(nn.Module):
        refine = None

        def forward(self, features):
            return torch.where(shape, 50.0, -50.0).expand(len(features), 28, 28)

    found = mask_branch.evaluate(Constant(), splits.test, bf16=False)
    with torch.no_grad():
        drawn = nn.functional.interpolate(shape[None, None].float(), size=(112, 112), mode="bilinear")[0, 0].numpy()
    masks = splits.test.masks.numpy()
    ious = [(m & (drawn > 0.5)).sum() / (m | (drawn > 0.5)).sum() for m in masks]
    assert found["iou"] == pytest.approx(np.mean(ious), abs=1e-6)
    assert found["above_50"] == pytest.approx(np.mean(np.array(ious) > 0.5))
    images = splits.test.images.numpy()
    assert found["images"] == sorted(set(images.tolist()))
    for image, count, total in zip(found["images"], found["objects"], found["iou_sums"], strict=True):
        own = np.array(ious)[images == image]
        assert (count, total) == (len(own), pytest.approx(own.sum(), abs=1e-4))


def test_the_last_epoch_is_returned_and_tested(splits, monkeypatch):
    scores = iter([0.2, 0.7, 0.5, 0.6])
    states = []

    def evaluate(model, objects, *, bf16):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        return {"iou": next(scores)}

    monkeypatch.setattr(mask_branch, "evaluate", evaluate)
    options = {"channels": 32, "epochs": 3, "batch_size": 4, "lr": 1e-2, "seed": 0}
    model, report = train_branch(STRATEGIES["1 convolution"], splits, **options)
    assert [epoch["validation_iou"] for epoch in report["epochs"]] == [0.2, 0.7, 0.5]
    assert (report["validation"], report["test"]) == ({"iou": 0.5}, {"iou": 0.6})
    torch.testing.assert_close(dict(model.state_dict()), states[2], rtol=0, atol=0)
    torch.testing.assert_close(states[3], states[2], rtol=0, atol=0)


def test_training_lowers_the_loss(splits):
    options = {"channels": 32, "epochs": 8, "batch_size": 2, "lr": 1e-2, "seed": 0}
    _, report = train_branch(STRATEGIES["2 convolutions"], splits, **options)
    losses = [epoch["loss"] for epoch in report["epochs"]]
    assert losses[-1] < 0.8 * losses[0]


def test_a_loss_that_is_not_finite_is_an_error(splits):
    with pytest.raises(FloatingPointError, match="not finite in epoch"):
        train_branch(STRATEGIES["1 convolution"], splits, channels=32, epochs=30, batch_size=4, lr=1e30, seed=0)


def test_the_backward_residual_is_that_of_the_adjoints_equation(splits):
    residuals = []
    for steps in (1, 40):
        torch.manual_seed(0)
        refinement = ifr(adjoint=Implicit(max_iter=steps, rtol=1e-4), post_gain=0.1).build(32)
        model = MaskBranch(splits.mean, splits.std, 32, refinement).eval()
        mask_branch.evaluate(model, splits.test, bf16=False)
        residuals.append(mask_branch.backward_residual(model, splits.test, bf16=False))
    assert residuals[1] < 0.1 * residuals[0]


@pytest.mark.parametrize("row", ["4 convolutions", "unroll", "IFR, JacobianFree"])
def test_without_an_adjoint_equation_there_is_no_backward_residual(splits, row):
    model = MaskBranch(splits.mean, splits.std, 32, STRATEGIES[row].build(32))
    mask_branch.evaluate(model, splits.test, bf16=False)
    assert mask_branch.backward_residual(model, splits.test, bf16=False) is None


def test_half_of_the_towers_parameters():
    affine = 6 * 64 + 2 * 64  # norms; weight normalisation's gains
    assert parameters("IFR") == 2 * 64 * 64 * 9 + affine
    assert parameters("4 convolutions") == 4 * (64 * 64 * 9 + 64)
    assert parameters("unroll, unshared") == 4 * parameters("unroll") == 4 * parameters("IFR")


def test_an_unshared_unroll_of_equal_blocks_is_the_shared_one():
    x = torch.randn(2, 64, 14, 14)
    shared, unshared = (STRATEGIES[row].build(64) for row in ("unroll", "unroll, unshared"))
    for block in unshared.blocks:
        block.load_state_dict(shared.block.state_dict())
    torch.testing.assert_close(unshared(x), shared(x), rtol=0, atol=0)


def test_the_warm_up_is_a_share_of_the_training():
    assert STRATEGIES["IFR, warm-up 0.3"].warmup_steps(100) == 30
    assert STRATEGIES["unroll"].warmup_steps(100) == STRATEGIES["4 convolutions"].warmup_steps(100) == 0


def test_the_first_iterations_unroll_and_the_others_solve(splits, monkeypatch):
    found, train_step = [], mask_branch.train_step

    def recorded(model, *args):
        found.append(model.refine.training_unroll)
        return train_step(model, *args)

    monkeypatch.setattr(mask_branch, "train_step", recorded)
    train_branch(ifr(warmup=0.5), splits, channels=32, epochs=2, batch_size=4, lr=1e-3, seed=0)
    half = len(found) // 2
    assert found == [4] * half + [0] * half
