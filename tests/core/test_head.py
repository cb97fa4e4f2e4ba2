"""IFRHead as a module: inputs, errors, precision, warm-up, persistence, compilation, DDP."""

import copy
import io
import os
import pickle
import subprocess
import sys
import textwrap

import pytest
import torch

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, Picard, Status, Unroll, Unrolled, WarmupUnroll, reference
from ifr_fast.diagnostics import spectral_radius

BACKENDS = ["cpu", "eager"]


def equilibrium(head, x):
    """A float64 equilibrium by the specification's plain iteration."""
    params = [p.detach().double() for p in head.block.tensors()]
    x = x.double()
    return reference.picard(
        lambda z: reference.residual_block(z, x, params, form=head.block.form, groups=head.block.groups),
        torch.zeros_like(x),
        steps=100,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "solver", [Broyden(40, rtol=1e-6), Anderson(40, rtol=1e-6), Picard(300, rtol=1e-6)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize("mid", [8, 32])
def test_reaches_the_equilibrium(backend, solver, mid, make_head):
    head = make_head(16, groups=4, mid_channels=mid, post_gain=0.3, solver=solver, backend=backend)
    x = torch.randn(3, 16, 7, 6)
    z = head(x)
    assert (head.last_solution.status == Status.CONVERGED).all()
    torch.testing.assert_close(z.double(), equilibrium(head, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (7, 5), (14, 14), (100, 152)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_shape_dtype_and_memory_format(size, channels_last, dtype, make_head):
    head = make_head(8, groups=2, solver=Broyden(2))
    head = head.to(dtype)
    format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(2, 8, *size).to(dtype, memory_format=format).requires_grad_()
    z = head(x)
    assert (z.shape, z.dtype) == (x.shape, x.dtype)
    assert z.is_contiguous(memory_format=format)
    assert z.isfinite().all()
    z.float().square().sum().backward()
    assert x.grad.isfinite().all()


def test_low_precision_stays_near_float32(make_head):
    """bfloat16 convolutions: the equilibrium within 2e-2 (measured 3e-3 to 1e-2), the residual's floor below 1e-2."""
    head = make_head(64, groups=8, post_gain=0.3, solver=Broyden(15, rtol=0.0))
    x = torch.randn(4, 64, 14, 14)
    exact = head(x)
    for dtype in (torch.bfloat16, torch.float16):
        low = head(x.to(dtype))
        assert (low.float() - exact).norm() < 2e-2 * exact.norm()
        assert head.last_solution.residual.max() < 1e-2


def test_non_contiguous_input_gives_what_its_copy_gives(make_head):
    head = make_head(8, groups=2)
    for x in (
        torch.randn(3, 8, 6, 10)[..., ::2],
        torch.randn(8, 3, 5, 6).transpose(0, 1),
        torch.randn(1, 8, 5, 6).expand(3, -1, -1, -1),
    ):
        torch.testing.assert_close(head(x), head(x.contiguous()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("solver", [Broyden(), Unroll(2)], ids=["solve", "unroll"])
def test_empty_batch(solver, make_head):
    head = make_head(8, groups=2, solver=solver)
    x = torch.randn(0, 8, 14, 14, requires_grad=True)
    z = head(x)
    z.sum().backward()
    assert z.shape == x.shape
    assert x.grad.shape == x.shape
    assert all((p.grad == 0).all() for p in head.parameters())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: IFRHead(30, groups=32), "groups=32 does not divide channels=30.*groups=2"),
        (lambda: IFRHead(64, mid_channels=48), "groups=32 does not divide mid_channels=48"),
        (lambda: IFRHead(64, form="releas"), "form='releas'.*released, paper, plain"),
        (lambda: IFRHead(0), "channels=0"),
        (lambda: IFRHead(64, solver="newton"), "solver='newton'"),
        (lambda: IFRHead(64, adjoint="guess"), "adjoint='guess'"),
        (lambda: IFRHead(64, solver=Picard(), adjoint="shine"), "Shine"),
        (lambda: IFRHead(64, backend="tpu"), "backend='tpu'"),
        (lambda: setattr(IFRHead(64), "training_unroll", -1), r"training_unroll=-1"),
        (lambda: IFRHead(64, solver=type("Mine", (Broyden,), {})()), "is a Mine: expected one of"),
        (lambda: IFRHead(64, backend="metal"), "backend='metal': expected one of"),
        (lambda: IFRHead(64)(torch.randn(2, 32, 4, 4)), r"shape \(2, 32, 4, 4\): expected \(N, 64, H, W\)"),
        (lambda: IFRHead(64)(torch.randn(2, 64, 0, 4)), r"shape \(2, 64, 0, 4\)"),
        (lambda: IFRHead(64)(torch.randn(64, 4, 4)), r"expected \(N, 64, H, W\)"),
        (lambda: IFRHead(64)(torch.zeros(1, 64, 4, 4, dtype=torch.int64)), "int64"),
        (lambda: IFRHead.from_released({"a": torch.zeros(1)}, prefix="head"), "head.conv1.weight"),
    ],
)
def test_bad_input_is_refused_in_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_paper_form_warns():
    with pytest.warns(UserWarning, match="no equilibrium"):
        IFRHead(32, form="paper")


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_bad_roi_leaves_the_others_alone(backend, make_head):
    head = make_head(16, backend=backend)
    x = torch.randn(7, 16, 6, 6)
    x[2], x[5] = torch.nan, 0
    x.requires_grad_()
    batch, solution = head(x), head.last_solution
    grad_x = torch.autograd.grad(batch[[0, 1, 3, 4, 5, 6]].square().sum(), x)[0]
    for i in range(7):
        alone = head(x[i : i + 1])
        torch.testing.assert_close(batch[i], alone[0], rtol=1e-6, atol=1e-6)
        assert solution.status[i] == head.last_solution.status[0]
        if i != 2:
            expected = torch.autograd.grad(alone.square().sum(), x)[0][i]
            torch.testing.assert_close(grad_x[i], expected, rtol=1e-4, atol=1e-5)
    assert solution.status[2] == Status.NONFINITE


def test_unroll_is_the_block_applied(make_head):
    head = make_head(8, groups=2, solver=Unroll(3), dtype=torch.float64)
    x = torch.randn(2, 8, 5, 5, dtype=torch.float64)
    z = torch.zeros_like(x)
    for _ in range(3):
        z = reference.residual_block(z, x, head.block.tensors(), groups=2)
    torch.testing.assert_close(head(x), z)
    assert head.last_solution is None


def test_defaults_of_torch_change_nothing(make_head):
    """Its default device, and its default dtype."""
    head, x = make_head(8, groups=2), torch.randn(2, 8, 4, 4)
    expected = head(x), spectral_radius(head, x, iterations=2).shape
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert torch.equal(head(x), expected[0])
            assert spectral_radius(head, x, iterations=2).shape == expected[1]
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda h: pickle.loads(pickle.dumps(h))], ids=["deepcopy", "pickle"])
def test_clones(clone, make_head):
    head = make_head(16, solver=Anderson(5))
    x = torch.randn(2, 16, 5, 5)
    head(x).sum().backward()
    head.eval()(x)
    other = clone(head)
    assert other.solver == head.solver
    assert torch.equal(other(x), head(x))
    other.solver = Broyden(2)
    assert head.solver == Anderson(5)


def test_copies_hold_no_batch(make_head):
    head = make_head(16)
    small = len(pickle.dumps(head))
    head(torch.randn(64, 16, 14, 14))
    assert len(pickle.dumps(head)) < small + 1000
    assert copy.deepcopy(head).last_solution is None
    assert head.last_solution is not None


def test_printed_with_its_solver_and_adjoint():
    words = repr(IFRHead(16, groups=4, solver=Anderson(7), adjoint="phantom"))
    assert "solver=Anderson(max_iter=7" in words
    assert "adjoint=Phantom(" in words


def test_state_dict_is_the_block_only(make_head):
    head = make_head(16)
    buffer = io.BytesIO()
    torch.save(head.state_dict(), buffer)
    buffer.seek(0)
    other = IFRHead(16, groups=4)
    other.load_state_dict(torch.load(buffer, weights_only=True))
    assert all(key.startswith("block.") for key in head.state_dict())
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(head(x), other(x))


@pytest.mark.parametrize("weight_norm", [True, False])
def test_from_released(weight_norm, make_head):
    state = {f"gn{i}.{n}": torch.randn(8) for i in (1, 2, 3) for n in ("weight", "bias")}
    for conv in ("conv1", "conv2"):
        if weight_norm:
            state[f"{conv}.weight_g"], state[f"{conv}.weight_v"] = torch.rand(8, 1, 1, 1), torch.randn(8, 8, 3, 3)
        else:
            state[f"{conv}.weight"] = torch.randn(8, 8, 3, 3)
    head = IFRHead.from_released({f"mask_head.repeat_block.{k}": v for k, v in state.items()}, "mask_head.repeat_block")
    assert head.block.groups == 4
    weight = state.get("conv1.weight")
    if weight_norm:
        v = state["conv1.weight_v"]
        weight = state["conv1.weight_g"] * v / v.flatten(1).norm(dim=1)[:, None, None, None]
    torch.testing.assert_close(head.block.conv1.weight, weight)
    assert torch.equal(head.block.gn3.bias, state["gn3.bias"])
    with pytest.raises(ValueError, match="channels=16: the checkpoint has 8"):
        IFRHead.from_released(state, channels=16)


def test_parameters_are_half_of_four_convolutions():
    stack = 4 * (256 * 256 * 9 + 256)
    ours = sum(p.numel() for p in IFRHead(256).parameters())
    assert ours == 2 * 256 * 256 * 9 + 2 * 256 + 6 * 256  # convolutions, their gains, three GroupNorms
    assert ours < 0.501 * stack


@pytest.mark.parametrize("adjoint", ["implicit", "phantom", "jacobianfree", "shine", "unrolled"])
def test_autocast_computes_in_bfloat16_and_keeps_float32_outside(adjoint, make_head):
    head = make_head(32, groups=8, adjoint=adjoint, solver=Broyden(6, rtol=0.0))
    x = torch.randn(3, 32, 7, 7, requires_grad=True)
    exact = head(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = head(x)
        z.square().sum().backward()
    assert z.dtype == torch.float32
    assert not torch.equal(z, exact)
    torch.testing.assert_close(z, exact, rtol=0.1, atol=0.1)
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in head.parameters())


def test_inference_mode(make_head):
    head = make_head(16)
    x = torch.randn(2, 16, 5, 5)
    expected = head(x)
    with torch.inference_mode():
        assert torch.equal(head(x), expected)


@pytest.mark.parametrize("kwargs", [{}, {"adjoint": "shine"}, {"adjoint": "phantom"}, {"solver": Unroll(2)}], ids=str)
def test_compiles_whole_with_gradients(kwargs, make_head):
    torch._dynamo.reset()
    # A block that contracts, so that rounding decides nothing.
    head = make_head(16, **{"post_gain": 0.3, "solver": Broyden(4, rtol=0.0), **kwargs})
    x = torch.randn(3, 16, 6, 5, requires_grad=True)
    cotangent = torch.randn_like(x)
    expected = torch.autograd.grad(head(x), [x, *head.parameters()], cotangent)
    compiled = torch.compile(head, fullgraph=True)
    z = compiled(x)
    torch.testing.assert_close(z, head(x), rtol=1e-4, atol=1e-5)
    actual = torch.autograd.grad(z, [x, *head.parameters()], cotangent)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-3, atol=1e-4)


