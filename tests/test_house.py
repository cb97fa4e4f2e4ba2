"""The rooms of the package: what may import what, how long a file and how wide a function may be, how deep a call."""

import ast
import subprocess
import sys
import traceback
from pathlib import Path

import machines
import pytest
import sanitize
import torch

import ifr_fast
from ifr_fast import IFRHead
from ifr_fast.kernels import cpu

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ifr_fast"
# From the lowest: a module imports from its own line and from those above it.
LAYERS = [
    ["_native", "_torch", "reference"],
    ["kernels"],
    ["checks", "config"],
    ["solvers", "solution"],
    ["engine"],
    ["adjoints"],
    ["ops"],
    ["altered", "weight_norm", "released"],
    ["block", "fixed_point"],
    ["head"],
    ["warmup", "diagnostics", "regularisation"],
    ["__init__", "__main__"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = [p for p in PACKAGE.rglob("*.py") if "integrations" not in p.relative_to(PACKAGE).parts]
# Outside of them: benchmarks and integrations, in files of any room.
FILES = [*MODULES, *(ROOT / "integrations").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
MOST_ARGUMENTS, MOST_LINES, MOST_CALLS = 8, 350, 9


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def room(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imported(path):
    """The rooms of ifr_fast that a module imports when it runs: what is for type checkers alone does not count."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    tree = ast.parse(path.read_text())
    hidden = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or id(node) in hidden or not node.level:
            continue
        base = package[: len(package) - node.level + 1]
        target = [*base, *(node.module or "").split(".")] if node.module else list(base)
        names = [target[1]] if len(target) > 1 else [alias.name for alias in node.names]
        yield from (name for name in names if name in LEVEL)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_nothing_imports_upward(path):
    own = room(path)
    assert own in LEVEL, "a new room: give it its layer here and in CONTRIBUTING.md"
    above = [name for name in imported(path) if LEVEL[name] > LEVEL[own]]
    assert not above


def test_types():
    """mypy, strict: pyproject.toml says what it leaves out, and why."""
    pytest.importorskip("mypy", reason="mypy is not installed: the [test] extra has it")
    run = subprocess.run([sys.executable, "-m", "mypy"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", sorted({*machines.FILES, *sanitize.TESTS}))
def test_the_tools_name_tests_that_exist(name):
    assert (ROOT / "tests" / name).is_file()


def test_integrations_use_the_public_api_only():
    public = {"ifr_fast", "ifr_fast.diagnostics"}
    for path in (ROOT / "integrations").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("ifr_fast"):
                assert node.module in public or node.module.startswith("ifr_fast.integrations"), name_of(path)
                assert not any(alias.name.startswith("_") for alias in node.names), name_of(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_short_and_functions_narrow(path):
    text = path.read_text()
    assert "kernels" in path.parts or len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef) or any("jit" in ast.unparse(d) for d in node.decorator_list):
            continue
        arguments = node.args
        if node.name == "__init__" and path.name == "head.py":
            continue  # IFRHead's options, of which nobody writes more than a few
        count = len([a for a in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs) if a.arg != "self"])
        assert count <= MOST_ARGUMENTS, f"{node.name}: {count} arguments"


def test_few_calls_lie_between_a_head_and_its_kernels(monkeypatch):
    """Of functions of this package, from the head's forward to what passes addresses on."""
    stacks, installed = [], str(Path(ifr_fast.__file__).parent)

    def noting(*args, **kwargs):
        stacks.append([f.name for f in traceback.extract_stack() if installed in f.filename])
        return original(*args, **kwargs)

    original = cpu.norm_relu
    monkeypatch.setattr(cpu, "norm_relu", noting)
    IFRHead(8, groups=2, backend="cpu")(torch.randn(2, 8, 4, 4))
    assert stacks[0][0] == "forward"
    assert len(stacks[0]) + 1 <= MOST_CALLS, stacks[0]  # and norm_relu itself
