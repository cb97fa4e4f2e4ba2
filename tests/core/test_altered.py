"""Blocks whose modules were exchanged, adapted or hooked: F is what calling them gives, and nothing is ignored."""

import copy
import logging
import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm

from ifr_fast import Anderson, Broyden, IFRHead, Implicit, JacobianFree, Phantom, Shine, Unroll, Unrolled, altered
from ifr_fast.diagnostics import adjoint_residual, spectral_radius


class StandardisedConv2d(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), True)) / (w.std((1, 2, 3), keepdim=True) * 9)
        return self._conv_forward(x, w, self.bias)


class LowRank(nn.Module):
    """A convolution and a trainable change of low rank beside it, as LoRA's."""

    def __init__(self, base):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Conv2d(base.in_channels, 2, 3, padding=1, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Faded(nn.Module):
    def forward(self, weight):
        return weight * torch.linspace(0.3, 1, len(weight)).view(-1, *[1] * (weight.dim() - 1))


def standardise(block):
    block.conv1.__class__ = StandardisedConv2d


def dilate(block):
    block.conv1 = nn.Conv2d(8, 8, 3, padding=2, dilation=2)


def adapt(block):
    block.conv1, block.conv2 = LowRank(block.conv1), LowRank(block.conv2)


def other_eps(block):
    block.gn2.eps = 0.5


def no_affine(block):
    block.gn1 = nn.GroupNorm(2, 8, affine=False)


def other_norm(block):
    block.gn2 = nn.InstanceNorm2d(8)


def hook(block):
    block.gn1.register_forward_hook(lambda module, inputs, output: output * torch.linspace(0.5, 1.5, 8).view(8, 1, 1))


def pre_hook(block):
    block.conv2.register_forward_pre_hook(lambda module, inputs: (inputs[0].sin(),))


def hook_on_the_block(block):
    block.register_forward_hook(lambda module, inputs, output: 0.5 * output)


def own_forward(block):
    block.conv1.forward = lambda x: torch.conv2d(x, block.conv1.weight.flip(2), padding=1)


def circular(block):
    def forward(self, x, weight, bias):
        return torch.conv2d(nn.functional.pad(x, (1, 1, 1, 1), mode="circular"), weight, bias)

    block.conv2._conv_forward = forward.__get__(block.conv2)


def subclass(block):
    class Half(type(block)):
        def forward(self, z, x, dtype=None):
            return 0.5 * super().forward(z, x, dtype)

    block.__class__ = Half


CALLED = [standardise, dilate, adapt, other_eps, no_affine, other_norm, hook, pre_hook, hook_on_the_block, own_forward]
CALLED += [circular, subclass]


def prune_half(block):
    prune.l1_unstructured(block.conv1, "weight", 0.5)


def old_spectral_norm(block):
    spectral_norm(block.conv1)
    block.conv1.weight_orig.data *= 7  # of no effect


def new_spectral_norm(block):
    parametrizations.spectral_norm(block.conv2)


def own_parametrisation(block):
    parametrize.register_parametrization(block.conv2, "weight", Faded())


def norm_parametrisation(block):
    parametrize.register_parametrization(block.gn2, "weight", Faded())


READ = [prune_half, old_spectral_norm, new_spectral_norm, own_parametrisation, norm_parametrisation]


def contracting_head(make_head, **options):
    head = make_head(8, groups=2, weight_norm=False, post_gain=0.2, dtype=torch.float64, **options)
    head.solver, head.adjoint = Broyden(60, rtol=1e-12), Implicit(60, rtol=1e-12)
    return head


def equilibrium_by_calls(block, x):
    """The plain iteration, in autograd's sight, far beyond convergence."""
    z = torch.zeros_like(x)
    for _ in range(50):
        r = z + x
        y = block.gn2(block.conv2(torch.relu(block.gn1(block.conv1(r)))))
        z = block.gn3(torch.relu(y + r))
    return z


@pytest.mark.parametrize("alter", CALLED + READ, ids=lambda alter: alter.__name__)
def test_the_equilibrium_and_its_gradients_are_those_of_the_modules(alter, make_head):
    head = contracting_head(make_head).eval()
    x = torch.randn(2, 8, 5, 4, dtype=torch.float64, requires_grad=True)
    before = head(x)
    alter(head.block)
    head.double().eval()
    params = [p for p in head.parameters() if p.requires_grad]
    actual = head(x)
    if "spectral_norm" not in alter.__name__:  # a scale, which the GroupNorm after it takes away
        assert not torch.allclose(actual, before, rtol=1e-3, atol=1e-3)
    assert bool(head.altered()) == (alter in CALLED)
    if alter in (hook_on_the_block, subclass):
        z = torch.zeros_like(x)
        for _ in range(50):
            z = head.block(z, x)
        expected = z
    else:
        expected = equilibrium_by_calls(head.block, x)
    torch.testing.assert_close(actual, expected, rtol=1e-8, atol=1e-8)
    grad = torch.randn_like(x)
    for a, e in zip(
        torch.autograd.grad(actual, [x, *params], grad),
        torch.autograd.grad(expected, [x, *params], grad),
        strict=True,
    ):
        torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6 * e.abs().max().item())


