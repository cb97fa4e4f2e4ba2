"""The solver's step fused with F's last norms or sum, against compositions of the specification's (eager)."""

import pytest
import torch
from fused_kernels import (
    STOPPED,
    activation,
    assert_close,
    forms,
    norm_relu_vjp_coefficients,
    norm_sums,
    norm_tail_vjp_coefficients,
    norms,
    shapes,
    stopped_at,
    sums_of,
    with_threads,
)

from ifr_fast import _native
from ifr_fast.kernels import cpu, eager, fused
from ifr_fast.kernels.contract import RUNNING, Norm, Status, Step


def step_tail(state, y, sums, injection, first, second, z, step):
    tail = fused.tail_fields(y, sums, injection, first, second, z)
    return _native.step_tail(cpu.step_fields(state, z, step) | tail)


def step_total(state, addends, z, step):
    return _native.step_total(cpu.step_fields(state, z, step) | fused.total_fields(z, *addends))


METHODS = [("broyden", 9), ("anderson", 3), ("picard", 1)]
methods = pytest.mark.parametrize(("method", "window"), METHODS)


class Solve:
    """A state in the middle of a solve, and F's last tensors for several evaluations from there."""

    def __init__(self, shape, *, shortcut=True, post=True, history=torch.float32, evaluations=4, seed=0):
        torch.manual_seed(seed)
        n, channels, groups, height, width = shape
        self.shape, self.evaluations, self.history = shape, evaluations, history
        self.z = activation(n, channels, height, width)
        self.ys = [activation(n, channels, height, width) for _ in range(evaluations)]
        self.injection = activation(n, channels, height, width) if shortcut else None
        self.first, second = norms(channels, groups)
        self.second = second if post else None
        self.status = torch.full((n,), RUNNING)

    def samples(self, index):
        """The same for some of its samples."""
        part = Solve.__new__(Solve)
        vars(part).update(vars(self))
        part.z, part.status = self.pick(self.z, index), self.status[index]
        part.ys = [self.pick(y, index) for y in self.ys]
        part.injection = None if self.injection is None else self.pick(self.injection, index)
        return part

    @staticmethod
    def pick(t, index):
        return t[index].contiguous(memory_format=torch.channels_last)

    def run(self, step, method, window, *, threads=1, last=True, rtol=0.0):
        """The state and z after these evaluations."""
        z, rows = self.z.clone(), 1 if method == "picard" else self.evaluations
        state = cpu.new_state(z, rows=rows, evaluations=self.evaluations, history_dtype=self.history, from_zero=False)
        state.status.copy_(self.status)
        state.trace.fill_(0.25)

        def steps():
            for k, y in enumerate(self.ys):
                parameters = Step(method, window, k, last and k + 1 == self.evaluations, rtol)
                count = step(self, state, y.clone(memory_format=torch.preserve_format), z, parameters)
                assert count == (state.status == RUNNING).sum()

        with_threads(threads, steps)
        return state, z


def by_tail(s, state, y, z, step):
    return step_tail(state, y, sums_of(y), s.injection, s.first, s.second, z, step)


def tail_by_eager(s, state, y, z, step):
    shortcut = None if s.injection is None else z + s.injection
    f = eager.norm_tail(y, shortcut, s.first, s.second)[0]
    return eager.step(state, f.contiguous(memory_format=torch.channels_last), z, step)


def by_total(s, state, y, z, step):
    return step_total(state, total_of(s, y, z), z, step)


def total_by_step(s, state, y, z, step):
    f = eager.total(*total_of(s, y, z))  # without samples, its layout is another
    return cpu.step(state, torch.empty_like(z).copy_(f), z, step)


def total_of(s, y, z):
    return (y, z.cos()) if s.injection is None else (y, s.injection, z.cos())


