"""benchmarks/analysis/inference_steps.py: trained heads tested with other solves than they were trained with."""

import json

import pytest
import torch
from PIL import Image

from benchmarks.analysis import inference_steps
from benchmarks.quality.coco import DataError
from benchmarks.quality.mask_branch import evaluate
from benchmarks.quality.sweep import load_test_objects, trained_branches
from benchmarks.report import results_page

NARROW = "IFR, C/4 inside, stopping at 1e-1"


def test_more_steps_leave_a_smaller_residual_and_cost_more(shapes, sweep, tmp_path):
    options = ["--steps", "1", "4", "--rtols", "0.5", "0.01", "--output", str(tmp_path)]
    report = inference_steps.main([str(shapes), "--sweep", str(sweep), *options])
    assert report == json.loads((tmp_path / "inference_steps.json").read_text())
    assert list(report["rows"]) == ["IFR", NARROW]
    for found in report["rows"].values():
        assert list(found) == ["1 steps", "4 steps", "to 0.5", "to 0.01"]
        residuals = [entry["residual"][0] for entry in found.values()]
        assert residuals[0] > residuals[1]
        assert 0.5 >= residuals[2] > residuals[3]
        assert found["to 0.5"]["steps"] < found["to 0.01"]["steps"]
    assert [report["rows"]["IFR"][cut]["convolutions"] for cut in ("1 steps", "4 steps")] == [4, 10]
    assert report["rows"][NARROW]["1 steps"]["convolutions"] == 1
    assert_on_the_page(report)
    with Image.open(tmp_path / "inference_steps.png") as picture:
        assert picture.size[0] > 800


def assert_on_the_page(report):
    """A line for each way to test, a column for each way to train."""
    lines = [line.strip("| ").split(" | ") for line in results_page.inference_steps(report).splitlines()]
    assert lines[2] == ["tested with", *report["rows"]]
    cells = {(line[0], row): cell for line in lines[4:] for row, cell in zip(lines[2][1:], line[1:], strict=True)}
    narrow = report["rows"][NARROW]
    assert cells["to 0.5", NARROW].endswith(f"; {narrow['to 0.5']['steps'][0]:.1f} steps")
    assert cells["4 steps", NARROW].endswith(f"; {narrow['4 steps']['residual'][0]:.0e}")
    gain = 100 * narrow["4 steps"]["gain"]["mean"]
    assert cells["4 steps", NARROW].startswith(f"{gain:+.1f} [")


def test_with_its_own_solver_a_row_has_the_ious_of_its_training(shapes, sweep, tmp_path):
    options = ["--rows", NARROW, "--rtols", "0.1", "--steps", "2", "--output", str(tmp_path)]
    found = inference_steps.main([str(shapes), "--sweep", str(sweep), *options])["rows"][NARROW]
    (training,) = json.loads((sweep / "ablation.json").read_text())["rows"][NARROW]
    assert found["to 0.1"]["iou"] == [training["test"]["iou"]]
    objects = load_test_objects(shapes, sweep)
    branches = [trained_branches(sweep, row)[0] for row in (NARROW, "4 convolutions")]
    own, other = (evaluate(branch, objects, bf16=True)["iou"] for branch in branches)
    assert found["to 0.1"]["gain"]["mean"] == pytest.approx(own - other, abs=1e-4)


def test_objects_are_evenly_spaced(shapes, sweep, tmp_path):
    options = ["--rows", NARROW, "--rtols", "0.1", "--steps", "2", "--objects", "3", "--output", str(tmp_path)]
    report = inference_steps.main([str(shapes), "--sweep", str(sweep), *options])
    assert report["objects"] == 3
    objects = load_test_objects(shapes, sweep)
    last = len(objects) - 1
    branch = trained_branches(sweep, "4 convolutions")[0]
    assert report["baseline"] == [evaluate(branch, objects[torch.tensor([0, last // 2, last])], bf16=True)["iou"]]


def test_rows_are_paired_by_their_seeds():
    """Also where a seed is missing: its training failed, or its weights are elsewhere."""
    tests = {seed: {"iou": iou, "iterations": 4.0, "residual": 0.1} for seed, iou in enumerate((0.1, 0.2, 0.4, 0.8))}
    tests = {seed: {**test, "images": [0], "objects": [1], "iou_sums": [test["iou"]]} for seed, test in tests.items()}
    own = {seed: tests[seed] for seed in (1, 3)}
    found = inference_steps.summary(NARROW, own, tests, 32)
    assert found["gain"]["mean"] == 0
    assert found["seeds"] == [1, 3]


@pytest.mark.parametrize("row", ["no convolution", "unroll"])
def test_a_row_that_solves_nothing_is_refused(shapes, sweep, tmp_path, row):
    with pytest.raises(DataError, match=f"solve for an equilibrium, got '{row}'"):
        inference_steps.main([str(shapes), "--sweep", str(sweep), "--rows", row, "--output", str(tmp_path)])


@pytest.mark.parametrize(
    ("flag", "value", "expected"),
    [("--steps", "0", "positive numbers"), ("--rtols", "-0.01", "positive numbers"), ("--objects", "0", "at least 1")],
)
def test_bad_options_are_refused(shapes, capsys, flag, value, expected):
    with pytest.raises(SystemExit):
        inference_steps.main([str(shapes), flag, value])
    assert f"{flag}: expected {expected}, got {value}" in capsys.readouterr().err
