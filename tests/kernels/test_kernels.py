"""The compiled kernels against the eager ones, and the eager ones against autograd."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from ifr_fast import Anderson, Broyden, Picard, Status, _native
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import cpu, eager
from ifr_fast.kernels.contract import EPS, Norm, State, Step, wide

# RMS error.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 2e-2}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
# Groups of fewer than four values amplify roundings, up to 1/sqrt(eps) = 316 times.
shapes = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2, 4]), st.integers(1, 5), st.integers(1, 9), st.integers(1, 9)
).filter(lambda s: s[2] * s[3] * s[4] >= 4)


def draw(shape, dtype, channels_last, count):
    """Activations in one layout, and three norms."""
    n, groups, per_group, height, width = shape
    format = torch.channels_last if channels_last else torch.contiguous_format
    tensors = [torch.randn(n, groups * per_group, height, width).to(dtype, memory_format=format) for _ in range(count)]
    pairs = [torch.randn(2, groups * per_group).to(wide(dtype)) for _ in range(3)]
    return tensors, [Norm(*pair, groups) for pair in pairs]


def assert_close(actual, expected, dtype, rstds):
    """RMS error against RMS or the inputs' own, 1: single elements near zero say nothing. A group of small variance
    magnifies roundings by its 1/σ. Parameters' gradients are sums over positions, whose terms may cancel."""
    tolerance = TOLERANCE[dtype] * max(1.0, *(float(r.max()) for r in rstds))
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        a, b = a.double(), b.double()
        terms = expected[0].numel() if a.dim() == 1 else b.numel()
        assert torch.isfinite(a).all()
        assert (a - b).norm() <= tolerance * (b.norm() + terms**0.5)


@dtypes
@settings(max_examples=25, deadline=None)
@given(shape=shapes, channels_last=st.booleans())
def test_norm_relu(dtype, shape, channels_last):
    (y, grad), (norm, *_) = draw(shape, dtype, channels_last, 2)
    actual, expected = (k.norm_relu(y, norm) for k in (cpu, eager))
    rstds = [expected[1][1]]
    assert_close(*([out, *statistics] for out, statistics in (actual, expected)), dtype, rstds)
    # The statistics are eager's in both, so that a value on ReLU's edge falls to the same side.
    vjps = [k.norm_relu_vjp(grad, y, norm, expected[1], params=True) for k in (cpu, eager)]
    assert_close(*([grad_y, *grads] for grad_y, grads in vjps), dtype, rstds)


@dtypes
@pytest.mark.parametrize(("residual", "post"), [(True, True), (True, False), (False, True)])
@settings(max_examples=15, deadline=None)
@given(shape=shapes, channels_last=st.booleans())
def test_norm_tail(dtype, residual, post, shape, channels_last):
    (y, r, grad), (first, second, _) = draw(shape, dtype, channels_last, 3)
    r, second, grad = r if residual else None, second if post else None, grad.to(wide(dtype))
    results = [k.norm_tail(y, r, first, second) for k in (cpu, eager)]
    statistics = results[1][1]
    rstds = statistics[1::2]
    assert_close(*([out, *statistics] for out, statistics in results), dtype, rstds)
    vjps = [k.norm_tail_vjp(grad, y, r, first, second, statistics, params=True) for k in (cpu, eager)]
    assert_close(*([grad_y, grad_r, *grads] for grad_y, grad_r, grads in vjps), dtype, rstds)