def assert_same_bits(actual, expected, picked=slice(None)):
    """Of all that a solve leaves; `picked`: the samples of `expected` that are compared."""
    (state, z), (other, other_z) = actual, expected
    for name in ("value", "history", "gram", "p", "q", "step", "norms", "status", "iterations", "improved", "residual"):
        a, b = getattr(state, name), getattr(other, name)[picked]
        if name == "history" and a.shape[1] > 1:  # the last evaluation does not write its row
            a, b = a[:, :-1], b[:, :-1]
        assert torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)), name
    assert torch.equal(state.trace.nan_to_num(7e7), other.trace[:, picked].nan_to_num(7e7))
    assert torch.equal(z.nan_to_num(7e7), other_z[picked].nan_to_num(7e7))


@methods
@forms
@shapes
def test_step_tail(shape, shortcut, post, method, window):
    solve = Solve(shape, shortcut=shortcut, post=post)
    (state, z), (expected, expected_z) = (solve.run(step, method, window) for step in (by_tail, tail_by_eager))
    # A group of one value has no variance: its normalised value is a rounding, times 316.
    tolerance = 1e-4 if shape[3] > 1 else 1e-2
    written = slice(0, max(1, state.rows - 1))
    assert_close(state.history[:, written].flatten(0, 1), expected.history[:, written].flatten(0, 1), tolerance)
    torch.testing.assert_close(state.trace, expected.trace, rtol=10 * tolerance, atol=1e-6)
    torch.testing.assert_close(state.norms, expected.norms, rtol=10 * tolerance, atol=1e-6)
    assert_close(z, expected_z, 10 * tolerance)
    assert_close(state.value, expected.value, 10 * tolerance)
    assert torch.equal(state.status, expected.status)


