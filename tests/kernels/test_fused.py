"""The kernels around Winograd's convolutions against compositions of the specification's (eager)."""

import pytest
import torch

from ifr_fast import _native
from ifr_fast.kernels import cpu, eager, fused
from ifr_fast.kernels.contract import RUNNING, Norm, Status, Step


def norm_sums(*args):
    return fused.norm_sums(*args)()


def norm_relu_vjp_coefficients(*args):
    return fused.norm_relu_vjp_coefficients(*args)()


def norm_tail_vjp_coefficients(*args):
    return fused.norm_tail_vjp_coefficients(*args)()


def step_tail(state, y, sums, injection, first, second, z, step):
    tail = fused.tail_fields(y, sums, injection, first, second, z)
    return _native.step_tail(cpu.step_fields(state, z, step) | tail)


def step_total(state, addends, z, step):
    return _native.step_total(cpu.step_fields(state, z, step) | fused.total_fields(z, *addends))


# n, channels, groups, height, width
SHAPES = [
    (3, 32, 1, 14, 14), (1, 256, 32, 14, 14), (2, 64, 4, 7, 5), (17, 32, 32, 3, 13), (3, 96, 4, 1, 1), (0, 64, 4, 5, 5),
    (2, 160, 32, 13, 19), (1, 64, 4, 65, 130),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize(("shortcut", "post"), [(True, True), (True, False), (False, True), (False, False)])
METHODS = [("broyden", 9), ("anderson", 3), ("picard", 1)]
methods = pytest.mark.parametrize(("method", "window"), METHODS)
STOPPED = (Status.CONVERGED, Status.DIVERGED, Status.NONFINITE)


def activation(n, channels, height, width):
    return torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)


def norms(channels, groups):
    return [Norm(*torch.randn(2, channels), groups) for _ in range(2)]


def sums_of(y):
    """As Winograd's output transform leaves them: of parts of four rows, 16 values at a time in float."""
    n, channels = y.shape[:2]
    parts = []
    for rows in y.split(4, dim=2):
        total = torch.zeros(n, 2, channels, dtype=torch.float64)
        for tile in rows.split(4, dim=3):
            total += torch.stack([tile.sum((2, 3)), tile.square().sum((2, 3))], 1)
        parts.append(total)
    return torch.stack(parts, 1)


def per_channel(coefficients):
    """The coefficients of each kind (n, C, 1, 1)."""
    return [c[:, :, None, None] for c in coefficients.unbind(1)]


def reads(x, other, coefficients):
    """Read::norm_vjp of csrc/cpu/kernels.h."""
    a, _, c, d, e = per_channel(coefficients)
    return x * c - d - (other - a) * e


def reads_relu(x, other, coefficients, bias):
    """Read::norm_relu_vjp."""
    a, b, *_ = per_channel(coefficients)
    return reads(torch.where((other - a) * b + bias[:, None, None] <= 0, 0, x), other, coefficients)


def assert_close(actual, expected, tolerance=1e-5):
    """By the size of a sample's numbers, of which single ones may cancel."""
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    assert ((actual - expected).norm(dim=1) <= tolerance * (1e-30 + expected.norm(dim=1))).all()


def with_threads(count, function):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


@shapes
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3])
def test_norm_sums(shape, mean):
    """A mean far from zero: the sums have lost the variance."""
    n, channels, groups, height, width = shape
    y, (norm, _) = activation(n, channels, height, width) + mean, norms(channels, groups)
    center, scale = per_channel(norm_sums(y, sums_of(y), norm, None))
    _, (means, rstds) = eager.norm_relu(y.double(), Norm(norm.weight.double(), norm.bias.double(), groups))
    width = channels // groups
    error = (center.flatten(1) - means.repeat_interleave(width, 1)).abs()
    assert (error <= 1e-7 * (mean + 1)).all()
    if height > 1:  # else a group may have one value, whose variance is zero
        assert_close(scale, rstds.repeat_interleave(width, 1) * norm.weight, 5e-6)


def test_a_constant_group_has_no_variance():
    y, (norm, _) = activation(2, 64, 9, 9), norms(64, 4)
    y[0, 16:32] = 1234.567
    y[1, :16] = 0.1
    center, scale = norm_sums(y, sums_of(y), norm, None).unbind(1)
    for n, own in ((0, slice(16, 32)), (1, slice(0, 16))):
        assert torch.equal(center[n, own], y[n, own, 0, 0])
        torch.testing.assert_close(scale[n, own], 1e-5**-0.5 * norm.weight[own], rtol=1e-6, atol=0)


