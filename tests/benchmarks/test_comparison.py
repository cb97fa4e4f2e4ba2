"""comparison.py: every training once, from several seeds, whatever stops it; its figures and pictures."""

import argparse
import json
import re
import shutil
import statistics

import numpy as np
import pytest
from coco_shapes import TINY, edit, write_dataset
from PIL import Image

from benchmarks.quality import accuracy, comparison, training
from benchmarks.quality.coco import CocoFolder, DataError
from benchmarks.report import results_page
from benchmarks.report.files import write_json, write_whole

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning:pycocotools"),
]
BRIEF = ["--iterations", "2", "--checkpoint-every", "1", "--groups", "4", "--steps", "2", "--warmup-steps", "1"]


def compare(shapes, folder, *options):
    comparison.main([str(shapes), *TINY, *BRIEF, "--seeds", "2", "--output", str(folder), *options])
    return json.loads((folder / "comparison.json").read_text())


def without_clocks(content):
    kept = ("refine", "seed", "final_loss", "metrics", "parameters", "solve")
    return [{key: run[key] for key in kept if key in run} for run in content["runs"]]


@pytest.fixture(scope="module")
def compared(shapes, one_thread, tmp_path_factory):
    """The folder of a finished comparison, and what it reports."""
    folder = tmp_path_factory.mktemp("comparison")
    return folder, compare(shapes, folder)


def test_every_training_is_reported(compared):
    folder, content = compared
    assert [(run["refine"], run["seed"]) for run in content["runs"]] == [
        ("stack", 0),
        ("ifr", 0),
        ("stack", 1),
        ("ifr", 1),
    ]
    for run in content["runs"]:
        report = json.loads((folder / f"{run['refine']}-seed{run['seed']}" / "accuracy.json").read_text())
        assert run["metrics"] == report["metrics"]
        assert run["final_loss"] == report["history"][-1]["loss"]
    assert "solve" in content["runs"][1]
    assert content["settings"]["iterations"] == 2


def test_figures_of_a_refinement_are_those_of_its_seeds(compared):
    _, content = compared
    paces = [run["seconds_per_iteration"] for run in content["runs"] if run["refine"] == "ifr"]
    found = content["refinements"]["ifr"]["seconds_per_iteration"]
    assert found == {"mean": statistics.mean(paces), "std": statistics.stdev(paces)}
    assert content["refinements"]["stack"]["parameters"] == 4 * (16 * 16 * 9 + 16)


def test_gains_are_those_of_the_means(compared):
    _, content = compared
    assert {reference: list(of) for reference, of in content["gains"].items()} == {"stack": ["ifr"]}
    assert list(content["gains"]["stack"]["ifr"]) == ["mask_iou", "segm", "bbox"]
    for kind, gain in content["gains"]["stack"]["ifr"].items():
        found = [content["refinements"][refine][kind] for refine in ("ifr", "stack")]
        means = [(figures if kind == "mask_iou" else figures["AP"])["mean"] for figures in found]
        assert gain["mean"] == pytest.approx(means[0] - means[1], abs=1e-12)
        assert gain["low"] <= gain["high"]


def test_each_refinement_is_compared_with_those_before_it(compared, shapes):
    folder, _ = compared
    runs = comparison.parse([str(shapes), *TINY, *BRIEF, "--seeds", "2", "--output", str(folder)])
    third = [argparse.Namespace(**{**vars(run), "refine": "third"}) for run in runs if run.refine == "stack"]
    evaluations = [{"images": [1, 2], "objects": [1, 1], "iou_sums": [0.5, iou]} for iou in (0.5, 0.6) * 2 + (0.7,) * 2]
    found = comparison.gains([*runs, *third], evaluations, CocoFolder(shapes, "val"))
    means = {(a, b): gain["mask_iou"]["mean"] for a, of in found.items() for b, gain in of.items()}
    assert means == pytest.approx({("stack", "ifr"): 0.05, ("stack", "third"): 0.1, ("ifr", "third"): 0.05})
    assert found["stack"]["third"]["segm"]["mean"] == 0


def test_masks_in_given_boxes_are_those_of_all_annotated_images(compared, shapes):
    folder, content = compared
    dataset = CocoFolder(shapes, "val")
    counts = [len(dataset[index][1]["labels"]) for index in range(len(dataset))]
    assert content["given_boxes"] == {"images": np.count_nonzero(counts), "objects": sum(counts)}
    for run in content["runs"]:
        found = json.loads((folder / f"{run['refine']}-seed{run['seed']}" / "given_boxes.json").read_text())
        assert found["objects"] == [count for count in counts if count]
        assert run["mask_iou"] == pytest.approx(sum(found["iou_sums"]) / sum(counts))


