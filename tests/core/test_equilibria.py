"""What holds for every equilibrium, by fixed_point and by IFRHead: scales, samples solved before they begin, autocast,
layouts, samples without elements, reports of the backward solve."""

import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ifr_fast import (
    Anderson,
    Broyden,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Shine,
    Status,
    Unroll,
    Unrolled,
    fixed_point,
)

SOLVERS = [Broyden(25, rtol=1e-3), Anderson(25, rtol=1e-3), Picard(60, rtol=1e-3)]
ADJOINTS = [Implicit(), JacobianFree(), Phantom(), Shine(), Unrolled()]
solvers = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
adjoints = pytest.mark.parametrize("adjoint", ADJOINTS, ids=lambda a: type(a).__name__)
backends = pytest.mark.parametrize("backend", ["cpu", "eager"])
FLOAT32, FLOAT64 = (1e-30, 1e-20, 1.0, 1e20, 1e30), (1e-200, 1e-35, 1.0, 1e35, 1e200)


def fits(solver, adjoint):
    return isinstance(solver, Broyden) or not isinstance(adjoint, Shine)


@solvers
@adjoints
@backends
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_no_scale_is_lost(dtype, backend, adjoint, solver):
    """A map that is linear in its scale is solved alike at all of them, side by side in a batch."""
    if not fits(solver, adjoint):
        pytest.skip("Shine reuses Broyden's inverse Jacobian")
    scale = torch.tensor(FLOAT32 if dtype == torch.float32 else FLOAT64, dtype=dtype).unsqueeze(1)
    matrix = torch.randn(6, 6, dtype=dtype)
    matrix *= 0.6 / torch.linalg.matrix_norm(matrix, 2)
    x = (torch.randn(1, 6, dtype=dtype) * scale).requires_grad_()
    z, solution = fixed_point(
        lambda z: z @ matrix + x, torch.zeros_like(x), solver=solver, adjoint=adjoint, backend=backend
    )
    assert solution.status.tolist() == [Status.CONVERGED] * 5
    residual = (z @ matrix + x - z) / scale
    torch.testing.assert_close(residual.norm(dim=1), torch.zeros(5, dtype=dtype), rtol=0, atol=2e-2)
    (grad,) = torch.autograd.grad((z / scale).sum(), x)
    torch.testing.assert_close(grad * scale, (grad * scale)[2:3].expand(5, -1), rtol=1e-2, atol=1e-2)


@backends
def test_a_tiny_residual_of_a_large_value_is_no_overflow(backend):
    for size in (1e30, 1e-30):
        z0 = torch.full((2, 4), size)
        z, solution = fixed_point(lambda z, size=size: 0.5 * z + 0.5 * size, z0, backend=backend)
        assert solution.status.tolist() == [Status.CONVERGED] * 2
        torch.testing.assert_close(z / size, torch.ones(2, 4))


@solvers
@backends
def test_what_is_not_finite_is_said_so(backend, solver):
    shift = torch.tensor([torch.nan, torch.inf, 0.5, 0.0])[:, None]
    z, solution = fixed_point(lambda z: 0.3 * z + shift, torch.zeros(4, 3), solver=solver, backend=backend)
    assert solution.status.tolist() == [Status.NONFINITE] * 2 + [Status.CONVERGED] * 2
    assert solution.trace[0, :2].isnan().all()
    assert (z[:2] == 0).all()


