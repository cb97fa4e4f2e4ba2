"""The Triton norms against eager in double precision; the whole path against the split one."""

import pytest
import torch

from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import Norm
from ifr_fast.kernels.gpu import DeviceState, Tail

pytest.importorskip("triton")

from ifr_fast.kernels.triton import norm as norms
from ifr_fast.kernels.triton import norm_vjp as vjps
from ifr_fast.kernels.triton import tiles

# RMS error against RMS. The interpreter truncates where a GPU rounds to 16 bits.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.full)], ids=str
)
paths = pytest.mark.parametrize("path", ["whole", "split"])
forms = pytest.mark.parametrize(("residual", "post"), [(True, True), (True, False), (False, True)])
# (n, channels, groups, height, width): groups of 8, of 1, of 6 channels, of 32; maps of one position too.
SHAPES = [(3, 32, 4, 7, 7), (1, 5, 5, 14, 14), (2, 18, 3, 9, 11), (3, 64, 2, 1, 1), (1, 12, 4, 3, 5)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.fixture
def choose(monkeypatch):
    """Forces a path; the split path's tiles are small, so that a sample spans several."""

    def force(path):
        if path == "split":
            for module in (norms, vjps):
                monkeypatch.setattr(module, "whole_tile", lambda *args: None)
            monkeypatch.setattr(tiles, "SPLIT", 512)

    plans = norms._plan, vjps._plan
    for plan in plans:
        plan.cache_clear()
    yield force
    for plan in plans:
        plan.cache_clear()


def draw(shape, dtype, device, count):
    """count activations of a mean not zero, and three norms."""
    n, channels, groups, height, width = shape
    make = {"dtype": dtype, "device": device, "memory_format": torch.channels_last}
    tensors = [(torch.randn(n, channels, height, width) + 0.5).to(**make) for _ in range(count)]
    affines = [Norm(*torch.randn(2, channels).to(device), groups) for _ in range(3)]
    return tensors, affines


def wide(value):
    """Tensors in double precision, whatever holds them."""
    if isinstance(value, torch.Tensor):
        return value.double()
    if isinstance(value, Norm):
        return Norm(wide(value.weight), wide(value.bias), value.groups)
    return type(value)(wide(v) for v in value) if isinstance(value, (tuple, list)) else value


def assert_close(actual, expected, dtype, tolerance=None):
    """RMS errors of all tensors, nested as they come; of sums whose terms cancel, against a tenth of the inputs'."""
    if expected is None or isinstance(expected, torch.Tensor):
        assert (actual is None) == (expected is None)
        if expected is None:
            return
        assert actual.shape == expected.shape
        error = (actual.double() - expected).norm()
        assert error <= (tolerance or TOLERANCE[dtype]) * (expected.norm() + 0.1 * expected.numel() ** 0.5)
        return
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, dtype, tolerance)


def conditioned(*rstds):
    """A vjp's tolerance in single precision: a group of small variance magnifies roundings by its 1/σ."""
    return 1e-4 * max(1.0, *(float(r.max()) for r in rstds))


@dtypes
@paths
@shapes
def test_norm_relu(dtype, path, shape, device, choose):
    choose(path)
    (y,), (norm, *_) = draw(shape, dtype, device, 1)
    actual = norms.norm_relu(y, norm)
    assert actual[0].dtype == dtype
    assert actual[0].is_contiguous(memory_format=torch.channels_last)
    expected = eager.norm_relu(y.double(), wide(norm))
    assert_close(actual[0], expected[0], dtype)
    assert_close(actual[1:], expected[1:], torch.float32)


@dtypes
@paths
@forms
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_norm_tail(dtype, path, residual, post, shape, device, choose):
    choose(path)
    (y, r), (first, second, _) = draw(shape, dtype, device, 2)
    r, second = r if residual else None, second if post else None
    out, statistics = norms.norm_tail(y, r, first, second)
    assert out.dtype == torch.float32
    expected = eager.norm_tail(y.double(), wide(r), wide(first), wide(second))
    assert_close([out, statistics], expected, torch.float32)


