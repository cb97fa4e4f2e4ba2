"""The CUDA GroupNorm chains against plain in float64: compiled for the CPU (tools/cuda_emulation), and on a GPU."""

import math
import re
import shutil
import subprocess
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import ROOT, cuda_fixture  # noqa: F401
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from machine_code import cuobjdump, instructions

from ifr_fast import _native
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import Norm
from ifr_fast.kernels.gpu import DeviceState, Tail

NVCC = shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")
FORMS = {"released": (True, True), "paper": (True, False), "plain": (False, True)}
# RMS error; of what a kernel keeps in float32, always float32's.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
forms = pytest.mark.parametrize("form", FORMS)
# Groups of fewer than four values amplify roundings, up to 1/sqrt(eps) = 316 times.
shapes = st.tuples(
    st.integers(1, 3), st.sampled_from([1, 2, 4, 5]), st.sampled_from([1, 2, 3, 8, 16, 24]), st.integers(1, 9),
    st.integers(1, 9),
).filter(lambda s: s[2] * s[3] * s[4] >= 4)  # fmt: skip
pytestmark = pytest.mark.usefixtures("one_thread")


def relaxed(examples):
    return settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def varied(examples):
    return lambda test: relaxed(examples)(given(shape=shapes)(example(shape=(1, 8, 8, 14, 14))(test)))


@pytest.fixture
def on(request):
    """The backend and where its tensors live: on a GPU, or emulated."""
    if not torch.cuda.is_available():
        return SimpleNamespace(kernels=request.getfixturevalue("cuda"), device="cpu")
    if not _native.cuda_archs:
        pytest.skip("the extension was built without CUDA kernels")
    return SimpleNamespace(kernels=import_module("ifr_fast.kernels.cuda"), device="cuda")


@pytest.fixture(params=["whole", "split"])
def cut(request, on, monkeypatch):
    """Samples small enough for one launch, or cut into tiles of a few positions all the same."""
    norm = on.kernels.norms
    norm._cut.cache_clear()
    if request.param == "split":
        monkeypatch.setattr(norm, "MOST_WHOLE", 0)
        monkeypatch.setattr(norm, "TILE", 512)
    yield request.param
    norm._cut.cache_clear()


def draw(on, shape, *types):
    """NHWC activations of these types, and two norms."""
    n, groups, per_group, height, width = shape
    channels = groups * per_group
    tensors = [torch.randn(n, channels, height, width) for _ in types]
    tensors = [x.to(on.device, t, memory_format=torch.channels_last) for x, t in zip(tensors, types, strict=True)]
    return *tensors, *(Norm(*torch.randn(2, channels, device=on.device), groups) for _ in range(2))


def double(x):
    if isinstance(x, Norm):
        return Norm(double(x.weight), double(x.bias), x.groups)
    if isinstance(x, (tuple, list)):
        return type(x)(map(double, x))
    return None if x is None else x.double()


def assume_no_edge(y, shortcut, norm, statistics):
    """No input of ReLU is so near 0 that rounding decides its sign, and with it a whole gradient."""
    u = eager._affine(*map(double, (y, norm, statistics)))
    u = u if shortcut is None else u + double(shortcut)
    assume(u.numel() == 0 or u.abs().min() > 1e-5)


def assert_close(actual, expected, dtype, statistics):
    """RMS error against RMS or the inputs' own, 1: single elements near zero say nothing. A group of small variance
    magnifies roundings by its 1/σ, and those of 1/σ itself by σ⁻². Parameters' gradients are sums over samples and
    positions, whose terms may cancel."""
    largest = max([1.0, *(float(r.max()) for r in statistics[1::2])])
    for a, b in zip(actual, expected, strict=True):
        assert (a is None) == (b is None)
        if a is None:
            continue
        assert a.shape == b.shape
        scale = largest**2 if a.dim() == 2 else largest
        tolerance = TOLERANCE[a.dtype if a.dtype == torch.float32 else dtype] * scale
        terms = expected[0].numel() if a.dim() == 1 else b.numel()
        assert torch.isfinite(a).all()
        assert (a.double() - b).norm() <= tolerance * (b.norm() + terms**0.5)


