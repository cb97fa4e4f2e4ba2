"""latency.py and choice.py: what trained heads cost, and the table and the picture that it stands in."""

import json
import shutil

import pytest
from PIL import Image

from benchmarks.analysis import latency
from benchmarks.quality.ablation import write_report
from benchmarks.quality.coco import DataError
from benchmarks.quality.sweep import Run, Settings, read_report, weights
from benchmarks.report import choice, results_page

ROWS = ["4 separable 5×5 blocks", "IFR, stopping at 1e-1", "unroll"]


@pytest.fixture(scope="module")
def measured(shapes, sweep, tmp_path_factory):
    folder = tmp_path_factory.mktemp("latency")
    options = ["--sweep", str(sweep), "--output", str(folder), "--n", "2", "--threads", "1", "--budget", "0.1"]
    return latency.main([str(shapes), *options, "--rows", *ROWS]), folder / "latency.json"


def test_every_row_is_timed_beside_the_stack_in_both_precisions(measured):
    report, path = measured
    assert report == json.loads(path.read_text())
    assert list(report["rows"]) == ["4 convolutions", *ROWS]
    for row, found in report["rows"].items():
        assert list(found) == ["bfloat16", "float32"]
        for entry in found.values():
            low, middle, high = entry["ratio"]
            assert 0 < low <= middle <= high
            assert entry["median"] > 0 < entry["processor_median"]
            assert ("steps" in entry) == (row == "IFR, stopping at 1e-1")
    assert report["rows"]["4 convolutions"]["float32"]["ratio"] == [1, 1, 1]


def test_a_solve_stops_at_its_trainings_residual_in_float32_too(sweep):
    found = latency.contenders(sweep, ["IFR", "IFR, stopping at 1e-1"])
    assert [(c.precision, c.branch.refine.solver.rtol) for c in found] == [
        ("bfloat16", 1e-2),
        ("float32", 1e-2),
        ("bfloat16", 1e-1),
        ("float32", 1e-1),
    ]


def test_a_seed_without_weights_is_passed_over(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    (report,) = read_report(folder)["rows"]["IFR"]
    first, second = (Run("IFR", report["lr"], seed) for seed in (0, 1))
    second.path(folder).write_text(json.dumps(json.loads(first.path(folder).read_text()) | {"seed": 1}))
    weights(first, folder).rename(weights(second, folder))
    write_report(folder, Settings(**read_report(folder)["settings"]))
    assert [contender.seed for contender in latency.contenders(folder, ["IFR"])] == [1, 1]
    weights(second, folder).unlink()
    with pytest.raises(DataError, match="no weights"):
        latency.contenders(folder, ["IFR"])


def test_the_seed_with_the_rows_mean_steps_is_timed(sweep, tmp_path):
    folder = shutil.copytree(sweep, tmp_path / "sweep")
    (report,) = read_report(folder)["rows"]["IFR"]
    first = Run("IFR", report["lr"], 0)
    for seed, steps in enumerate([9.0, 14.0, 11.0, 10.0]):  # the mean is 11
        run = Run("IFR", report["lr"], seed)
        whole = json.loads(first.path(folder).read_text())
        test = whole["test"] | {"iterations": steps}
        run.path(folder).write_text(json.dumps(whole | {"seed": seed, "test": test}))
        if seed:
            shutil.copy(weights(first, folder), weights(run, folder))
    write_report(folder, Settings(**read_report(folder)["settings"]))
    assert latency.contenders(folder, ["IFR"])[0].seed == 2
    weights(Run("IFR", report["lr"], 2), folder).unlink()
    assert latency.contenders(folder, ["IFR"])[0].seed == 3


def test_a_slower_head_takes_more_time(shapes, sweep, monkeypatch):
    """The clock is of the refinement itself."""
    found = latency.contenders(sweep, ["4 convolutions"])[0]
    objects = latency.load_test_objects(shapes, sweep)[:2]
    found.renew(objects)
    assert found.x.shape == (2, 32, 14, 14)
    assert found.call()().shape == found.x.shape
    seen = []
    monkeypatch.setattr(found.branch.refine, "forward", lambda x: seen.append(x) or x)
    found.call()()
    assert seen[0] is found.x


def test_rows_and_options_that_are_not_there_are_named(shapes, sweep, capsys, tmp_path):
    with pytest.raises(DataError, match="no row 'IFR, 4 steps'"):
        latency.main([str(shapes), "--sweep", str(sweep), "--rows", "IFR, 4 steps", "--output", str(tmp_path)])
    with pytest.raises(SystemExit):
        latency.parse([str(shapes), "--n", "0"])
    assert "--n: expected a positive number, got 0" in capsys.readouterr().err


def two_seeds(content):
    """A sweep's report as if it had another seed with the same figures."""
    gain = {"seeds": 2, "test": {"mean": 0.0123, "low": 0.001, "high": 0.02}}
    gains = {row: gain for row in content["rows"] if row != "4 convolutions"}
    rows = {row: [reports[0], {**reports[0], "seed": 1}] for row, reports in content["rows"].items()}
    return {**content, "rows": rows, "gains": {**content["gains"], "4 convolutions": gains}}


def test_the_table_says_what_each_row_gains_weighs_and_costs(sweep, measured):
    content = two_seeds(json.loads((sweep / "ablation.json").read_text()))
    lines = choice.choice_table(content, measured[0]).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines[2:]}
    assert list(cells) == list(content["rows"])
    assert cells["4 convolutions"][1] == "–"
    assert cells["IFR"][1] == "+1.2 [+0.1, +2.0]"
    assert cells["IFR"][6:10] == ["–"] * 4
    timed = measured[0]["rows"]["unroll"]["bfloat16"]
    assert cells["unroll"][6:8] == [f"{1e3 * timed['median']:.1f}", f"{timed['ratio'][1]:.2f}"]
    assert cells["IFR, stopping at 1e-1"][6].endswith(" steps)")
    assert cells["4 separable 5×5 blocks"][3] == "0.8"
    assert cells["unroll"][-1] == "2"


