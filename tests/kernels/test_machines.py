"""machines.py reports what passes and fails on every machine, and a switch that changes nothing."""

import machines
import pytest

TOY = """
import os

def test_switch():
    assert os.environ["OMP_NUM_THREADS"] == "1"

def test_seed():
    assert os.environ["IFR_FAST_SEED"] == "5"
"""


@pytest.fixture
def toys(monkeypatch, tmp_path):
    """Two tests in place of the package's. On the second machine one fails, and a switch does not do what is said."""
    (tmp_path / "test_toy.py").write_text(TOY)
    monkeypatch.setenv("IFR_FAST_SEED", "5")
    monkeypatch.setattr(machines, "TESTS", tmp_path)
    monkeypatch.setattr(machines, "FILES", ["test_toy.py"])
    monkeypatch.setitem(machines.EFFECTS, ("IFR_FAST_ISA", "generic"), "cpu avx1024")
    toys = {"good": {"OMP_NUM_THREADS": "1"}, "bad": {"OMP_NUM_THREADS": "2", "IFR_FAST_ISA": "generic"}}
    monkeypatch.setattr(machines, "MACHINES", toys)
    return toys


def table(printed):
    """The rows under the table's heading, in words."""
    seed, _, rows = printed.rpartition("\nIFR_FAST_SEED=")[2].partition("seconds\n")
    return seed.split()[0], [row.split() for row in rows.splitlines()]


def test_failures_and_idle_switches_are_reported(toys, capsys):
    assert machines.main([]) == 1
    seed, (good, bad) = table(capsys.readouterr().out)
    assert seed == "5"
    assert good[:3] == ["good", "2", "0"]
    assert bad[:3] == ["bad", "1", "1"]
    assert (good[4:], bad[4:]) == ([], ["without", "effect:", "IFR_FAST_ISA"])


@pytest.mark.full
def test_options_reach_pytest_and_success_is_zero(toys, capsys):
    del toys["bad"]
    assert machines.main(["--deselect", "test_toy.py::test_switch"]) == 0
    assert table(capsys.readouterr().out)[1][0][:3] == ["good", "1", "0"]