@dtypes
@varied(6)
def test_norm_relu(on, cut, poisoned, dtype, shape):
    y, grad, norm, _ = draw(on, shape, dtype, dtype)
    out, (mean, rstd) = on.kernels.norm_relu(y, norm)
    expected = eager.norm_relu(y.double(), double(norm))
    assert out.dtype == dtype
    assert_close([out, mean, rstd], [expected[0], *expected[1]], dtype, expected[1])
    # Statistics of one source, so that a value near ReLU's edge falls to the same side.
    assume_no_edge(y, None, norm, [mean, rstd])
    grad_y, grads = on.kernels.norm_relu_vjp(grad, y, norm, [mean, rstd], params=True)
    wanted, wanted_grads = eager.norm_relu_vjp(*map(double, (grad, y, norm, [mean, rstd])), params=True)
    assert grad_y.dtype == dtype
    assert_close([grad_y, *grads], [wanted, *wanted_grads], dtype, expected[1])


@dtypes
@forms
@varied(3)
def test_norm_tail(on, cut, poisoned, form, dtype, shape):
    y, r, grad, first, second = draw(on, shape, dtype, dtype, torch.float32)
    r, second = (x if given else None for x, given in zip((r, second), FORMS[form], strict=True))
    out, statistics = on.kernels.norm_tail(y, r, first, second)
    expected, exact = eager.norm_tail(*map(double, (y, r, first, second)))
    assert out.dtype == torch.float32
    assert_close([out, *statistics], [expected, *exact], dtype, exact)
    if second:
        assume_no_edge(y, r, first, statistics[:2])
    inputs = grad, y, r, first, second, statistics
    grad_y, grad_r, grads = on.kernels.norm_tail_vjp(*inputs, params=True)
    wanted, wanted_r, wanted_grads = eager.norm_tail_vjp(*map(double, inputs), params=True)
    assert grad_y.dtype == dtype
    assert_close([grad_y, grad_r, *grads], [wanted, wanted_r, *wanted_grads], dtype, exact)


@dtypes
@forms
@pytest.mark.parametrize("history", [torch.float32, torch.bfloat16], ids=str)
@varied(1)
def test_residual_tail(on, cut, poisoned, form, history, dtype, shape):
    y, r, z, first, second = draw(on, shape, dtype, dtype, torch.float32)
    r, second = (x if given else None for x, given in zip((r, second), FORMS[form], strict=True))
    f = on.kernels.norm_tail(y, r, first, second)[0]
    state = DeviceState(z, rows=3, evaluations=4, history_dtype=history)
    for row in (1, -1):  # stored, and judged only
        state.norm_partials = None
        on.kernels.norms.residual_tail(state, Tail(y, r, first, second), z, row=row)
        norms = state.norm_partials.double().sum(1)
        expected = torch.stack([(f - z).double().square().flatten(1).sum(1), f.double().square().flatten(1).sum(1)], 1)
        torch.testing.assert_close(norms, expected, rtol=1e-5, atol=1e-5)
    g = (f - z).permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(state.history[:, 1], g.to(history), rtol=0, atol=1e-6 if history == torch.float32 else 0)
    assert state.history[:, (0, 2)].isnan().all()


