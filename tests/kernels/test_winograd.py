"""Winograd's convolutions (csrc/cpu/winograd.cpp) against torch's in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from ifr_fast.kernels import eager, weight_cache
from ifr_fast.kernels.contract import RUNNING, Norm, Status
from ifr_fast.kernels.winograd import READ, Convolved, Operand, Winograd

TOLERANCE = 3e-6  # relative to a sample's norm; twice what noise, the worst input, needs
# n, channels, out_channels, height, width. The first is as in a mask head, the last takes many blocks a sample.
SIZES = [
    (2, 256, 256, 14, 14), (17, 32, 96, 7, 5), (3, 160, 32, 13, 19), (5, 64, 32, 1, 1), (4, 32, 64, 2, 3),
    (3, 32, 32, 4, 6), (2, 32, 64, 37, 46),
]  # fmt: skip
sizes = pytest.mark.parametrize("size", SIZES, ids=str)
transposable = pytest.mark.parametrize("transposed", [False, True])


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """The workspace holds NaN, and what lies behind it must not change."""
    made = []

    def workspace(floats):
        made.append((floats, torch.full((floats + 256,), torch.nan, dtype=torch.float32, device="cpu")))
        made[-1][1][floats:] = 7
        return made[-1][1]

    monkeypatch.setattr(weight_cache, "workspace", workspace)
    yield
    for floats, memory in made:
        assert (memory[floats:] == 7).all()


@pytest.fixture
def threads():
    """Sets the number of threads until the test ends."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def activation(n, channels, height, width):
    return torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)


def features(n, channels, height, width):
    """Like those that a detector pools: low-passed noise through a ReLU."""
    noise = torch.randn(n, channels, height + 4, width + 4)
    return F.avg_pool2d(noise, 5, stride=1).relu().contiguous(memory_format=torch.channels_last)


def he_normal(out_channels, channels):
    return torch.randn(out_channels, channels, 3, 3) * (2 / (9 * out_channels)) ** 0.5


def weight_and_input(size, transposed=False, draw=activation):
    n, channels, out_channels, height, width = size
    shape = (channels, out_channels) if transposed else (out_channels, channels)
    return he_normal(*shape), draw(n, channels, height, width)


def convolve(weight, x, *, transposed=False):
    return Winograd().convolution(weight, x, transposed=transposed)(x)


def exact(weight, x, *, transposed=False):
    return (F.conv_transpose2d if transposed else F.conv2d)(x.double(), weight.double(), padding=1)


def errors(actual, expected):
    """Of each sample, relative to its norm."""
    assert actual.shape == expected.shape
    difference = (actual.double() - expected).flatten(1)
    return difference.norm(dim=1) / (1e-30 + expected.flatten(1).norm(dim=1))


def assert_close(actual, expected, tolerance=TOLERANCE):
    found = errors(actual, expected)
    assert (found <= tolerance).all(), found


@transposable
@settings(max_examples=60, deadline=None)
@given(
    st.tuples(
        st.sampled_from([0, 1, 2, 3, 17]), st.sampled_from([32, 64, 96]), st.sampled_from([32, 64, 160]),
        st.integers(1, 40), st.integers(1, 40),
    ).filter(lambda size: size[0] * size[3] * size[4] <= 3000)
)  # fmt: skip
def test_any_size(transposed, size):
    weight, x = weight_and_input(size, transposed)
    assert_close(convolve(weight, x, transposed=transposed), exact(weight, x, transposed=transposed))


@transposable
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_remainder(height, transposed):
    """Both ways: the last tiles of a row and of a column differ."""
    for width in range(1, 10):
        weight, x = weight_and_input((2, 32, 32, height, width), transposed)
        assert_close(convolve(weight, x, transposed=transposed), exact(weight, x, transposed=transposed))


