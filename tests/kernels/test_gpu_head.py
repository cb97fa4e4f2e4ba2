"""Whole heads on a GPU: against the specification in float64 on the CPU."""

import pytest
import torch
from gpu_heads import (  # noqa: F401
    EXACT,
    GPU,
    GRADIENT,
    STEPS,
    TOLERANCE,
    clean_fixture,
    dtypes,
    error,
    every_backend,
    features,
    pair_fixture,
)

from ifr_fast import Anderson, Broyden, Implicit, Picard, Status, backends


def leave_nan_in_free_memory():
    """What the allocator hands out next is full of NaN."""
    held = [torch.full((size,), torch.nan, device=GPU) for size in (64, 1 << 12, 1 << 16, 1 << 20, 1 << 24) * 8]
    del held


def test_the_gpu_kernels_serve_here():
    assert backends()["triton"].available, backends()["triton"].reason


@every_backend
@dtypes
@pytest.mark.parametrize("n", [0, 1, 3, 100, 257])
def test_equilibrium_and_gradients(n, dtype, backend, pair, poisoned):
    head, exact = pair(backend=backend)
    x = features(n, dtype).requires_grad_()
    grad = torch.randn_like(x)
    leave_nan_in_free_memory()
    y = head(x)
    gradients = torch.autograd.grad(y, [x, *head.parameters()], grad)
    assert (y.shape, y.dtype, y.device) == (x.shape, dtype, x.device)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if n == 0:
        return
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = exact(x64)
    assert error(y, y64) < TOLERANCE[dtype]
    expected = torch.autograd.grad(y64, [x64, *exact.parameters()], grad.cpu().double())
    names = ["x", *(name for name, _ in head.named_parameters())]
    errors = {name: error(a, e) for name, a, e in zip(names, gradients, expected, strict=True)}
    assert all(value < GRADIENT[dtype] for value in errors.values()), errors
    solution = head.last_solution
    assert (solution.iterations == STEPS).all()
    assert (solution.residual < 10 * TOLERANCE[dtype]).all()


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("solver", [Anderson(**EXACT), Picard(**EXACT), Broyden(1, rtol=0.0), Broyden(STEPS)], ids=str)
def test_solvers(solver, dtype, backend, pair):
    """The traces too, as far down as rounding lets them agree."""
    head, exact = pair(backend=backend, solver=solver)
    x = features(5, dtype)
    y, y64 = head(x), exact(x.cpu().double())
    stops_early = solver.rtol is None
    assert error(y, y64) < (2e-2 if stops_early else TOLERANCE[dtype])
    if stops_early:
        assert (head.last_solution.status == Status.CONVERGED).all()
        return
    trace, expected = head.last_solution.trace.double().cpu(), exact.last_solution.trace
    floor = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(trace, expected, rtol=0.05, atol=floor)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", ["paper", "plain"])
def test_forms(form, dtype, backend, pair):
    """Two plain steps: the paper's form has no equilibrium."""
    gain = {} if form == "paper" else {"post_gain": 0.3}
    options = {"solver": Picard(2, rtol=0.0), "adjoint": Implicit(**EXACT) if form == "plain" else "jacobianfree"}
    head, exact = pair(form=form, backend=backend, **{"post_gain": 1.0, **gain}, **options)
    x = features(4, dtype).requires_grad_()
    grad = torch.randn_like(x)
    x64 = x.detach().cpu().double().requires_grad_()
    y, y64 = head(x), exact(x64)
    assert error(y, y64) < TOLERANCE[dtype]
    actual = torch.autograd.grad(y, [x, *head.parameters()], grad)
    expected = torch.autograd.grad(y64, [x64, *exact.parameters()], grad.cpu().double())
    assert all(error(a, e) < GRADIENT[dtype] for a, e in zip(actual, expected, strict=True))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_mask_heads_size(dtype, backend, pair):
    head, exact = pair(256, groups=32, backend=backend)
    x = features(2, dtype, 256, (14, 14))
    assert error(head(x), exact(x.cpu().double())) < TOLERANCE[dtype]


@pytest.mark.parametrize("groups", [3, 48])
def test_odd_channel_counts(groups, pair):
    """Groups of 16, and of one channel; positions and channels that fill no block."""
    head, exact = pair(48, groups=groups)
    x = features(3, torch.float32, 48, (5, 13))
    assert error(head(x), exact(x.cpu().double())) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_maps(dtype, pair):
    """Split reductions; the reference in float64 on the GPU too, where it takes less than a minute."""
    solver = Broyden(3, rtol=0.0)
    head, exact = pair(256, groups=32, solver=solver, adjoint=Implicit(3, rtol=0.0))
    x = features(2, dtype, 256, (100, 152)).requires_grad_()
    grad = torch.randn_like(x)
    y = head(x)
    (actual,) = torch.autograd.grad(y, x, grad)
    x64 = x.detach().double().requires_grad_()
    y64 = exact.to(GPU)(x64)
    (expected,) = torch.autograd.grad(y64, x64, grad.double())
    assert error(y, y64) < 2 * TOLERANCE[dtype]
    assert error(actual, expected) < GRADIENT[dtype]


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_contiguous_input(dtype, backend, pair):
    head, _ = pair(backend=backend)
    x = features(3, dtype)
    y = head(x.contiguous())
    assert y.is_contiguous()
    assert error(y, head(x)) < TOLERANCE[dtype]


@every_backend
def test_a_sample_alone_gives_what_it_gives_in_a_batch(backend, pair):
    """To rounding: cuDNN may take another algorithm for another batch."""
    head, _ = pair(backend=backend)
    x = features(9).requires_grad_()
    y = head(x)
    (grads,) = torch.autograd.grad(y.square().sum(), x)
    trace = head.last_solution.trace
    for i in (0, 4, 8):
        alone = head(x[i : i + 1])
        assert error(alone[0], y[i]) < 5e-5
        torch.testing.assert_close(head.last_solution.trace[:, 0], trace[:, i], rtol=1e-2, atol=5e-6)
        (grad,) = torch.autograd.grad(alone.square().sum(), x)
        assert error(grad[i], grads[i]) < 1e-3


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nan_stays_in_its_sample(dtype, backend, pair):
    head, _ = pair(backend=backend)
    x = features(6, dtype)
    bad = x.clone()
    bad[2, 0, 0, 0] = torch.nan
    results = []
    for given in (x, bad):
        given.requires_grad_()
        y = head(given)
        status = head.last_solution.status
        results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), given), status))
    others = [0, 1, 3, 4, 5]
    for clean, dirty in zip(*results, strict=True):
        assert torch.equal(clean[others], dirty[others])
    assert results[1][2][2] == Status.NONFINITE


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(dtype, pair):
    head, exact = pair()
    x = features(4).requires_grad_()
    with torch.autocast("cuda", dtype):
        y = head(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    x64 = x.detach().cpu().double().requires_grad_()
    y64 = exact(x64)
    (expected,) = torch.autograd.grad(y64.square().sum(), x64)
    assert y.dtype == torch.float32
    assert 2e-5 < error(y, y64) < TOLERANCE[dtype]  # and not computed in float32
    assert error(grad, expected) < GRADIENT[dtype]
