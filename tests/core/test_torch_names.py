"""_torch: with torch's private names and without them the results are the same, or the answer is the safe one."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad

from ifr_fast import IFRHead, _torch


@pytest.fixture(params=[True, False], ids=["with the name", "without"])
def named(request):
    return request.param


def without(monkeypatch, owner, name):
    assert hasattr(owner, name), f"this torch has no {name}: only the fallback is tested"
    monkeypatch.delattr(owner, name)


def test_transforms(named, monkeypatch):
    if not named:
        without(monkeypatch, torch._C, "_are_functorch_transforms_active")
    seen = []
    torch.func.vmap(lambda x: seen.append(_torch.transforms_active()) or x)(torch.ones(2))
    assert (_torch.transforms_active(), *seen) == (False, named)


def test_forward_mode(named, monkeypatch):
    with forward_ad.dual_level():
        if not named:
            without(monkeypatch, forward_ad, "_current_level")
        assert _torch.forward_mode_active() is named
        monkeypatch.undo()
    assert not _torch.forward_mode_active()


def test_reference_count(named, monkeypatch):
    x = torch.ones(2)
    if not named:
        without(monkeypatch, torch._C, "_storage_Use_Count")
    before = _torch.reference_count(x)
    kept = x.view(2, 1)
    after = _torch.reference_count(x)
    assert after > before if named else after is before is None
    assert kept.shape == (2, 1)


def test_version(named, monkeypatch):
    x = torch.ones(2)
    before = _torch.version(x)
    x.add_(1)
    assert _torch.version(x) == before + 1
    with torch.inference_mode():
        assert _torch.version(torch.ones(2)) is None


def test_copy_all(named, monkeypatch):
    if not named:
        without(monkeypatch, torch, "_foreach_copy_")
    targets, sources = [torch.zeros(3), torch.zeros(2, 2)], [torch.randn(3), torch.randn(2, 2).to(torch.bfloat16)]
    _torch.copy_all(targets, sources)
    assert all(torch.equal(t, s.float()) for t, s in zip(targets, sources, strict=True))
    _torch.copy_all([], [])


def test_conv2d(named, monkeypatch):
    if not named:
        without(monkeypatch, torch, "mkldnn_convolution")
    x, weight = torch.randn(2, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 3, 3, requires_grad=True)
    actual, expected = _torch.conv2d(x, weight), torch.conv2d(x, weight, padding=1)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(y.square().sum(), [x, weight]) for y in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=[1, 2, 3])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_conv2d_gives_samples_the_same_bits_alone(dtype, memory_format, threads):
    for channels in (1, 3, 8, 11, 15, 24):
        for size in ((1, 1), (1, 3), (5, 5), (7, 7)):
            x = torch.randn(5, channels, *size, dtype=dtype).contiguous(memory_format=memory_format)
            weight = torch.randn(channels + 4, channels, 3, 3, dtype=dtype).contiguous(memory_format=memory_format)
            y = _torch.conv2d(x, weight)
            assert y.is_contiguous(memory_format=memory_format) or 1 in (channels, *size)  # those are in both
            torch.testing.assert_close(y, torch.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)
            for some in ([1, 4], [2]):
                assert torch.equal(_torch.conv2d(x[some].contiguous(memory_format=memory_format), weight), y[some])


def test_packed_conv2d(named, monkeypatch):
    _torch._packs.cache_clear()
    if not named:
        without(monkeypatch, torch._C._nn, "mkldnn_reorder_conv2d_weight")
    x, weight = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3)
    packed = _torch.packed_conv2d(weight, x)
    assert named or packed is None
    if packed is not None:
        torch.testing.assert_close(packed(x), torch.conv2d(x, weight, padding=1), rtol=1e-5, atol=1e-5)
    head = IFRHead(8, groups=2, backend="cpu")
    assert head(torch.randn(2, 8, 4, 4)).isfinite().all()
    monkeypatch.undo()
    _torch._packs.cache_clear()


def test_weight_norm(named, monkeypatch):
    if not named:
        without(monkeypatch, torch, "_weight_norm")
    gain, direction = torch.rand(3, 1, 1, 1) + 0.5, torch.randn(3, 4, 3, 3)
    norm = direction.square().sum((1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(_torch.weight_norm(gain, direction), gain * direction / norm)


def test_hooks(named, monkeypatch):
    module = nn.ReLU()
    assert not _torch.has_hooks(module)
    assert _torch.pre_hooks(module) == []
    module.register_forward_hook(lambda *_: None)
    before = module.register_forward_pre_hook(print)
    assert before.id is not None
    if not named:
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            del module.__dict__[name]
    assert _torch.has_hooks(module) is named
    assert _torch.pre_hooks(module) == ([print] if named else [])


def test_fake_tensors(named, monkeypatch):
    from torch._subclasses import fake_tensor

    with fake_tensor.FakeTensorMode():
        fake = torch.ones(2)
    if not named:
        without(monkeypatch, fake_tensor, "FakeTensor")
    assert _torch.is_fake(fake) is named
    assert not _torch.is_fake(torch.ones(2))


def test_classes_of_modules():
    assert isinstance(nn.SyncBatchNorm(2), _torch.BATCH_NORMS)
    assert isinstance(nn.FeatureAlphaDropout(), _torch.DROPOUTS)
    assert not isinstance(nn.GroupNorm(1, 2), _torch.BATCH_NORMS)


def test_a_traced_subgraph(named, monkeypatch):
    if not named:
        import torch._dynamo.symbolic_convert as convert

        without(monkeypatch, convert, "InstructionTranslator")
    assert not _torch.in_traced_subgraph()
