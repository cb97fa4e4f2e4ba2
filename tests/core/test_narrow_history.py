"""A history in 8 bits: what users can ask for, and that solves and gradients hardly change."""

import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import avg_pool2d, cosine_similarity

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, Picard, Shine, Status, config, fixed_point
from ifr_fast.adjoints import Equation, Memory
from ifr_fast.engine.call import Call
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import choose, eager

E5M2 = torch.float8_e5m2
pytestmark = pytest.mark.usefixtures("one_thread")
rules = pytest.mark.parametrize("rule", [Broyden, Anderson, Picard])


def narrow(rule, compute=torch.float32, **options):
    return rule(history_dtype=E5M2, **options).resolve(compute)


def features(scale, shape=(6, 64, 10, 10)):
    """Smooth and positive, of that rms."""
    x = avg_pool2d(torch.randn(*shape[:2], shape[2] + 4, shape[3] + 4), 5, stride=1).relu()
    return scale * x / x.square().mean().sqrt()


@rules
def test_it_is_asked_for_by_dtype_or_name(rule):
    assert rule(history_dtype="float8_e5m2") == rule(history_dtype=E5M2)
    for compute in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert narrow(rule, compute).history_dtype == E5M2
    assert config.decode(config.encode(narrow(rule))) == narrow(rule)
    assert Implicit(history_dtype="float8_e5m2").backward_solver.history_dtype == E5M2
    with pytest.raises(ValueError, match="expected None, float32, float64, bfloat16 or float8_e5m2"):
        rule(history_dtype=torch.float8_e4m3fn)


def test_more_samples_fit_the_workspace():
    sizes = [
        Broyden(15, history_dtype=dtype, workspace=10**6).resolve(torch.float32).chunk(10**6, 100, torch.device("cpu"))
        for dtype in (E5M2, torch.bfloat16, torch.float32)
    ]
    for size, itemsize in zip(sizes, (1, 2, 4), strict=True):
        assert size == pytest.approx(10**6 / (100 * (15 * itemsize + 8 * 4)), rel=0.01)


def test_the_cpu_kernels_refuse_it_and_auto_takes_eager(caplog):
    x = torch.randn(2, 32, 8, 8)
    for options, words in (
        ({"backend": "cpu"}, "a history in 8 bits, which backend='eager' serves"),
        ({"convolution": "winograd"}, "a history of 16 bits at least: the eager kernels run"),
    ):
        with pytest.raises(ValueError, match=words):
            IFRHead(32, groups=4, solver=narrow(Broyden), **options)(x)
    for solver, adjoint in ((narrow(Broyden), Implicit()), (Broyden(), Implicit(history_dtype=E5M2))):
        with pytest.raises(ValueError, match="a history in 8 bits"):
            fixed_point(torch.cos, x, solver=solver, adjoint=adjoint, backend="cpu")
    choose.kernels.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ifr_fast"):
        for _ in range(2):
            IFRHead(32, groups=4, solver=narrow(Broyden, max_iter=2))(x)
    assert [record.message for record in caplog.records] == [
        "running without the cpu kernels, several times slower: they keep no history in 8 bits"
    ]
    assert choose.kernels("auto", "cpu", torch.float32, E5M2) is eager


# Scale of the features and gain of the block: it contracts in between, slowly, and fast.
SETTINGS = [(1.0, 1.0), (0.5, 0.5), (2.0, 1.0)]


@pytest.mark.parametrize("draw", [0, *(pytest.param(i, marks=pytest.mark.full) for i in range(1, 5))])
@pytest.mark.parametrize(("scale", "gain"), SETTINGS)
def test_broydens_trace_is_that_of_16_bits(scale, gain, draw):
    """Convolutions in bfloat16, whose floor is under all that is compared. Samples' median, evaluations' mean."""
    head, x = IFRHead(64, post_gain=gain, backend="eager"), features(scale)
    traces = []
    for dtype in (torch.bfloat16, E5M2):
        head.solver = Broyden(15, rtol=0.0, history_dtype=dtype)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            head(x)
        traces.append(head.last_solution.trace.median(1).values)
    wide, other = traces
    ratio = (other / wide)[wide > 1e-3].log()
    assert len(ratio) > 4
    assert ratio.mean().abs().exp() < 1.1
    assert ratio.abs().max().exp() < 1.6  # a single evaluation, as much as a step or so


