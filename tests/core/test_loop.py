"""The engine: iterates against the specification, and that samples never see each other."""

from itertools import islice, pairwise

import pytest
import torch

import ifr_fast.engine.loop as solve_module
from ifr_fast import Anderson, Broyden, Implicit, Picard, Status, fixed_point, reference
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import cpu, eager

FORMS = ["released", "plain", "paper"]
backends = pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])


def reference_iterates(rule, f, z0):
    steps = rule.max_iter
    iterates = {
        Broyden: lambda: reference.broyden_iterates(f, z0, steps=steps),
        Anderson: lambda: reference.anderson_iterates(f, z0, steps=steps, m=rule.m),
        Picard: lambda: islice(reference.picard_iterates(f, z0), steps + 1),
    }[type(rule)]()
    with torch.no_grad():
        return list(iterates)


def best_of(iterates):
    """Each sample's iterate of the smallest relative residual, and all residuals (steps + 1, N)."""
    trace = torch.stack([reference.relative_residual(z, g) for z, g in iterates])
    samples = torch.arange(trace.shape[1])
    return torch.stack([z for z, _ in iterates])[trace.argmin(0), samples], trace


@backends
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("rule", [Broyden(), Anderson(m=4), Picard()], ids=["broyden", "anderson", "picard"])
def test_iterates_are_the_specifications(rule, dtype, form, kernels, make_head):
    """1 to 16 steps: relative error of the returned iterate ≤ 1e-9 in float64, ≤ 1e-5 in float32."""
    if isinstance(rule, Anderson) and form == "paper":
        pytest.skip("Eq. 5 has spectral radius 1: Anderson's least-squares problem is singular to rounding there")
    head = make_head(16, groups=4, form=form, dtype=torch.float64)
    x = 2 * torch.randn(3, 16, 6, 5, dtype=torch.float64)
    params = [p.detach() for p in head.block.tensors()]

    def f(z):
        return reference.residual_block(z, x.to(z.dtype), [p.to(z.dtype) for p in params], form=form, groups=4)

    exact = reference_iterates(type(rule)(max_iter=16), f, torch.zeros_like(x))
    # What the specification itself loses in this dtype: a step over a tiny denominator magnifies F's own rounding.
    rounded = reference_iterates(type(rule)(max_iter=16), f, torch.zeros_like(x, dtype=dtype))
    for steps in (1, 2, 3, 5, 8, 12, 16):
        # Steps where the specification itself leaves the range in which numbers mean something ("paper" explodes).
        if exact[steps][0].abs().max() > 1e4:
            break
        expected, trace = best_of(exact[: steps + 1])
        settings = type(rule)(max_iter=steps, rtol=0.0).resolve(dtype)
        state = solve(lambda z, _: f(z), torch.zeros_like(x, dtype=dtype), settings, kernels)
        error, own = (
            (value - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1).clamp_min(1)
            for value in (state.value, best_of(rounded[: steps + 1])[0])
        )
        bound = 1e-9 if dtype == torch.float64 else (5 * own).clamp_min(1e-5)
        assert (error < bound).all(), (steps, error, own)
        if dtype == torch.float64:
            torch.testing.assert_close(state.trace, trace, rtol=1e-6, atol=1e-12)


@backends
def test_bfloat16_history_keeps_the_residual_trace(kernels, make_head):
    head = make_head(32, groups=8)
    x = torch.nn.functional.avg_pool2d(torch.randn(4, 32, 16, 16), 3, 1).relu()
    x = 2 * x / x.square().mean().sqrt()  # smooth features of rms 2, where a new block contracts
    params = [p.detach() for p in head.block.tensors()]
    wide, narrow = (
        solve(
            lambda z, _: reference.residual_block(z, x, params, groups=8),
            torch.zeros_like(x),
            Broyden(15, rtol=0.0, history_dtype=dtype).resolve(torch.float32),
            kernels,
        )
        for dtype in (torch.float32, torch.bfloat16)
    )
    torch.testing.assert_close(narrow.trace, wide.trace, rtol=0.05, atol=1e-6)


def affine_maps():
    """z ← a z + x with a rate of its own for every sample: 0.5, 0.8, growth, NaN and the zero sample among them."""
    rate = torch.tensor([0.5, 0.8, 3.0, 0.1, 0.6, 0.3, 0.7]).view(-1, 1, 1, 1)
    x = torch.randn(7, 4, 3, 5)
    x[3] = torch.nan
    x[4] = 0
    return rate, x


@backends
@pytest.mark.parametrize(
    "rule", [Picard(30), Broyden(8), Anderson(8), Broyden(4, rtol=0.0)], ids=["picard", "broyden", "anderson", "fixed"]
)
def test_a_batch_is_its_samples_one_by_one(rule, kernels):
    rate, x = affine_maps()

    def run(i):
        curve = 0.1 * torch.arange(60.0).view(1, 4, 3, 5).cos()  # no map a solver finishes in one step
        return solve(
            lambda z, _: rate[i] * z + curve * z.sin() + x[i], torch.zeros_like(x[i]), rule.resolve(x.dtype), kernels
        )

    batch = run(slice(None))
    for i in range(7):
        alone = run(slice(i, i + 1))
        torch.testing.assert_close(batch.value[i], alone.value[0], rtol=1e-6, atol=1e-6)
        assert batch.status[i] == alone.status[0]
        assert batch.iterations[i] == alone.iterations[0]
    assert batch.status[3] == Status.NONFINITE
    assert batch.value[[0, 1, 2, 4, 5, 6]].isfinite().all()


