"""The Triton solver's kernels against the eager ones: whole solves, and each promise of a step."""

from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ifr_fast import Anderson, Broyden, Picard, Status
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import Norm, Step
from ifr_fast.kernels.gpu import DeviceState, shift, tail, total
from ifr_fast.reference import anderson_iterates, broyden_iterates

pytest.importorskip("triton")

from ifr_fast.kernels.triton import rules, solver

TRITON = SimpleNamespace(new_state=DeviceState, step=solver.step, finish=solver.finish)


def resolved(rule, history=torch.float32):
    return type(rule)(**{**vars(rule), "history_dtype": history}).resolve(torch.float32)


def nhwc(*shape, device):
    return torch.randn(shape, device=device).contiguous(memory_format=torch.channels_last)


def sines(z0, slowest=0.8):
    """A contraction whose rate grows from sample to sample."""
    rate = torch.linspace(0.1, slowest, len(z0), device=z0.device).view(-1, 1, 1, 1)
    injection = torch.randn_like(z0)
    return lambda z, state=None: rate.to(z.dtype) * z.sin() + injection.to(z.dtype)


def both(f, z0, rule, **kwargs):
    return [solve(f, z0.clone(), rule, kernels, **kwargs) for kernels in (TRITON, eager)]


RULES = [
    Broyden(7, rtol=0.0),
    Broyden(7, rtol=1e-2),
    Anderson(4, rtol=0.0, m=1),
    Anderson(5, rtol=0.0, m=2),
    Anderson(8, rtol=1e-3, m=5),
    Picard(7, rtol=1e-2),
    Picard(1, rtol=0.0),
    Broyden(1, rtol=0.0),
]


@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=2, deadline=None)
@given(n=st.integers(1, 3), channels=st.integers(1, 20), side=st.sampled_from([1, 3, 8]), last=st.booleans())
def test_solves_agree(device, rule, n, channels, side, last):
    # Of fewer unknowns than it combines, Anderson's system is singular but for the ridge, by which the two differ.
    assume(not isinstance(rule, Anderson) or channels * side * (side + 1) > 2 * rule.m)
    z0 = nhwc(n, channels, side, side + 1, device=device)
    z0 = z0 if last else z0.contiguous()
    actual, expected = both(sines(z0), z0, resolved(rule))
    # Anderson's normal equations square the condition of few unknowns; they are regularised for float32 here, for
    # float64 in eager.
    factor = 50 if isinstance(rule, Anderson) else 1
    torch.testing.assert_close(actual.trace, expected.trace, rtol=1e-3 * factor, atol=1e-5 * factor)
    torch.testing.assert_close(actual.value, expected.value, rtol=1e-4 * factor, atol=1e-4 * factor)
    # Which sample falls below rtol first, or has its best when all are equal, is decided by roundings.
    decided = ((expected.trace - rule.rtol).abs() > 1e-5 * factor).all(0) & (expected.trace > 1e-5 * factor).all(0)
    assert torch.equal(actual.iterations[decided], expected.iterations[decided])
    assert torch.equal(actual.status[decided], expected.status[decided])
    best = actual.trace.nan_to_num(torch.inf).amin(0)
    torch.testing.assert_close(actual.residual, best, rtol=0, atol=0)


