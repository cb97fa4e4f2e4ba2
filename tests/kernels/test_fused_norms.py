"""The norms around Winograd's convolutions against compositions of the specification's (eager)."""

import pytest
import torch
from fused_kernels import (
    activation,
    assert_close,
    forms,
    norm_relu_vjp_coefficients,
    norm_sums,
    norm_tail_vjp_coefficients,
    norms,
    shapes,
    stopped_at,
    sums_of,
    with_threads,
)

from ifr_fast import _native
from ifr_fast.kernels import cpu, eager, fused
from ifr_fast.kernels.contract import Norm


def per_channel(coefficients):
    """The coefficients of each kind (n, C, 1, 1)."""
    return [c[:, :, None, None] for c in coefficients.unbind(1)]


def reads(x, other, coefficients):
    """Read::norm_vjp of csrc/cpu/kernels.h."""
    a, _, c, d, e = per_channel(coefficients)
    return x * c - d - (other - a) * e


def reads_relu(x, other, coefficients, bias):
    """Read::norm_relu_vjp."""
    a, b, *_ = per_channel(coefficients)
    return reads(torch.where((other - a) * b + bias[:, None, None] <= 0, 0, x), other, coefficients)


@shapes
@pytest.mark.parametrize("mean", [0.0, 3.0, 1e3])
def test_norm_sums(shape, mean):
    """A mean far from zero: the sums have lost the variance."""
    n, channels, groups, height, width = shape
    y, (norm, _) = activation(n, channels, height, width) + mean, norms(channels, groups)
    center, scale = per_channel(norm_sums(y, sums_of(y), norm, None))
    _, (means, rstds) = eager.norm_relu(y.double(), Norm(norm.weight.double(), norm.bias.double(), groups))
    width = channels // groups
    error = (center.flatten(1) - means.repeat_interleave(width, 1)).abs()
    assert (error <= 1e-7 * (mean + 1)).all()
    if height > 1:  # else a group may have one value, whose variance is zero
        assert_close(scale, rstds.repeat_interleave(width, 1) * norm.weight, 5e-6)


def test_a_constant_group_has_no_variance():
    y, (norm, _) = activation(2, 64, 9, 9), norms(64, 4)
    y[0, 16:32] = 1234.567
    y[1, :16] = 0.1
    center, scale = norm_sums(y, sums_of(y), norm, None).unbind(1)
    for n, own in ((0, slice(16, 32)), (1, slice(0, 16))):
        assert torch.equal(center[n, own], y[n, own, 0, 0])
        torch.testing.assert_close(scale[n, own], 1e-5**-0.5 * norm.weight[own], rtol=1e-6, atol=0)


