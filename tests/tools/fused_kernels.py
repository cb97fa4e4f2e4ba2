"""What the tests of the kernels around Winograd's convolutions share."""

import pytest
import torch

from ifr_fast.kernels import fused
from ifr_fast.kernels.contract import RUNNING, Norm, Status

# n, channels, groups, height, width
SHAPES = [
    (3, 32, 1, 14, 14), (1, 256, 32, 14, 14), (2, 64, 4, 7, 5), (17, 32, 32, 3, 13), (3, 96, 4, 1, 1), (0, 64, 4, 5, 5),
    (2, 160, 32, 13, 19), (1, 64, 4, 65, 130),
]  # fmt: skip
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
forms = pytest.mark.parametrize(("shortcut", "post"), [(True, True), (True, False), (False, True), (False, False)])
STOPPED = (Status.CONVERGED, Status.DIVERGED, Status.NONFINITE)


def norm_sums(*args):
    return fused.norm_sums(*args)()


def norm_relu_vjp_coefficients(*args):
    return fused.norm_relu_vjp_coefficients(*args)()


def norm_tail_vjp_coefficients(*args):
    return fused.norm_tail_vjp_coefficients(*args)()


def activation(n, channels, height, width):
    return torch.randn(n, channels, height, width).contiguous(memory_format=torch.channels_last)


def norms(channels, groups):
    return [Norm(*torch.randn(2, channels), groups) for _ in range(2)]


def sums_of(y):
    """As Winograd's output transform leaves them: of parts of four rows, 16 values at a time in float."""
    n, channels = y.shape[:2]
    parts = []
    for rows in y.split(4, dim=2):
        total = torch.zeros(n, 2, channels, dtype=torch.float64)
        for tile in rows.split(4, dim=3):
            total += torch.stack([tile.sum((2, 3)), tile.square().sum((2, 3))], 1)
        parts.append(total)
    return torch.stack(parts, 1)


def assert_close(actual, expected, tolerance=1e-5):
    """By the size of a sample's numbers, of which single ones may cancel."""
    actual, expected = actual.double().flatten(1), expected.double().flatten(1)
    assert ((actual - expected).norm(dim=1) <= tolerance * (1e-30 + expected.norm(dim=1))).all()


def with_threads(count, function):
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def stopped_at(*places, n):
    status = torch.full((n,), RUNNING)
    for i, place in enumerate(places):
        status[place] = STOPPED[i % 3]
    return status
