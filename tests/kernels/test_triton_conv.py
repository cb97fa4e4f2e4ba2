"""The implicit-GEMM convolution, and the partial sums of its epilogue, against torch.conv2d in float64."""

from types import SimpleNamespace

import pytest
import torch

from ifr_fast.kernels.contract import RUNNING

conv = pytest.importorskip("ifr_fast.kernels.triton.conv")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The interpreter cuts a float32 down to bfloat16, where a GPU rounds it.
ROUNDING = {torch.float32: 2e-3, torch.bfloat16: 2**-7, torch.float16: 2**-10}
MAPS = [(3, 1, 1), (2, 7, 7), (3, 14, 14), (1, 15, 20), (2, 3, 41)]


@pytest.fixture(autouse=True)
def _uninitialised(poisoned):
    """What a launch leaves unwritten is NaN."""


def draw(device, dtype, n, channels, out, height, width):
    """A weight and an input that dtype represents."""
    weight = (torch.randn(out, channels, 3, 3) / (3 * channels**0.5)).to(device, dtype)
    x = torch.randn(n, channels, height, width).to(device, dtype).contiguous(memory_format=torch.channels_last)
    return weight, x


def expected(weight, x):
    return torch.conv2d(x.cpu().double(), weight.cpu().double(), padding=1)


def check(y, reference, dtype):
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    error = (y.cpu().double() - reference).abs()
    assert (error <= ROUNDING[dtype] * (reference.abs() + 0.5)).all(), error.max()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "height", "width"), MAPS)
def test_matches_conv2d(device, dtype, n, height, width):
    weight, x = draw(device, dtype, n, 24, 40, height, width)
    y, partial = conv.implicit_gemm(weight, x)(x)
    assert partial is None
    check(y, expected(weight, x), dtype)


@pytest.mark.parametrize(("channels", "out"), [(1, 1), (16, 64), (50, 7), (64, 130), (100, 16)])
def test_channels_need_not_fill_a_block(device, channels, out):
    weight, x = draw(device, torch.bfloat16, 2, channels, out, 5, 6)
    check(conv.implicit_gemm(weight, x)(x)[0], expected(weight, x), torch.bfloat16)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(d, marks=pytest.mark.full) for d in DTYPES[1:])], ids=str)
def test_every_candidate(device, dtype):
    weight, x = draw(device, dtype, 3, 32, 48, 14, 14)
    gemm = conv.implicit_gemm(weight, x, statistics=True)
    reference = expected(weight, x)
    configs = conv.candidates(32, dtype, gemm.precision, gemm.chip)
    assert configs
    results = [gemm.launch(config, x) for config in configs]
    for y, partial in results:
        check(y, reference, dtype)
        check_partial(partial, y)
    if device.type == "cuda":  # the interpreter's matrix product rounds as it likes
        assert all(torch.equal(results[0][0], y) and torch.equal(results[0][1], partial) for y, partial in results)


@pytest.fixture
def _exact_float32():
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    yield
    torch.backends.cudnn.conv.fp32_precision = before


@pytest.mark.usefixtures("_exact_float32")
def test_float32_without_tf32(device):
    weight, x = draw(device, torch.float32, 2, 20, 36, 7, 7)
    gemm = conv.implicit_gemm(weight, x)
    assert gemm.precision == "ieee"
    y, _ = gemm(x)
    torch.testing.assert_close(y.cpu().double(), expected(weight, x), rtol=1e-5, atol=1e-5)
    for config in conv.candidates(20, torch.float32, "ieee", gemm.chip):
        torch.testing.assert_close(gemm.launch(config, x)[0], y, rtol=1e-5, atol=1e-5)


def check_partial(partial, y):
    """Each part against the positions it covers, and all of them, by Chan's formula, against the whole map."""
    n, channels, height, width = y.shape
    rows = conv.rows_of(height * width)
    assert partial.dtype == torch.float32
    assert partial.shape == (n, rows.parts, channels, 3)
    flat, partial = y.cpu().double().flatten(2), partial.cpu().double()
    count, mean, squares = torch.zeros(3, n, channels, dtype=torch.float64)
    starts = [i * rows.segment for i in range(rows.parts)]
    for start, end, part in zip(starts, [*starts[1:], height * width], partial.unbind(1), strict=True):
        covered = flat[:, :, start:end]
        variance, center = torch.var_mean(covered, 2, correction=0)
        direct = torch.stack([torch.full_like(center, end - start), center, variance * (end - start)], -1)
        torch.testing.assert_close(part, direct, rtol=1e-5, atol=1e-5)
        total, delta = count + part[..., 0], part[..., 1] - mean
        squares += part[..., 2] + delta**2 * count * part[..., 0] / total
        mean += delta * part[..., 0] / total
        count = total
    variance, center = torch.var_mean(flat, 2, correction=0)
    torch.testing.assert_close(mean, center, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(squares / count, variance, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "height", "width"), [*MAPS, (5, 2, 3), (1, 25, 40)])
def test_partial_sums(device, dtype, n, height, width):
    weight, x = draw(device, dtype, n, 16, 24, height, width)
    y, partial = conv.implicit_gemm(weight, x, statistics=True)(x)
    check(y, expected(weight, x), dtype)
    check_partial(partial, y)