def test_a_figure_that_coco_does_not_give_is_none():
    assert comparison.mean_and_std([0.5, None]) is None
    assert comparison.mean_and_std([0.5]) == {"mean": 0.5}


def test_what_is_finished_is_not_trained_again(shapes, compared, monkeypatch):
    folder, content = compared
    monkeypatch.setattr(accuracy, "train", None)
    assert without_clocks(compare(shapes, folder)) == without_clocks(content)


def test_refinements_trained_apart_are_compared_together(shapes, compared, tmp_path, monkeypatch):
    whole, content = compared
    length = BRIEF[: BRIEF.index("--groups")]
    comparison.main([str(shapes), *TINY, *length, "--seeds", "2", "--refine", "stack", "--output", str(tmp_path)])
    for seed in range(2):
        shutil.copytree(whole / f"ifr-seed{seed}", tmp_path / f"ifr-seed{seed}")
    monkeypatch.setattr(accuracy, "train", None)
    assert without_clocks(compare(shapes, tmp_path, "--refine", "ifr")) == without_clocks(content)[1::2]
    assert without_clocks(compare(shapes, tmp_path)) == without_clocks(content)


def test_a_file_written_by_two_at_once_is_the_last_ones_whole(tmp_path):
    path = tmp_path / "comparison.json"

    def write_slowly(file):
        file.write(b"the last ")
        write_json(path, "written meanwhile, and longer")
        assert json.loads(path.read_text()) == "written meanwhile, and longer"
        file.write(b"one's")

    write_whole(path, write_slowly)
    assert path.read_bytes() == b"the last one's"
    assert list(tmp_path.iterdir()) == [path]


def test_a_killed_sweep_goes_on_to_the_same_figures(shapes, compared, tmp_path, monkeypatch):
    saves = []

    def save_or_die(self, *state):
        saves.append(self.folder.name)
        if len(saves) == 4:  # the second training is at its end
            raise KeyboardInterrupt
        save(self, *state)

    save = training.Checkpoints.save
    monkeypatch.setattr(training.Checkpoints, "save", save_or_die)
    with pytest.raises(KeyboardInterrupt):
        compare(shapes, tmp_path)
    assert without_clocks(compare(shapes, tmp_path)) == without_clocks(compared[1])
    assert saves == ["stack-seed0"] * 2 + ["ifr-seed0"] * 3 + ["stack-seed1"] * 2 + ["ifr-seed1"] * 2


@pytest.mark.parametrize(
    ("changed", "was", "now"),
    [
        (["--lr", "0.1"], "{'lr': 0.0002}", "{'lr': 0.1}"),
        (["--detections-per-image", "4"], "{'detections_per_image': 5}", "{'detections_per_image': 4}"),
        (["--solver", "anderson"], "{'solver': 'broyden'}", "{'solver': 'anderson'}"),
    ],
)
def test_a_sweep_with_other_settings_is_refused(shapes, compared, changed, was, now):
    message = f"accuracy.json was made with {was}, this run asks for {now}"
    with pytest.raises(DataError, match=re.escape(message)):
        compare(shapes, compared[0], *changed)


def test_other_data_are_refused(shapes, compared, tmp_path):
    other = shutil.copytree(shapes, tmp_path / "other")
    with pytest.raises(DataError, match=r"this run asks for \{'data': 'other'\}"):
        compare(other, compared[0])


def test_an_unfinished_training_with_other_settings_is_refused(shapes, compared, tmp_path, monkeypatch):
    (tmp_path / "ifr-seed0").mkdir()
    shutil.copy(compared[0] / "ifr-seed0" / "checkpoint.pt", tmp_path / "ifr-seed0")
    monkeypatch.setattr(accuracy, "train", None)
    with pytest.raises(
        DataError, match=r"checkpoint.pt was made with \{'lr': 0.0002\}, this run asks for \{'lr': 0.1\}"
    ):
        compare(shapes, tmp_path, "--lr", "0.1")


def test_data_without_objects_are_refused(tmp_path):
    root = write_dataset(tmp_path / "data")
    edit(root, lambda content: content.update(annotations=[]))
    with pytest.raises(DataError, match="show no objects"):
        compare(root, tmp_path, "--val-annotations", str(root / "annotations" / "instances_train.json"))


