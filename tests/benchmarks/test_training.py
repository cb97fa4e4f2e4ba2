"""benchmarks/quality/training.py: what is learnt and from what, interrupting and resuming, several processes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from coco_shapes import TINY, edit, losses, run_accuracy, write_dataset

from benchmarks.quality import training

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]
ROOT = Path(__file__).parents[2]


def test_processes_share_each_batch():
    plan = training.Plan(iterations=5, batch_size=4, lr=1e-3, seed=0)
    alone = training.batches(2, plan, SimpleNamespace(rank=0, world=1))
    shares = [training.batches(2, plan, SimpleNamespace(rank=rank, world=2)) for rank in range(2)]
    assert len(alone) == 3
    assert [sorted([*a, *b]) for a, b in zip(*shares, strict=True)] == [list(batch) for batch in alone]


def test_loss_falls(shapes, tmp_path):
    _, report = run_accuracy(shapes, tmp_path, "--refine", "stack", "--iterations", "30", "--lr", "2e-3")
    values = losses(report)
    assert np.mean(values[-6:]) < 0.75 * np.mean(values[:6]), values


def test_images_without_objects_are_trained_on(tmp_path):
    root = write_dataset(tmp_path / "data")
    edit(root, lambda content: content.update(annotations=[]))
    model, report = run_accuracy(root, tmp_path, "--refine", "ifr", "--groups", "4", "--iterations", "1")
    assert report["history"][0]["loss_mask"] == 0
    assert np.isfinite(losses(report)).all()
    # Every process of a distributed training needs a gradient, if only of zeros.
    assert all(parameter.grad is not None for parameter in model.roi_heads.mask_head.parameters())


def test_bf16(shapes, tmp_path):
    _, report = run_accuracy(shapes, tmp_path, "--refine", "ifr", "--groups", "4", "--iterations", "2", "--amp", "bf16")
    assert np.isfinite(losses(report)).all()


def test_seed_decides_the_losses(shapes, tmp_path):
    first, again, other = (
        losses(run_accuracy(shapes, tmp_path, "--refine", "stack", "--iterations", "2", "--seed", seed)[1])
        for seed in ("1", "1", "2")
    )
    assert first == again
    assert first != other


def test_a_loss_that_is_not_finite_stops_the_training(shapes, tmp_path):
    with pytest.raises(FloatingPointError, match="not finite at iteration"):
        run_accuracy(shapes, tmp_path, "--refine", "none", "--iterations", "20", "--lr", "1e20")


def test_resumed_training_equals_the_uninterrupted(shapes, tmp_path, monkeypatch):
    options = ["--refine", "ifr", "--groups", "4", "--steps", "3", "--warmup-steps", "4", "--iterations", "6"]
    whole, expected = run_accuracy(shapes, tmp_path / "whole", *options)

    saved = ["--checkpoint", str(tmp_path / "checkpoint"), "--checkpoint-every", "3"]
    seed_iteration = training.seed_iteration

    def interrupt(seed, iteration, rank):
        if iteration == 4:
            raise KeyboardInterrupt
        seed_iteration(seed, iteration, rank)

    monkeypatch.setattr(training, "seed_iteration", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_accuracy(shapes, tmp_path / "broken", *options, *saved)
    monkeypatch.setattr(training, "seed_iteration", seed_iteration)
    resumed, report = run_accuracy(shapes, tmp_path / "resumed", *options, *saved, "--resume")

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
    assert list(tmp_path.iterdir()) == [checkpoints.path]


def test_a_checkpoint_is_neither_overwritten_nor_resumed_otherwise(shapes, tmp_path, capsys):
    options = ["--refine", "none", "--iterations", "1", "--checkpoint", str(tmp_path / "checkpoint")]
    with pytest.raises(SystemExit):
        run_accuracy(shapes, tmp_path, *options, "--resume")
    assert "--resume: no checkpoint.pt" in capsys.readouterr().err
    run_accuracy(shapes, tmp_path, *options)
    with pytest.raises(SystemExit):
        run_accuracy(shapes, tmp_path, *options)
    assert "holds a training" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"\{'lr': 0.0002\}, this run asks for \{'lr': 0.1\}"):
        run_accuracy(shapes, tmp_path, *options, "--resume", "--lr", "0.1")


TORCHRUN_SCRIPT = """
import os, sys
from benchmarks.quality import accuracy
import torch
torch.set_num_threads(1)
model, report = accuracy.main(sys.argv[2:])
losses = [entry["loss"] for entry in report["history"]]
torch.save({"model": model.state_dict(), "losses": losses}, f"{sys.argv[1]}/rank{os.environ['RANK']}.pt")
"""


@pytest.mark.full
def test_two_processes_agree(shapes, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(TORCHRUN_SCRIPT)
    options = ["--refine", "ifr", "--groups", "4", "--steps", "3", "--iterations", "3"]
    options += ["--checkpoint", str(tmp_path / "checkpoint")]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(script), str(tmp_path), str(shapes), *TINY, *options, "--output", str(tmp_path)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-3000:]

    first, second = (torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2))
    assert first["losses"] == second["losses"]
    for name, value in first["model"].items():
        assert torch.equal(value, second["model"][name]), name

    together = json.loads((tmp_path / "accuracy.json").read_text())
    assert together["processes"] == 2
    _, alone = run_accuracy(shapes, tmp_path / "alone", *options, "--resume")
    assert alone["metrics"] == together["metrics"]
    assert alone["solve"] == pytest.approx(together["solve"], rel=1e-4)