def test_status_and_report():
    rate, x = affine_maps()
    _, solution = fixed_point(lambda z: rate * z + x, torch.zeros_like(x), solver=Picard(20, rtol=1e-3))
    names = [Status(int(code)).name for code in solution.status]
    assert names == ["CONVERGED", "MAX_ITER", "DIVERGED", "NONFINITE", "CONVERGED", "CONVERGED", "CONVERGED"]
    # ‖g_k‖/‖f(z_k)‖ of z_k = (1 + r + … + r^(k-1)) x is r^k / (1 + … + r^k).
    expected = 0.8**20 / sum(0.8**i for i in range(21))
    torch.testing.assert_close(solution.residual[1], torch.tensor(expected), rtol=1e-3, atol=0)
    assert solution.iterations[1] == 20
    assert solution.iterations[4] == 0  # X = 0: the equilibrium is where it starts
    assert solution.residual[3] == torch.inf
    assert (solution.value[3] == 0).all()  # no finite iterate: z⁰, and the status says so
    stop = solution.iterations[0]
    assert stop < 20
    assert (solution.trace[stop:, 0] == solution.trace[stop, 0]).all()
    assert solution.trace.shape == (21, 7)
    assert "4 converged, 1 max_iter, 1 diverged, 1 nonfinite" in str(solution)


@backends
def test_returns_the_best_iterate_not_the_last(kernels):
    """Residuals fall, then rise: the map's rate grows once it has been called three times."""
    calls = iter([0.1, 0.1, 0.1, 1.5, 1.5, 1.5, 1.5])
    x = torch.randn(2, 12)
    state = solve(lambda z, _: next(calls) * z + x, torch.zeros_like(x), Picard(6, rtol=0.0).resolve(x.dtype), kernels)
    assert (state.trace.argmin(0) == 2).all()
    torch.testing.assert_close(state.value, 1.1 * x)
    torch.testing.assert_close(state.residual, state.trace[2])


def test_really_stops_on_a_cpu():
    calls = 0

    def f(z):
        nonlocal calls
        calls += 1
        return 0.1 * z + 1

    fixed_point(f, torch.zeros(3, 5), solver=Picard(1000, rtol=1e-3))
    assert calls < 10


@pytest.mark.parametrize("rule", [Broyden(6, rtol=0.0), Broyden(8, rtol=1e-2)], ids=["fixed", "stopping"])
def test_chunks_change_nothing(rule, make_head):
    head = make_head(16)
    x = torch.randn(7, 16, 5, 4)
    whole = head(x)  # 15 steps of default tolerance: somewhere else
    results = []
    for workspace in (1, 3 * (rule.rows + 8) * x[0].numel() * 4, 1 << 30):
        head.solver = type(rule)(rule.max_iter, rule.rtol, workspace=workspace)
        results.append((head(x).detach(), head.last_solution))
    for value, solution in results[1:]:
        torch.testing.assert_close(value, results[0][0], rtol=1e-5, atol=1e-5)
        assert torch.equal(solution.status, results[0][1].status)
    assert not torch.equal(whole, results[0][0])


@pytest.mark.parametrize(("samples", "most"), [(1, 10), (10, 10), (11, 10), (512, 10), (3, 0)])
def test_workspace_bounds_the_chunk(samples, most):
    size = 1000
    rule = Broyden(15, workspace=max(1, most * (15 + 8) * size * 4)).resolve(torch.float32)
    chunk = rule.chunk(samples, size, torch.device("cpu"))
    assert 1 <= chunk <= max(1, most)
    assert -(-samples // chunk) == -(-samples // max(1, most))  # no more chunks than needed


@backends
def test_stopped_samples_are_not_evaluated_and_nothing_else_changes(kernels):
    rate = torch.tensor([0.9, 0.0, 0.1, 0.5, 0.05, 0.0]).view(-1, 1, 1, 1)
    shift = torch.randn(6, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    seen = []

    def some(index):
        def f(z, state):
            seen.append(index.tolist())
            assert z.is_contiguous(memory_format=torch.channels_last)
            return rate[index] * z.sin() + shift[index]

        return f

    rule = Broyden(9, rtol=1e-3).resolve(torch.float32)
    z0 = torch.zeros_like(shift)
    all_along, restricted = (
        solve(some(torch.arange(6)), z0.clone(), rule, kernels, select=select) for select in (None, some)
    )
    evaluated = [set(index) for index in seen[len(seen) // 2 :]]
    assert evaluated[-1] <= {0, 3}
    assert all(after <= before for before, after in pairwise(evaluated))
    for name in ("value", "residual", "trace", "iterations", "status"):
        assert torch.equal(getattr(all_along, name), getattr(restricted, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_heads_gradients_do_not_depend_on_who_has_stopped(dtype, make_head, monkeypatch):
    adjoint = Implicit(9, rtol=1e-2)
    head = make_head(32, post_gain=0.4, mid_channels=8, solver=Broyden(9, rtol=1e-2), adjoint=adjoint, dtype=dtype)
    scale = torch.logspace(-0.5, 1.5, 9).view(-1, 1, 1, 1)
    x = (torch.randn(9, 32, 7, 6) * scale).to(dtype).requires_grad_()
    results = []
    for worthwhile in (0.0, 0.9):
        monkeypatch.setattr(solve_module, "WORTHWHILE", worthwhile)
        y = head(x)
        results.append([y, *torch.autograd.grad(y.float().square().sum(), [x, *head.parameters()])])
        assert head.last_solution.iterations.unique().numel() > 2
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