@solvers
@adjoints
@backends
def test_samples_that_need_no_step_have_finite_gradients(backend, adjoint, solver):
    """Zero, solved before it began, solved in one step, an ordinary one and one that goes on to the end."""
    if not fits(solver, adjoint):
        pytest.skip("Shine reuses Broyden's inverse Jacobian")
    weight = torch.tensor([0.5, 0.5, 0.0, 0.5, 1.0])[:, None].requires_grad_()
    shift = torch.tensor([0.0, 1.0, 1.0, 1.0, 1.0])[:, None].requires_grad_()
    z0 = torch.tensor([0.0, 2.0, 0.0, 0.0, 0.0])[:, None].expand(5, 3).contiguous()
    z, solution = fixed_point(lambda z: weight * z + shift, z0, solver=solver, adjoint=adjoint, backend=backend)
    assert solution.iterations[:3].tolist() == [0, 0, 1]
    grads = torch.autograd.grad(z[:4].sum(), [weight, shift])
    assert all(g.isfinite().all() for g in grads)
    if isinstance(adjoint, Implicit):  # dz*/dshift = 1 / (1 - weight), three times; z0 does not matter
        torch.testing.assert_close(grads[1][:4, 0], torch.tensor([6.0, 6.0, 3.0, 6.0]), rtol=1e-2, atol=1e-2)


@solvers
@adjoints
def test_a_head_solved_to_rounding_has_finite_gradients(adjoint, solver, make_head):
    if not fits(solver, adjoint):
        pytest.skip("Shine reuses Broyden's inverse Jacobian")
    head = make_head(8, groups=2, post_gain=0.1, solver=type(solver)(25, rtol=1e-7), adjoint=adjoint)
    x = 3 * torch.randn(4, 8, 5, 4)
    x[0] = 0
    x[1] = 2  # constant maps
    x.requires_grad_()
    head(x).square().sum().backward()
    assert all(p.grad.isfinite().all() for p in [x, *head.parameters()])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("solver", SOLVERS[:2], ids=lambda s: type(s).__name__)
def test_autocast_leaves_the_solver_its_precision(solver, dtype, make_head):
    head = make_head(64, groups=8, post_gain=0.3, solver=type(solver)(12, rtol=0.0), adjoint=Unrolled())
    x = torch.randn(2, 64, 20, 20, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = head(x)
        assert head.last_solution.residual.max() < 5e-3
        linear = nn.Linear(400, 400)
        linear.weight.data.mul_(0.3)
        z, solution = fixed_point(
            lambda z: linear(z).float().tanh() + 100, torch.zeros(2, 400), solver=solver, adjoint=Unrolled()
        )
    assert (solution.status == Status.CONVERGED).all()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), [x, *head.parameters()]))
    assert torch.autograd.grad(z.sum(), linear.weight)[0].isfinite().all()


def test_f_runs_under_the_callers_autocast():
    linear, seen = nn.Linear(8, 8), []

    def f(z):
        seen.append(linear(z).dtype)
        return 0.1 * linear(z)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, _ = fixed_point(f, torch.randn(2, 8))
    z.sum().backward()
    assert set(seen) == {torch.bfloat16}


