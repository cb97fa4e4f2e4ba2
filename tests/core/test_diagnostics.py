"""The diagnostics against what they estimate."""

import pytest
import torch
from torch import nn

from ifr_fast import Broyden, Implicit, Unroll, reference
from ifr_fast.diagnostics import adjoint_residual, effective_receptive_field, spectral_radius


def test_spectral_radius_is_the_largest_eigenvalues_modulus(make_head):
    head = make_head(8, groups=2, dtype=torch.float64, post_gain=0.5, solver=Broyden(60, rtol=1e-12))
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64)
    z, params = head(x).detach(), [p.detach() for p in head.block.tensors()]
    estimate = spectral_radius(head, x, iterations=400)
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(
            lambda v, i=i: reference.residual_block(v, x[i : i + 1], params, groups=2), z[i : i + 1]
        ).reshape(72, 72)
        radius = torch.linalg.eigvals(jacobian).abs().max()
        torch.testing.assert_close(estimate[i], radius, rtol=0.02, atol=0)


def test_adjoint_residual_falls_with_the_steps(make_head):
    head = make_head(16, post_gain=0.3)
    x, grad = torch.randn(2, 2, 16, 5, 5)
    residuals = []
    for steps in (1, 4, 15):
        head.adjoint = Implicit(steps, rtol=0.0)
        residuals.append(adjoint_residual(head, x, grad).max())
    assert residuals[0] > residuals[1] > residuals[2]
    assert residuals[2] < 1e-3
    head.adjoint = "jacobianfree"
    assert adjoint_residual(head, x, grad).isinf().all()
    head.solver = Unroll(2)
    with pytest.raises(ValueError, match="unroll"):
        adjoint_residual(head, x, grad)


def test_receptive_field_of_a_convolution_is_its_kernel():
    field = effective_receptive_field(nn.Conv2d(4, 4, 3, padding=1), torch.randn(2, 4, 9, 9))
    torch.testing.assert_close(field.sum(), torch.tensor(1.0))
    assert (field > 0).sum() == 9
    assert (field[3:6, 3:6] > 0).all()


def test_receptive_field_of_an_equilibrium_is_global(make_head):
    field = effective_receptive_field(make_head(16), torch.randn(4, 16, 9, 9))
    assert (field > 0).all()
