"""Training under mmengine's Runner: saved, resumed, evaluated with COCO's metrics, in one process and in two."""

import json
import os
import subprocess
import sys

import mmdet_training
import pytest
import torch
from coco_shapes import shared, write_areas, write_dataset
from mmdet_systems import QUIET
from mmdet_training import tiny_mask_rcnn
from mmengine.runner import Runner

pytestmark = [*QUIET, pytest.mark.usefixtures("one_thread")]
SPLITS = {"train": "train", "val": "val"}
METRICS = [f"coco/{kind}_mAP{suffix}" for kind in ("bbox", "segm") for suffix in ("", "_50", "_75")]


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """A small dataset."""
    return write_areas(write_dataset(tmp_path_factory.mktemp("shapes")))


@pytest.fixture(autouse=True)
def full_checkpoints(monkeypatch):
    """mmengine 0.10 reads its own checkpoints, which hold more than tensors, with torch's weights-only default."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")


def scalars(work_dir):
    """What the visualizer wrote, line by line."""
    (path,) = work_dir.rglob("scalars.json")
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_save_resume(data, images, work_dir):
    """Four iterations, then two more from the checkpoint; returns both runs' scalars."""
    Runner.from_cfg(tiny_mask_rcnn(data, images, work_dir / "first", 4)).train()
    first = scalars(work_dir / "first")
    saved = str(work_dir / "first/iter_4.pth")
    runner = Runner.from_cfg(tiny_mask_rcnn(data, images, work_dir / "again", 6, resume=True, load_from=saved))
    runner.train()
    saved = torch.load(work_dir / "again/iter_6.pth", weights_only=False)
    assert saved["meta"]["iter"] == 6
    for name, value in runner.model.state_dict().items():
        assert torch.equal(saved["state_dict"][name], value), name
    return first, scalars(work_dir / "again")


def check(lines, steps):
    """A line for each training step, the loss finite, the solver's residual where it solved, COCO's metrics last."""
    *training, metrics = lines
    assert [line["step"] for line in training] == steps
    assert all(0 < line["loss"] < 100 and 0 < line["loss_mask"] < 10 for line in training)
    assert 0 < training[-1]["ifr_residual"] < 1
    assert 0 < training[-1]["ifr_spectral_radius"] < 10
    assert 1 <= training[-1]["ifr_iterations"] <= 15
    assert all(0 <= metrics[name] <= 1 for name in METRICS), metrics


def test_training_is_saved_resumed_and_evaluated(shapes, tmp_path):
    first, again = train_save_resume(shapes, SPLITS, tmp_path)
    check(first, [1, 2, 3, 4])
    check(again, [5, 6])
    assert "ifr_residual" not in first[1]  # still unrolled


@pytest.mark.full
def test_training_on_photographs(tmp_path):
    images = {"train": "images", "val": "images"}
    first, again = train_save_resume(shared("pennfudan"), images, tmp_path)
    check(first, [1, 2, 3, 4])
    check(again, [5, 6])


@pytest.mark.full
def test_two_processes_train_one_model(shapes, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [mmdet_training.__file__, str(shapes), str(tmp_path)]
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["wrapper"] == second["wrapper"] == "MMDistributedDataParallel"
    trained = [name for name in first["model"] if "running_" not in name and "num_batches" not in name]
    assert any("convs.0.block" in name for name in trained)
    for name in trained:
        assert torch.equal(first["model"][name], second["model"][name]), name
    check(scalars(tmp_path), [1, 2, 3, 4])