def test_squares_that_overflow_are_summed_anew():
    y, (norm, _) = activation(2, 32, 6, 6), norms(32, 4)
    y[0] *= 1e25
    center, scale = norm_sums(y, sums_of(y), norm, None).unbind(1)
    _, (means, rstds) = eager.norm_relu(y, norm)
    assert_close(center, means.repeat_interleave(8, 1))
    assert_close(1e20 * scale, 1e20 * rstds.repeat_interleave(8, 1) * norm.weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite_stays_in_its_group(bad):
    y, (norm, _) = activation(3, 64, 6, 6), norms(64, 4)
    expected = norm_sums(y, sums_of(y), norm, None)
    y[1, 17, 2, 3] = bad
    actual = norm_sums(y, sums_of(y), norm, None)
    assert actual[1, 1, 16:32].isnan().all()
    actual[1, :, 16:32] = expected[1, :, 16:32]
    assert torch.equal(actual, expected)


@shapes
def test_norm_relu_vjp_coefficients(shape):
    n, channels, groups, height, width = shape
    y, grad, (norm, _) = *(activation(n, channels, height, width) for _ in range(2)), norms(channels, groups)
    statistics = eager.norm_relu(y, norm)[1]
    coefficients = norm_relu_vjp_coefficients(grad, y, norm, statistics, None)
    expected, _ = cpu.norm_relu_vjp(grad, y, norm, statistics, params=False)
    actual = reads_relu(grad, y, coefficients, norm.bias)
    # Within rounding of zero either side of the ReLU is right.
    clear = eager.norm_tail(y, None, norm, None)[0].abs() > 1e-5
    assert (~clear).sum() <= clear.numel() / 100
    actual, expected = (torch.where(clear, t, 0) for t in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * scale_of(statistics))


@forms
@shapes
def test_norm_tail_vjp_coefficients(shape, shortcut, post):
    n, channels, groups, height, width = shape
    y, grad, r = (activation(n, channels, height, width) for _ in range(3))
    first, second = norms(channels, groups)
    r, second = r if shortcut else None, second if post else None
    statistics = eager.norm_tail(y, r, first, second)[1]
    x, coefficients = norm_tail_vjp_coefficients(grad, y, r, first, second, statistics, None)
    expected, expected_r, _ = cpu.norm_tail_vjp(grad, y, r, first, second, statistics, params=False)
    if shortcut:
        assert torch.equal(x, expected_r)
    torch.testing.assert_close(reads(x, y, coefficients), expected, rtol=0, atol=1e-5 * scale_of(statistics))


def scale_of(statistics):
    """By how much norms of these statistics can magnify gradients."""
    return torch.stack([r.amax().clamp(min=1.0) for r in statistics[1::2] if r.numel()] or [torch.ones(())]).prod() * 10


def test_stopped_samples_are_left_out_of_norms(monkeypatch):
    """What is computed for the others has the bits that it has without them."""
    n, stopped = 5, (0, 3)
    (y, grad, r), (first, second) = (activation(n, 64, 6, 6) for _ in range(3)), norms(64, 4)
    statistics = eager.norm_tail(y, r, first, second)[1]
    status, runs = stopped_at(*stopped, n=n), [1, 2, 4]

    def results(status):
        sums = sums_of(y)
        return [
            norm_sums(y, sums, first, status),
            norm_relu_vjp_coefficients(grad, y, first, statistics[:2], status),
            *norm_tail_vjp_coefficients(grad, y, r, first, second, statistics, status),
        ]

    expected = results(None)
    # Memory that kernels are given is 7 everywhere.
    new_empty, empty_like = torch.Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(7))
    monkeypatch.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(7))
    for threads in (1, 2, 4):
        for a, b in zip(with_threads(threads, lambda: results(status)), expected, strict=True):
            assert torch.equal(a[runs], b[runs])
            assert (a[list(stopped)] == 7).all()


def test_stopped_samples_are_left_out_of_every_norm():
    """Those that write grad_y and the forward ones, too."""
    y, norm = activation(4, 64, 6, 6), norms(64, 4)[0]
    expected, (mean, rstd) = cpu.norm_relu(y, norm)
    status, out = stopped_at(1, n=4), torch.full_like(y, 7)
    means, rstds = torch.full_like(mean, 7), torch.full_like(rstd, 7)
    _native.norm_relu(_native.DType.f32, {
        **fused._shape(y, 4, status), "y": y.data_ptr(), "shortcut": 0, **fused.parameters(y, norm, None),
        "first_mean": means.data_ptr(), "first_rstd": rstds.data_ptr(), "second_mean": 0, "second_rstd": 0,
        "out": out.data_ptr(),
    })  # fmt: skip
    for actual, all_running in ((out, expected), (means, mean), (rstds, rstd)):
        assert (actual[1] == 7).all()
        assert torch.equal(actual[[0, 2, 3]], all_running[[0, 2, 3]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_vjps_of_no_samples(dtype):
    """Where memory of no size has no address."""
    y, wide = torch.empty(0, 8, 3, 3, dtype=dtype), torch.float64 if dtype == torch.float64 else torch.float32
    norm, none = Norm(torch.ones(8, dtype=wide), torch.zeros(8, dtype=wide), 2), torch.empty(0, 2, dtype=wide)
    grad_y, grads = cpu.norm_relu_vjp(y, y, norm, [none, none], params=True)
    assert grad_y.shape == y.shape
    assert all(g.eq(0).all() for g in grads)
    grad_y, grad_r, grads = cpu.norm_tail_vjp(y.to(wide), y, y, norm, norm, [none] * 4, params=True)
    assert grad_y.shape == grad_r.shape == y.shape
    assert all(g.eq(0).all() for g in grads)
