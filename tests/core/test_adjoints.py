"""Gradients: against finite differences, against a converged unroll, each inexact adjoint by its definition."""

from itertools import pairwise

import pytest
import torch

from ifr_fast import (
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    Phantom,
    Shine,
    Unroll,
    Unrolled,
    fixed_point,
    reference,
)
from ifr_fast.adjoints import Equation
from ifr_fast.kernels import cpu, eager
from ifr_fast.kernels.contract import memory_format
from ifr_fast.ops import solve as solve_op

EXACT = Broyden(60, rtol=1e-13)


def gradients(head, x, cotangent):
    return torch.autograd.grad(head(x), [x, *head.parameters()], cotangent)


def specification(head, x):
    """x ↦ F as the specification has it, differentiable in the head's own parameters."""
    return lambda z: reference.residual_block(
        z, x, head.block.tensors(), form=head.block.form, groups=head.block.groups
    )


@pytest.fixture
def problem(make_head):
    """A contracting block in float64, an input, and a cotangent."""

    def make(adjoint, form="released", backend="auto"):
        head = make_head(
            8,
            groups=2,
            form=form,
            mid_channels=4,
            post_gain=0.3,
            dtype=torch.float64,
            solver=EXACT,
            adjoint=adjoint,
            backend=backend,
        )
        x = torch.randn(2, 8, 4, 3, dtype=torch.float64, requires_grad=True)
        return head, x, torch.randn_like(x)

    return make


def assert_same(actual, expected, rtol=1e-9):
    for a, e in zip(actual, expected, strict=True):
        assert (a - e).norm() <= rtol * e.norm(), ((a - e).norm() / e.norm()).item()


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("form", ["released", "plain"])
@pytest.mark.parametrize(
    "adjoint",
    [
        Implicit(60, rtol=1e-13),
        Implicit(solver=Anderson(80, rtol=1e-13)),
        Implicit(solver={"type": "picard", "max_iter": 300, "rtol": 1e-13}),
        Unrolled(),
    ],
    ids=["implicit", "by Anderson", "by Picard", "unrolled"],
)
def test_exact_adjoints_are_backpropagation_through_a_converged_unroll(adjoint, form, backend, problem):
    for _ in range(9):  # one random block in a hundred does not contract: it may have other equilibria, or none
        head, x, cotangent = problem(adjoint, form, backend)
        z = reference.picard(specification(head, x), torch.zeros_like(x), steps=250)
        if torch.allclose(specification(head, x)(z), z, rtol=1e-10, atol=1e-10) and torch.allclose(head(x), z):
            break
    expected = torch.autograd.grad(z, [x, *head.parameters()], cotangent)
    assert_same(gradients(head, x, cotangent), expected, 1e-7)