@dtypes
@paths
@shapes
def test_norm_relu_vjp(dtype, path, shape, device, choose):
    choose(path)
    (y, grad), (norm, *_) = draw(shape, dtype, device, 2)
    _, (mean, rstd) = eager.norm_relu(y, norm)
    grad_y, grads = vjps.norm_relu_vjp(grad, y, norm, [mean, rstd], params=True)
    assert grad_y.dtype == dtype
    expected = eager.norm_relu_vjp(*wide((grad, y, norm, [mean, rstd])), params=True)
    tolerance = conditioned(rstd)
    assert_close(grad_y, expected[0], dtype, max(TOLERANCE[dtype], tolerance))
    assert_close(grads, expected[1], torch.float32, tolerance)


@dtypes
@paths
@forms
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_norm_tail_vjp(dtype, path, residual, post, shape, device, choose):
    choose(path)
    (y, r, grad), (first, second, _) = draw(shape, dtype, device, 3)
    r, second, grad = r if residual else None, second if post else None, grad.float()
    statistics = eager.norm_tail(y, r, first, second)[1]
    actual = vjps.norm_tail_vjp(grad, y, r, first, second, statistics, params=True)
    assert actual[0].dtype == dtype
    expected = eager.norm_tail_vjp(*wide((grad, y, r, first, second, statistics)), params=True)
    tolerance = conditioned(*statistics[1::2])
    assert_close(actual[0], expected[0], dtype, max(TOLERANCE[dtype], tolerance))
    assert_close(actual[1:], expected[1:], torch.float32, tolerance)


@pytest.mark.parametrize("row", [-1, 1])
@paths
@forms
def test_residual_tail(row, path, residual, post, device, choose):
    choose(path)
    (y, r, z), (first, second, _) = draw(SHAPES[0], torch.bfloat16, device, 3)
    r, second, z = r if residual else None, second if post else None, z.float()
    state = DeviceState(z, rows=3, evaluations=4, history_dtype=torch.bfloat16)
    state.history.zero_()
    norms.residual_tail(state, Tail(y, r, first, second), z, row)
    f = eager.norm_tail(y.double(), wide(r), wide(first), wide(second))[0]
    g = (f - z.double()).permute(0, 2, 3, 1).flatten(1)
    expected = torch.zeros(state.history.shape, dtype=torch.float64, device=device)
    if row >= 0:
        expected[:, row] = g
    assert_close(state.history, expected, torch.bfloat16)
    sums = torch.stack([g.square().sum(1), f.flatten(1).square().sum(1)], 1)
    assert_close(state.norm_partials.double().sum(1), sums, torch.float32)


@paths
def test_large_means_do_not_cancel(path, device, choose):
    choose(path)
    (y,), (norm, *_) = draw((1, 8, 2, 15, 20), torch.float32, device, 1)
    y += 3000
    actual = norms.norm_relu(y, norm)
    assert_close(actual, eager.norm_relu(y.double(), wide(norm)), torch.float32, 1e-3)