def test_squares_that_overflow_are_summed_anew():
    y, (norm, _) = activation(2, 32, 6, 6), norms(32, 4)
    y[0] *= 1e25
    center, scale = norm_sums(y, sums_of(y), norm, None).unbind(1)
    _, (means, rstds) = eager.norm_relu(y, norm)
    assert_close(center, means.repeat_interleave(8, 1))
    assert_close(1e20 * scale, 1e20 * rstds.repeat_interleave(8, 1) * norm.weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    y, (norm, _) = activation(3, 64, 6, 6), norms(64, 4)
    expected = norm_sums(y, sums_of(y), norm, None)
    y[1, 17, 2, 3] = bad
    actual = norm_sums(y, sums_of(y), norm, None)
    assert actual[1, 1, 16:32].isnan().all()
    actual[1, :, 16:32] = expected[1, :, 16:32]
    assert torch.equal(actual, expected)


@shapes
def test_norm_relu_vjp_coefficients(shape):
    n, channels, groups, height, width = shape
    y, grad, (norm, _) = *(activation(n, channels, height, width) for _ in range(2)), norms(channels, groups)
    statistics = eager.norm_relu(y, norm)[1]
    coefficients = norm_relu_vjp_coefficients(grad, y, norm, statistics, None)
    expected, _ = cpu.norm_relu_vjp(grad, y, norm, statistics, params=False)
    actual = reads_relu(grad, y, coefficients, norm.bias)
    # Within rounding of zero either side of the ReLU is right.
    clear = eager.norm_tail(y, None, norm, None)[0].abs() > 1e-5
    assert (~clear).sum() <= clear.numel() / 100
    actual, expected = (torch.where(clear, t, 0) for t in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale_of(statistics))


@forms
@shapes
def test_norm_tail_vjp_coefficients(shape, shortcut, post):
    n, channels, groups, height, width = shape
    y, grad, r = (activation(n, channels, height, width) for _ in range(3))
    first, second = norms(channels, groups)
    r, second = r if shortcut else None, second if post else None
    statistics = eager.norm_tail(y, r, first, second)[1]
    x, coefficients = norm_tail_vjp_coefficients(grad, y, r, first, second, statistics, None)
    expected, expected_r, _ = cpu.norm_tail_vjp(grad, y, r, first, second, statistics, params=False)
    if shortcut:
        assert torch.equal(x, expected_r)
    torch.testing.assert_close(reads(x, y, coefficients), expected, rtol=0, atol=1e-5 * scale_of(statistics))


def scale_of(statistics):
    """By how much norms of these statistics can magnify gradients."""
    return torch.stack([r.amax().clamp(min=1.0) for r in statistics[1::2] if r.numel()] or [torch.ones(())]).prod() * 10


def stopped_at(*places, n):
    status = torch.full((n,), RUNNING)
    for i, place in enumerate(places):
        status[place] = STOPPED[i % 3]
    return status


def test_stopped_samples_are_left_out_of_norms(monkeypatch):
    """What is computed for the others has the bits that it has without them."""
    n, stopped = 5, (0, 3)
    (y, grad, r), (first, second) = (activation(n, 64, 6, 6) for _ in range(3)), norms(64, 4)
    statistics = eager.norm_tail(y, r, first, second)[1]
    status, runs = stopped_at(*stopped, n=n), [1, 2, 4]

    def results(status):
        sums = sums_of(y)
        return [
            norm_sums(y, sums, first, status),
            norm_relu_vjp_coefficients(grad, y, first, statistics[:2], status),
            *norm_tail_vjp_coefficients(grad, y, r, first, second, statistics, status),
        ]

    expected = results(None)
    # Memory that kernels are given is 7 everywhere.
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(7))
    monkeypatch.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(7))
    for threads in (1, 2, 4):
        for a, b in zip(with_threads(threads, lambda: results(status)), expected, strict=True):
            assert torch.equal(a[runs], b[runs])
            assert (a[list(stopped)] == 7).all()


def test_stopped_samples_are_left_out_of_every_norm():
    """Those that write grad_y and the forward ones, too."""
    y, norm = activation(4, 64, 6, 6), norms(64, 4)[0]
    expected, (mean, rstd) = cpu.norm_relu(y, norm)
    status, out = stopped_at(1, n=4), torch.full_like(y, 7)
    means, rstds = torch.full_like(mean, 7), torch.full_like(rstd, 7)
    _native.norm_relu(_native.DType.f32, {
        **fused._shape(y, 4, status), "y": y.data_ptr(), "shortcut": 0, **fused.parameters(y, norm, None),
        "first_mean": means.data_ptr(), "first_rstd": rstds.data_ptr(), "second_mean": 0, "second_rstd": 0,
        "out": out.data_ptr(),
    })  # fmt: skip
    for actual, all_running in ((out, expected), (means, mean), (rstds, rstd)):
        assert (actual[1] == 7).all()
        assert torch.equal(actual[[0, 2, 3]], all_running[[0, 2, 3]])


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vjps_of_no_samples(dtype):
    """Where memory of no size has no address."""
    y, wide = torch.empty(0, 8, 3, 3, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    norm, none = Norm(torch.ones(8, dtype=wide), torch.zeros(8, dtype=wide), 2), torch.empty(0, 2, dtype=wide)
    grad_y, grads = cpu.norm_relu_vjp(y, y, norm, [none, none], params=True)
    assert grad_y.shape == y.shape
    assert all(g.eq(0).all() for g in grads)
    grad_y, grad_r, grads = cpu.norm_tail_vjp(y.to(wide), y, y, norm, norm, [none] * 4, params=True)
    assert grad_y.shape == grad_r.shape == y.shape
    assert all(g.eq(0).all() for g in grads)
