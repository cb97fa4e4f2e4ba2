"""torch.func's transforms and forward mode: right, or refused in words."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, stack_module_state, vjp, vmap

from ifr_fast import Broyden, Implicit, JacobianFree, Phantom, Shine, Unroll, Unrolled, fixed_point

ADJOINTS = [Implicit(), JacobianFree(), Phantom(), Shine(), Unrolled()]
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
OPTIONS = dict(groups=2, post_gain=0.3, dtype=torch.float64)


def loss(head, params, x):
    return functional_call(head, params, (x,)).pow(3).sum()


@pytest.fixture
def x():
    return torch.randn(3, 8, 4, 5, dtype=torch.float64)


@adjoints
def test_grad_is_backward(adjoint, x, make_head):
    head = make_head(8, adjoint=adjoint, **OPTIONS)
    params = dict(head.named_parameters())
    expected = torch.autograd.grad(loss(head, params, x), params.values())
    actual = grad(lambda p: loss(head, p, x))({name: p.detach() for name, p in params.items()})
    torch.testing.assert_close(list(actual.values()), list(expected))


@adjoints
def test_vjp_is_backward(adjoint, x, make_head):
    head, v = make_head(8, adjoint=adjoint, **OPTIONS), torch.randn_like(x)
    value, pull = vjp(head, x)
    x.requires_grad_()
    expected = head(x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(pull(v)[0], torch.autograd.grad(expected, x, v)[0])


@adjoints
def test_gradients_per_sample(adjoint, x, make_head):
    head = make_head(8, adjoint=adjoint, **OPTIONS)
    params = {name: p.detach() for name, p in head.named_parameters()}
    each = grad(lambda p, sample: loss(head, p, sample.unsqueeze(0)))
    actual = vmap(each, in_dims=(None, 0))(params, x)
    for i in range(len(x)):
        for name, expected in each(params, x[i]).items():
            torch.testing.assert_close(actual[name][i], expected, rtol=1e-6, atol=1e-8)


def test_batches_of_batches_and_ensembles(x, make_head):
    heads = [make_head(8, **OPTIONS) for _ in range(2)]
    batches = torch.stack([x, 2 * x], 1)
    expected = torch.stack([heads[0](x), heads[0](2 * x)], 1)
    torch.testing.assert_close(vmap(heads[0], in_dims=1, out_dims=1)(batches), expected)
    assert heads[0].last_solution is None  # what its tensors stood for is gone
    params, buffers = stack_module_state(heads)
    actual = vmap(lambda p, b, x: functional_call(heads[0], (p, b), (x,)), in_dims=(0, 0, None))(params, buffers, x)
    torch.testing.assert_close(actual, torch.stack([head(x) for head in heads]))


@pytest.mark.parametrize("options", [dict(solver=Unroll(2)), dict(adjoint=Unrolled())], ids=str)
@pytest.mark.parametrize("dim", [0, 1])
def test_batches_of_batches_unrolled(dim, options, x, make_head):
    head, batches = make_head(8, **options, **OPTIONS), torch.stack([x, 2 * x], dim)
    expected = torch.stack([head(x), head(2 * x)], dim)
    torch.testing.assert_close(vmap(head, in_dims=dim, out_dims=dim)(batches), expected)


def test_jacobian_rows_are_vjps(make_head):
    head = make_head(2, groups=1, post_gain=0.3, dtype=torch.float64)
    x = torch.randn(1, 2, 2, 3, dtype=torch.float64)
    jacobian = jacrev(head)(x).reshape(x.numel(), *x.shape)
    pull = vjp(head, x)[1]
    for row, unit in zip(jacobian, torch.eye(x.numel(), dtype=x.dtype), strict=True):
        torch.testing.assert_close(row, pull(unit.view(x.shape))[0])


def test_second_derivatives_are_refused(x, make_head):
    head = make_head(8, **OPTIONS)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad(lambda x: grad(lambda x: head(x).pow(3).sum())(x).pow(2).sum())(x)


@pytest.mark.parametrize("options", [dict(solver=Unroll(3)), dict(adjoint=Unrolled())], ids=str)
def test_an_unroll_has_forward_mode(options, x, make_head):
    options = {"solver": Broyden(40, rtol=1e-12), **options}
    head, v, step = make_head(8, **options, **OPTIONS), torch.randn_like(x), 1e-6
    difference = (head(x + step * v) - head(x - step * v)) / (2 * step)
    torch.testing.assert_close(jvp(head, (x,), (v,))[1], difference, rtol=1e-4, atol=1e-6)
    with forward_ad.dual_level():
        dual = head(forward_ad.make_dual(x, v))
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, difference, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("adjoint", ADJOINTS[:4], ids=lambda a: type(a).__name__)
def test_forward_mode_of_a_solve_is_refused_in_the_same_words(adjoint, x, make_head):
    head, words = make_head(8, adjoint=adjoint, **OPTIONS), "has no forward-mode derivatives"
    calls = [(head, "IFRHead"), (lambda x: fixed_point(lambda z: z / 2 + x, x, adjoint=adjoint)[0], "fixed_point")]
    for call, name in calls:
        with pytest.raises(NotImplementedError, match=f"{name} {words}"):
            jvp(call, (x,), (x,))
        with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=f"{name} {words}"):
            call(forward_ad.make_dual(x, x))


def test_fixed_point_refuses_what_it_cannot_do(x):
    for transform in (grad, vmap, lambda f: lambda x: vjp(f, x)):
        with pytest.raises(NotImplementedError, match=r"fixed_point does not work under torch\.func.*: use an unroll"):
            transform(lambda x: fixed_point(lambda z: z / 2 + x, torch.zeros_like(x))[0].sum())(x)


@pytest.mark.parametrize("options", [dict(solver=Unroll(60)), dict(adjoint=Unrolled())], ids=str)
def test_fixed_point_unrolls_under_transforms(options):
    shift = torch.randn(1, 4, dtype=torch.float64)
    options = {"solver": Broyden(40, rtol=1e-13), **options}

    def total(shift):
        return fixed_point(lambda z: z / 2 + shift, torch.zeros_like(shift), **options)[0].sum()

    torch.testing.assert_close(grad(total)(shift), torch.full_like(shift, 2))
    torch.testing.assert_close(jvp(total, (shift,), (torch.ones_like(shift),))[1].item(), 8.0)
