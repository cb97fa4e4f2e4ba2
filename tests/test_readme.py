"""What the documents show runs, and what they name exists: files, commands, options, extras, variables, names."""

import functools
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
DOCUMENTS = (
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    "ifr_fast/README.md",
    "ifr_fast/kernels/README.md",
    "ifr_fast/integrations/README.md",  # integrations/, under the name that it has in a source archive too
)
documents = pytest.mark.parametrize("name", DOCUMENTS)
# Nothing to download, and fewer RoIs.
SUBSTITUTES = {'weights="DEFAULT"': "weights=None, weights_backbone=None", "randn(100,": "randn(2,"}
FOLDERS = ("ifr_fast", "integrations", "benchmarks", "csrc", "tests")


@functools.cache
def text_of(name):
    return (ROOT / name).read_text()


@functools.cache
def help_of(program):
    command = [sys.executable, ROOT / program, "--help"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@functools.cache
def file_names():
    return {path.name for folder in FOLDERS for path in (ROOT / folder).rglob("*.*")}


def commands():
    """(document, program, arguments) of every `python program.py arguments`."""
    pattern = r"python ((?:benchmarks|tests)/[\w/]+\.py)([^`\n#]*)"
    return [(name, *found) for name in DOCUMENTS for found in re.findall(pattern, text_of(name))]


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 70


def test_the_example_prints_a_solution(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    for shown, here in SUBSTITUTES.items():
        assert example.count(shown) == 1, f"the example no longer has {shown}"
        example = example.replace(shown, here)
    exec(compile(example, "README.md", "exec"), {})
    assert re.fullmatch(r"2 samples \(.+\), worst relative residual \S+\n", capsys.readouterr().out)


def test_the_guides_examples_run(capsys):
    examples = re.findall(r"```python\n(.*?)```", text_of("ifr_fast/README.md"), re.DOTALL)
    assert len(examples) >= 4
    names = {}
    for example in examples:  # one after another, as a reader would
        exec(compile(example, "ifr_fast/README.md", "exec"), names)
    assert re.search(r"^8 samples \(.+\), worst relative residual \S+$", capsys.readouterr().out, re.MULTILINE)


@documents
def test_links_lead_to_files(name):
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text_of(name), flags=re.DOTALL)
    targets = re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", prose)
    folder = (ROOT / name).resolve().parent
    assert not [target for target in targets if not (folder / target).exists()]


@documents
def test_files_in_the_text_exist(name):
    places = [ROOT, ROOT / "ifr_fast", (ROOT / name).parent]
    missing = []
    for path in re.findall(r"(?<![\w/*.-])[\w./-]+\.(?:py|md|h|cpp|cu|cuh|yml)\b", text_of(name)):
        known = path in file_names() or any((place / path).is_file() for place in places)
        if not known and "NAME" not in path:
            missing.append(path)
    assert not missing


def test_extras_in_the_commands_exist():
    table = text_of("pyproject.toml").split("[project.optional-dependencies]")[1]
    known = set(re.findall(r"^(\w+) = \[", table, re.MULTILINE))
    for name in DOCUMENTS:
        found = {extra for some in re.findall(r"'\.\[([\w,]+)\]'", text_of(name)) for extra in some.split(",")}
        assert found <= known, name
        assert name != "README.md" or found == {"bench", "detectron2", "mmdet", "test"}


def test_options_in_the_commands_exist():
    assert {"benchmarks/speed.py", "tests/tools/machines.py"} <= {program for _, program, _ in commands()}
    for name, program, arguments in commands():
        for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
            assert re.search(rf"{option}\b", help_of(program)), f"{name}: {program} has no {option}"


@documents
def test_variables_exist(name):
    sources = "".join(text_of(path) for path in ("setup.py", "csrc/bindings.cpp", "tests/conftest.py"))
    assert not [found for found in re.findall(r"IFR_FAST_[A-Z]+", text_of(name)) if found not in sources]


@documents
def test_python_names_exist(name):
    for found in set(re.findall(r"\bifr_fast(?:\.[A-Za-z_]\w*)+", text_of(name))):
        if not re.search(r"mmdet|mmengine|detectron2", found):  # which are not installed with the rest
            _resolve(found)


def _resolve(name):
    """The object of this dotted name; AttributeError where there is none."""
    module, *attributes = name.split(".")
    value = importlib.import_module(module)
    for attribute in attributes:
        module = f"{module}.{attribute}"
        try:
            value = getattr(value, attribute)
        except AttributeError:
            try:
                value = importlib.import_module(module)
            except ImportError:
                raise AttributeError(name) from None


def test_refinements_in_the_text_are_the_choices():
    named = {found for name in DOCUMENTS for found in re.findall(r"--refine\s+([\w|-]+\|[\w|-]+)", text_of(name))}
    program = "benchmarks/quality/accuracy.py"
    for some in named:
        assert f"--refine {{{some.replace('|', ',')}}}" in help_of(program)