def test_partial_sums_of_a_large_mean(device):
    """A difference of sums of squares would have no digit left."""
    weight, x = draw(device, torch.float32, 1, 16, 16, 8, 8)
    weight[:, 0, 1, 1] = 1
    x[:, 0] = 4096
    y, partial = conv.implicit_gemm(weight, x, statistics=True)(x)
    variance, mean = torch.var_mean(y.cpu().double().flatten(2), 2, correction=0)
    torch.testing.assert_close(partial[:, 0, :, 1].cpu().double(), mean, rtol=1e-6, atol=0)
    torch.testing.assert_close(partial[:, 0, :, 2].cpu().double() / 64, variance, rtol=1e-2, atol=1e-4)


def test_no_samples(device):
    weight, x = draw(device, torch.bfloat16, 0, 16, 24, 14, 14)
    y, partial = conv.implicit_gemm(weight, x, statistics=True)(x)
    assert y.shape == (0, 24, 14, 14)
    assert partial.shape == (0, conv.rows_of(196).parts, 24, 3)


@pytest.mark.parametrize(("height", "width"), [(7, 7), (14, 14)])
def test_batch_mates_do_not_matter(device, height, width):
    weight, x = draw(device, torch.bfloat16, 5, 16, 24, height, width)
    gemm = conv.implicit_gemm(weight, x, statistics=True)
    y, partial = gemm(x)
    for i in range(5):
        alone = gemm(x[i : i + 1])
        tolerance = {"rtol": 0, "atol": 0} if device.type == "cuda" else {"rtol": 2**-6, "atol": 1e-3}
        torch.testing.assert_close(alone[0], y[i : i + 1], **tolerance)
        torch.testing.assert_close(alone[1], partial[i : i + 1], **tolerance)


def test_nan_stays_in_its_sample(device):
    weight, x = draw(device, torch.bfloat16, 4, 24, 24, 7, 7)
    reference = expected(weight, x)
    x[1] = torch.nan
    x[3] = torch.inf
    y, partial = conv.implicit_gemm(weight, x, statistics=True)(x)
    check(y[[0, 2]], reference[[0, 2]], torch.bfloat16)
    check_partial(partial[[0, 2]], y[[0, 2]])
    assert y[1].isnan().all()


@pytest.mark.parametrize("positions", [(1, 1), (7, 7), (14, 14)])
def test_stopped_samples_cost_nothing_and_harm_nobody(device, positions):
    """Tiles whose samples have all stopped stay unwritten; other samples get what they would have got."""
    n = 80
    weight, x = draw(device, torch.bfloat16, n, 16, 16, *positions)
    running = torch.zeros(n, dtype=torch.bool)
    running[[0, n - 1]] = True
    x[~running] = torch.nan
    status = torch.where(running, RUNNING, 0).to(device)
    gemm = conv.implicit_gemm(weight, x, statistics=True)
    y, partial = gemm(x, SimpleNamespace(status=status))
    check(y[running], expected(weight, x[running]), torch.bfloat16)
    check_partial(partial[running], y[running])
    # A tile of ones is left as it was: of 80 samples, whole tiles lie between the first and the last.
    x[~running] = 1
    untouched = gemm(x, SimpleNamespace(status=status))[0].isnan().flatten(1).any(1)
    assert untouched.any() == (positions != (1, 1))
    everywhere, _ = gemm(x, SimpleNamespace(status=torch.zeros_like(status)))
    assert everywhere.isnan().all()


def test_dense_input_of_another_layout(device):
    weight, x = draw(device, torch.float32, 2, 16, 24, 5, 6)
    check(conv.implicit_gemm(weight, x)(x.contiguous())[0], expected(weight, x), torch.float32)


def test_bad_input_is_named(device):
    weight, x = draw(device, torch.float32, 1, 16, 16, 4, 4)
    with pytest.raises(ValueError, match="weight: expected"):
        conv.implicit_gemm(weight.double(), x)
    with pytest.raises(ValueError, match="weight: expected"):
        conv.implicit_gemm(weight[:, :, :1], x)
    with pytest.raises(ValueError, match="x: expected 16 channels"):
        conv.implicit_gemm(weight, x)(x[:, :8])


@pytest.mark.parametrize("positions", [1, 2, 15, 16, 49, 64, 100, 196, 225, 300, 784, 15200])
def test_segments_cover_a_map(positions):
    rows = conv.rows_of(positions)
    taken = rows.count * rows.segment + rows.rest
    assert positions <= taken
    assert positions > (rows.parts - 1) * rows.segment
    assert rows.rest < rows.segment
    assert rows.rest & (rows.rest - 1) == 0
    assert taken <= 1.25 * positions or positions <= 16


@pytest.mark.parametrize("channels", [16, 64, 100, 256, 512])
@pytest.mark.parametrize("n", [1, 8, 100, 512])
@pytest.mark.parametrize("chip", [(8, 108, 166_912), (8, 84, 101_376), (9, 132, 232_448), (10, 148, 232_448)])
def test_choice_fits_the_chip(channels, n, chip):
    chip = conv.Chip(*chip)
    for dtype, precision in [(torch.bfloat16, "tf32"), (torch.float32, "tf32"), (torch.float32, "ieee")]:
        config = conv.choose(n, 196, channels, channels, dtype, precision, chip)
        assert config.shared(dtype.itemsize) < chip.shared
        assert config.height >= 64  # the longest segment
