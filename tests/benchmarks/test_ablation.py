"""ablation.py: every row trains, a stopped sweep goes on, the learning rate that validates best is taken."""

import json
import math
import shutil

import pytest
import torch

from benchmarks.quality import ablation
from benchmarks.quality import sweep as sweeps
from benchmarks.quality.coco import DataError
from benchmarks.quality.mask_branch import Splits
from benchmarks.quality.strategies import STRATEGIES, TABLES
from benchmarks.quality.sweep import Run

OPTIONS = ["--channels", "32", "--epochs", "1", "--batch-size", "4", "--min-area", "200", "--device", "cpu"]


def sweep_again(shapes, folder, *options):
    rows = [] if "--rows" in options else ["--rows", "no convolution", "IFR"]
    return ablation.main([str(shapes), "--output", str(folder), *OPTIONS, "--seeds", "1", *rows, *options])


def without_clocks(report):
    epochs = [{**epoch, "seconds": None} for epoch in report["epochs"]]
    return {**report, "epochs": epochs, "seconds_per_epoch": None}


def test_every_row_trains_and_is_reported(sweep):
    report = json.loads((sweep / "ablation.json").read_text())
    assert list(report["rows"]) == list(STRATEGIES)
    for row, (training,) in report["rows"].items():
        assert 0 <= training["test"]["above_75"] <= training["test"]["above_50"] <= 1, row
        assert math.isfinite(training["epochs"][0]["loss"]), row
        assert (training["jacobian"] is None) == ("residual" not in training["test"]), row
    solved = {row for row, (training,) in report["rows"].items() if "residual" in training["test"]}
    assert solved == {row for row, s in STRATEGIES.items() if s.kind == "ifr"} - {"unroll", "unroll, paper's form"}


def test_the_size_of_the_data_is_reported(shapes, sweep):
    report = json.loads((sweep / "ablation.json").read_text())
    given = sweeps.load_given(shapes, sweep, sweeps.Settings(**report["settings"]))
    splits = Splits.make(*given, torch.device("cpu"))
    parts = {part: getattr(splits, part).images.tolist() for part in ("train", "validation", "test")}
    sizes = {part: {"images": len(set(images)), "objects": len(images)} for part, images in parts.items()}
    assert report["data"] == sizes
    assert 0 < sizes["validation"]["images"] < sizes["train"]["images"]


def test_every_row_stands_in_a_table():
    assert {row for rows in TABLES.values() for row in rows} == set(STRATEGIES)


COSTS = {
    ("no convolution", None): 0,
    ("3 convolutions", None): 3,
    ("4 convolutions, shared", None): 4,
    ("4 separable 5×5 blocks", None): 4 * (25 + 225) / (9 * 225),
    ("unroll", None): 8,
    ("unroll, unshared", None): 8,
    ("IFR", 15.0): 32,
    ("IFR, C/4 inside, 7 steps", 7.0): 4,
    ("IFR, 2C inside", 3.5): 18,
}


@pytest.mark.parametrize(("row", "steps"), COSTS)
def test_a_solve_costs_one_evaluation_more_than_it_has_steps(row, steps):
    assert STRATEGIES[row].convolutions(steps, channels=225) == COSTS[row, steps]


def test_a_stopped_sweep_goes_on_and_repeats_itself_to_the_last_digit(shapes, sweep):
    before = json.loads((sweep / "ablation.json").read_text())["rows"]["IFR"][0]
    run = Run("IFR", 1e-3, 0)
    untouched = Run("no convolution", 1e-3, 0).path(sweep)
    stamp = untouched.stat().st_mtime_ns
    run.path(sweep).unlink()
    after = sweep_again(shapes, sweep, "--lrs", "1e-3")["rows"]["IFR"][0]
    assert untouched.stat().st_mtime_ns == stamp
    assert without_clocks(after) == without_clocks(before)


def test_a_folder_of_other_trainings_is_refused(shapes, sweep):
    with pytest.raises(DataError, match=r"was made with \{'epochs': 1\}, this run asks for \{'epochs': 2\}"):
        sweep_again(shapes, sweep, "--epochs", "2")


def test_trainings_of_a_row_of_another_definition_are_refused(shapes, sweep, monkeypatch):
    monkeypatch.setitem(sweeps.STRATEGIES, "no convolution", STRATEGIES["1 convolution"])
    with pytest.raises(DataError, match=r"was made with \{'kind': 'none', 'options': \{\}\}"):
        sweep_again(shapes, sweep, "--lrs", "1e-3")