@pytest.mark.parametrize(("residual", "post"), [(True, True), (True, False), (False, True)])
def test_eager_vjps_are_autograds(residual, post):
    (y, r, grad), (first, second, _) = draw((2, 4, 3, 5, 4), torch.float64, False, 3)
    inputs = [t.requires_grad_() for t in (y, r, *first[:2], *second[:2])]
    u = F.group_norm(y, first.groups, *first[:2], EPS) + (r if residual else 0)
    out = F.group_norm(u.relu(), first.groups, *second[:2], EPS) if post else u
    expected = torch.autograd.grad(out, inputs, grad, allow_unused=True)
    with torch.no_grad():
        r, second = r if residual else None, second if post else None
        value, statistics = eager.norm_tail(y, r, first, second)
        grad_y, grad_r, grads = eager.norm_tail_vjp(grad, y, r, first, second, statistics, params=True)
    assert_close([value], [out], torch.float64, statistics[1::2])
    expected = [g for g in expected if g is not None]
    assert_close([g for g in (grad_y, grad_r, *grads) if g is not None], expected, torch.float64, statistics[1::2])


def test_relu_keeps_nan():
    y = torch.randn(2, 8, 3, 3)
    y[0, 0, 0, 0] = torch.nan
    out = cpu.norm_relu(y, Norm(torch.ones(8), torch.zeros(8), 2))[0]
    assert out[0, :4].isnan().all()
    assert out[0, 4:].isfinite().all()
    assert out[1].isfinite().all()


@dtypes
@settings(max_examples=10, deadline=None)
@given(shape=shapes, channels_last=st.booleans(), exponent=st.integers(-3, 12))
def test_a_constant_group_is_normalised_to_zero(dtype, shape, channels_last, exponent):
    """However large its value, and beside groups that are not constant. Exactly; only sums of float64 are rounded."""
    (y, r, grad), (first, second, _) = draw(shape, dtype, channels_last, 3)
    own, slack = slice(0, shape[2]), 1e-9 if dtype == torch.float64 else 0.0

    def assert_same(actual, expected):
        torch.testing.assert_close(actual, expected.expand_as(actual), rtol=slack, atol=slack)

    y[0, own], r[0, own] = torch.randn(()).item() * 10.0**exponent, 0.0
    out, (mean, rstd) = cpu.norm_relu(y, first)
    assert_same(mean[0, 0], y[0, 0, 0, 0].to(mean.dtype))
    assert_same(rstd[0, 0], torch.tensor(EPS, dtype=torch.float64).rsqrt().to(rstd.dtype))
    assert_same(out[0, own], first[1][own].relu().to(dtype).view(-1, 1, 1))
    y, r, grad = y[:1], r[:1], grad[:1]
    _, (grad_weight, _) = cpu.norm_relu_vjp(grad, y, first, [mean[:1], rstd[:1]], params=True)
    assert_same(grad_weight[own], torch.zeros_like(grad_weight[own]))
    # The second norm's input is the first one's bias: the same in all of the group.
    first[1][own] = y[0, 0, 0, 0].abs()
    out, statistics = cpu.norm_tail(y, r, first, second)
    assert_same(out[0, own], second[1][own].view(-1, 1, 1))
    grads = cpu.norm_tail_vjp(grad.to(out.dtype), y, r, first, second, statistics, params=True)[2]
    for grad_weight in grads[::2]:
        assert_same(grad_weight[own], torch.zeros_like(grad_weight[own]))


@dtypes
@pytest.mark.parametrize("channels_last", [False, True])
def test_a_mean_far_from_zero_costs_no_accuracy(dtype, channels_last):
    """Of the differences that the dtype can still hold, that is."""
    (y,), (norm, *_) = draw((2, 4, 3, 9, 8), dtype, channels_last, 1)
    y += 1e-3 / torch.finfo(dtype).eps
    _, (mean, rstd) = cpu.norm_relu(y, norm)
    exact = y.double().unflatten(1, (norm.groups, -1)).flatten(2)
    torch.testing.assert_close(mean.double(), exact.mean(2), rtol=1e-6, atol=0)
    expected = (exact - exact.mean(2, keepdim=True)).square().mean(2).add(EPS).rsqrt()
    # 216 squares are summed in float32 for 16 and 32 bits: a rounding of 6e-8 each.
    torch.testing.assert_close(rstd.double(), expected, rtol=4e-6, atol=0)


