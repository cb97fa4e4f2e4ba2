"""benchmarks/report/results_page.py: the figures of the page, and that the page in the repository is the files' own."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from benchmarks.quality import ablation, comparison
from benchmarks.quality.strategies import TABLES
from benchmarks.report import results_page

ROOT = Path(__file__).parents[2]
COMMITTED = ROOT / "benchmarks" / "results"
TEXTS = ["README.md", "ifr_fast/README.md", "integrations/README.md"]
TEXTS += ["benchmarks/results/choice.md", "benchmarks/results/findings.md"]


def test_spread_is_mean_and_standard_deviation():
    assert results_page.spread([0.70, 0.72, None, 0.74], 100) == "72.0 ± 2.0"
    assert results_page.spread([None]) == "–"


def test_intervals_are_in_points():
    assert results_page.interval({"mean": 0.0062, "low": -0.0016, "high": 0.0133}) == "+0.6 [-0.2, +1.3]"


def test_every_row_of_a_sweep_is_on_the_page_once_under_its_title(sweep, tmp_path):
    folder = tmp_path / "some-device"
    folder.mkdir()
    shutil.copy(sweep / "ablation.json", folder / "ablation-small.json")
    (folder / "ablation-small.png").touch()
    (tmp_path / "choice.md").write_text("Which head?")
    (tmp_path / "findings.md").write_text("What we found.")
    page = results_page.page(tmp_path)
    assert "What we found." in page
    assert "![ablation-small](some-device/ablation-small.png)" in page
    rows = [line.split("|")[1].strip(" *") for line in page.splitlines() if line.startswith("| ")]
    for title, names in TABLES.items():
        assert rows.count(title) == 1
        own = [name for name in names if rows.index(name) > rows.index(title)]
        assert own, f"{title} has no row but the references"
    assert len(set(rows)) == len(rows)


def test_a_small_sweep_has_no_titles(sweep):
    content = json.loads((sweep / "ablation.json").read_text())
    content["rows"] = {name: content["rows"][name] for name in ("4 convolutions", "IFR", "unroll")}
    assert "Table" not in results_page.ablation(content)


def test_a_row_whose_trainings_failed_says_so(sweep):
    content = json.loads((sweep / "ablation.json").read_text())
    content["rows"]["IFR, paper's form"] = [{"seed": 0, "tuned": "IFR", "failed": "the loss is not finite in epoch 1"}]
    assert "| IFR, paper's form | the loss is not finite in epoch 1 |" in results_page.ablation(content)


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*/ablation*.json")), ids=lambda path: path.stem)
def test_the_commands_of_an_ablation_repeat_its_trainings(path):
    content = json.loads(path.read_text())
    text = results_page.trainings(content)
    first, *others = [part for part in text.split("`") if "--lrs" in part]
    python, script, *arguments = shlex.split(first)
    assert (python, script) == ("python", "benchmarks/quality/ablation.py")
    calls = [ablation.parse([*arguments, *shlex.split(options)]) for options in ("", *others)]
    called = {(tuned_by(content, row), lr) for call in calls for row in call.rows or content["rows"] for lr in call.lrs}
    assert called == {(entry["row"], entry["lr"]) for entry in content["search"]}
    if len(content["rows"]) <= results_page.FEW:
        assert sorted(row for call in calls for row in call.rows) == sorted(content["rows"])
    told = {name: value for name, value in content["settings"].items() if name != "data"}
    assert all(told == {name: getattr(call, name) for name in told} for call in calls)
    assert {call.seeds for call in calls} == {max(map(len, content["rows"].values()))}


def tuned_by(content, row):
    return content["rows"][row][0]["tuned"]


@pytest.mark.parametrize("path", sorted(COMMITTED.glob("*/comparison*.json")), ids=lambda path: path.stem)
def test_the_command_of_a_comparison_repeats_its_trainings(path):
    content = json.loads(path.read_text())
    python, script, *arguments = shlex.split(results_page.comparison(content).split("`")[1])
    assert (python, script) == ("python", "benchmarks/quality/comparison.py")
    runs = [vars(run) for run in comparison.parse(arguments)]
    assert {(run["refine"], run["seed"]) for run in runs} == {(run["refine"], run["seed"]) for run in content["runs"]}
    told = {name: value for name, value in content["settings"].items() if name not in ("data", "epochs")}
    assert told == {name: runs[0][name] for name in told}


def intervals(content):
    """Every mean with its bounds in a file, of either sign, in points and rounded as texts have it."""
    if isinstance(content, dict) and {"mean", "low", "high"} <= content.keys():
        bounds = [content[key] for key in ("mean", "low", "high")]
        yield tuple(float(f"{100 * bound:.1f}") for bound in bounds)
        yield tuple(float(f"{-100 * bound:.1f}") for bound in (bounds[0], bounds[2], bounds[1]))
    elif isinstance(content, dict | list):
        for entry in content.values() if isinstance(content, dict) else content:
            yield from intervals(entry)


@pytest.mark.parametrize("name", TEXTS)
def test_every_interval_in_a_text_is_in_a_file(name):
    known = {triple for path in COMMITTED.glob("*/*.json") for triple in intervals(json.loads(path.read_text()))}
    text = " ".join((ROOT / name).read_text().replace("−", "-").split())
    number = r"([+-]?\d+\.\d)"
    told = re.findall(rf"{number}[^\d[\]]{{0,20}}\[{number}, {number}\]", text)
    assert told
    assert [triple for triple in told if tuple(map(float, triple)) not in known] == []


def test_the_page_in_the_repository_is_what_its_files_say():
    page = (COMMITTED / "README.md").read_text()
    assert page == results_page.page(COMMITTED)
    assert len(page.splitlines()) <= 290