def test_the_learning_rate_that_validates_best_is_taken():
    scores = {(1e-3, 0): 0.5, (1e-3, 1): 0.5, (3e-3, 0): 0.9, (3e-3, 1): 0.4, (1e-2, 0): 0.8, (1e-2, 4): 1.0}
    reports = [{"row": "IFR", "lr": lr, "seed": seed, "validation": {"iou": iou}} for (lr, seed), iou in scores.items()]
    failed = {"row": "IFR", "lr": 1e-2, "seed": 1, "failed": "the loss is not finite"}
    other = {"row": "IFR, 3 steps", "lr": 1e-4, "seed": 0, "validation": {"iou": 0.99}}
    assert ablation.best_rates([*reports, failed, other]) == {"IFR": 3e-3}


@pytest.mark.parametrize(("score", "chosen"), [(0.5995, 1e-2), (0.5985, 3e-3)])
def test_of_learning_rates_that_are_level_the_highest_is_taken(score, chosen):
    scores = {1e-3: 0.599, 3e-3: 0.6, 1e-2: score}
    reports = [{"row": "IFR", "lr": lr, "seed": 0, "validation": {"iou": iou}} for lr, iou in scores.items()]
    assert ablation.best_rates(reports) == {"IFR": chosen}


def test_learning_rates_without_a_common_seed_are_compared_by_their_own():
    """Else all of them would be level, and the highest taken."""
    tried = {(1e-3, 0): 0.59, (3e-3, 1): 0.6, (3e-3, 2): 0.6, (1e-2, 3): 0.5}
    reports = [{"row": "IFR", "lr": lr, "seed": s, "validation": {"iou": iou}} for (lr, s), iou in tried.items()]
    assert ablation.best_rates(reports) == {"IFR": 3e-3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "48"], "--channels: expected a multiple of 32"),
        (["--test", "elsewhere"], "expected DATA, to train on, or --test FOLDER"),
        (["--search-seeds", "0"], "--search-seeds: expected at least 1, got 0"),
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--lrs", "-1"], "--lrs: expected positive numbers, got -1.0"),
        (["--rows", "IFR, 4 steps"], "argument --rows: invalid choice"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        ablation.parse([str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_a_sweep_of_which_weights_are_wanted_must_have_finished(tmp_path):
    with pytest.raises(DataError, match=r"has no ablation\.json"):
        sweeps.trained_branches(tmp_path, "IFR")


def test_an_unknown_row_of_a_sweep_is_named(sweep):
    with pytest.raises(DataError, match="has no row 'IFR, 7 steps'"):
        sweeps.trained_branches(sweep, "IFR, 7 steps")


def test_weights_that_did_not_come_with_the_reports_are_missed(sweep, tmp_path):
    (tmp_path / "trainings").mkdir()
    for name in ("ablation.json", "trainings/ifr-lr0.001-seed0.json"):
        shutil.copy(sweep / name, tmp_path / name)
    with pytest.raises(DataError, match=r"has no weights \(\.pt\) of 'IFR', only 1 reports"):
        sweeps.trained_branches(tmp_path, "IFR")
    with pytest.raises(DataError, match=r"has no weights"):
        ablation.main(["--output", str(tmp_path), "--test", str(tmp_path), "--rows", "IFR"])


def test_saved_weights_are_tested_on_any_folder(shapes, sweep):
    """On the sweep's own test images they find what the training found."""
    found = ablation.main(["--output", str(sweep), "--test", str(shapes), "--rows", "IFR", "4 convolutions"])
    trained = json.loads((sweep / "ablation.json").read_text())["rows"]
    assert list(found["rows"]) == ["IFR", "4 convolutions"]
    for row, (test,) in found["rows"].items():
        assert test["test"] == pytest.approx(trained[row][0]["test"], rel=1e-6), row
    assert json.loads((sweep / "held_out-shapes0-val.json").read_text())["objects"] == found["objects"]


def test_the_split_for_tests_is_taken_where_a_folder_has_one(shapes, sweep, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    (other / "annotations" / "instances_train.json").rename(other / "annotations" / "instances_test2017.json")
    (other / "train").rename(other / "test2017")
    found = ablation.main(["--output", str(sweep), "--test", str(other), "--rows", "no convolution"])
    assert found["split"] == "test"


def test_an_unknown_row_to_test_is_named(shapes, tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps({"settings": {}, "rows": {"IFR": []}}))
    with pytest.raises(DataError, match="has no row 'IFR, Picard', only IFR"):
        ablation.main(["--output", str(tmp_path), "--test", str(shapes), "--rows", "IFR, Picard"])


def test_a_folder_without_objects_to_test_on_is_named(sweep, tmp_path):
    with pytest.raises(DataError, match=r"expected one of instances_test.json, instances_val.json"):
        ablation.main(["--output", str(sweep), "--test", str(tmp_path)])