@pytest.mark.parametrize("shape", [(3, 32, 14, 14), (1, 64, 50, 76)])
@pytest.mark.parametrize("channels_last", [False, True])
def test_results_do_not_depend_on_threads_or_batch_mates(shape, channels_last):
    n, channels, height, width = shape
    (y, r), (first, second, _) = draw((n, 8, channels // 8, height, width), torch.float32, channels_last, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(cpu.norm_tail(y, r, first, second)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    alone = cpu.norm_tail(y[-1:], r[-1:], first, second)[0]
    assert torch.equal(alone[0], results[0][-1])


RULES = [Broyden(9, rtol=0.0), Broyden(9, rtol=1e-2), Anderson(9, rtol=0.0, m=3), Picard(9, rtol=1e-2)]


@pytest.mark.parametrize("history", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=str)
@settings(max_examples=8, deadline=None)
@given(n=st.integers(1, 4), channels=st.integers(2, 20), size=st.sampled_from([3, 17]), last=st.booleans())
def test_solver_kernels(rule, dtype, history, n, channels, size, last):
    """gram_row, assess, the rules and combine together: whole solves of one map, backend against backend."""
    rule = type(rule)(**{**vars(rule), "history_dtype": history}).resolve(dtype)
    z0 = torch.randn(n, channels, size, size, dtype=dtype)
    z0 = z0.contiguous(memory_format=torch.channels_last) if last else z0
    rate = torch.linspace(0.1, 0.8, n, dtype=dtype).view(-1, 1, 1, 1)
    shift = torch.randn_like(z0)
    cpu_state, eager_state = (solve(lambda z, _: rate * z.sin() + shift, z0.clone(), rule, k) for k in (cpu, eager))
    # Residuals fall to rounding, where nothing agrees: compare down to a floor.
    scale, floor = (1e-3, 2e-3) if history else (1e-4, 1e-5) if dtype == torch.float32 else (1e-7, 1e-12)
    torch.testing.assert_close(cpu_state.trace, eager_state.trace, rtol=10 * scale, atol=floor)
    torch.testing.assert_close(cpu_state.value, eager_state.value, rtol=scale, atol=floor)


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
@pytest.mark.parametrize("growth", [0.5, 3.0])
def test_residuals_of_an_affine_map_are_relative_to_its_constant(kernels, growth):
    """Where plain steps grow without bound too, and ‖f(z)‖ with them."""
    constant = torch.randn(3, 257, dtype=torch.float64)
    visited = []

    def f(z, state):
        visited.append(z.clone())
        return -growth * z + constant

    rule = Picard(6, rtol=1e-9).resolve(torch.float64)
    state = solve(f, torch.zeros_like(constant), rule, kernels, from_zero=True, first=constant, affine=True)
    expected = [((1 + growth) * z - constant).norm(dim=1) / constant.norm(dim=1) for z in visited]
    torch.testing.assert_close(state.trace[1:], torch.stack(expected))
    torch.testing.assert_close(state.trace[0], torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(state.residual, state.trace.amin(0), rtol=0, atol=0)


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
@pytest.mark.parametrize("n", [1, 5])  # fewer samples than threads take another path
def test_a_step_touches_running_samples_only(kernels, n):
    z, f = torch.randn(2, n, 9001)
    state = State(z, rows=1, evaluations=3, history_dtype=torch.float32)
    state.trace[0] = 0.5
    state.status[0] = Status.NONFINITE
    state.history[0] = torch.nan
    state.value.fill_(-1.0)
    state.norms[:, 2] = torch.inf  # no residual is too large
    moved = z.clone()
    running = kernels.step(state, f, moved, Step("picard", 1, 1, False, 0.0))
    assert running == n - 1
    assert torch.equal(moved[0], z[0])
    assert (state.value[0] == -1).all()
    assert state.trace[1, 0] == 0.5
    torch.testing.assert_close(moved[1:], f[1:])
    assert torch.equal(state.value[1:], z[1:])
    torch.testing.assert_close(state.trace[1, 1:], (f - z)[1:].norm(dim=1) / f[1:].norm(dim=1))


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
def test_a_first_evaluation_may_find_its_samples_stopped(kernels):
    z = torch.zeros(3, 8)
    state = kernels.new_state(z, rows=3, evaluations=4, history_dtype=torch.float32, from_zero=True)
    for _ in range(2):
        assert kernels.step(state, torch.zeros_like(z), z, Step("picard", 1, 0, False, 1e-3)) == 0


def judged(kernels, f, z, *, rtol=1e-3):
    """The state after one evaluation."""
    state = kernels.new_state(z, rows=1, evaluations=2, history_dtype=z.dtype, from_zero=False)
    kernels.step(state, f, z.clone(), Step("picard", 1, 0, False, rtol))
    return state


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
@pytest.mark.parametrize("exponent", [-140, -100, -60, 60, 100, 120])
def test_residuals_do_not_depend_on_the_scale(kernels, exponent):
    """Where squares of float32 are zero or infinite; samples of another scale beside them."""
    z, f = torch.randn(2, 3, 3001)
    scale = torch.tensor([[1.0], [2.0**exponent], [1.0]])
    expected, actual = judged(kernels, f, z), judged(kernels, scale * f, scale * z)
    precision = 1e-5 if exponent > -130 else 1e-3  # denormal numbers have few digits
    torch.testing.assert_close(actual.residual, expected.residual, rtol=precision, atol=0)
    assert torch.equal(actual.residual[::2], expected.residual[::2])
    assert torch.equal(actual.status, expected.status)


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_residuals_of_zero_and_of_no_scale(kernels, dtype):
    """A sample solved exactly, one that is zero and solved, one whose f is zero though z is not, and two failures."""
    z = torch.randn(5, 9, dtype=dtype)
    f = torch.stack([z[0], 0 * z[1], 0 * z[2], torch.inf * z[3], torch.nan * z[4]])
    z[1] = 0
    state = judged(kernels, f, z, rtol=0.0)
    assert state.residual[:3].tolist() == [0, 0, torch.finfo(dtype).max]
    assert state.trace[0].nan_to_num(-1).tolist() == [*state.residual[:3].tolist(), -1, -1]
    assert state.residual[3:].isinf().all()
    expected = [Status.CONVERGED, Status.CONVERGED, Status.MAX_ITER, Status.NONFINITE, Status.NONFINITE]
    assert state.status.tolist() == expected


def test_plain_keeps_the_layout_on_a_gpu(monkeypatch):
    """Where group_norm's result is contiguous, whatever its argument: compiled code relies on the layout."""
    contiguous = torch.group_norm
    monkeypatch.setattr(torch, "group_norm", lambda *args: contiguous(*args).contiguous())
    (y, r), (first, second, _) = draw((2, 2, 3, 4, 5), torch.float32, True, 2)
    results = [eager.norm_relu(y, first)[0]]
    results += [eager.norm_tail(y, r, first, norm)[0] for norm in (second, None)]
    assert all(out.stride() == y.stride() for out in results)


ISAS = ("generic", "avx2", "avx512")  # narrow to wide


def isa_of(switch: str) -> str:
    """What a new process runs, or says, where IFR_FAST_ISA is `switch`. Without torch: it would take seconds."""
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('ifr_fast._native', {_native.__file__!r});"
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.isa())"
    )
    env = {**os.environ, "IFR_FAST_ISA": switch}
    done = subprocess.run([sys.executable, "-c", code], env=env, text=True, capture_output=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_narrower_instruction_set_can_be_asked_for():
    widest = isa_of("")
    for asked in ISAS:
        assert isa_of(asked) == min(asked, widest, key=ISAS.index)
    assert isa_of("avx1024") == "ImportError: IFR_FAST_ISA is 'avx1024'; expected generic, avx2 or avx512."