@pytest.mark.full
def test_compiled_warmup_and_other_batch_sizes(make_head):
    torch._dynamo.reset()
    head = make_head(16).train()
    warmup = WarmupUnroll(head, steps=3)
    compiled = torch.compile(head, fullgraph=True, dynamic=True)
    kinds = []
    for n in (2, 3, 2, *[4, 2, 5] * 3):  # more than there may be specialisations
        x = torch.randn(n, 16, 5, 5)
        z = compiled(x)
        kinds.append(head.last_solution is None)
        warmup.step()
        assert z.shape == x.shape
    assert kinds == [True] * 3 + [False] * 9


def test_compiled_solution_is_reported(make_head):
    torch._dynamo.reset()
    head = make_head(16)
    torch.compile(head, fullgraph=True)(torch.randn(3, 16, 5, 5))
    assert head.last_solution.residual.shape == (3,)


DDP = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from ifr_fast import IFRHead, WarmupUnroll

dist.init_process_group("gloo")
torch.manual_seed(0)
head = IFRHead(16, groups=4)
batch = torch.randn(6, 16, 5, 5)
whole = IFRHead(16, groups=4)
whole.load_state_dict(head.state_dict())
model = DistributedDataParallel(head)
rank = dist.get_rank()
schedules = [WarmupUnroll(m, steps=1) for m in (model, whole)]
for step in range(3):  # an unroll, then two solves
    for m, x in ((model, batch[3 * rank : 3 * rank + 3]), (whole, batch)):
        m.zero_grad()
        m(x).square().mean(0).sum().backward()
    for schedule in schedules:
        schedule.step()
    for (name, a), b in zip(head.named_parameters(), whole.parameters()):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4, msg=name)