def test_a_mean_far_from_zero_costs_no_accuracy(on, cut):
    y, norm, _ = draw(on, (1, 2, 8, 11, 13), torch.float32)
    y = (y + 1000).contiguous(memory_format=torch.channels_last)
    out, (_, rstd) = on.kernels.norm_relu(y, norm)
    expected = eager.norm_relu(y.double(), double(norm))
    torch.testing.assert_close(rstd.double(), expected[1][1], rtol=1e-5, atol=0)
    torch.testing.assert_close(out.double(), expected[0], rtol=0, atol=2e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_not_finite_stays_in_its_group(on, cut, value):
    y, r, grad, first, second = draw(on, (3, 4, 8, 5, 6), *[torch.float32] * 3)
    clean = on.kernels.norm_tail(y, r, first, second)[0]
    y[1, 9, 2, 3] = value
    out = on.kernels.norm_relu(y, first)[0]
    assert out[1, 8:16].isnan().all()
    out, statistics = on.kernels.norm_tail(y, r, first, second)
    grad_y = on.kernels.norm_tail_vjp(grad, y, r, first, second, statistics, params=False)[0]
    for result in (out, grad_y):
        assert result[1, 8:16].isnan().all()
        result[1, 8:16] = 0
        assert result.isfinite().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


@dtypes
def test_results_do_not_depend_on_batch_mates(on, cut, dtype):
    y, r, grad, first, second = draw(on, (3, 4, 8, 9, 7), dtype, dtype, torch.float32)
    out = on.kernels.norm_relu(y, first)[0]
    tail, statistics = on.kernels.norm_tail(y, r, first, second)
    batch = on.kernels.norm_tail_vjp(grad, y, r, first, second, statistics, params=False)
    for one in (slice(i, i + 1) for i in range(3)):
        assert torch.equal(on.kernels.norm_relu(y[one], first)[0], out[one])
        alone, single = on.kernels.norm_tail(y[one], r[one], first, second)
        assert torch.equal(alone, tail[one])
        vjp = on.kernels.norm_tail_vjp(grad[one], y[one], r[one], first, second, single, params=False)
        assert all(torch.equal(a, b[one]) for a, b in zip(vjp[:2], batch[:2], strict=True))


def test_stopped_samples_are_left_alone(on, cut, poisoned):
    y, r, z, first, second = draw(on, (3, 4, 8, 5, 6), *[torch.float32] * 3)
    state = DeviceState(z, rows=2, evaluations=3, history_dtype=torch.float32)
    state.status[1] = 0
    out, (mean, rstd) = on.kernels.norm_relu(y, first, state=state)
    tail, statistics = on.kernels.norm_tail(y, r, first, second, state=state)
    grad_y, grad_r, _ = on.kernels.norm_tail_vjp(z, y, r, first, second, statistics, params=False, state=state)
    relu_vjp = on.kernels.norm_relu_vjp(z, y, first, [mean, rstd], params=False, state=state)[0]
    on.kernels.norms.residual_tail(state, Tail(y, r, first, second), z, row=0)
    for result in (out, mean, tail, *statistics, grad_y, grad_r, relu_vjp, state.history[:, 0], state.norm_partials):
        assert result[1].isnan().all()
        assert result[[0, 2]].isfinite().all()


def test_parameters_gradients_are_of_all_samples(on, cut):
    y, grad, norm, _ = draw(on, (3, 4, 8, 5, 6), torch.float32, torch.float32)
    _, (mean, rstd) = on.kernels.norm_relu(y, norm)
    state = DeviceState(y, rows=2, evaluations=3, history_dtype=torch.float32)
    state.status[1] = 0
    results = [on.kernels.norm_relu_vjp(grad, y, norm, [mean, rstd], params=True, state=s)[1] for s in (state, None)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@dtypes
def test_consumed_memory(on, cut, dtype):
    y, r, first, second = draw(on, (2, 4, 8, 5, 6), dtype, dtype)
    expected = on.kernels.norm_relu(y, first)[0], on.kernels.norm_tail(y, r, first, second)[0]
    taken = y.clone()
    out = on.kernels.norm_relu(taken, first, consume=True)[0]
    assert out.data_ptr() == taken.data_ptr()
    assert torch.equal(out, expected[0])
    out = on.kernels.norm_tail(y, r, first, second, consume=True)[0]
    assert torch.equal(out, expected[1])


@dtypes
def test_any_layout_and_alignment(on, cut, dtype):
    """A convolution or autograd may hand over another layout; a view may start anywhere."""
    y, r, grad, first, second = draw(on, (2, 4, 8, 5, 6), dtype, dtype, torch.float32)
    expected, statistics = on.kernels.norm_tail(y, r, first, second)
    expected_vjp = on.kernels.norm_tail_vjp(grad, y, r, first, second, statistics, params=True)
    unaligned = torch.empty(y.numel() + 1, dtype=dtype, device=on.device)[1:].view(2, 5, 6, 32).permute(0, 3, 1, 2)
    unaligned.copy_(y)
    assert unaligned.data_ptr() % 16 != 0
    contiguous = [x.contiguous() for x in (y, r, grad)]
    for others in ((contiguous[0], r, grad), (y, *contiguous[1:]), (unaligned, r, grad)):
        out, statistics = on.kernels.norm_tail(*others[:2], first, second)
        assert_close([out], [expected.double()], torch.float32, statistics)
        vjp = on.kernels.norm_tail_vjp(others[2], *others[:2], first, second, statistics, params=True)
        assert_close([*vjp[:2], *vjp[2]], double([*expected_vjp[:2], *expected_vjp[2]]), dtype, statistics)


def test_empty_batches(on, cut):
    y, r, grad, first, second = draw(on, (0, 4, 8, 5, 6), *[torch.float32] * 3)
    out, statistics = on.kernels.norm_tail(y, r, first, second)
    assert out.shape == y.shape
    grads = on.kernels.norm_tail_vjp(grad, y, r, first, second, statistics, params=True)[2]
    assert all((g == 0).all() for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", [7, 14, 28])
@pytest.mark.parametrize("shared", [163, 227])  # KiB: A100; H100 and B200
def test_blocks_share_a_multiprocessor(on, monkeypatch, shared, side, dtype):
    """Three forward ones or more, by their shared memory; four by their registers, as below. Two backward ones, where
    the map leaves a choice."""
    norms = on.kernels.norms
    monkeypatch.setattr(norms.device, "shared_memory", lambda device: shared << 10)
    monkeypatch.setattr(norms, "_cut", lambda n, *cut: norms.tiling(*cut))
    y = torch.empty(2, 256, side, side, dtype=dtype, device="meta")

    def blocks(plan, staged, columns):
        assert plan.whole
        scratch = 8 * (plan.threads * columns + plan.width) + 24 * plan.width
        return (shared + 1 << 10) // (plan.width * side * side * staged + scratch + 1024)

    size = y.element_size()
    for shortcut in (None, y):
        assert blocks(norms._forward_plan(y, shortcut, 32), size * (1 if shortcut is None else 2), 1) >= 3
    for staged in (2 * size, 2 * size + 4):
        plan = norms._plan(y, 32, staged=staged, columns=16 // size)
        assert blocks(plan, staged, 16 // size) >= (1 if side == 28 else 2)


@pytest.mark.skipif(NVCC is None, reason="there is no nvcc on PATH or in /usr/local/cuda")
@pytest.mark.parametrize("arch", [pytest.param(arch, marks=pytest.mark.full) for arch in (80, 90, 100)])
def test_forward_kernels_as_compiled(tmp_path, arch):
    """They leave room for four blocks of a multiprocessor, and load before they wait for the status."""
    pytest.importorskip("triton")  # which has a disassembler
    built = tmp_path / "norm.cubin"
    switches = ["-O3", "-std=c++17", f"-I{ROOT / 'csrc'}", f"-arch=sm_{arch}", "-cubin"]
    subprocess.run([NVCC, *switches, ROOT / "csrc/cuda/norm.cu", "-o", built], check=True)
    used = re.findall(r"Function \S*forward\S*:\s+REG:(\d+)", cuobjdump("--dump-resource-usage", built))
    assert max(map(int, used)) * 256 * 4 <= 65536
    kernels = [found for found in instructions(built, "forward") if "LDGSTS" in found[1]]
    assert len(kernels) == 6  # norm_relu and norm_tail of three types
    for name, code in kernels:
        assert code.index("LDGSTS") < code.index("EXIT"), name


@relaxed(300)
@given(
    groups=st.sampled_from([1, 2, 4, 5, 32]), per_group=st.integers(1, 300), positions=st.integers(1, 70_000),
    itemsize=st.sampled_from([2, 4]), staged=st.sampled_from([1, 2, 3]), shared=st.sampled_from([99, 163, 227]),
)  # fmt: skip
def test_tiles_fit_their_block(on, groups, per_group, positions, itemsize, staged, shared):
    channels, staged = groups * per_group, staged * itemsize
    assume(channels <= 2048)
    norm = on.kernels.norms
    width, length, threads, whole = norm.tiling(channels, positions, groups, itemsize, staged, shared << 10)
    assert 1 <= width <= min(channels, norm.MOST_THREADS)
    assert 1 <= length <= positions
    assert threads % 32 == 0
    assert 32 <= threads <= norm.MOST_THREADS
    assert not whole or (width % per_group == 0 and length == positions)
    vector = channels % (16 // itemsize) == 0
    assert not vector or width % (16 // itemsize) == 0
    # csrc/cuda/norm.cuh: the tiles, rounded up to 16 bytes, and its Scratch
    scratch = 8 * (max(threads, width) * (16 // itemsize if vector else 1) + width) + 24 * width
    assert width * length * staged + 3 * 16 + scratch <= shared << 10


@pytest.mark.parametrize(
    ("channels", "side", "groups", "itemsize", "expected"),
    [
        (256, 14, 32, 2, (32, 196, 256, True)),  # Mask R-CNN
        (256, 14, 4, 2, (64, 196, 256, True)),  # the released checkpoints
        (512, 14, 4, 2, (128, 196, 256, True)),  # keypoints
        (256, 7, 32, 2, (128, 49, 256, True)),
        (256, 128, 32, 2, (64, 128, 256, False)),  # a level of a feature pyramid
    ],
)
def test_how_maps_are_cut(on, channels, side, groups, itemsize, expected):
    assert on.kernels.norms.tiling(channels, side * side, groups, itemsize, 2 * itemsize, 227 << 10) == expected