def test_the_table_shows_what_there_is():
    metrics = {"AP": {"mean": 0.25, "std": 0.0111}, "AP50": {"mean": 0.5}, "AP75": None}
    row = {"parameters": 2360000, "segm": metrics, "bbox": metrics, "seconds_per_iteration": {"mean": 1.5}, "seeds": 3}
    gain = {"mean": 0.021, "low": -0.005, "high": 0.04}
    content = {"refinements": {"stack": row, "ifr": {**row, "residual_median": {"mean": 0.002}}}}
    content |= {"gains": {"stack": {"ifr": {"segm": gain}}}, "settings": {"data": "x", "iterations": 1200}}
    content |= {"environment": {"cpu": "y"}, "runs": [{"seconds_per_iteration": 1.5}] * 6}
    assert "The iterations took 3.0 hours" in results_page.comparison(content)
    lines = results_page.comparison(content).splitlines()[-2:]
    stack, ifr = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    assert stack == ["stack", "25.0 ± 1.1", "–", "50.0", "-", "25.0 ± 1.1", "2.36 M", "-", "1.50", "3"]
    assert ifr == ["ifr", "25.0 ± 1.1", "+2.1 [-0.5, +4.0]", *stack[3:7], "0.0020", "1.50", "3"]
    content["given_boxes"] = {"images": 1234, "objects": 5678}
    for row, iou in (("stack", 0.5), ("ifr", 0.51)):
        content["refinements"][row]["mask_iou"] = {"mean": iou, "std": 0.001}
    content["gains"]["stack"]["ifr"]["mask_iou"] = {"mean": 0.01, "low": 0.004, "high": 0.016}
    page = results_page.comparison(content)
    assert "5,678 objects of 1234 images" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines()[-2:]]
    assert rows == [
        ["stack", "50.0 ± 0.1", "–", *stack[1:]],
        ["ifr", "51.0 ± 0.1", "+1.0 [+0.4, +1.6]", *ifr[1:]],
    ]


def test_options_go_to_the_refinements_that_have_them(tmp_path):
    stack, unroll, ifr = comparison.parse(
        [str(tmp_path), "--refine", "stack", "unroll", "ifr", "--seeds", "1", "--solver", "anderson", "--groups", "8"]
    )
    assert (stack.solver, stack.groups) == (None, None)
    assert (unroll.solver, unroll.groups) == (None, 8)
    assert (ifr.solver, ifr.groups) == ("anderson", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds: expected at least 1, got 0"),
        (["--refine", "ifr", "ifr"], "--refine: expected each refinement once, got ifr ifr"),
        (["--refine", "stack", "none", "--solver", "picard"], "--solver applies to none of --refine stack none"),
        (["--seed", "3"], "unrecognized arguments: --seed 3"),
        (["--batch-size", "0"], "--batch-size: expected a positive number, got 0"),
    ],
)
def test_bad_options_are_named(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit):
        comparison.parse([str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_pictures_show_every_refinement(compared):
    folder, _ = compared
    for name, columns in (("predictions", 4), ("features", 7)):
        with Image.open(folder / f"{name}.png") as picture:
            pixels = np.asarray(picture.convert("L"))
        parts = np.array_split(pixels, columns, axis=1)
        assert all(part.std() > 10 for part in parts), name


def test_features_are_those_before_and_after_the_refinement(shapes):
    options = accuracy.parse([str(shapes), *TINY, "--refine", "none", "--iterations", "1"])
    dataset = CocoFolder(shapes, "val")
    model = accuracy.build_model(options, 3).eval()
    (annotation, *_) = comparison.choose_examples(dataset)
    found = comparison.refine(model, dataset, annotation)
    assert found.coarse.shape == (14, 14)
    assert found.mask.shape == (28, 28)
    np.testing.assert_array_equal(found.coarse, found.refined)


def test_examples_are_the_largest_objects_and_no_crowds(shapes):
    dataset = CocoFolder(shapes, "val")
    for annotation in comparison.choose_examples(dataset):
        others = [a for a in dataset.annotations(annotation["image_id"]) if not a["iscrowd"]]
        assert annotation["area"] == max(a["area"] for a in others)
        assert not annotation["iscrowd"]


def test_the_results_page_has_a_row_for_each(compared):
    page = results_page.comparison(compared[1])
    assert "| stack | " in page
    assert "| ifr | " in page
