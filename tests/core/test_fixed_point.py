"""fixed_point on callables that are no residual block."""

import pytest
import torch
from torch import nn

from ifr_fast import Anderson, Broyden, Implicit, JacobianFree, Phantom, Picard, Shine, Unroll, Unrolled, fixed_point

ADJOINTS = [Implicit(60, rtol=1e-13), Unrolled(), JacobianFree(), Phantom(), Shine()]


@pytest.fixture
def layer():
    """z ↦ tanh(A z) + x in float64, ‖A‖ = 0.5, with the batch of x."""
    linear = nn.Linear(6, 6, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.mul_(0.5 / torch.linalg.matrix_norm(linear.weight, 2))
    return linear, torch.randn(4, 6, dtype=torch.float64, requires_grad=True)


SOLVERS = [Broyden(50, rtol=1e-12), Anderson(50, rtol=1e-12), Picard(200, rtol=1e-12)]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_finds_the_fixed_point(solver, layer):
    linear, x = layer
    z, solution = fixed_point(lambda z: linear(z).tanh() + x, torch.zeros_like(x), solver=solver)
    torch.testing.assert_close(z, linear(z).tanh() + x)
    assert solution.value.requires_grad is False


@pytest.mark.parametrize("adjoint", ADJOINTS[:2], ids=lambda a: type(a).__name__)
def test_gradients_reach_params_and_closures(adjoint, layer):
    linear, x = layer
    scale = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    z, _ = fixed_point(
        lambda z, scale: scale * linear(z).tanh() + x,
        torch.zeros_like(x),
        params=(scale,),
        solver=Broyden(60, rtol=1e-13),
        adjoint=adjoint,
    )
    inputs = [scale, x, linear.weight, linear.bias]
    grad = torch.randn_like(z)
    actual = torch.autograd.grad(z, inputs, grad)
    unrolled = torch.zeros_like(x)
    for _ in range(200):
        unrolled = scale * linear(unrolled).tanh() + x
    for a, e in zip(actual, torch.autograd.grad(unrolled, inputs, grad), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("shape", [(4,), (3, 5), (2, 3, 4), (2, 3, 4, 5), (2, 1, 3, 2, 2), (0, 3)])
@pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
def test_any_shape(shape, adjoint):
    x = torch.randn(shape, requires_grad=True)
    z, solution = fixed_point(lambda z: 0.3 * z.sin() + x, torch.zeros(shape), adjoint=adjoint)
    assert z.shape == shape
    assert solution.residual.shape == shape[:1]
    z.sum().backward()
    assert x.grad.shape == shape


def test_bfloat16_iterates_are_kept_in_float32():
    x = torch.randn(3, 40, dtype=torch.bfloat16)
    z, solution = fixed_point(lambda z: (0.5 * z.sin() + x).to(torch.bfloat16), torch.zeros_like(x))
    assert z.dtype == torch.bfloat16
    assert solution.value.dtype == torch.float32
    assert solution.residual.max() <= 1e-2


def test_channels_last_stays():
    z0 = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)

    def f(z):
        assert z.is_contiguous(memory_format=torch.channels_last)
        return 0.5 * z + 1

    assert fixed_point(f, z0)[0].is_contiguous(memory_format=torch.channels_last)


def test_samples_stay_apart_whatever_the_strides():
    shift = torch.tensor([torch.nan, 0.3, 0.5])[:, None]
    for z0 in (torch.zeros(5, 3).t(), torch.zeros(1, 5).expand(3, 5)):
        z, solution = fixed_point(lambda z: 0.5 * z.cos() + shift, z0, solver=Broyden(20, rtol=1e-5))
        assert solution.status.tolist() == [3, 0, 0]
        torch.testing.assert_close(z[1:], (0.5 * z.cos() + shift)[1:], rtol=1e-4, atol=1e-4)


def test_identity_maps_leave_their_argument_alone():
    """f's vjp may hand back its argument itself."""
    x = torch.randn(3, 5, requires_grad=True)
    z, _ = fixed_point(lambda z: x + 0 * z.detach(), torch.zeros(3, 5))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], torch.ones(3, 5))


def test_second_derivatives_are_refused_not_dropped():
    weight = torch.tensor(0.3, requires_grad=True)
    z, _ = fixed_point(lambda z: (weight * z).cos(), torch.zeros(2, 3))
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(z.square().sum(), weight, create_graph=True)


@pytest.mark.parametrize("adjoint", [a for a in ADJOINTS if a != Unrolled()], ids=lambda a: type(a).__name__)
def test_a_result_requires_a_gradient_where_something_does(adjoint):
    z0 = torch.zeros(2, 3, requires_grad=True)
    weight = torch.tensor(0.3, requires_grad=True)
    assert not fixed_point(torch.cos, z0, adjoint=adjoint)[0].requires_grad
    assert fixed_point(lambda z: (2 * weight * z).cos(), z0, adjoint=adjoint)[0].requires_grad
    assert not fixed_point(lambda z: (weight.detach() * z).cos(), z0, adjoint=adjoint)[0].requires_grad


def test_unroll_applies_f(layer):
    linear, x = layer
    z, solution = fixed_point(lambda z: linear(z) + x, torch.zeros_like(x), solver=Unroll(2))
    torch.testing.assert_close(z, linear(linear(torch.zeros_like(x)) + x) + x)
    assert solution is None


def test_no_grad_builds_no_graph(layer):
    linear, x = layer
    with torch.no_grad():
        assert not fixed_point(lambda z: linear(z).tanh() + x, torch.zeros_like(x))[0].requires_grad


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3, dtype=torch.int64)), "z0 has shape .*int64"),
        (lambda: fixed_point(torch.sin, torch.tensor(1.0)), "z0 has shape"),
        (lambda: fixed_point(lambda z: z[:, :1], torch.zeros(2, 3)), r"f returned shape \(2, 1\)"),
        (lambda: fixed_point(lambda z: (z, z), torch.zeros(2, 3)), "f returned tuple"),
        (lambda: fixed_point(lambda z: z.mul_(0.5).add_(1), torch.zeros(2, 3)), "in place"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), solver="secant"), "solver='secant'"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), solver=Picard(), adjoint=Shine()), "Shine"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError, match=words):
        call()