@methods
@pytest.mark.parametrize("history", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("third", [False, True])
@shapes
def test_step_total(shape, third, history, method, window):
    """The step itself is the same: so are the bits."""
    solve = Solve(shape, shortcut=third, history=history)
    for last in (False, True):
        assert_same_bits(*(solve.run(step, method, window, last=last) for step in (by_total, total_by_step)))


@methods
def test_step_tail_stores_bfloat16(method, window):
    solve = Solve((3, 64, 4, 9, 9), history=torch.bfloat16)
    (state, z), (expected, expected_z) = (solve.run(step, method, window) for step in (by_tail, tail_by_eager))
    torch.testing.assert_close(state.trace, expected.trace, rtol=1e-2, atol=1e-4)
    assert_close(z, expected_z, 1e-2)


@pytest.mark.parametrize("step", [by_tail, by_total], ids=["tail", "total"])
@pytest.mark.parametrize("post", [True, False])
@pytest.mark.parametrize("shape", [(5, 256, 32, 14, 14), (3, 96, 4, 13, 19), (2, 64, 4, 65, 130)], ids=str)
def test_bits_depend_neither_on_threads_nor_on_batch_mates(shape, post, step):
    solve = Solve(shape, post=post)
    expected = solve.run(step, "broyden", 9)
    for threads in (2, 3, 4, 7):
        assert_same_bits(solve.run(step, "broyden", 9, threads=threads), expected)
    for threads in (1, 2):
        assert_same_bits(solve.samples([1]).run(step, "broyden", 9, threads=threads), expected, [1])
    # Stopped mates, one of which left NaN behind.
    solve.status = stopped_at(0, n=shape[0])
    solve.z[0] = torch.nan
    for threads in (1, 2, 4):
        state, z = solve.run(step, "broyden", 9, threads=threads)
        mates = list(range(1, shape[0]))
        assert state.status[0] == STOPPED[0]
        assert z[0].isnan().all()
        assert (state.trace[1:, 0] == 0.25).all()
        alone = solve.samples(mates).run(step, "broyden", 9)
        assert_same_bits(alone, expected, mates)
        assert torch.equal(z[mates], expected[1][mates])
        assert torch.equal(state.residual[mates], expected[0].residual[mates])


@pytest.mark.parametrize("step", [by_tail, by_total], ids=["tail", "total"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("threads", [1, 4])
def test_a_sample_that_is_not_finite_stops_alone(step, bad, threads):
    solve = Solve((3, 64, 4, 7, 9))
    expected = solve.run(step, "anderson", 3)
    solve.ys[1][1, 5, 3, 3] = bad
    state, z = solve.run(step, "anderson", 3, threads=threads)
    assert state.status.tolist() == [RUNNING, Status.NONFINITE, RUNNING]
    assert z[1].isfinite().all()  # as it was before that evaluation
    for i in (0, 2):
        assert torch.equal(z[i], expected[1][i])
        assert torch.equal(state.trace[:, i], expected[0].trace[:, i])


@pytest.mark.parametrize("threads", [1, 3])
def test_step_tail_of_large_means_and_tiny_variances(threads):
    """Both norms see them: such groups are summed a second time."""
    solve = Solve((2, 64, 4, 9, 9), evaluations=2)
    for y in solve.ys:
        y[0, :16] = 700 + 0.01 * y[0, :16]
        y[1, 16:32] = -3.25
    solve.first.weight[:16] = 1e-3
    solve.first.bias[:16] = 50.0  # relu(u) is far from zero, with the shortcut's variance
    solve.injection[:, :16] *= 1e-2
    solve.z[:, :16] *= 1e-2
    actual, expected = (solve.run(step, "picard", 1, threads=threads) for step in (by_tail, tail_by_eager))
    # u holds 50 to 4e-6, and the second norm divides by a deviation of 1e-2.
    assert_close(actual[0].history[:, 0], expected[0].history[:, 0], 1e-3)
    torch.testing.assert_close(actual[0].trace, expected[0].trace, rtol=1e-3, atol=0)


def test_a_converged_sample_stops():
    """f = z in a sample: it is judged, and no later step touches it."""
    n, z = 3, activation(3, 32, 5, 6)
    state = cpu.new_state(z, rows=2, evaluations=2, history_dtype=torch.float32, from_zero=False)
    half, moved = z / 2, z.clone()
    other = half.clone()
    other[0] += 1
    assert step_total(state, (half, other), moved, Step("picard", 1, 0, False, 1e-3)) == 1
    assert state.status.tolist() == [RUNNING, *[Status.CONVERGED] * (n - 1)]
    assert torch.equal(moved[1:], z[1:])


WRONG = {
    "dtype": lambda t: t.double() if t.dtype == torch.float32 else t.float(),
    "short": lambda t: t[:-1],
    "meta": lambda t: t.to("meta"),
    "layout": lambda t: t.transpose(-1, -2),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("name", ["y", "sums", "injection", "z", "grad", "shortcut", "status", "mean", "bias", "first"])
def test_no_address_goes_unchecked(name, wrong):
    solve = Solve((2, 32, 4, 6, 5))
    y, z, first = solve.ys[0], solve.z, solve.first
    given = {
        "y": y, "sums": sums_of(y), "injection": solve.injection, "z": z, "grad": solve.ys[1], "shortcut": solve.ys[2],
        "status": torch.full((2,), RUNNING), "mean": torch.zeros(2, 4), "bias": first.bias, "first": first.weight,
    }  # fmt: skip
    if wrong == "layout" and given[name].dim() < 3:
        pytest.skip("numbers side by side have no layout")
    given[name] = WRONG[wrong](given[name])
    y, sums, injection, z, grad, shortcut, status, mean, bias, weight = given.values()
    first, second, rstd = Norm(weight, bias, 4), solve.second, torch.ones(2, 4)
    state = cpu.new_state(solve.z, rows=2, evaluations=2, history_dtype=torch.float32, from_zero=False)
    step = Step("picard", 1, 0, False, 0.0)
    calls = {
        "y sums first status": lambda: norm_sums(y, sums, first, status),
        "grad y first bias mean status": lambda: norm_relu_vjp_coefficients(grad, y, first, [mean, rstd], status),
        "grad y shortcut first bias mean status": lambda: norm_tail_vjp_coefficients(
            grad, y, shortcut, first, second, [mean, rstd, mean, rstd], status
        ),
        "y sums injection first bias z": lambda: step_tail(state, y, sums, injection, first, second, z, step),
        "y z": lambda: step_total(state, (solve.z, y), z, step),
        "injection": lambda: step_total(state, (solve.z, solve.z, injection), solve.z, step),
    }
    for names, call in calls.items():
        if name in names.split():
            with pytest.raises(ValueError, match="expected"):
                call()
