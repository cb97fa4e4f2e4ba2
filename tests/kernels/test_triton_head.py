"""IFRHead on the Triton kernels as a whole, against the float64 specification; under the interpreter without a GPU."""

import copy

import pytest
import torch

from ifr_fast import Anderson, Broyden, Implicit, JacobianFree, Phantom, Picard, Shine, backends, reference

pytestmark = [
    pytest.mark.skipif(not backends()["triton"].available, reason=backends()["triton"].reason),
    pytest.mark.usefixtures("ieee_arithmetic"),
]


def specified(head, x):
    """The same head in float64 on the CPU, on PyTorch's own operators, and x as it takes it."""
    double = copy.deepcopy(head).double().cpu()
    double.block.backend = "eager"
    return double, x.detach().double().cpu()


def gradients(head, x, cotangent):
    x = x.detach().requires_grad_()
    y = head(x)
    return y.detach(), torch.autograd.grad(y, [x, *head.block.tensors()], cotangent)


def as_plain(head):
    """The same head without weight norm, so that gradients are those of the effective weights."""
    torch.nn.utils.parametrize.remove_parametrizations(head.block.conv1, "weight")
    torch.nn.utils.parametrize.remove_parametrizations(head.block.conv2, "weight")
    return head


SOLVERS = [
    (Broyden(4, rtol=0.0), Implicit(4, rtol=0.0)),
    (Anderson(4, rtol=0.0), JacobianFree()),
    (Picard(3, rtol=0.0), Phantom(2)),
    (Broyden(4, rtol=0.0), Shine()),
]


# Eq. 5 explodes under the faster methods, and then no two roundings agree.
@pytest.mark.filterwarnings("ignore:form='paper'")
@pytest.mark.parametrize(
    ("form", "solver", "adjoint"),
    [*((form, *pair) for form in ("released", "plain") for pair in SOLVERS), ("paper", *SOLVERS[2])],
    ids=lambda option: option if isinstance(option, str) else type(option).__name__,
)
def test_forward_and_gradients(device, make_head, form, solver, adjoint):
    head = as_plain(
        make_head(16, groups=2, form=form, mid_channels=8, solver=solver, adjoint=adjoint, backend="triton")
    ).to(device)
    # Contiguous, so that the layout the kernels work in is not the caller's.
    x = 2 * torch.randn(3, 16, 5, 4, device=device)
    cotangent = torch.randn_like(x)
    y, grads = gradients(head, x, cotangent)
    double, wide_x = specified(head, x)
    expected, expected_grads = gradients(double, wide_x, cotangent.double().cpu())
    assert y.stride() == x.stride()
    torch.testing.assert_close(y.double().cpu(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(
        head.last_solution.trace.double().cpu(), double.last_solution.trace, rtol=1e-2, atol=1e-5
    )
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert (grad.double().cpu() - wanted).norm() < 2e-3 * wanted.norm() + 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bits(device, make_head, dtype):
    head = make_head(16, groups=2, solver=Broyden(4, rtol=0.0), adjoint=Implicit(4), backend="triton").to(device)
    x = 2 * torch.randn(2, 16, 4, 4, device=device).contiguous(memory_format=torch.channels_last)
    if device.type == "cpu" and dtype == torch.float16:
        pytest.skip("a CPU computes float16 in float32")
    exact = specified(head, x)[0](x.double().cpu())
    y = head.to(dtype)(x.to(dtype).requires_grad_())
    y.sum().backward()
    assert y.dtype == dtype
    assert (y.double().cpu() - exact).norm() < 0.05 * exact.norm()
    assert all(p.grad.isfinite().all() for p in head.parameters())


def test_samples_do_not_see_each_other(device, make_head):
    head = make_head(16, groups=2, solver=Broyden(5), adjoint=Implicit(5), backend="triton").to(device)
    x = 2 * torch.randn(4, 16, 4, 4, device=device)
    x[1] = torch.nan
    y = head(x)
    assert (y[1] == 0).all()
    assert y[[0, 2, 3]].isfinite().all()
    alone = head(x[2:3])
    torch.testing.assert_close(alone[0], y[2], rtol=1e-5, atol=1e-5)


def test_no_samples(device, make_head):
    head = make_head(16, groups=2, backend="triton").to(device)
    x = torch.randn(0, 16, 4, 4, device=device, requires_grad=True)
    y = head(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert all((p.grad == 0).all() for p in head.parameters())


def test_unrolls_in_either_layout(device, make_head):
    head = make_head(16, groups=2, solver="unroll", backend="triton").to(device)
    x = torch.randn(2, 16, 4, 4, device=device)
    params = [p.detach() for p in head.block.tensors()]
    z = torch.zeros_like(x)
    for _ in range(4):
        z = reference.residual_block(z, x, params, groups=2)
    for layout in (torch.contiguous_format, torch.channels_last):
        given = x.clone(memory_format=layout).requires_grad_()
        y = head(given)
        y.square().sum().backward()
        torch.testing.assert_close(y, z, rtol=1e-3, atol=1e-3)
        assert given.grad.isfinite().all()
