"""A solve that goes on with half of its samples, by the kernels of each backend: the same as of all, bit for bit."""

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import cuda_fixture  # noqa: F401

from ifr_fast import Anderson, Broyden, Picard, Status
from ifr_fast.engine import loop, segments
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import RUNNING, pick
from ifr_fast.kernels.gpu import DeviceState, shift

N, HALF = 5, 2
RULES = [Broyden(9, rtol=1e-2), Anderson(9, rtol=1e-2, m=3), Picard(9, rtol=1e-2)]
pytestmark = pytest.mark.usefixtures("one_thread", "poisoned")


@pytest.fixture(params=["eager", "triton", "cuda"])
def kernels(request, device):
    """A backend's solver. Inputs are drawn where it runs."""
    if request.param == "eager":
        found = {**vars(eager), "step": lambda *args: (eager.step(*args), None)[1]}  # as on a GPU, it counts nothing
    else:
        if request.param == "triton":
            pytest.importorskip("triton")
            from ifr_fast.kernels.triton import solver
        else:
            solver = request.getfixturevalue("cuda").solver
        found = {"new_state": DeviceState, "step": solver.step, "finish": solver.finish, "shift": shift}
    with device:
        yield SimpleNamespace(**{**found, "SKIPS_STOPPED": True})


class Decided:
    """The course of a solve of which the host knows all: a part that a device would leave out takes no steps."""

    branches, rehearses = True, False

    def __init__(self, kernels):
        self.kernels, self.left_out, self.evaluated = kernels, [False], []

    def step(self, state, f, z, step):
        if not any(self.left_out):
            self.evaluated.append(state.n)
            self.kernels.step(state, f, z, step)

    def segment_ends(self, status):
        self.left_out[-1] = not (status == RUNNING).any()

    def none_runs(self):
        return False

    @contextlib.contextmanager
    def branch(self, status, least, most):
        self.left_out[-1] = False
        self.left_out += [not least <= (status == RUNNING).sum() <= most, False]
        yield
        del self.left_out[-2:]

    def solve_ends(self):
        self.left_out[-1] = False


def problem(slow, kernels):
    """F of all samples and F of some. So many need more than 9 steps, one is NaN, and the others need few."""
    x = channels_last()
    rate = torch.full((N, 1, 1, 1), 0.1)
    order = torch.randperm(N)
    rate[order[:slow]] = 8.0
    x[order[slow], 0, 0, 0] = torch.nan

    def f(x, rate):
        def at(z, state):
            # In float16: Triton's interpreter cuts bfloat16's digits off. A triangle wave has no roundings of its own.
            r = kernels.shift(z, x, torch.float16, state).float()
            return rate * (r / 2 - (r / 2).round()).abs()

        return at

    return f(x, rate), lambda index: f(pick(x, index), rate[index])


def channels_last():
    return torch.randn(N, 4, 3, 2).contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("slow", [HALF, HALF + 1])
@pytest.mark.parametrize(("history", "from_zero"), [(torch.float32, False), (torch.float8_e5m2, True)], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.method)
def test_the_half_that_runs_goes_on(kernels, rule, history, from_zero, slow, monkeypatch):
    monkeypatch.setattr(loop, "FEWEST", N)
    rule = replace(rule, history_dtype=history).resolve(torch.float32)
    wanted = [Status.MAX_ITER] * slow + [Status.NONFINITE] + [Status.CONVERGED] * (N - slow - 1)
    for _ in range(20):  # now and then a slow sample is near its solution
        f, select = problem(slow, kernels)
        z0 = channels_last() * (not from_zero)
        expected = loop.solve(f, z0.clone(), rule, kernels, from_zero=from_zero)
        if sorted(expected.status.tolist()) == sorted(wanted):
            break
    course = Decided(kernels)
    stepped = SimpleNamespace(**{**vars(kernels), "step": course.step})
    with segments.recording(course):
        actual = loop.solve(f, z0.clone(), rule, stepped, from_zero=from_zero, select=select)
    assert course.evaluated == [N] * 5 + [HALF if slow <= HALF else N] * 5
    assert sorted(expected.status.tolist()) == sorted(wanted)
    for name in ("value", "residual", "iterations", "trace", "status"):
        assert_same(getattr(actual, name), getattr(expected, name))
    written = (torch.arange(rule.rows) <= expected.iterations.unsqueeze(1)).unsqueeze(2)
    for a, e in zip((actual.history, *actual.pairs()), (expected.history, *expected.pairs()), strict=True):
        assert_same(*(torch.where(written, t.float(), 0) for t in (a, e)))


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