def test_the_picture_has_every_row(sweep, measured, tmp_path):
    content = two_seeds(json.loads((sweep / "ablation.json").read_text()))
    figure = choice.draw(content, measured[0])
    rows = dict(text.get_text().split("  ") for legend in figure.legends for text in legend.texts)
    by_time, by_size = ({rows[text.get_text().split(":")[0]] for text in axes.texts} for axes in figure.axes)
    assert by_time == {"4 convolutions", *ROWS}
    assert by_size == set(content["rows"])
    (tmp_path / "ablation.json").write_text(json.dumps(content))
    choice.main([str(tmp_path / "ablation.json"), str(measured[1]), "--output", str(tmp_path / "choice.png")])
    with Image.open(tmp_path / "choice.png") as picture:
        assert picture.size[0] > 1000


def test_trainings_that_failed_are_counted(sweep, measured):
    content = two_seeds(json.loads((sweep / "ablation.json").read_text()))
    failed = {"seed": 0, "tuned": "IFR", "failed": "the loss is not finite in epoch 1"}
    content["rows"]["IFR"][0] = failed
    content["rows"]["unroll"] = [failed]
    del content["gains"]["4 convolutions"]["unroll"]
    lines = choice.choice_table(content, measured[0]).splitlines()
    (ifr,) = (line for line in lines if line.startswith("| IFR |"))
    (unroll,) = (line for line in lines if line.startswith("| unroll |"))
    assert ifr.endswith("| 1, 1 failed |")
    assert "not finite in epoch 1" in unroll
    choice.draw(content, measured[0])
    assert unroll in results_page.choice(content, measured[0])


def test_it_opens_the_page_and_its_sweep_has_no_other_table(sweep, measured, tmp_path):
    folder = tmp_path / "some-device"
    folder.mkdir()
    content = two_seeds(json.loads((sweep / "ablation.json").read_text()))
    for name, epochs in (("short", 1), ("tall", 3)):
        changed = {**content, "settings": {**content["settings"], "epochs": epochs}}
        (folder / f"ablation-{name}.json").write_text(json.dumps(changed))
        shutil.copy(measured[1], folder / f"latency-{name}.json")
    shutil.copy(sweep / "ablation.json", folder / "ablation-y.json")
    (tmp_path / "choice.md").write_text("## Which head?")
    (tmp_path / "findings.md").write_text("## Older")
    titles = [line for line in results_page.page(tmp_path).splitlines() if line.startswith("##")]
    assert titles == [
        "## Which head?",
        "### some-device/ablation-tall.json",
        "### some-device/ablation-short.json",
        "## Older",
        "## Ablations of the mask branch: some-device/ablation-y.json",
    ]
