"""jacobian_penalty: its estimate against the exact norm, its derivatives, and whose equilibrium it takes."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian

from ifr_fast import Broyden, IFRHead, Unroll, WarmupUnroll, jacobian_penalty
from ifr_fast.reference import residual_block

FORMS = ("released", "plain")


def squared_jacobian(head, x, z, *, create_graph=False):
    """‖∂F/∂z‖² / (C·H·W) at z, the mean over samples, by the specification and every entry of the Jacobian."""
    block, total = head.block, 0
    for one_z, one_x in zip(z.split(1), x.split(1), strict=True):

        def value(z, x=one_x):
            return residual_block(z, x, block.tensors(), form=block.form, groups=block.groups)

        total = total + jacobian(value, one_z, create_graph=create_graph).square().sum()
    return total / z.numel()


@pytest.mark.parametrize("form", FORMS)
def test_its_mean_over_probes_is_the_exact_norm(make_head, form):
    head = make_head(8, groups=2, dtype=torch.float64, form=form, solver=Broyden(max_iter=50, rtol=1e-10))
    x = torch.randn(3, 8, 4, 3, dtype=torch.float64)
    exact = squared_jacobian(head, x, head(x).detach())
    estimates = torch.stack([jacobian_penalty(head, x) for _ in range(400)]).detach()
    error = estimates.std() / 20
    assert error < 0.1 * exact
    assert abs(estimates.mean() - exact) < 5 * error


@pytest.mark.parametrize("form", FORMS)
def test_its_gradient_is_the_exact_norms_with_the_equilibrium_held(make_head, form, monkeypatch):
    """A probe of one sample's entry e_i gives row i of the Jacobian: over all probes the estimates sum to the norm."""
    head = make_head(4, groups=2, dtype=torch.float64, form=form)
    x = torch.randn(1, 4, 2, 3, dtype=torch.float64, requires_grad=True)
    z = head(x).detach()
    params = [x, *(p for name, p in head.named_parameters() if name != "block.gn3.bias")]
    expected = torch.autograd.grad(squared_jacobian(head, x, z, create_graph=True), params)
    total = 0
    for i in range(z.numel()):
        unit = torch.zeros_like(z).flatten().index_fill(0, torch.tensor([i]), 1.0).view_as(z)
        monkeypatch.setattr(torch, "randint_like", lambda *_, unit=unit: (unit + 1) / 2)
        total = total + jacobian_penalty(head, x)
    torch.testing.assert_close(torch.autograd.grad(total, params), expected, rtol=1e-9, atol=1e-12)


def test_an_optimizer_that_follows_it_makes_the_jacobian_small(make_head):
    head = make_head(16, groups=4, solver=Broyden(max_iter=30, rtol=1e-4))
    x = torch.randn(4, 16, 6, 6)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    head(x)
    before, steps = jacobian_penalty(head, x).item(), head.last_solution.iterations.float().mean()
    for _ in range(20):
        head(x)
        optimizer.zero_grad()
        jacobian_penalty(head, x).backward()
        optimizer.step()
    head(x)
    assert jacobian_penalty(head, x).item() < 0.5 * before
    assert head.last_solution.iterations.float().mean() < steps


def test_it_takes_the_equilibrium_of_the_latest_pass_if_that_had_this_very_input(make_head, monkeypatch):
    head = make_head()
    x = torch.randn(2, 16, 5, 5)
    head(x)
    solves = []
    monkeypatch.setattr(IFRHead, "solve", lambda self, x: solves.append(x) or self._solve(x))
    jacobian_penalty(head, x)
    assert not solves
    other = x.clone()
    jacobian_penalty(head, other)
    assert [seen is other for seen in solves] == [True]
    for forget in (copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))):
        jacobian_penalty(forget(head), x)
    assert len(solves) == 3


def step(head):
    with torch.no_grad():
        head.block.gn1.weight.mul_(1.1)


CHANGES = {
    "x": lambda head, x: x.mul_(2),
    "solution": lambda head, x: head.last_solution.value.relu_(),
    "parameters in place": lambda head, x: step(head),
    "another parameter": lambda head, x: setattr(head.block.gn1, "bias", nn.Parameter(torch.randn(8).double())),
    "solver": lambda head, x: setattr(head, "solver", Broyden(max_iter=49, rtol=1e-10)),
}