def test_gradcheck(make_head):
    head = make_head(
        4,
        groups=2,
        post_gain=0.3,
        dtype=torch.float64,
        solver=Broyden(40, rtol=1e-14),
        adjoint=Implicit(40, rtol=1e-14),
    )
    x = torch.randn(2, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    weights = [p for name, p in head.named_parameters() if "gn" in name or "original0" in name]
    assert torch.autograd.gradcheck(lambda x, *_: head(x), (x, *weights))


def test_default_accuracy_points_the_right_way(make_head):
    """float32, 15 steps forward and backward on a block that contracts: cosine with the exact gradient > 0.9999."""
    head = make_head(32, groups=8, post_gain=0.3, solver=Broyden(15, rtol=0.0), adjoint=Implicit(15, rtol=0.0))
    x = torch.randn(3, 32, 7, 7, requires_grad=True)
    cotangent = torch.randn_like(x)
    z = reference.picard(specification(head, x), torch.zeros_like(x), steps=100)
    expected = torch.autograd.grad(z, [x, *head.parameters()], cotangent)
    for a, e in zip(gradients(head, x, cotangent), expected, strict=True):
        assert torch.cosine_similarity(a.flatten(), e.flatten(), dim=0) > 0.9999


def test_implicit_solves_equation_8(problem):
    head, x, cotangent = problem(Implicit(60, rtol=1e-13))
    z = head(x).detach()
    w = reference.implicit_gradient(specification(head, x.detach()), z, cotangent)
    expected = torch.autograd.grad(specification(head, x)(z), [x, *head.parameters()], w)
    assert_same(gradients(head, x, cotangent), expected, 1e-8)


@pytest.mark.parametrize("kernels", [cpu, eager], ids=["cpu", "eager"])
@pytest.mark.parametrize("growth", [0.5, 2.0, 10.0])
def test_the_solved_w_is_better_than_none_or_jacobian_free(kernels, growth):
    """Where F does not contract, w can grow without bound and ‖wᵀ ∂F/∂H + ∂L/∂H‖ with it: judged by that, the wildest w
    would be the best."""
    jacobian = growth * torch.randn(5, 300, 300, dtype=torch.float64) / 300**0.5
    grad = torch.randn(5, 300, dtype=torch.float64)

    def product(w, constant, state=None):
        return (w.unsqueeze(1) @ jacobian).squeeze(1) + constant

    w, residual, _ = Implicit(10, rtol=1e-9).cotangent(Equation(product, grad, torch.float64, kernels))
    expected = (product(w, grad) - w).norm(dim=1) / grad.norm(dim=1)
    torch.testing.assert_close(residual, expected)
    free = (w - grad).abs().amax(1) < 1e-12
    assert (free | (residual < 1)).all()
    assert growth < 10 or free.all()
    assert growth > 0.5 or not free.any()


def test_jacobian_free_is_one_product(problem):
    head, x, cotangent = problem(JacobianFree())
    z = head(x).detach()
    expected = torch.autograd.grad(specification(head, x)(z), [x, *head.parameters()], cotangent)
    assert_same(gradients(head, x, cotangent), expected)


@pytest.mark.parametrize(("steps", "damping"), [(1, 1.0), (3, 0.4)])
def test_phantom_is_backpropagation_through_damped_steps(steps, damping, problem):
    head, x, cotangent = problem(Phantom(steps, damping))
    z = head(x).detach()
    f = specification(head, x)
    for _ in range(steps):
        z = (1 - damping) * z + damping * f(z)
    assert_same(gradients(head, x, cotangent), torch.autograd.grad(z, [x, *head.parameters()], cotangent))


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_shine_uses_the_forward_solves_inverse_jacobian(backend, problem):
    """w = -J⁻ᵀ grad with the classical method's explicit factors, rebuilt here from its iterates."""
    steps = 7
    head, x, cotangent = problem(Shine(), backend=backend)
    head.solver = Broyden(steps, rtol=0.0)
    f = specification(head, x)
    with torch.no_grad():
        pairs = [
            (z.flatten(1), g.flatten(1)) for z, g in reference.broyden_iterates(f, torch.zeros_like(x), steps=steps)
        ]
    w = []
    for sample in range(len(x)):
        inverse = -torch.eye(x[0].numel(), dtype=x.dtype)
        # Residual 7 exists, but the last one that a step, hence an update of J⁻¹, was made from is residual 6.
        for (z0, g0), (z1, g1) in pairwise(pairs[:steps]):
            dz, dg = z1[sample] - z0[sample], g1[sample] - g0[sample]
            left = dz @ inverse
            inverse = inverse + torch.outer(dz - inverse @ dg, left) / (left @ dg)
        w.append(-cotangent[sample].flatten() @ inverse)
    z = head(x).detach()
    expected = torch.autograd.grad(f(z), [x, *head.parameters()], torch.stack(w).view_as(x))
    assert_same(gradients(head, x, cotangent), expected, 1e-7)


@pytest.mark.parametrize("adjoint", [Shine(), JacobianFree(), Implicit(9, rtol=0.0)], ids=lambda a: type(a).__name__)
def test_adjoints_evaluate_f_once_beside_the_solve(adjoint):
    """Once in all, for the graph that leads to the parameters; Shine no more often than JacobianFree."""
    calls = 0
    weight = torch.randn(5, 5, dtype=torch.float64, requires_grad=True)

    def f(z, weight):
        nonlocal calls
        calls += 1
        return 0.2 * (z @ weight).sin() + 1

    z, _ = fixed_point(
        f, torch.zeros(3, 5, dtype=torch.float64), params=(weight,), solver=Broyden(6, rtol=0.0), adjoint=adjoint
    )
    z.sum().backward()
    assert calls == 7 + 1
    assert weight.grad.norm() > 0


def test_shine_reads_a_gradient_of_another_layout_as_its_memory_lies(problem, monkeypatch):
    """On a GPU the reference kernels solve in x's own layout."""

    def staged(x, dtype, kernels, like=None):
        return x.to(dtype).contiguous(memory_format=memory_format(x if like is None else like))

    head, x, cotangent = problem(Shine(), backend="eager")
    expected = gradients(head, x, cotangent)
    monkeypatch.setattr(solve_op, "staged", staged)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()
    assert_same(gradients(head, x, cotangent.contiguous()), expected, 1e-7)


@pytest.mark.parametrize("adjoint", [Implicit(), JacobianFree(), Phantom(), Shine()], ids=lambda a: type(a).__name__)
def test_head_and_fixed_point_agree(adjoint, problem):
    """Two ways through the code, the op's written-out vjps and autograd's own graph: one gradient."""
    head, x, cotangent = problem(adjoint)
    head.solver = Broyden(8, rtol=0.0)
    z, solution = fixed_point(lambda z: head.block(z, x), torch.zeros_like(x), solver=head.solver, adjoint=adjoint)
    torch.testing.assert_close(z, head(x))
    torch.testing.assert_close(solution.trace, head.last_solution.trace, rtol=1e-5, atol=1e-12)
    expected = torch.autograd.grad(z, [x, *head.parameters()], cotangent)
    assert_same(gradients(head, x, cotangent), expected, 1e-6)


def test_gradient_layout_may_differ_from_the_forwards(problem):
    head, x, cotangent = problem(Implicit())
    plain = gradients(head, x, cotangent)
    turned = gradients(head, x, cotangent.contiguous(memory_format=torch.channels_last))
    assert_same(turned, plain)


@pytest.mark.parametrize("adjoint", [Implicit(), Shine(), JacobianFree(), Phantom()], ids=lambda a: type(a).__name__)
def test_gradient_may_be_a_slice(adjoint, problem):
    """As the backward pass of a concatenation makes it: strides of channels_last, but not dense."""
    head, x, cotangent = problem(adjoint)
    slice_ = torch.cat([cotangent, cotangent], 1).contiguous(memory_format=torch.channels_last)[:, :8]
    assert_same(gradients(head, x, slice_), gradients(head, x, cotangent))


@pytest.mark.parametrize("factor", [1e-25, 1e-3, 1e25])
def test_gradients_scale(factor, make_head):
    """Squares of float32 under- and overflow long before the gradients do."""
    head = make_head(16, post_gain=0.3)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    cotangent = torch.randn_like(x)
    actual = torch.autograd.grad(head(x), x, factor * cotangent)[0] / factor
    assert_same([actual], [torch.autograd.grad(head(x), x, cotangent)[0]], 1e-4)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_gradients_stay_visible_and_apart(value, make_head):
    head = make_head(16)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    cotangent = torch.randn_like(x)
    clean = torch.autograd.grad(head(x), x, cotangent)[0]
    cotangent[0, 0, 0, 0] = value
    grad = torch.autograd.grad(head(x), x, cotangent)[0]
    assert not grad[0].isfinite().all()
    torch.testing.assert_close(grad[1], clean[1])


def test_frozen_parameters_and_input(problem):
    head, x, cotangent = problem(Implicit())
    everything = gradients(head, x, cotangent)
    head.requires_grad_(False)
    torch.testing.assert_close(torch.autograd.grad(head(x), x, cotangent)[0], everything[0])
    head.requires_grad_(True)
    params = list(head.parameters())
    for a, e in zip(torch.autograd.grad(head(x.detach()), params, cotangent), everything[1:], strict=True):
        torch.testing.assert_close(a, e)


def test_unroll_ignores_the_adjoint(problem):
    head, x, cotangent = problem(JacobianFree())
    head.solver = Unroll(3)
    expected = torch.autograd.grad(
        reference.picard(specification(head, x), torch.zeros_like(x), steps=3), [x, *head.parameters()], cotangent
    )
    assert_same(gradients(head, x, cotangent), expected)
