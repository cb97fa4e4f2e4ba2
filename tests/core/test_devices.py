"""Tensors on several devices, on meta, and parameters that hooks bring from elsewhere."""

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ifr_fast import Broyden, IFRHead, JacobianFree, Phantom, Shine, Unroll, Unrolled, fixed_point

OPTIONS = [
    {}, dict(adjoint=JacobianFree()), dict(adjoint=Phantom()), dict(adjoint=Shine()), dict(adjoint=Unrolled()),
    dict(solver=Unroll(2)), dict(form="plain"), dict(weight_norm=False),
]  # fmt: skip


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_all_on_meta_gives_shapes(options):
    with torch.device("meta"):
        head, x = IFRHead(8, groups=2, **options), torch.randn(3, 8, 4, 5, requires_grad=True)
    y = head(x)
    assert (y.device.type, y.shape, y.dtype) == ("meta", x.shape, x.dtype)
    y.sum().backward()
    assert all(p.grad.shape == p.shape for p in [x, *head.parameters()])


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fake_tensors_give_shapes(options):
    head = IFRHead(8, groups=2, **options)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = mode.from_tensor(torch.randn(3, 8, 4, 5).contiguous(memory_format=torch.channels_last))
        y = head(x)
    assert y.shape == x.shape
    assert y.stride() == x.stride()


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("part", ["conv1", "gn1", "gn2"])
def test_a_part_on_meta_is_refused(part, options):
    head, x = IFRHead(8, groups=2, **options), torch.randn(2, 8, 4, 4)
    getattr(head.block, part).to("meta")
    with pytest.raises(ValueError, match=rf"block\.{part}\.weight .* on meta: expected .* cpu"):
        head(x)
    with pytest.raises(ValueError, match=rf"block\.{part}\.weight"):
        head.block(x, x)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_input_on_meta_is_refused(options):
    with pytest.raises(ValueError, match=r"block\.conv1\.weight .* on cpu: expected .* meta"):
        IFRHead(8, groups=2, **options)(torch.randn(2, 8, 4, 4, device="meta"))


def test_ops_refuse_several_devices():
    ops, head = torch.ops.ifr_fast, IFRHead(8, groups=2)
    x, weight, params = torch.randn(2, 8, 4, 4), torch.ones(8), head.block.tensors()
    there = [t.to("meta") for t in params]
    call = head.call(torch.float32)
    calls = [
        lambda: ops.norm_relu(x, weight, weight.to("meta"), 2, "auto"),
        lambda: ops.norm_tail(x, x.to("meta"), [weight, weight], 2, "auto"),
        lambda: ops.solve(x, [*params[:-1], there[-1]], call),
        lambda: ops.solve(x.to("meta"), params, call),
        lambda: ops.solve_backward(x, x.to("meta"), x, params, [x.new_empty(2, 0)] * 3, call),
    ]
    for refused in calls:
        with torch.no_grad(), pytest.raises(ValueError, match="expected all on one device"):
            refused()


@pytest.mark.parametrize("solver", [Broyden(), Unroll(2)], ids=str)
def test_fixed_point_refuses_another_device(solver):
    with pytest.raises(ValueError, match=r"f returned shape .* on meta"):
        fixed_point(lambda z: z.to("meta"), torch.zeros(2, 3), solver=solver)
    assert fixed_point(torch.sin, torch.zeros(2, 3, device="meta"), solver=solver)[0].is_meta


@pytest.mark.parametrize("name", ["conv1", "conv2", "gn1", "gn2", "gn3"])
@pytest.mark.parametrize("change", ["fewer", "empty", "integers"])
def test_parameters_of_another_size_or_dtype_are_named(name, change):
    head = IFRHead(8, groups=2, weight_norm=False)
    module = getattr(head.block, name)
    weight = module.weight.detach()
    new = {"fewer": weight[:4], "empty": weight[:0], "integers": weight.long()}[change]
    module.weight = nn.Parameter(new.clone(), requires_grad=False)
    with pytest.raises(ValueError, match=rf"block\.{name}\.weight has shape"):
        head(torch.randn(2, 8, 4, 4))


@pytest.mark.parametrize("weight_norm", [False, True])
@pytest.mark.parametrize("kind", ["cpu_offload", "disk_offload"])
def test_accelerate_offloading(kind, weight_norm, make_head, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model = nn.Sequential(make_head(8, groups=2, weight_norm=weight_norm, post_gain=0.3)).eval()
    x = torch.randn(2, 8, 4, 5)
    with torch.no_grad():
        before = model(x)
        extra = [tmp_path] if kind == "disk_offload" else []
        getattr(accelerate, kind)(model, *extra, execution_device=torch.device("cpu"))
        torch.testing.assert_close(model(x), before, rtol=1e-3, atol=1e-4)