@pytest.mark.parametrize(
    "options",
    [
        dict(solver=Anderson(rtol=1e-8)), dict(adjoint=Phantom()), dict(adjoint=JacobianFree()), dict(adjoint=Shine()),
        dict(adjoint=Unrolled()), dict(solver=Unroll(3)), dict(form="plain"), dict(backend="eager"),
    ],
    ids=str,
)  # fmt: skip
def test_every_option_serves_an_adapted_block(options, make_head):
    """An adapter of zeros changes nothing: the results are those of the kernels."""
    head = make_head(8, groups=2, weight_norm=False, post_gain=0.2, **options)
    called = copy.deepcopy(head)
    adapt(called.block)
    for conv in (called.block.conv1, called.block.conv2):
        conv.base.requires_grad_()
        nn.init.zeros_(conv.up.weight)
    x = torch.randn(3, 8, 5, 4).contiguous(memory_format=torch.channels_last)
    inputs = [x.clone(memory_format=torch.preserve_format).requires_grad_() for _ in range(2)]
    values = head(inputs[0]), called(inputs[1])
    assert values[1].stride() == x.stride()
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-4)
    grads = [torch.autograd.grad(v.square().sum(), i)[0] for v, i in zip(values, inputs, strict=True)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * grads[0].abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("autocast", [False, True], ids=["own", "autocast"])
def test_sixteen_bits(dtype, autocast, make_head):
    head = make_head(8, groups=2, weight_norm=False, post_gain=0.2)
    x = torch.randn(2, 8, 5, 4)
    exact = head(x)
    head.block.conv1.register_forward_hook(lambda module, inputs, output: None)  # changes nothing, but is called
    with torch.autocast("cpu", dtype=dtype, enabled=autocast):
        y = head(x if autocast else x.to(dtype))
    assert y.dtype == (torch.float32 if autocast else dtype)
    torch.testing.assert_close(y.float(), exact, rtol=0.1, atol=0.05)
    assert head.last_solution.residual.max() < 2e-2


class EightBits(nn.Module):
    def __init__(self, conv):
        super().__init__()
        self.scale = conv.weight.detach().abs().amax() / 127
        self.weight = nn.Parameter((conv.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x):
        assert x.dtype == torch.float32
        return torch.conv2d(x, self.weight * self.scale, padding=1)


def test_integer_weights_do_not_set_the_dtype(make_head):
    head, x = make_head(8, groups=2, weight_norm=False, post_gain=0.2), torch.randn(2, 8, 5, 4)
    exact = head(x)
    head.block.conv1 = EightBits(head.block.conv1)
    torch.testing.assert_close(head(x), exact, rtol=0.1, atol=0.05)


def test_replicas_of_an_altered_head(make_head):
    """nn.DataParallel's have attributes in place of parameters."""
    head, x = make_head(8, groups=2, weight_norm=False, post_gain=0.2), torch.randn(2, 8, 5, 4)
    head.block.conv1.register_forward_hook(lambda module, inputs, output: None)
    replica = torch.nn.parallel.replicate(head, [0], detach=True)[0] if torch.cuda.is_available() else None
    if replica is None:
        replica = copy.deepcopy(head)
        for module in replica.modules():
            for name, p in list(module._parameters.items()):
                del module._parameters[name]
                setattr(module, name, None if p is None else p.detach())
    torch.testing.assert_close(replica(x.to(replica.block.gn1.weight.device)).cpu(), head(x))


def test_an_altered_head_in_bfloat16_has_its_tolerance(make_head):
    head = make_head(8, groups=2, weight_norm=False, post_gain=0.2).bfloat16()
    head.block.conv1.register_forward_hook(lambda module, inputs, output: None)
    head(torch.randn(2, 8, 5, 4))
    assert (head.last_solution.status == 0).all()


def test_an_altered_head_on_meta_and_unsaid_in_traces(make_head):
    head = make_head(8, groups=2, weight_norm=False, solver=Unroll(2))
    head.block.conv1 = nn.Conv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 5, 4)
    torch.testing.assert_close(torch.compile(head, fullgraph=True, backend="eager")(x), head(x))
    assert "a bias" in head.altered()
    for solver in (Unroll(2), Broyden()):
        head.to("meta").solver = solver
        assert head(x.to("meta")).shape == x.shape


def test_one_line_says_so(make_head, caplog):
    altered.warn_once.cache_clear()
    head = make_head(8, groups=2, weight_norm=False)
    with caplog.at_level(logging.WARNING, logger="ifr_fast"):
        head(torch.randn(1, 8, 3, 3))
        assert not caplog.records
        adapt(head.block)
        for _ in range(2):
            head(torch.randn(1, 8, 3, 3))
    assert [r.getMessage().count("LowRank") for r in caplog.records] == [1]


def test_what_has_no_equilibrium_is_refused(make_head):
    head = make_head(8, groups=2)
    head.block.gn1 = nn.Sequential(head.block.gn1, nn.Dropout(0.1))
    with pytest.raises(ValueError, match=r"block.gn1.1 drops"):
        head(torch.randn(2, 8, 3, 3))
    head.eval()(torch.randn(2, 8, 3, 3))
    head.block.gn1 = nn.BatchNorm2d(8)
    with pytest.raises(ValueError, match=r"block.gn1 normalises by the statistics of the batch"):
        head(torch.randn(2, 8, 3, 3))
    head.block.gn1.eval()
    head(torch.randn(2, 8, 3, 3))


def test_an_unroll_may_drop_out(make_head):
    head = make_head(8, groups=2, solver=Unroll(2))
    head.block.gn1 = nn.Sequential(head.block.gn1, nn.Dropout(0.5))
    head(torch.randn(2, 8, 3, 3))


def test_another_tensor_of_a_shared_class_is_not_parametrised(make_head):
    head, other = make_head(8, groups=2), make_head(8, groups=2)
    head.block.conv1.bias = nn.Parameter(torch.zeros(8))
    with pytest.raises(ValueError, match="bias of a convolution under IFRHead's weight norm"):
        parametrize.register_parametrization(head.block.conv1, "bias", Faded())
    other(torch.randn(2, 8, 3, 3))


def test_a_convolution_of_another_size_is_refused_in_words(make_head):
    head = make_head(8, groups=2)
    head.block.conv2 = nn.Conv2d(8, 8, 3)  # no padding
    with pytest.raises(ValueError, match=r"block\.gn2 gave shape"):
        head(torch.randn(2, 8, 5, 5))


def test_diagnostics_of_a_frozen_block_with_adapters(make_head):
    head = contracting_head(make_head)
    adapt(head.block)
    head.double()
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    assert adjoint_residual(head, x, torch.ones_like(x)).max() < 1e-8


def test_diagnostics_follow_the_modules(make_head):
    head = contracting_head(make_head)
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    radius, residual = spectral_radius(head, x), adjoint_residual(head, x, torch.ones_like(x))
    head.block.gn1.register_forward_hook(lambda module, inputs, output: None)
    torch.testing.assert_close(spectral_radius(head, x), radius, rtol=0.1, atol=1e-6)
    assert residual.max() < 1e-10
    assert adjoint_residual(head, x, torch.ones_like(x)).max() < 1e-10


def test_the_block_may_be_exchanged(make_head):
    class Half(nn.Module):
        def forward(self, z, x):
            return 0.5 * z + x

    head = make_head(8, groups=2, solver=Broyden(rtol=1e-6))
    head.block = Half()
    x = torch.randn(2, 8, 4, 4, requires_grad=True)
    y = head(x)
    torch.testing.assert_close(y, 2 * x)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, 2))


