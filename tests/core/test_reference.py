"""The specification against independent statements of the same formulas."""

from itertools import islice

import pytest
import torch
from torch import nn

from ifr_fast import reference


@pytest.fixture
def linear():
    """Contractions f(z) = A z + b, a sample apart, and their fixed points."""
    size = 6
    a = torch.randn(3, size, size, dtype=torch.float64)
    a = 0.9 * a / torch.linalg.matrix_norm(a, 2)[:, None, None]
    b = torch.randn(3, size, dtype=torch.float64)
    solution = torch.linalg.solve(torch.eye(size, dtype=torch.float64) - a, b)
    return lambda z: (a @ z.unsqueeze(2)).squeeze(2) + b, solution


@pytest.mark.parametrize("form", ["released", "paper", "plain"])
def test_residual_block_is_the_stack_of_modules(form):
    conv1, conv2 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.Conv2d(12, 8, 3, padding=1, bias=False)
    gn1, gn2, gn3 = nn.GroupNorm(4, 12), nn.GroupNorm(4, 8), nn.GroupNorm(4, 8)
    for norm in (gn1, gn2, gn3):
        nn.init.normal_(norm.weight), nn.init.normal_(norm.bias)
    z, x = torch.randn(2, 2, 8, 5, 6)
    y = gn2(conv2(gn1(conv1(z + x)).relu()))
    expected = {"paper": y + z + x, "released": gn3((y + z + x).relu()), "plain": gn3(y.relu())}[form]
    norms = [gn1, gn2] if form == "paper" else [gn1, gn2, gn3]
    weights = [conv1.weight, gn1.weight, gn1.bias, conv2.weight, *(t for n in norms[1:] for t in (n.weight, n.bias))]
    torch.testing.assert_close(reference.residual_block(z, x, weights, form=form, groups=4), expected)


def test_broyden_solves_linear_systems_exactly(linear):
    f, solution = linear
    # Broyden's method ends after at most twice as many steps as there are unknowns (Gay, 1979).
    best, g, trace = reference.broyden(f, torch.zeros_like(solution), steps=2 * solution.shape[1])
    torch.testing.assert_close(best, solution, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(g, f(best) - best)
    assert reference.relative_residual(best, g).max() < 1e-8
    assert min(norm for norm, _ in trace) == g.norm().item()


def test_anderson_with_full_window_solves_linear_systems_exactly(linear):
    f, solution = linear
    size = solution.shape[1]
    *_, (z, _) = reference.anderson_iterates(f, torch.zeros_like(solution), steps=size + 1, m=size + 2)
    torch.testing.assert_close(z, solution, rtol=1e-6, atol=1e-8)


def test_picard_is_repeated_application(linear):
    f, solution = linear
    z0 = torch.zeros_like(solution)
    torch.testing.assert_close(reference.picard(f, z0, steps=3), f(f(f(z0))))
    torch.testing.assert_close(next(islice(reference.picard_iterates(f, z0), 2, None))[1], f(f(f(z0))) - f(f(z0)))


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_first_step_has_the_asked_sign(linear, sign):
    f, solution = linear
    z0 = torch.randn_like(solution)
    _, (z1, _) = islice(reference.broyden_iterates(f, z0, steps=1, first_sign=sign), 2)
    torch.testing.assert_close(z1, z0 + sign * (f(z0) - z0))


def test_implicit_gradient_is_backpropagation_through_a_converged_iteration():
    b = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 3, dtype=torch.float64)
    weight = 0.5 * weight / torch.linalg.matrix_norm(weight, 2)

    def f(z):
        return torch.einsum("ij,njhw->nihw", weight, z.tanh()) + b

    z = reference.picard(f, torch.zeros_like(b), steps=100)
    grad = torch.randn_like(z)
    w = reference.implicit_gradient(f, z.detach(), grad)
    torch.testing.assert_close(torch.autograd.grad(z, b, grad)[0], w)  # ∂f/∂b = 1