@transposable
@sizes
def test_size(size, transposed):
    weight, x = weight_and_input(size, transposed)
    y = convolve(weight, x, transposed=transposed)
    assert y.dtype == torch.float32
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert_close(y, exact(weight, x, transposed=transposed))
    assert torch.equal(convolve(weight, x.contiguous(), transposed=transposed), y)


@pytest.mark.full
@transposable
def test_level_of_a_feature_pyramid(transposed):
    weight, x = weight_and_input((2, 256, 256, 100, 152), transposed)
    assert_close(convolve(weight, x, transposed=transposed), exact(weight, x, transposed=transposed))


@pytest.mark.parametrize(("transposed", "bound"), [(False, 1.2e-6), (True, 2e-6)])
def test_accuracy(transposed, bound):
    """What a mask head convolves: features forward, and gradients, of which neighbours have nothing in common."""
    weight, x = weight_and_input(SIZES[0], transposed, activation if transposed else features)
    assert_close(convolve(weight, x, transposed=transposed), exact(weight, x, transposed=transposed), bound)


def test_one_pixel_and_one_weight():
    """A single product in each place: no error may hide in the sum of many."""
    weight, x = torch.zeros(32, 32, 3, 3), torch.zeros(1, 32, 11, 10)
    x[0, 7, 5, 6] = 1
    weight[:, 7] = torch.randn(32, 3, 3)
    for transposed in (False, True):
        weight_t = weight.transpose(0, 1).contiguous() if transposed else weight
        y, expected = (f(weight_t, x, transposed=transposed) for f in (convolve, exact))
        torch.testing.assert_close(y.double(), expected, rtol=0, atol=1e-5)
        assert (y[expected == 0].abs() <= 1e-5).all()