def test_peft_adapters_are_trained(make_head):
    peft = pytest.importorskip("peft")
    model = nn.Sequential(make_head(8, groups=2, weight_norm=False, post_gain=0.2))
    x = torch.randn(2, 8, 4, 4)
    before = model(x)
    config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False)
    model = peft.inject_adapter_in_model(config, model)
    after = model(x)
    after.square().sum().backward()
    assert not torch.allclose(before, after, rtol=1e-3, atol=1e-3)
    assert all(p.grad.abs().max() > 0 for name, p in model.named_parameters() if "lora_" in name)


FSDP = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from ifr_fast import Broyden, IFRHead, Implicit

kind, weight_norm = sys.argv[1], sys.argv[2] == "True"
dist.init_process_group("gloo")


def make():
    torch.manual_seed(0)
    exact = dict(solver=Broyden(rtol=1e-5), adjoint=Implicit(rtol=1e-5))
    head = IFRHead(32, groups=8, weight_norm=weight_norm, post_gain=0.2, **exact)
    return nn.Sequential(nn.Conv2d(32, 32, 3, padding=1), head, nn.Conv2d(32, 4, 1))


def shard(model, units):
    if kind == "fsdp1":
        return FullyShardedDataParallel(
            model, device_id=torch.device("cpu"), use_orig_params=True, auto_wrap_policy=ModuleWrapPolicy({units})
        )
    for module in [m for m in model.modules() if isinstance(m, units)]:
        fully_shard(module)
    return fully_shard(model)


