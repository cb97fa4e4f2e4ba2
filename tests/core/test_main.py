"""`python -m ifr_fast` says what a bug report must say, and its exit status whether the backends compute rightly."""

import importlib.metadata
import os
import re
import subprocess
import sys

import pytest
import torch

import ifr_fast
from ifr_fast import __main__ as report
from ifr_fast import backends


def test_a_report_of_this_machine():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}  # which takes long
    command = [sys.executable, "-m", "ifr_fast"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=os.path.dirname(__file__))
    assert done.returncode == 0, done.stdout + done.stderr
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    assert lines["ifr_fast"].startswith(ifr_fast.__version__)
    assert torch.__version__ in lines["torch"]
    assert {"python", "triton", "processor", "instructions", "threads", "GPUs"} <= lines.keys()
    for name in backends():
        assert re.match("(not )?available: ", lines[f"backend {name}"])
    assert re.fullmatch(r"ok, \d+\.\d\d s, errors \de-\d\d forward, \de-\d\d backward", lines["test eager"])


def test_a_wrong_backend_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr(report, "_errors", lambda backend: (1e-6, 0.5 if backend == "eager" else 1e-6))
    assert report.main() == 1
    assert re.search(r"test eager +FAILED, \S+ s, errors 1e-06 forward, 5e-01 backward\n", capsys.readouterr().out)


def test_a_backend_that_raises_is_named_and_the_others_are_tested(monkeypatch, capsys):
    def errors(backend):
        if backend == "eager":
            raise RuntimeError("no such kernel")
        return 1e-6, 1e-6

    monkeypatch.setattr(report, "_errors", errors)
    assert report.main() == 1
    out = capsys.readouterr().out
    assert re.search(r"test eager +FAILED, \S+ s, RuntimeError: no such kernel\n", out)
    assert len(re.findall(r"^test \w+ +ok", out, re.MULTILINE)) == sum(b.available for b in backends().values()) - 1


def test_the_self_test_sees_a_wrong_gradient(monkeypatch):
    right = report.reference.implicit_gradient
    monkeypatch.setattr(report.reference, "implicit_gradient", lambda *args: 1.1 * right(*args))
    forward, backward = report._errors("eager")
    assert forward < report.TOLERANCE < backward


def test_version_is_the_metadatas():
    assert re.fullmatch(r"\d+\.\d+\.\d+", ifr_fast.__version__)
    with pytest.raises(AttributeError, match="has no attribute '__author__'"):
        ifr_fast.__author__  # noqa: B018


def test_version_of_a_tree_that_is_not_installed(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    assert ifr_fast.__version__ == "unknown"