def operands(n, channels, height, width, status=None):
    """The operands of a solve by the names of their reads, and what eager makes of the same tensors in float64."""
    kernels, state = Winograd(), SimpleNamespace(status=status)
    norm, second = (Norm(*torch.randn(2, channels), 4) for _ in range(2))
    x, y, grad, r = (activation(n, channels, height, width) for _ in range(4))
    wide = [Norm(norm.weight.double(), norm.bias.double(), 4), Norm(second.weight.double(), second.bias.double(), 4)]
    # Near ReLU's edge float32 and float64 differ over which side a value is on.
    edge = eager.norm_tail(y.double(), None, wide[0], None)[0].abs() < 1e-4
    grad[edge] = 0
    y_sums = torch.stack([y.double().sum((2, 3)), y.double().square().sum((2, 3))], 1)[:, None]
    wide_statistics = eager.norm_relu(y.double(), wide[0])[1]
    statistics = [s.float() for s in wide_statistics]
    tail_statistics = eager.norm_tail(y, r, norm, second)[1]
    wide_tail = eager.norm_tail(y.double(), r.double(), *wide)[1]
    cotangent = grad.clone()
    cotangent[(eager.norm_tail(y.double(), r.double(), wide[0], None)[0].abs() < 1e-4)] = 0
    return {
        "sum": (kernels.shift(x, y, torch.float32, state), x.double() + y.double()),
        "norm_relu": (
            kernels.norm_relu(Convolved(y, y_sums), norm, state=state)[0],
            eager.norm_relu(y.double(), wide[0])[0],
        ),
        "norm_relu_vjp": (
            kernels.norm_relu_vjp(grad, y, norm, statistics, params=False, state=state)[0],
            eager.norm_relu_vjp(grad.double(), y.double(), wide[0], wide_statistics, params=False)[0],
        ),
        "norm_vjp": (
            kernels.norm_tail_vjp(cotangent, y, r, norm, second, tail_statistics, params=False, state=state)[0],
            eager.norm_tail_vjp(cotangent.double(), y.double(), r.double(), *wide, wide_tail, params=False)[0],
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", ["sum", "norm_relu", "norm_relu_vjp", "norm_vjp"])
@pytest.mark.parametrize(
    "size", [(2, 256, 64, 14, 14), (3, 64, 96, 7, 5), (0, 32, 32, 5, 5), (2, 32, 64, 30, 33)], ids=str
)
def test_what_is_computed_while_reading(name, size):
    n, channels, out_channels, height, width = size
    operand, read = operands(n, channels, height, width)[name]
    assert operand.read == getattr(READ, name)
    weight = he_normal(out_channels, channels)
    result = Winograd().convolution(weight, operand.x)(operand)
    forward = name in ("sum", "norm_relu")
    assert isinstance(result, Convolved) == forward
    # A GroupNorm of few or alike values magnifies the roundings of what it is given.
    assert_close(result.y if forward else result, exact(weight, read), 3 * TOLERANCE)
    if forward:
        y = result.y.double()
        sums = torch.stack([y.sum((2, 3)), y.square().sum((2, 3))], 1)
        terms = torch.stack([y.abs().sum((2, 3)), y.square().sum((2, 3))], 1)
        assert ((result.sums.sum(1) - sums).abs() <= 1e-6 * terms).all()


@sizes
def test_sums_of_each_row_of_tiles(size):
    weight, x = weight_and_input(size)
    y, sums = Winograd().convolution(weight, x)(Operand(READ.sum, x, None, x))
    rows = y.double().split(4, dim=2)
    assert sums.shape == (len(x), len(rows), 2, len(weight))
    for part, row in zip(sums.unbind(1), rows, strict=True):
        assert ((part[:, 0] - row.sum((2, 3))).abs() <= 1e-6 * row.abs().sum((2, 3))).all()
        torch.testing.assert_close(part[:, 1], row.square().sum((2, 3)), rtol=1e-6, atol=0)


def results(weight, operand):
    """y and the sums of y, of memory that is NaN where nothing is written."""
    return Winograd().convolution(weight, operand.x)(operand)


def samples(operand, index):
    picked = [t if t is None or (t.dim() == 1 and len(t) != len(operand.x)) else t[index] for t in operand[1:]]
    format = torch.channels_last
    x, status, other, coefficients, bias = picked
    other = None if other is None else other.contiguous(memory_format=format)
    return Operand(operand.read, x.contiguous(memory_format=format), status, other, coefficients, bias)


@pytest.mark.parametrize("name", ["sum", "norm_relu", "norm_relu_vjp", "norm_vjp"])
@pytest.mark.parametrize(
    "size",
    [(17, 64, 96, 14, 14), (17, 96, 256, 7, 5), (5, 32, 320, 13, 19), (2, 64, 32, 1, 1), (3, 32, 64, 30, 41)],
    ids=str,
)
def test_bits_depend_neither_on_threads_nor_on_batch_mates(name, size, poisoned, threads):
    n, channels, out_channels, height, width = size
    status = torch.full((n,), RUNNING)
    operand = operands(n, channels, height, width, status)[name][0]
    weight = he_normal(out_channels, channels)
    tensors = (lambda result: result) if name in ("sum", "norm_relu") else (lambda result: [result])
    threads(1)
    expected = [t.clone() for t in tensors(results(weight, operand))]
    assert not any(t.isnan().any() for t in expected)
    running = torch.rand(n) < 0.5
    for count in (1, 2, 3, 4, 7):
        threads(count)
        for actual, whole in zip(tensors(results(weight, operand)), expected, strict=True):
            assert torch.equal(actual, whole)
        for i in {0, n // 2, n - 1}:
            for actual, whole in zip(tensors(results(weight, samples(operand, [i]))), expected, strict=True):
                assert torch.equal(actual[0], whole[i])
        status[~running] = torch.tensor([Status.CONVERGED, Status.DIVERGED, Status.NONFINITE])[torch.arange(n) % 3][
            ~running
        ]
        for actual, whole in zip(tensors(results(weight, operand)), expected, strict=True):
            assert torch.equal(actual[running], whole[running])
            assert actual[~running].isnan().all()
        status.fill_(RUNNING)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("size", [(5, 64, 32, 14, 14), (3, 32, 64, 5, 6)], ids=str)
def test_what_is_not_finite_stays_in_its_sample(size, bad, threads):
    weight, x = weight_and_input(size)
    expected, spoilt = convolve(weight, x), x.clone()
    spoilt[1, 3, 2, 4] = bad
    for count in (1, 4):
        threads(count)
        y = convolve(weight, spoilt)
        assert not y[1].isfinite().all()
        for i in (0, *range(2, size[0])):
            assert torch.equal(y[i], expected[i])


def fake(shape):
    with FakeTensorMode():
        return torch.randn(shape)


def launch(**changes):
    """One convolution of 32 channels of an operand that is right but for the changes."""
    x = activation(2, 32, 6, 5)
    right = {
        "weight": he_normal(64, 32), "read": READ.norm_relu_vjp, "x": x, "status": torch.full((2,), RUNNING),
        "other": x.clone(memory_format=torch.preserve_format), "coefficients": torch.randn(2, 5, 32),
        "bias": torch.randn(32),
    }  # fmt: skip
    weight, *operand = (right | changes).values()
    convolution = Winograd().convolution(weight, x)
    return convolution(Operand(*operand))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("x", torch.randn(2, 64, 6, 5)),
        ("x", torch.randn(2, 32, 6, 5)),  # contiguous
        ("x", torch.randn(2, 32, 6)),
        ("x", torch.randn(2, 32, 0, 5)),
        ("x", activation(2, 32, 6, 5).double()),
        ("x", activation(2, 32, 6, 5).to("meta")),
        ("x", fake((2, 32, 6, 5))),
        ("other", torch.randn(2, 32, 6, 5)),
        ("other", activation(2, 32, 5, 6)),
        ("other", activation(2, 32, 6, 5).double()),
        ("other", activation(2, 32, 6, 10)[..., ::2]),
        ("other", None),
        ("status", torch.full((2,), RUNNING, dtype=torch.int32)),
        ("status", torch.full((3,), RUNNING)),
        ("coefficients", torch.randn(2, 2, 32)),
        ("coefficients", torch.randn(2, 5, 32, dtype=torch.float64)),
        ("coefficients", None),
        ("bias", torch.randn(31)),
        ("bias", fake((32,))),
        ("bias", None),
    ],
    ids=lambda case: case if isinstance(case, str) else "None" if case is None else type(case).__name__,
)
def test_wrong_operands_are_refused(name, wrong):
    launch()
    with pytest.raises(ValueError, match=rf"^{name} is"):
        launch(**{name: wrong})


@pytest.mark.parametrize(
    "wrong",
    [
        torch.randn(48, 32, 3, 3),
        torch.randn(32, 40, 3, 3),
        torch.randn(0, 32, 3, 3),
        torch.randn(32, 32, 5, 5),
        torch.randn(32, 32, 3),
        torch.randn(32, 32, 3, 3).double(),
        torch.randn(32, 32, 3, 3).bfloat16(),
        torch.randn(32, 32, 3, 3).to("meta"),
        fake((32, 32, 3, 3)),
    ],
    ids=lambda w: f"{type(w).__name__} {tuple(w.shape)} {w.dtype} {w.device}",
)
@transposable
def test_wrong_weights_are_refused(wrong, transposed):
    with pytest.raises(ValueError, match=r"^weight is"):
        Winograd().convolution(wrong, activation(2, 32, 6, 5), transposed=transposed)


def test_defaults_of_torch_change_nothing():
    """Its default dtype decides how much memory torch.empty gives."""
    weight, x = weight_and_input((2, 32, 64, 6, 5))
    operand = Operand(READ.sum, x, None, x)
    expected, sums = results(weight, operand)
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            actual = results(weight, operand)
            single = convolve(weight, x + x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(actual.y, expected)
    assert torch.equal(actual.sums, sums)
    assert torch.equal(single, expected)