@pytest.mark.parametrize("grad", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("changed", CHANGES)
def test_it_does_not_take_the_equilibrium_of_what_has_changed(make_head, changed, grad):
    head = make_head(8, groups=2, dtype=torch.float64, solver=Broyden(max_iter=50, rtol=1e-10))
    with grad():
        x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
        head(x)
        CHANGES[changed](head, x)
        found = head.equilibrium(x)
        torch.testing.assert_close(found, head(x.clone()), rtol=1e-7, atol=1e-7)


def test_a_solve_of_its_own_is_not_the_last_forward_pass(make_head):
    head = make_head()
    jacobian_penalty(head, torch.randn(2, 16, 5, 5))
    assert head.last_solution is None
    levels = [torch.randn(2, 16, size, size) for size in (5, 4)]
    for x in levels:
        head(x)
    last = head.last_solution
    jacobian_penalty(head, levels[0])
    assert head.last_solution is last
    assert head.equilibrium(levels[1]) is last.value


def test_in_a_warmup_it_solves(make_head):
    head = make_head(8, groups=2, dtype=torch.float64, solver=Broyden(max_iter=50, rtol=1e-10))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    WarmupUnroll(head, steps=1)
    head.train()(x)
    torch.manual_seed(0)
    found = jacobian_penalty(head, x)
    torch.manual_seed(0)
    torch.testing.assert_close(jacobian_penalty(head.eval(), x), found)


def test_it_is_of_the_modules_where_they_were_altered(make_head):
    head = make_head(4, groups=2, dtype=torch.float64, solver=Broyden(max_iter=50, rtol=1e-10))
    head.block.gn1 = nn.Sequential(head.block.gn1, nn.Hardtanh(-1, 1))
    assert head.altered()
    x = torch.randn(1, 4, 3, 3, dtype=torch.float64)
    exact = jacobian(lambda z: head.block(z, x), head(x).detach()).square().sum() / x.numel()
    estimates = torch.stack([jacobian_penalty(head, x) for _ in range(400)]).detach()
    assert abs(estimates.mean() - exact) < 5 * estimates.std() / 20


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_under_autocast_it_is_float32_and_near(make_head, dtype):
    head = make_head(32, groups=8)
    x = torch.randn(4, 32, 7, 7)
    head(x)
    exact = torch.stack([jacobian_penalty(head, x) for _ in range(20)]).mean().item()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        head(x)
        found = torch.stack([jacobian_penalty(head, x) for _ in range(20)]).mean()
    assert found.dtype == torch.float32
    found.backward()
    assert found.item() == pytest.approx(exact, rel=0.1)
    assert all(p.grad.isfinite().all() for name, p in head.named_parameters() if name != "block.gn3.bias")


def test_without_samples_it_is_zero(make_head):
    head = make_head()
    x = torch.zeros(0, 16, 4, 4, requires_grad=True)
    penalty = jacobian_penalty(head, x)
    penalty.backward()
    assert penalty.item() == 0
    assert x.grad.shape == x.shape


def test_without_gradients_it_is_only_measured(make_head):
    head = make_head()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            penalty = jacobian_penalty(head, torch.randn(1, 16, 4, 4))
        assert not penalty.requires_grad
        assert 0 < penalty < 10


def test_of_a_compiled_head_it_is_the_heads_own(make_head):
    head = make_head(8, groups=2, dtype=torch.float64, solver=Broyden(max_iter=50, rtol=1e-10))
    compiled = torch.compile(head, backend="eager")
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    compiled(x)
    torch.manual_seed(0)
    found = jacobian_penalty(compiled, x)
    torch.manual_seed(0)
    torch.testing.assert_close(jacobian_penalty(head, x.clone()), found)


def test_it_passes_through_the_rest_of_a_model(make_head):
    """As a term of a loss: the layers before the head get its gradient too."""
    model = nn.Sequential(nn.Conv2d(3, 16, 1), make_head())
    seen = []
    model[1].register_forward_hook(lambda head, args, output: seen.append(jacobian_penalty(head, *args)))
    model(torch.randn(2, 3, 4, 4))
    seen[0].backward()
    assert model[0].weight.grad.abs().sum() > 0


def test_within_a_compiled_loss_it_runs_as_it_is(make_head):
    head = make_head(8, groups=2)

    @torch.compile(backend="aot_eager")
    def loss(x):
        return head(x).sum() + jacobian_penalty(head, x)

    loss(torch.randn(2, 8, 4, 4)).backward()
    assert head.block.gn1.weight.grad.abs().sum() > 0


def test_what_has_no_equilibrium_is_refused(make_head):
    with pytest.raises(ValueError, match="no equilibrium"):
        jacobian_penalty(make_head(solver=Unroll(steps=2)), torch.randn(1, 16, 4, 4))
    with pytest.raises(ValueError, match=r"x has shape \(1, 8, 4, 4\)"):
        jacobian_penalty(make_head(), torch.randn(1, 8, 4, 4))
    with pytest.raises((TypeError, ValueError), match="x"):
        jacobian_penalty(make_head(), None)
    with pytest.raises(TypeError, match="head is Conv2d: expected IFRHead"):
        jacobian_penalty(nn.Conv2d(16, 16, 3), torch.randn(1, 16, 4, 4))
    head = make_head()
    refused = r"jacobian_penalty does not work under torch\.func's transforms .* torch\.autograd\.grad$"  # nor unrolled
    with pytest.raises(NotImplementedError, match=refused):
        torch.func.grad(lambda x: jacobian_penalty(head, x))(torch.randn(1, 16, 4, 4))


def test_a_block_that_ignores_z_has_none(make_head):
    class Constant(nn.Module):
        def forward(self, z, x):
            return x * self.weight

        weight = nn.Parameter(torch.ones(()))

    head = make_head()
    head.block = Constant()
    penalty = jacobian_penalty(head, torch.randn(2, 16, 4, 4))
    assert penalty.item() == 0