whole, model, inner = make(), shard(make(), IFRHead), shard(make(), nn.Conv2d)
batch, rank = torch.randn(4, 32, 8, 8), dist.get_rank()
optimizers = [torch.optim.SGD(m.parameters(), lr=0.01) for m in (model, whole)]
for step in range(3):
    for m, x, o in zip((model, whole), (batch[2 * rank : 2 * rank + 2], batch), optimizers):
        o.zero_grad()
        m(x).square().mean().backward()
        o.step()
torch.testing.assert_close(model(batch), whole(batch), rtol=1e-3, atol=1e-3)
try:
    inner(batch)
except ValueError as error:
    assert "FSDP" in str(error)
    print("as it should be", flush=True)
dist.destroy_process_group()
os._exit(0)  # a thread of gloo's that still frees a tensor when the interpreter ends aborts the process
"""


@pytest.mark.full
@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("kind", ["fsdp1", "fsdp2"])
def test_fsdp_trains_a_head_as_one_unit_and_units_inside_are_refused(kind, weight_norm, tmp_path):
    script = tmp_path / "fsdp.py"
    script.write_text(textwrap.dedent(FSDP))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, kind, str(weight_norm)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("as it should be") == 2


def test_reading_costs_no_call(make_head, monkeypatch):
    """An untouched head takes the kernels' path."""
    head = make_head(8, groups=2)
    monkeypatch.setattr(IFRHead, "_solve_by_calls", None)
    head(torch.randn(1, 8, 3, 3))