print("same gradients on rank", rank)
"""


@pytest.mark.full
def test_distributed_data_parallel(tmp_path):
    script = tmp_path / "ddp.py"
    script.write_text(textwrap.dedent(DDP))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("same gradients") == 2


def test_gradient_scaler_sees_a_nan(make_head):
    """A NaN RoI must not be hidden from AMP's overflow check."""
    head = make_head(16)
    x = torch.randn(2, 16, 5, 5)
    x[0, 0, 0, 0] = torch.nan
    head(x).square().sum().backward()
    assert not all(p.grad.isfinite().all() for p in head.parameters())


def test_the_output_may_be_changed_in_place(make_head):
    head = make_head(16)
    x = torch.randn(2, 16, 5, 5, requires_grad=True)
    expected = torch.autograd.grad(head(x).relu().square().sum(), x)[0]
    actual = torch.autograd.grad(torch.nn.Sequential(head, torch.nn.ReLU(inplace=True))(x).square().sum(), x)[0]
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("call", [lambda h, x: h(x), lambda h, x: h.block(x, x)], ids=["solve", "block"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives_are_refused_not_dropped(call, backend, make_head):
    head = make_head(8, groups=2, backend=backend)
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    (grad,) = torch.autograd.grad(call(head, x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        grad.square().sum().backward()


def test_a_second_parametrisation_survives_deepcopy(make_head):
    head = make_head(16)
    torch.nn.utils.parametrize.register_parametrization(head.block.conv1, "weight", torch.nn.Softplus())
    x = torch.randn(2, 16, 5, 5)
    assert torch.equal(copy.deepcopy(head)(x), head(x))


def test_solver_and_adjoint_may_be_assigned(make_head):
    head = make_head(16, solver=Broyden(3, rtol=0.0))
    x = torch.randn(2, 16, 5, 5)
    head(x)
    assert head.last_solution.trace.shape[0] == 4
    head.solver = dict(type="Anderson", max_iter=5, rtol=0.0)
    head.adjoint = "unrolled"
    head(x).sum().backward()
    assert head.last_solution.trace.shape[0] == 6
    assert head.adjoint == Unrolled()
    assert head.adjoint != Implicit()
    head.solver = Broyden()
    head.adjoint = "shine"
    with pytest.raises(ValueError, match="Shine"):
        head.solver = Picard()
    assert head.solver == Broyden()  # a refused assignment changes nothing
