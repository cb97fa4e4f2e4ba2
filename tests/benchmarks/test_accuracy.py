"""benchmarks/quality/accuracy.py: its options, its report."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from coco_shapes import losses, run_accuracy, shared
from PIL import Image

from benchmarks.quality import accuracy, coco
from benchmarks.quality.detector import REFINEMENTS

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]


@pytest.mark.parametrize("refine", REFINEMENTS)
def test_every_refinement_trains_and_reports(shapes, tmp_path, refine):
    ifr = ["--groups", "4"] if "ifr" in refine or refine == "unroll" else []
    _, report = run_accuracy(shapes, tmp_path, "--refine", refine, *ifr, "--iterations", "1")
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
    _, report = run_accuracy(shapes, tmp_path, *options, "--adjoint", "jacobian_free", "--warmup-steps", "1")
    assert report["solve"]["rois"] > 0
    assert 0 <= report["solve"]["residual_median"] <= report["solve"]["residual_max"] < 2
    assert 0 < report["solve"]["iterations_mean"] <= 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--refine", "stack", "--solver", "broyden"], "--solver applies to --refine ifr"),
        (["--refine", "unroll", "--adjoint", "shine"], "--adjoint applies to --refine ifr"),
        (
            ["--refine", "none", "--groups", "8"],
            "--groups applies to --refine ifr or ifr-coarse or",
        ),
        (["--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
        (["--seed", "-1"], "--seed: expected zero or more, got -1"),
    ],
)
def test_clashing_options_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        accuracy.parse([str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_unusable_data_is_named_without_a_traceback(tmp_path):
    script, nowhere = Path(accuracy.__file__), tmp_path / "nowhere"
    done = subprocess.run([sys.executable, script, nowhere, "--device", "cpu"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == f"accuracy.py: error: data: expected a folder in COCO format, {nowhere} is none\n"


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
    _, report = run_accuracy(data, tmp_path, *few, "--refine", "ifr", "--groups", "4", "--iterations", "2")
    assert np.isfinite(losses(report)).all()