@pytest.mark.parametrize(("scale", "bound"), [(1.0, 3e-3), (2.0, 1e-4)])
def test_gradients_are_those_of_16_bits(scale, bound):
    """The adjoint's history alone is another one."""
    head, x = IFRHead(64, backend="eager"), features(scale)
    weights, grads = torch.randn_like(x), []
    for dtype in (torch.bfloat16, E5M2):
        head.adjoint = Implicit(15, rtol=0.0, history_dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            out = head(x)
        found = torch.autograd.grad((out * weights).sum(), list(head.parameters()))
        grads.append(torch.cat([g.flatten().double() for g in found]))
    assert 1 - cosine_similarity(*grads, dim=0) < bound


@rules
@pytest.mark.parametrize(
    ("magnitude", "dtype"),
    [(1e-30, torch.float32), (1e-7, torch.float32), (1e10, torch.float32), (1e-200, torch.float64)],
)
def test_any_magnitude_is_solved(rule, magnitude, dtype):
    rate, x = torch.tensor([[0.2], [-0.5]], dtype=dtype), torch.randn(2, 33, dtype=dtype)
    x *= magnitude
    z, solution = fixed_point(
        lambda z: rate * z + x, torch.zeros_like(x), solver=rule(30, rtol=1e-5, history_dtype=E5M2)
    )
    assert solution.status.tolist() == [Status.CONVERGED] * 2
    torch.testing.assert_close(z / magnitude, x / (1 - rate) / magnitude, rtol=1e-3, atol=1e-4)


@rules
def test_a_batch_is_its_samples_one_by_one(rule):
    """One of them is NaN, one zero, one grows out of bounds."""
    rate = torch.tensor([0.5, 0.8, 30.0, 0.1, 0.6]).view(-1, 1)
    x = torch.randn(5, 77)
    x[3], x[4] = torch.nan, 0

    def run(i):
        f = lambda z, _: rate[i] * (z + 0.1 * z.sin()) + x[i]  # noqa: E731
        return solve(f, torch.zeros_like(x[i]), narrow(rule, max_iter=9), eager)

    together = run(slice(None))
    assert together.status[3] == Status.NONFINITE
    for i in range(5):
        alone = run(slice(i, i + 1))
        for field in ("value", "residual", "status", "iterations"):
            assert torch.equal(getattr(together, field)[i : i + 1].nan_to_num(-1), getattr(alone, field).nan_to_num(-1))


def test_shine_reuses_scaled_rows():
    """As it would reuse the residuals themselves, which are far from 1."""
    x, grad = 1e-4 * torch.randn(3, 50), torch.randn(3, 50)
    state = solve(lambda z, _: 0.7 * z.sin() + x, torch.zeros_like(x), narrow(Broyden, max_iter=6, rtol=0.0), eager)
    rows = torch.stack([eager.stored(state, j) for j in range(6)], 1)
    assert (rows.norm(dim=2) < 1e-2).all()
    found, expected = (
        Shine().cotangent(Equation(lambda *_: None, grad, torch.float32, eager, memory)).w
        for memory in (Memory(state.history, *state.pairs()), Memory(rows, state.p, state.q))
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (found - grad).norm() > 0.1 * grad.norm()


def test_shines_gradients_are_close():
    """Of a head in chunks, and of any map."""
    x = features(2.0)
    head = IFRHead(64, backend="eager", adjoint=Shine())
    weights, found = torch.randn_like(x), []
    for dtype in (torch.float32, E5M2):
        head.solver = Broyden(10, rtol=0.0, history_dtype=dtype, workspace=10**6)
        found.append(torch.autograd.grad((head(x) * weights).sum(), list(head.parameters())))
    flat = [torch.cat([g.flatten() for g in grads]) for grads in found]
    assert cosine_similarity(*flat, dim=0) > 0.99

    rate, shift, found = torch.linspace(-0.5, 0.5, 20), (1e-4 * torch.randn(2, 20)).requires_grad_(), []
    for dtype in (torch.float32, E5M2):
        z, _ = fixed_point(
            lambda z: rate * z + shift, torch.zeros(2, 20), solver=Broyden(15, 1e-4, dtype), adjoint=Shine()
        )
        found.append(torch.autograd.grad(z.sum(), shift)[0].flatten())
    assert cosine_similarity(*found, dim=0) > 0.95


def test_the_op_is_traced_with_it():
    head = IFRHead(8, groups=2)
    x, params = torch.randn(3, 8, 5, 6), [p.detach() for p in head.block.tensors()]
    call = Call("released", 2, torch.float32, narrow(Broyden, max_iter=3), Shine(), "auto", keep=True).encode()
    real = torch.ops.ifr_fast.solve(x, params, call)
    with FakeTensorMode() as mode:
        fake = torch.ops.ifr_fast.solve(mode.from_tensor(x), [mode.from_tensor(p) for p in params], call)
    assert [(t.dtype, t.shape) for t in fake] == [(t.dtype, t.shape) for t in real]
    assert real[5].dtype == E5M2
    head.solver = narrow(Broyden, max_iter=3)
    exported = torch.export.export(head, (x,)).module()
    torch.testing.assert_close(exported(x), head(x))
