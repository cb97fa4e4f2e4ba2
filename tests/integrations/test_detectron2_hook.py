"""integrations.detectron2.IFRHook under detectron2's trainers: what is logged, evaluated, resumed and warned of."""

import json
import logging

import pytest
import torch
from coco_shapes import write_areas, write_dataset
from torch import nn

from ifr_fast import Broyden, IFRHead

pytestmark = [
    pytest.mark.full,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning"),
]


class Pyramid(nn.Module):
    """One head on two levels; remembers of every pass its unroll and its residuals."""

    def __init__(self, tower=None):
        super().__init__()
        self.tower = tower or IFRHead(8, groups=4, solver=Broyden(max_iter=3))
        self.passes = []

    def forward(self, x):
        outputs, residuals = [], []
        for level in (x, x[..., ::2, ::2]):
            outputs.append(self.tower(level).square().mean())
            solution = getattr(self.tower, "last_solution", None)
            residuals += [solution.residual] if solution else []
        self.passes.append((getattr(self.tower, "training_unroll", 0), residuals))
        return {"loss": sum(outputs)}


def train(d2, model, hook, **range):
    return d2.train(model, torch.randn(2, 8, 6, 6), hook, **range)


def logged(trainer):
    return {name: values.values() for name, values in trainer.storage.histories().items() if "ifr" in name}


def test_logs_every_level_at_the_interval_only(d2):
    model = Pyramid()
    found = logged(train(d2, model, d2.ours.IFRHook(interval=2), steps=5))
    assert [iteration for _, iteration in found["ifr_residual"]] == [1, 3]
    expected = [torch.cat(model.passes[i][1]).median().item() for i in (1, 3)]
    assert [value for value, _ in found["ifr_residual"]] == pytest.approx(expected)
    assert found["ifr_iterations"][-1][0] == 3


def test_warm_up_is_counted_in_the_trainers_iterations(d2):
    model = Pyramid()
    train(d2, model, d2.ours.IFRHook(warmup_iters=3, warmup_unroll=2), steps=5)
    assert [unroll for unroll, _ in model.passes] == [2, 2, 2, 0, 0]
    model = Pyramid()
    train(d2, model, d2.ours.IFRHook(warmup_iters=3), start=2, steps=5)
    assert [unroll for unroll, _ in model.passes] == [4, 0, 0]


def test_evaluation_between_a_step_and_the_hook_is_not_logged(d2):
    """detectron2's EvalHook runs ahead of a hook that was registered after it."""
    model = Pyramid()

    class Late(d2.ours.IFRHook):
        def after_step(self):
            model.eval()(1e3 * torch.randn(1, 8, 6, 6))
            model.train()
            super().after_step()

    found = logged(train(d2, model, Late(interval=1), steps=1))
    assert found["ifr_residual"][0][0] == pytest.approx(torch.cat(model.passes[0][1]).median().item())


def test_unreached_equilibrium_is_warned_of_once(d2, caplog):
    logger = logging.getLogger("detectron2")
    logger.addHandler(caplog.handler)
    train(d2, Pyramid(), d2.ours.IFRHook(interval=1, warn_above=1e-6))
    logger.removeHandler(caplog.handler)
    found = {record.getMessage() for record in caplog.records if "equilibrium is not reached" in record.getMessage()}
    (warning,) = found
    assert warning.startswith("tower: ")
    assert "max_iter=3" in warning


def test_model_without_ifr_is_refused(d2):
    with pytest.raises(ValueError, match=r"Pyramid has no IFRHead; .*IFRMaskRCNNConvUpsampleHead"):
        train(d2, Pyramid(nn.Conv2d(8, 8, 1)), d2.ours.IFRHook())


def test_bad_options_are_named(d2):
    with pytest.raises(ValueError, match=r"IFRHook\(interval=0\)"):
        d2.ours.IFRHook(interval=0)


@pytest.fixture
def trainer(d2, tmp_path):
    """DefaultTrainer on a small dataset, with COCO's metrics, as a training script sets it up."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultTrainer
    from detectron2.evaluation import COCOEvaluator
    from detectron2.utils.events import JSONWriter

    class Trainer(DefaultTrainer):
        def build_hooks(self):
            return [d2.ours.IFRHook(warmup_iters=3, interval=1), *super().build_hooks()]

        @classmethod
        def build_evaluator(cls, cfg, name):
            return COCOEvaluator(name, output_dir=str(tmp_path), use_fast_impl=False)

        def build_writers(self):
            return [JSONWriter(str(tmp_path / "metrics.json"))]

    shapes = write_areas(write_dataset(tmp_path / "shapes"))
    for split in ("train", "val"):
        annotations = shapes / f"annotations/instances_{split}.json"
        register_coco_instances(f"shapes_{split}", {}, str(annotations), str(shapes / split))

    def make(iterations):
        cfg = d2.configuration(
            d2.ours.CONFIGS / "ifr_mask_rcnn_R_50_FPN_1x.yaml",
            DATASETS__TRAIN=("shapes_train",),
            DATASETS__TEST=("shapes_val",),
            DATALOADER__NUM_WORKERS=0,
            INPUT__MIN_SIZE_TRAIN=(64,),
            INPUT__MIN_SIZE_TEST=64,
            INPUT__MASK_FORMAT="bitmask",
            MODEL__ROI_HEADS__NUM_CLASSES=2,
            SOLVER__IMS_PER_BATCH=2,
            SOLVER__MAX_ITER=iterations,
            TEST__EVAL_PERIOD=2,
            OUTPUT_DIR=str(tmp_path),
        )
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=True)
        return trainer

    yield make
    for split in ("train", "val"):
        DatasetCatalog.remove(f"shapes_{split}")
        MetadataCatalog.remove(f"shapes_{split}")


def test_training_is_evaluated_saved_and_resumed(trainer, tmp_path):
    for iterations in (2, 4):
        trainer(iterations).train()
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    found = {line["iteration"]: line["ifr_residual"] for line in lines if "ifr_residual" in line}
    assert list(found) == [3]  # the others belong to the warm-up, which went on where it was
    assert "segm/AP" in lines[-1]
