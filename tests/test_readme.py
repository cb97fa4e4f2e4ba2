"""What the README shows runs, and what its commands name exists."""

import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
# Nothing to download, and fewer RoIs.
SUBSTITUTES = {'weights="DEFAULT"': "weights=None, weights_backbone=None", "randn(100,": "randn(2,"}


@pytest.fixture(scope="module")
def help_of():
    """The --help of a benchmark of this name."""

    @functools.cache
    def help_of(name):
        command = [sys.executable, ROOT / "benchmarks" / name, "--help"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    return help_of


def test_the_example_prints_a_solution(capsys):
    example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[0]
    for shown, here in SUBSTITUTES.items():
        assert example.count(shown) == 1, f"the example no longer has {shown}"
        example = example.replace(shown, here)
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"2 samples \(.+\), worst relative residual \S+\n", capsys.readouterr().out)


def test_files_in_the_text_exist():
    named = set(re.findall(r"(?:benchmarks|tests|ifr_fast)/[\w/]+\.\w+", README))
    assert {
        "benchmarks/speed.py",
        "benchmarks/accuracy.py",
        "tests/constraints.txt",
        "tests/tools/machines.py",
    } <= named
    assert not [path for path in named if not (ROOT / path).is_file()]


def test_extras_in_the_commands_exist():
    extras = {extra for some in re.findall(r"'\.\[([\w,]+)\]'", README) for extra in some.split(",")}
    table = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    assert {"bench", "mmdet", "test"} <= extras <= set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))


def test_options_in_the_commands_exist(help_of):
    commands = re.findall(r"python benchmarks/(\w+\.py)([^`\n]*)", README)
    assert {"speed.py", "gpu_check.py", "ablation.py", "comparison.py"} <= {name for name, _ in commands}
    for name, arguments in commands:
        for option in re.findall(r"--[\w-]+", arguments):
            assert re.search(rf"{option}\b", help_of(name)), f"{name} has no {option}"


def test_refinements_in_the_text_are_the_choices(help_of):
    (named,) = re.findall(r"--refine\s+([\w|-]+\|[\w|-]+)", README)
    assert f"--refine {{{named.replace('|', ',')}}}" in help_of("accuracy.py")