@pytest.mark.parametrize(
    "options",
    [dict(solver=Unroll(2)), dict(adjoint=Unrolled()), {}, dict(backend="eager")],
    ids=str,
)
@pytest.mark.parametrize("of_x", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("of_params", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
def test_the_layout_of_x_comes_back(of_params, of_x, options, make_head):
    head = make_head(8, groups=2, weight_norm=False, **options).to(memory_format=of_params)
    x = torch.randn(2, 8, 4, 5).contiguous(memory_format=of_x)
    assert head(x).stride() == x.stride()
    z, _ = fixed_point(
        lambda z: torch.conv2d(z, 0.01 * head.block.conv1.weight, padding=1) + 1,
        torch.zeros_like(x),
        **options,
    )
    assert z.stride() == x.stride()


@adjoints
@pytest.mark.parametrize("shape", [(4, 0), (0, 0), (3, 2, 0), (0, 5)])
def test_samples_without_elements(shape, adjoint):
    x = torch.zeros(shape, requires_grad=True)
    z, solution = fixed_point(lambda z: 0.5 * z + x, torch.zeros(shape), adjoint=adjoint)
    z.sum().backward()
    assert (z.shape, x.grad.shape, solution.residual.shape) == (shape, shape, shape[:1])


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("keep", [lambda z: z, lambda z: z[0], lambda z: z.t(), lambda z: z.detach()])
def test_f_may_keep_what_it_is_given(keep, dtype, solver):
    x, kept, copies = torch.randn(2, 3, dtype=dtype), [], []

    def f(z):
        kept.append(keep(z))
        copies.append(keep(z).clone())
        return 0.3 * z.sin() + x

    fixed_point(f, torch.zeros_like(x), solver=solver)
    assert len(kept) > 2
    for view, copy in zip(kept, copies, strict=True):
        assert torch.equal(view, copy)


def test_nothing_is_copied_where_nothing_is_kept():
    addresses = set()

    def f(z):
        addresses.add(z.data_ptr())
        return 0.3 * z + 1

    with torch.no_grad():
        fixed_point(f, torch.zeros(2, 3))
    assert len(addresses) == 1


@adjoints
def test_an_inference_tensor_may_be_the_start(adjoint):
    with torch.inference_mode():
        z0 = torch.zeros(2, 3)
    x = torch.randn(2, 3, requires_grad=True)
    z, _ = fixed_point(lambda z: 0.3 * z.sin() + x, z0, adjoint=adjoint)
    z.sum().backward()
    assert x.grad.isfinite().all()


def test_a_constant_map_has_a_gradient():
    x = torch.randn(2, 3, requires_grad=True)
    z, _ = fixed_point(lambda z: x, torch.zeros(2, 3))
    torch.testing.assert_close(torch.autograd.grad(z.sum(), x)[0], torch.ones(2, 3))


def linear_map(radius):
    matrix = torch.randn(16, 16, dtype=torch.float64)
    return matrix * radius / torch.linalg.eigvals(matrix).abs().max()


def test_the_adjoint_is_reported():
    matrix, x = linear_map(0.5), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    z, solution = fixed_point(lambda z: z @ matrix + x, torch.zeros_like(x), solver=Broyden(60, rtol=1e-8))
    assert solution.adjoint.isnan().all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        grad = torch.randn_like(x)
        (actual,) = torch.autograd.grad(z, x, grad)
    assert solution.adjoint.max() <= 1e-8  # as tight as the forward solve
    exact = torch.linalg.solve(torch.eye(16, dtype=x.dtype) - matrix, grad.T).T
    torch.testing.assert_close(actual, exact, rtol=1e-5, atol=1e-6)


def test_an_unsolved_adjoint_is_warned_of():
    matrix, x = linear_map(0.9), torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    options = dict(solver=Broyden(60, rtol=1e-8), adjoint=Implicit(max_iter=2))
    z, solution = fixed_point(lambda z: z @ matrix + x, torch.zeros_like(x), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            torch.autograd.grad(z.square().sum(), x, retain_graph=True)
    assert [str(w.message).count("`adjoint`") for w in caught] == [1]  # once, though three passes were unsolved
    assert solution.adjoint.max() > 1e-3


@pytest.mark.parametrize("adjoint", [JacobianFree(), Phantom(), Shine()], ids=lambda a: type(a).__name__)
def test_adjoints_that_solve_nothing_report_it(adjoint):
    x = torch.randn(2, 3, requires_grad=True)
    z, solution = fixed_point(lambda z: 0.3 * z + x, torch.zeros(2, 3), adjoint=adjoint)
    z.sum().backward()
    assert solution.adjoint.isinf().all()


def test_implicit_takes_the_forward_solves_steps_and_tolerance():
    solver = Broyden(40, rtol=1e-6)
    assert Implicit().fitted(solver, torch.float32) == Implicit(solver=Broyden(40, 1e-6))
    assert Implicit(3, 0.5).fitted(solver, torch.float32) == Implicit(solver=Broyden(3, 0.5))
    assert Implicit().fitted(Broyden(4, rtol=0.1), torch.float32) == Implicit(
        solver=Broyden(15, 1e-3)
    )  # never looser than the default
    assert Implicit().fitted(Broyden(rtol=0.0), torch.bfloat16) == Implicit(
        solver=Broyden(15, 1e-2)
    )  # 0 is no tolerance


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("adjoint", [Implicit(), JacobianFree(), Phantom(3), Shine()], ids=lambda a: type(a).__name__)
def test_checkpointing_evaluates_f_once_more_not_once_a_step(adjoint, reentrant):
    layer, x, calls = nn.Linear(16, 16), torch.randn(4, 16, requires_grad=True), 0
    layer.weight.data *= 0.8

    def equilibrium(x):
        def f(z):
            nonlocal calls
            calls += 1
            return torch.tanh(layer(z) + x)

        return fixed_point(f, torch.zeros(4, 16), solver=Broyden(rtol=1e-5), adjoint=adjoint)[0]

    expected = torch.autograd.grad(equilibrium(x).square().sum(), [x, *layer.parameters()])
    plain, calls = calls, 0
    checkpoint(equilibrium, x, use_reentrant=reentrant).square().sum().backward()
    assert calls <= 2 * plain + 1
    torch.testing.assert_close([x.grad, *(p.grad for p in layer.parameters())], list(expected))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: fixed_point(None, torch.zeros(2, 3)), "f is None: expected a callable"),
        (lambda: fixed_point(torch.sin, [0.0]), r"z0 is \[0.0\]: expected a tensor"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), params=torch.zeros(2)), "params is a Tensor"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), params=3), "params is a int"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), backend=3), "backend=3"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3).to_sparse()), "z0 has layout torch.sparse_coo"),
        (lambda: fixed_point(lambda z: z.to_sparse(), torch.zeros(2, 3)), "f returned layout torch.sparse_coo"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), solver=7), "solver=7"),
        (lambda: fixed_point(torch.sin, torch.zeros(2, 3), adjoint=[]), r"adjoint=\[\]"),
        (lambda: fixed_point(lambda z: z > 0, torch.zeros(2, 3)), "f returned dtype torch.bool"),
        (lambda: Implicit(max_iter=0), "Implicit.max_iter=0"),
        (lambda: Implicit(max_iter=True), "Implicit.max_iter=True"),
        (lambda: Broyden(max_iter=None), "Broyden.max_iter=None"),
        (lambda: Broyden(history_dtype=[]), "Broyden.history_dtype="),
        (lambda: Broyden(rtol="small"), "Broyden.rtol='small'"),
        (lambda: Broyden(workspace=1.5), "Broyden.workspace=1.5"),
        (lambda: Anderson(m="five"), "Anderson.m='five'"),
        (lambda: Phantom(damping="half"), "Phantom.damping='half'"),
    ],
)
def test_wrong_types_are_errors_that_name_them(call, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(") if "(" in words else words):
        call()


@pytest.mark.parametrize("x", [None, "x", 3.0, [[1.0]], torch.zeros(1, 8, 3, 3, dtype=torch.int32)], ids=str)
def test_a_head_names_an_input_of_a_wrong_type(x, make_head):
    with pytest.raises(ValueError, match=r"^x (is|has) "):
        make_head(8, groups=2)(x)


@pytest.mark.parametrize(
    "options",
    [
        dict(channels="8"), dict(channels=8.0), dict(groups="2"), dict(groups=2.0), dict(mid_channels=[8]),
        dict(form=1),
        dict(weight_norm="yes"), dict(post_gain="1"), dict(post_gain=None), dict(cuda_graphs=1),
        dict(backend=None), dict(solver=None), dict(adjoint=1),
    ],
    ids=str,
)  # fmt: skip
def test_a_head_names_options_of_a_wrong_type(options, make_head):
    from ifr_fast import IFRHead

    (name,) = options
    with pytest.raises(ValueError, match=name):
        IFRHead(**{"channels": 8, "groups": 2, **options})