@pytest.mark.parametrize("rule", [Broyden(5, rtol=1e-3), Picard(5, rtol=1e-3)], ids=str)
def test_residuals_of_affine_maps_agree(device, rule):
    constant = nhwc(2, 5, 3, 7, device=device)
    zero = torch.zeros_like(constant)
    actual, expected = both(
        lambda z, state: constant - 1.5 * z, zero, resolved(rule), from_zero=True, first=constant, affine=True
    )
    torch.testing.assert_close(actual.trace, expected.trace, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "rule",
    [
        pytest.param(Broyden(19, rtol=0.0), marks=pytest.mark.full),
        Anderson(18, rtol=0.0, m=18),
        pytest.param(Broyden(35, rtol=0.0), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_many_rows(device, rule):
    """More rows than a program loads at a time, and more than one warp's matrices. No map to solve, whose residuals
    would reach rounding first: residuals are drawn."""
    z0 = nhwc(1, 8, 7, 11, device=device)
    drawn = [torch.randn_like(z0) for _ in range(rule.max_iter + 1)]
    states, iterates = [], []
    for kernels in (TRITON, eager):
        residuals, visited = iter(drawn), []

        def f(z, state, residuals=residuals, visited=visited):
            visited.append(z.clone())
            return z + next(residuals)

        states.append(solve(f, z0.clone(), resolved(rule), kernels))
        iterates.append(torch.stack(visited))
    distance = (iterates[0] - iterates[1]).flatten(1).norm(dim=1)
    assert (distance <= 1e-3 * iterates[1].flatten(1).norm(dim=1)).all()
    torch.testing.assert_close(states[0].gram.double(), states[1].gram.double(), rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("rule", [Broyden(6, rtol=0.0), Anderson(6, rtol=0.0, m=4), Picard(6, rtol=0.0)], ids=str)
@pytest.mark.parametrize("channels", [8, pytest.param(5, marks=pytest.mark.full)])  # aligned for wide loads, and not
def test_bfloat16_history(device, rule, channels):
    z0 = nhwc(3, channels, 13, 11, device=device)
    actual, expected = both(sines(z0, slowest=0.4), z0, resolved(rule, torch.bfloat16))
    # The interpreter cuts off what a GPU rounds.
    torch.testing.assert_close(actual.trace, expected.trace, rtol=0.1, atol=1e-2)
    torch.testing.assert_close(actual.value, expected.value, rtol=2e-2, atol=2e-2)
    assert (actual.residual < 2e-2).all()


@pytest.mark.parametrize("method", ["broyden", "anderson"])
def test_iterates_are_the_specifications(device, method):
    """The paper's formulas in float64, without inner products or coefficients."""
    z0 = nhwc(2, 6, 5, 7, device=device)
    f = sines(z0, slowest=0.9)
    reference = {"broyden": broyden_iterates, "anderson": lambda *a, **k: anderson_iterates(*a, **k, m=3)}[method]
    rule = resolved(Broyden(6, rtol=0.0) if method == "broyden" else Anderson(6, rtol=0.0, m=3))
    visited = []
    solve(lambda z, state: visited.append(z.clone()) or f(z), z0.clone(), rule, TRITON)
    for z, (expected, _) in zip(visited, reference(f, z0.double(), steps=6), strict=True):
        torch.testing.assert_close(z.double(), expected.view(z.shape), rtol=1e-4, atol=1e-4)


def test_residuals_of_zero_and_of_no_scale(device):
    """A sample solved exactly, one that is zero and solved, one whose f is zero though z is not, and two failures."""
    z = torch.randn(5, 77, device=device)
    f = torch.stack([z[0], 0 * z[1], 0 * z[2], torch.inf * z[3], torch.nan * z[4]])
    z[1] = 0
    state = DeviceState(z, rows=2, evaluations=3, history_dtype=torch.float32)
    solver.step(state, f, z, Step("broyden", 2, 0, False, 0.0))
    assert state.residual[:3].tolist() == [0, 0, torch.finfo(torch.float32).max]
    assert state.trace[0].nan_to_num(-1).tolist() == [*state.residual[:3].tolist(), -1, -1]
    assert state.residual[3:].isinf().all()
    expected = [Status.CONVERGED, Status.CONVERGED, Status.MAX_ITER, Status.NONFINITE, Status.NONFINITE]
    assert state.status.tolist() == expected


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", [Broyden(6, rtol=1e-4), Anderson(6, rtol=1e-4, m=3), Picard(6, rtol=1e-4)], ids=str)
def test_samples_that_fail_stay_alone(device, rule):
    """Converged at once; not finite at the first evaluation and at the third; diverging; and a healthy one."""
    z0 = nhwc(5, 4, 6, 5, device=device)
    healthy = sines(z0)
    injection = torch.randn_like(z0[4])
    evaluations = []

    def f(z, state=None):
        evaluations.append(None)
        out = healthy(z)
        out[0] = z[0]
        out[1, 0, 0, 0] = torch.nan
        if len(evaluations) >= 3:
            out[2, 1, 2, 3] = torch.inf
        out[3] = z[3] + 1e4 ** len(evaluations) * injection
        return out

    actual = solve(f, z0.clone(), resolved(rule), TRITON)
    evaluations.clear()
    expected = solve(f, z0.clone(), resolved(rule), eager)
    assert actual.status[:4].tolist() == [Status.CONVERGED, Status.NONFINITE, Status.NONFINITE, Status.DIVERGED]
    assert torch.equal(actual.status, expected.status)
    assert torch.equal(actual.iterations, expected.iterations)
    torch.testing.assert_close(actual.trace, expected.trace, rtol=1e-3, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(actual.residual, expected.residual, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(actual.value, expected.value, rtol=1e-4, atol=1e-4)
    assert torch.equal(actual.value[:2], z0[:2])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rule", [Broyden(5, rtol=0.0), Picard(5, rtol=0.0)], ids=str)
def test_the_best_iterate_need_not_be_the_last(device, rule):
    """From the third evaluation on, the map is another one: all later residuals are larger."""
    z0 = nhwc(2, 8, 9, 9, device=device)
    f, evaluations = sines(z0, slowest=0.3), []

    def broken(z, state=None):
        evaluations.append(z.clone())
        return f(z) + (5 * len(evaluations) if len(evaluations) > 3 else 0)

    state = solve(broken, z0.clone(), resolved(rule), TRITON)
    assert torch.equal(state.trace.argmin(0), torch.full_like(state.iterations, 2))
    torch.testing.assert_close(state.value, evaluations[2], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rule", [Broyden(4, rtol=1e-3), Anderson(4, rtol=1e-3, m=3), Picard(4, rtol=1e-3)], ids=str)
@pytest.mark.parametrize("history", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.full)], ids=str)
def test_a_samples_result_does_not_depend_on_batch_mates(device, rule, history):
    z0 = nhwc(3, 16, 9, 8, device=device)
    f = sines(z0)
    together = solve(f, z0.clone(), resolved(rule, history), TRITON)
    index = torch.randint(3, ()).item()
    pick = slice(index, index + 1)
    alone = solve(
        lambda z, state: f(z.expand(3, -1, -1, -1))[pick].clone(memory_format=torch.channels_last),
        z0[pick].clone(memory_format=torch.channels_last),
        resolved(rule, history),
        TRITON,
    )
    assert torch.equal(alone.value[0], together.value[index])
    assert torch.equal(alone.trace[:, 0], together.trace[:, index])
    assert torch.equal(alone.total[0], together.total[index])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rule", [Broyden(4, rtol=0.0), Picard(4, rtol=0.0)], ids=str)
def test_r_is_the_iterate_plus_injection(device, rule, dtype):
    """From zero: no start is read. r follows z in every step, rounded to F's dtype."""
    injection = nhwc(2, 5, 7, 9, device=device).to(dtype)
    z0, seen = torch.zeros_like(injection, dtype=torch.float32), []

    def f(z, state):
        r = shift(z, injection, dtype, state)
        torch.testing.assert_close(r.float(), z + injection.float(), rtol=1e-2, atol=1e-2)
        seen.append(r.clone())
        return 0.5 * r.float().cos()

    state = solve(f, z0.clone(), resolved(rule), TRITON, from_zero=True)
    assert state.start is None
    assert len(seen) == rule.max_iter + 1
    assert all(not torch.equal(a, b) for a, b in pairwise(seen))


@pytest.mark.parametrize("contiguous", [False, True])
def test_an_injection_of_another_layout_and_address(device, contiguous):
    """A caller's slice may begin anywhere."""
    z0, x = nhwc(2, 5, 7, 9, device=device), nhwc(2, 5, 7, 9, device=device)
    moved = torch.empty(x.numel() + 1, device=device)[1:].as_strided(x.shape, x.stride()).copy_(x)
    assert moved.data_ptr() % 16
    values = []
    for injection in (x, moved.contiguous() if contiguous else moved):

        def f(z, state, injection=injection):
            return 0.5 * shift(z, injection, torch.float32, state).cos()

        values.append(solve(f, z0.clone(), resolved(Broyden(4, rtol=0.0)), TRITON).value)
    assert torch.equal(*values)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtypes", ["f", "fb", "bf", "ffb", "hfb"])
@pytest.mark.parametrize("last", [False, True])
def test_residual_of_a_total(device, dtypes, last):
    kinds = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
    z = nhwc(2, 10, 15, 17, device=device)
    addends = [torch.randn_like(z).to(kinds[d]) for d in dtypes]
    state = DeviceState(z, rows=3, evaluations=5, history_dtype=torch.float32)
    solver.residual(state, total(*addends), z, Step("broyden", 3, 1, last, 0.0))
    f = sum(a.double() for a in addends)
    g = (f - z.double()).permute(0, 2, 3, 1).flatten(1)
    if last:
        assert state.history.isnan().all()
    else:
        torch.testing.assert_close(state.history[:, 1].double(), g, rtol=1e-5, atol=1e-6)
        assert state.history[:, ::2].isnan().all()
    sums = torch.stack([g.square().sum(1), f.square().flatten(1).sum(1)], 1)
    torch.testing.assert_close(state.norm_partials.double().sum(1), sums, rtol=1e-5, atol=1e-5)


def test_a_total_of_another_layout(device):
    z = nhwc(2, 4, 5, 6, device=device)
    addend = torch.randn_like(z)
    states = [DeviceState(z, rows=1, evaluations=2, history_dtype=torch.float32) for _ in range(2)]
    for state, laid_out in zip(states, (addend, addend.contiguous()), strict=True):
        solver.residual(state, total(laid_out), z, Step("picard", 1, 0, False, 0.0))
    assert torch.equal(states[0].history, states[1].history)


@pytest.mark.usefixtures("poisoned")
def test_long_samples_have_bounded_parts(device, monkeypatch, request):
    """A program sums several blocks, the last of them partly filled, and the rule's kernel many parts."""
    for remembered in (solver._residual_launch, solver._gram_launch):
        remembered.cache_clear()
        request.addfinalizer(remembered.cache_clear)
    monkeypatch.setattr(solver, "MAX_PARTS", 5)
    z = nhwc(2, 9, 40, 41, device=device)
    state = DeviceState(z, rows=3, evaluations=4, history_dtype=torch.float32)
    assert solver.blocks_per_part(state.size) == 4
    for row in range(3):
        solver.residual(state, torch.randn_like(z), z, Step("broyden", 2, row, False, 0.0))
    solver.gram_row(state, z, Step("broyden", 2, 2, False, 0.0))
    assert state.gram_partials.shape[1] == state.norm_partials.shape[1] == 4
    rows = state.history.double()
    sums = state.gram_partials.double().sum(1)
    torch.testing.assert_close(sums[:, 1:], (rows[:, 2:] * rows[:, 1:]).sum(2), rtol=1e-5, atol=1e-3)
    assert sums[:, 0].isnan().all()  # outside the window: nothing written


def test_the_rule_sums_any_number_of_parts(device):
    """The tail's kernel has parts of its own."""
    z = torch.randn(3, 7, device=device)
    state = DeviceState(z, rows=2, evaluations=3, history_dtype=torch.float32)
    state.norm_partials = torch.rand(3, 300, 2, device=device)
    solver.rule(state, z, Step("picard", 2, 0, True, 0.0))
    g2, f2 = state.norm_partials.double().sum(1).unbind(1)
    torch.testing.assert_close(state.residual.double(), (g2 / f2).sqrt(), rtol=1e-6, atol=0)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 2])  # the best iterate as a copy, and as coefficients
def test_a_step_touches_running_samples_only(device, rows):
    z, f = torch.randn(2, 4, 2100, device=device)
    state = DeviceState(z, rows=rows, evaluations=4, history_dtype=torch.float32)
    state.trace[0] = 0.5
    state.status[0] = Status.NONFINITE
    state.improved[0] = True
    state.norms[:, 2] = torch.inf  # no residual is too large
    if rows > 1:
        state.value = z
    before = {name: getattr(state, name)[0].clone() for name in ("total", "best", "residual", "iterations", "p", "q")}
    moved = z.clone()
    if rows > 1:
        state.value = moved
    solver.step(state, f, moved, Step("picard", 1, 1, False, 0.0))
    assert torch.equal(moved[0], z[0])
    assert state.history[0].isnan().all()
    assert state.improved.all()
    assert state.trace[1, 0] == 0.5
    for name, value in before.items():
        assert torch.equal(getattr(state, name)[0], value), name
    torch.testing.assert_close(state.trace[1, 1:], (f - z)[1:].norm(dim=1) / f[1:].norm(dim=1))
    if rows == 1:
        torch.testing.assert_close(moved[1:], f[1:])
        assert torch.equal(state.value, z)


def test_tail_ends_in_the_residual(device):
    """A step on a Tail is the step on norm_tail's result."""
    y, r, z = (nhwc(2, 16, 7, 7, device=device) for _ in range(3))
    norms = [Norm(*torch.randn(2, 16, device=device), 4) for _ in range(2)]
    f, _ = eager.norm_tail(y, r, *norms)
    states = []
    for result in (f, tail(y, r, *norms)):
        state = DeviceState(z, rows=3, evaluations=4, history_dtype=torch.float32)
        moved = z.clone()
        state.value = moved
        solver.step(state, result, moved, Step("broyden", 3, 0, False, 0.0))
        solver.finish(state, moved)
        states.append((moved, state.history[:, 0], state.trace[0], state.gram))
    for a, b in zip(*states, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_singular_anderson_system_gives_a_plain_step(device):
    """The same residual twice leaves no difference; two differences of one direction no unique solution."""
    z = torch.zeros(2, 40, device=device)
    g = torch.randn(2, 40, device=device)
    state = DeviceState(z, rows=4, evaluations=5, history_dtype=torch.float32)
    moved = z.clone()
    state.value = moved
    for k, factor in enumerate((1.0, 1.0, 2.0)):
        before = moved.clone()
        solver.step(
            state, before + factor * g, moved, Step("anderson", 4, k, False, 0.0)
        )  # fmt: skip
        assert moved.isfinite().all()
        if k < 2:
            torch.testing.assert_close(moved, before + factor * g)


def test_tiles_are_powers_of_two():
    for rows in range(1, 65):
        for window in {1, 2, rows // 2 + 1, rows}:
            tile = rules.rule_tile("anderson", rows, window)
            assert rows <= tile.K
            assert min(window, rows) <= tile.M + 1
            assert all(side & (side - 1) == 0 for side in tile)