@paths
def test_nan_stays_in_its_sample(path, device, choose):
    choose(path)
    (y, r, z), (first, second, _) = draw((3, 16, 2, 7, 7), torch.float32, device, 3)
    clean = run(y, r, first, second, first.groups, z, None)
    y[1, 3, 2, 2] = torch.nan
    broken = run(y, r, first, second, first.groups, z, None)
    for a, b in zip(broken, clean, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
    h, *_, squares = broken
    assert h[1].isnan().any()
    assert squares[1].isnan().any()


@paths
def test_affine_gradients_are_optional(path, device, choose):
    choose(path)
    (y, r, grad), (first, second, _) = draw(SHAPES[4], torch.float32, device, 3)
    _, statistics = eager.norm_tail(y, r, first, second)
    for call in (
        lambda params: vjps.norm_relu_vjp(grad, y, first, statistics[:2], params=params),
        lambda params: vjps.norm_tail_vjp(grad, y, r, first, second, statistics, params=params),
    ):
        *without, none = call(False)
        *results, _ = call(True)
        assert none == []
        for a, b in zip(without, results, strict=True):
            assert torch.equal(a, b)


@paths
def test_stopped_samples_are_skipped(path, device, choose):
    choose(path)
    (y, r, z), (first, second, _) = draw((3, 16, 2, 7, 7), torch.float32, device, 3)
    state = DeviceState(z, rows=2, evaluations=3, history_dtype=torch.float32)
    state.status[1] = 0
    expected = run(y, r, first, second, first.groups, z, None)
    for a, b in zip(run(y, r, first, second, first.groups, z, state), expected, strict=True):
        assert torch.equal(a[[0, 2]], b[[0, 2]])
        assert a[1].isnan().all()


@paths
def test_samples_do_not_see_each_other(path, device, choose):
    choose(path)
    (y, r, z), (first, second, _) = draw((3, 16, 2, 7, 7), torch.float32, device, 3)
    together = run(y, r, first, second, first.groups, z, None)
    alone = run(y[2:], r[2:], first, second, first.groups, z[2:], None)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[2:], b)


def run(y, r, first, second, groups, z, state):
    """Every function's results per sample."""
    h, (mean, rstd) = norms.norm_relu(y, first, state=state)
    out, statistics = norms.norm_tail(y, r, first, second, state=state)
    grad_h, _ = vjps.norm_relu_vjp(z, y, first, [mean, rstd], params=False, state=state)
    grad_y, grad_r, _ = vjps.norm_tail_vjp(z, y, r, first, second, statistics, params=False, state=state)
    if state is None:
        state = DeviceState(z, rows=2, evaluations=3, history_dtype=torch.float32)
    norms.residual_tail(state, Tail(y, r, first, second), z, 0)
    return [h, mean, rstd, out, *statistics, grad_h, grad_y, grad_r, state.history[:, 0], state.norm_partials]


@paths
def test_consumed_memory_is_reused(path, device, choose):
    choose(path)
    (y, r), (first, second, _) = draw(SHAPES[0], torch.float32, device, 2)
    for call in (
        lambda y, **kwargs: norms.norm_relu(y, first, **kwargs)[0],
        lambda y, **kwargs: norms.norm_tail(y, r, first, second, **kwargs)[0],
    ):
        expected, used = call(y), y.clone()
        actual = call(used, consume=True)
        assert actual.data_ptr() == used.data_ptr()
        assert torch.equal(actual, expected)


def test_other_layouts_are_taken(device):
    """A convolution or autograd may hand over contiguous tensors."""
    (y, r, z), (first, second, _) = draw(SHAPES[0], torch.float32, device, 3)
    expected = run(y, r, first, second, first.groups, z, None)
    actual = run(y.contiguous(), r.contiguous(), first, second, first.groups, z.contiguous(), None)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("groups", [4, 16, 32])
@pytest.mark.parametrize("channels", [64, 128, 256, 512])
@pytest.mark.parametrize("positions", [1, 49, 196, 784, 15200])
def test_tiles_cover_a_sample_within_their_budget(positions, channels, groups):
    for budget in (norms.RELU, norms.TAIL, norms.RESIDUAL, vjps.NORM, vjps.TAIL, vjps.TAIL_PARAMS):
        split = tiles.split_tile(positions, channels, groups, budget)
        assert split.positions * split.blocks >= positions
        assert split.groups >= groups
        for itemsize in (2, 4):
            tile = tiles.whole_tile(positions, channels, groups, itemsize, budget)
            if tile is None:
                continue
            assert tile.positions >= positions
            assert tile.groups * tile.blocks >= groups
            assert tile.positions * tile.groups * tile.size <= budget.elements
            assert 32 * tile.warps * tile.registers <= tiles.REGISTERS
