"""Every registered op through torch.library.opcheck: schema, fake, autograd registration, compilation."""

import pytest
import torch

from ifr_fast import Broyden, Implicit, Phantom, Shine
from ifr_fast.engine.call import Call

backends = pytest.mark.parametrize("backend", ["cpu", "eager"])
layouts = pytest.mark.parametrize("format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def activation(dtype, format, grad=True):
    return torch.randn(2, 8, 4, 3).to(dtype, memory_format=format).requires_grad_(grad)


def affine(count):
    return [torch.randn(8, requires_grad=True) for _ in range(count)]


@backends
@layouts
@dtypes
def test_norm_relu(dtype, format, backend):
    y, grad = activation(dtype, format), activation(dtype, format, False)
    weight, bias = affine(2)
    torch.library.opcheck(torch.ops.ifr_fast.norm_relu, (y, weight, bias, 2, backend))
    detached = [t.detach() for t in (y, weight, bias)]
    statistics = torch.ops.ifr_fast.norm_relu(*detached, 2, backend)[1]
    torch.library.opcheck(torch.ops.ifr_fast.norm_relu_vjp, (grad, *detached, statistics, 2, backend))


@backends
@layouts
@dtypes
@pytest.mark.parametrize(("residual", "norms"), [(True, 4), (True, 2), (False, 4)])
def test_norm_tail(residual, norms, dtype, format, backend):
    y, r, grad = (
        activation(dtype, format),
        activation(dtype, format) if residual else None,
        activation(torch.float32, format, False),
    )
    norms = affine(norms)
    torch.library.opcheck(torch.ops.ifr_fast.norm_tail, (y, r, norms, 2, backend))
    y, r, norms = y.detach(), r.detach() if residual else None, [n.detach() for n in norms]
    statistics = torch.ops.ifr_fast.norm_tail(y, r, norms, 2, backend)[1]
    torch.library.opcheck(torch.ops.ifr_fast.norm_tail_vjp, (grad, y, r, norms, statistics, 2, backend))


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "eq5"}, {"dtype": torch.int8}, {"solver": Broyden()}, {"backend": "tpu"}, {"groups": "4"},
        {"groups": 0}, {"graphs": "yes"}, {"keep": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_call_is_checked(wrong):
    fields = {"form": "released", "groups": 2, "dtype": torch.float32, "backend": "auto", "adjoint": Implicit(4)}
    with pytest.raises(ValueError, match=r"expected (a form|one of|an integer|True or False)"):
        Call(**{**fields, "solver": Broyden().resolve(torch.float32), **wrong})


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '["released", 2, "float33", {"type": "Broyden"}, {"type": "Shine"}, "auto"]']
)
def test_a_call_that_is_none_is_refused(text, make_head):
    x, params = torch.randn(2, 8, 3, 3), make_head(8, groups=2).block.tensors()
    with pytest.raises(ValueError, match=r"expected what Call\.encode"):
        torch.ops.ifr_fast.solve(x, params, text)


def test_the_ops_refuse_what_is_no_block(make_head):
    solver = Broyden(3).resolve(torch.float32)
    call, keep = (Call("released", 2, torch.float32, solver, Shine(), "auto", keep=k).encode() for k in (False, True))
    x, params = torch.randn(2, 8, 3, 3), [p.detach() for p in make_head(8, groups=2).block.tensors()]
    ops = torch.ops.ifr_fast
    value, *_, history, p, q = ops.solve(x, params, keep)
    wrong = Call("released", 2, torch.float32, solver, solver, "auto").encode()
    for refused, words in (
        (lambda: ops.solve(x, params[:6], call), "params has 6 tensors: expected 8"),
        (lambda: ops.solve(x.long(), params, call), "dtype torch.int64"),
        (lambda: ops.solve(x, params, wrong), "expected an adjoint"),
        (lambda: ops.solve_backward(x, value, x, params, [], keep), "memory has 0 tensors"),
        (lambda: ops.solve_backward(x, value, x, params, [history, p, q], call), "keep=False"),
        (lambda: ops.norm_tail(x, None, [params[1]], 2, "auto"), "norms has 1 tensors"),
    ):
        with pytest.raises(ValueError, match=words):
            refused()


@backends
@pytest.mark.parametrize(
    "form", ["released", *(pytest.param(form, marks=pytest.mark.full) for form in ("plain", "paper"))]
)
@pytest.mark.parametrize("adjoint", [Implicit(4), Shine(), Phantom(2)], ids=lambda a: type(a).__name__)
@pytest.mark.filterwarnings("ignore:form='paper'")
def test_solve(adjoint, form, backend, make_head):
    head = make_head(8, groups=2, form=form)
    rule = Broyden(3, rtol=0.0).resolve(torch.float32)
    call = Call(form, 2, torch.float32, rule, adjoint, backend, keep=isinstance(adjoint, Shine)).encode()
    x = activation(torch.float32, torch.contiguous_format)
    params = [p.detach().requires_grad_() for p in head.block.tensors()]
    torch.library.opcheck(torch.ops.ifr_fast.solve, (x, params, call))
    x, params = x.detach(), [p.detach() for p in params]
    value, *_, history, p, q = torch.ops.ifr_fast.solve(x, params, call)
    backward = torch.randn_like(x), value, x, params, [history, p, q], call
    torch.library.opcheck(torch.ops.ifr_fast.solve_backward, backward)
