"""benchmarks/timing/measure.py: peak memory, convolutions and time of a call, and many calls in turns."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks.timing import measure
from benchmarks.timing.measure import Timed
from benchmarks.timing.winograd import WinogradConvolution
from ifr_fast import Broyden, IFRHead

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
MIB = 1 << 20


def test_profile_counts_the_most_that_was_held_at_once():
    def call() -> torch.Tensor:
        kept = torch.ones(MIB // 4)
        for _ in range(3):
            passing = torch.ones(2 * MIB // 4)
            del passing
        return kept

    assert measure.profile(call, CPU).peak_bytes == 3 * MIB


def test_profile_ignores_what_was_there_before():
    held = [torch.ones(MIB)]

    def call() -> torch.Tensor:
        held.clear()
        return torch.ones(MIB // 4)

    assert measure.profile(call, CPU).peak_bytes == MIB


@pytest.mark.full
def test_profiled_peak_is_what_the_process_really_takes():
    """The released solver's peak against VmHWM, in a process of its own that returns freed blocks at once.

    ru_maxrss would not do: a process starts with that of its parent, which here has run other tests.
    """
    script = """
import re
import torch
from benchmarks import speed
from benchmarks.timing import measure
from benchmarks.timing.contenders import RELEASED, Setting, contenders

def memory(kind):
    return int(re.search(rf"{kind}:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

torch.set_num_threads(1)
cpu = torch.device("cpu")
released = next(c for c in contenders(Setting(32, 15, 0, cpu)) if c.name == RELEASED)
released.forward(torch.rand(1, 32, 14, 14))()
x = speed.smooth_features(96, 32, 14, torch.Generator().manual_seed(0))
call = released.forward(x)
before = memory("VmRSS")
result = call()
grown = memory("VmHWM") - before
del result
print(grown, measure.profile(call, cpu).peak_bytes)
"""
    status = Path("/proc/self/status")
    if not status.exists() or "VmHWM" not in status.read_text():
        pytest.skip("this system has no VmHWM in /proc/self/status to read a process's peak memory from")
    environment = {
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    output = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
    ).stdout
    grown, profiled = map(int, output.split())
    assert profiled > 70 * MIB
    assert grown == pytest.approx(profiled, rel=0.1)


def test_profile_lists_convolutions_as_they_were_run():
    x = torch.rand(2, 4, 6, 5).to(memory_format=torch.channels_last).requires_grad_()
    layer = torch.nn.Conv2d(4, 3, 3, padding=1)

    def call() -> None:
        for _ in range(2):
            layer(x).sum().backward()

    found = measure.profile(call, CPU).convolutions
    assert sorted((c.name, count) for c, count in found.items()) == [("convolution", 2), ("convolution_backward", 2)]
    forward = next(c for c in found if c.name == "convolution")
    assert forward.arguments[0] == measure.Operand((2, 4, 6, 5), x.stride(), torch.float32)
    assert forward.alone(CPU)().shape == (2, 3, 6, 5)
    backward = next(c for c in found if c.name == "convolution_backward")
    assert [g.shape for g in backward.alone(CPU)()] == [x.shape, layer.weight.shape, layer.bias.shape]


def test_profile_lists_winograds_convolutions_of_both_passes():
    head = IFRHead(32, mid_channels=64, solver=Broyden(max_iter=4), convolution="winograd")
    x = torch.rand(2, 32, 6, 5, requires_grad=True)
    found = measure.profile(lambda: head(x).sum().backward(), CPU).convolutions
    by_winograd = {c: count for c, count in found.items() if isinstance(c, WinogradConvolution)}
    assert set(by_winograd) == {WinogradConvolution(2, 32, 64, 6, 5), WinogradConvolution(2, 64, 32, 6, 5)}
    assert min(by_winograd.values()) > 5  # five evaluations forward, and the adjoint's
    assert {c.name for c in found if c not in by_winograd} == {"convolution_backward"}  # the weights' gradients
    alone = WinogradConvolution(2, 32, 64, 6, 5).alone(CPU)
    assert alone().shape == (2, 64, 6, 5)
    assert alone() is alone()  # on the same memory


@pytest.fixture
def timed_by_a_false_clock(monkeypatch):
    """Times calls of given costs within a budget; gives what was timed, and the indices run in each round."""

    def run(costs: list[float], budget: float, every_round: tuple = ()) -> tuple[list[Timed], list[list[int]]]:
        now, turns = [0.0], []
        monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

        def call(i: int) -> None:
            turns[-1].append(i)
            now[0] += costs[i]

        timed = [Timed(lambda i=i: partial(call, i), every_round=i in every_round) for i in range(len(costs))]
        measure.time_in_turns(timed, CPU, budget, before_round=lambda: turns.append([]))
        return timed, turns

    return run


def test_calls_are_timed_in_turns(timed_by_a_false_clock):
    timed, turns = timed_by_a_false_clock([1e-3, 1.0, 1e-3], 4.5)
    assert [len(t.samples) for t in timed] == [30, 4, 30]
    assert [t.median for t in timed] == pytest.approx([1e-3, 1.0, 1e-3])
    slow = [i for i, turn in enumerate(turns) if turn == [0, 1, 2]]
    assert slow == [0, 10, 20, 29]
    assert all(turn == [0, 2] for i, turn in enumerate(turns) if i not in slow)
    assert list(timed[1].samples) == slow


def test_what_others_are_compared_with_is_timed_in_every_round(timed_by_a_false_clock):
    costs = [0.2, 0.1, 4.0]
    for every_round in ((), (0,)):
        timed, _ = timed_by_a_false_clock(costs, 17.0, every_round)
        assert (set(timed[1].samples) <= set(timed[0].samples)) == bool(every_round)


def test_ratios_are_of_equal_rounds():
    """A machine that is slower in some rounds leaves the ratios alone."""
    walls, others = {0: 2.0, 2: 20.0, 5: 4.0}, {0: 1.0, 1: 9.0, 2: 10.0, 5: 2.0}
    assert measure.ratios(walls, others) == [2.0, 2.0, 2.0]
    assert measure.quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 3.0, 4.0)
    assert measure.quartiles([7.0]) == (7.0, 7.0, 7.0)


def test_past_the_budget_calls_still_get_the_least_runs(timed_by_a_false_clock):
    timed, turns = timed_by_a_false_clock([1e-3, 10.0], 0.5)
    assert turns == [[0, 1]] * measure.LEAST
    assert [len(t.samples) for t in timed] == [measure.LEAST] * 2


def test_time_beyond_the_least_runs_goes_to_all_calls_equally():
    assert measure.repeats([0.1, 0.2, 4.0], 16.0, least=3, most=30) == [20, 10, 3]


def test_ceilings_are_rates():
    found = measure.ceilings(CPU, side=64, copied=1 << 16)
    for ceiling in found.values():
        ceiling.timed.take(0, CPU)
    assert found["matmul"].work == 2 * 64**3
    assert found["copy"].work == 2 << 16
    assert all(1e6 < ceiling.rate < 1e14 for ceiling in found.values())
