"""A history in 8 bits on a GPU: every kernel stores, scales and reads it as eager does."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
from emulated_cuda import cuda_fixture  # noqa: F401

from ifr_fast import Anderson, Broyden, Picard, Status
from ifr_fast.engine.loop import solve
from ifr_fast.kernels import eager
from ifr_fast.kernels.contract import Norm, Step
from ifr_fast.kernels.gpu import DeviceState, tail

E5M2 = torch.float8_e5m2
# Numbers by 8, and one at a time; CUDA's step by three kernels, and by one.
sized = pytest.mark.parametrize(
    ("kernels", "size"),
    [*product(("triton", "cuda"), (304, 77)), ("triton", 2100), ("cuda", 16392)],
    indirect=["kernels"],
)
LARGEST = torch.finfo(E5M2).max
pytestmark = pytest.mark.usefixtures("one_thread", "ieee_arithmetic")


@pytest.fixture(params=["triton", "cuda"])
def kernels(request, device):
    """A backend's step and residual. Inputs are drawn where it runs."""
    if request.param == "cuda":
        backend = request.getfixturevalue("cuda")
        solver = backend.solver
    else:
        pytest.importorskip("triton")
        from ifr_fast.kernels.triton import solver
    with device:
        yield SimpleNamespace(new_state=DeviceState, step=solver.step, residual=solver.residual, finish=solver.finish)


def codes(history):
    """The bytes; those of NaN are one."""
    return torch.where(history.isnan(), 0x7F, history.view(torch.uint8))


def rounded(x):
    return x.clamp(-LARGEST, LARGEST).to(E5M2)


@pytest.mark.parametrize("last", [0, 3])  # numbers by 8, and one at a time
def test_rounding_is_to_nearest_even_and_saturates(kernels, last):
    """All numbers of 8 bits, what lies half-way between them, and the neighbours of both."""
    every = torch.arange(256, dtype=torch.uint8).view(E5M2).float()
    finite = every[every.isfinite()].sort().values
    points = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, torch.tensor([57345.0, 61440.0, 1e15, 3e-6, 1e-20])])
    up, down = (torch.nextafter(points, torch.tensor(end)) for end in (torch.inf, -torch.inf))
    values = torch.cat([points, up, down, torch.tensor([torch.inf, -torch.inf, torch.nan])])
    values = torch.cat([values, torch.zeros(-len(values) % 8 + last)]).expand(2, -1).contiguous()
    scale = torch.tensor([1.0, 2.0**-20])
    z = torch.zeros_like(values)
    state = kernels.new_state(z, rows=3, evaluations=4, history_dtype=E5M2)
    state.next_scale.copy_(scale)
    kernels.residual(state, values * scale.unsqueeze(1), z, Step("broyden", 3, 1, False, 0.0))
    assert torch.equal(codes(state.history[:, 1]), codes(rounded(values)))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("method", ["broyden", "anderson", "picard"])
@sized
def test_steps_are_eagers(kernels, method, size):
    """From the same f and z in every step: the same bytes and scales, products and steps to rounding."""
    rows, magnitude = 1 if method == "picard" else 5, torch.tensor([[1e-7], [1.0], [1e4]])
    expected = magnitude * torch.randn(3, size)
    z = expected.clone()
    own, other = (
        k.new_state(z, rows=rows, evaluations=6, history_dtype=E5M2, from_zero=False) for k in (kernels, eager)
    )
    for k in range(5):
        f = expected + magnitude * torch.randn(3, size) * 0.3**k
        z.copy_(expected)
        step = Step(method, 3 if method == "anderson" else 5, k, False, 0.0)
        kernels.step(own, f, z, step)
        eager.step(other, f, expected, step)
        row = step.row(own)
        assert torch.equal(codes(own.history[:, row]), codes(other.history[:, row]))
        assert torch.equal(own.scales[:, row], other.scales[:, row])
        assert torch.equal(own.status, other.status)
        if method != "picard":
            largest = other.gram.diagonal(dim1=1, dim2=2).amax(1).view(-1, 1, 1)
            torch.testing.assert_close(own.gram.double() / largest, other.gram / largest, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(z / magnitude, expected / magnitude, rtol=1e-3, atol=1e-3)


def test_a_scale_is_the_power_of_two_below_the_residual_before(kernels):
    z = torch.zeros(4, 96)
    state = kernels.new_state(z, rows=3, evaluations=4, history_dtype=E5M2)
    level, sign = torch.tensor([[1e-7], [0.7], [5.0], [3e8]]), torch.randint(2, z.shape).float() * 2 - 1
    for k, factor in enumerate((1, 1 / 8, 1 / 2)):
        kernels.step(state, z + factor * level * sign, z, Step("broyden", 3, k, False, 0.0))
    below = 2 ** level.log2().floor().squeeze(1)
    assert torch.equal(state.scales, torch.stack([below, below, below / 8], 1))
    assert torch.equal(state.next_scale, below / 2)


@pytest.mark.parametrize("size", [4104, 4099])
def test_a_residual_that_outgrows_its_scale_saturates(kernels, size):
    """All of its norm in one number, which is beyond the largest of 8 bits and of 16."""
    z = torch.zeros(1, size)
    state = kernels.new_state(z, rows=3, evaluations=4, history_dtype=E5M2)
    for k, g in enumerate((torch.ones(1, size), torch.nn.functional.pad(torch.tensor([[-63420.0]]), (0, size - 1)))):
        kernels.step(state, z + g, z, Step("broyden", 3, k, False, 0.0))
    assert state.status.tolist() == [Status.MAX_ITER]
    assert state.history[0, 1].float().unique().tolist() == [-LARGEST, 0]
    assert z.isfinite().all()
    kernels.step(state, z + 1, z, Step("broyden", 3, 2, False, 0.0))
    assert z.isfinite().all()


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("rows", [1, 3])
@sized
def test_samples_that_have_stopped_or_fail_stay_alone(kernels, rows, size):
    """The first has stopped, the second is NaN from now on, the third is solved exactly."""
    z = torch.randn(4, size)
    state = kernels.new_state(z, rows=rows, evaluations=6, history_dtype=E5M2)
    method = "picard" if rows == 1 else "broyden"
    kernels.step(state, z + torch.randn_like(z), z, Step(method, rows, 0, False, 0.0))
    state.status[0] = Status.DIVERGED
    before = [t[0].clone() for t in (codes(state.history), state.scales, state.next_scale, z)]
    f, old_z = z + torch.randn_like(z), z.clone()
    f[1], f[2] = torch.nan, z[2]
    kernels.step(state, f, z, Step(method, rows, 1, False, 0.0))
    for t, old in zip((codes(state.history), state.scales, state.next_scale, z), before, strict=True):
        assert torch.equal(t[0], old)
    assert state.status[1:].tolist() == [Status.NONFINITE, Status.CONVERGED, Status.MAX_ITER]
    assert torch.equal(z[1:3], old_z[1:3])
    assert not torch.equal(z[3], old_z[3])
    assert all(t.isfinite().all() for t in (z, state.scales, state.next_scale))


@pytest.mark.parametrize(("channels", "groups"), [(16, 4), (5, 1)])  # numbers by 4, and one at a time
@pytest.mark.parametrize("last", [False, True])
def test_a_tail_ends_in_the_history(kernels, channels, groups, last):
    y, r, z = (torch.randn(2, channels, 5, 7).contiguous(memory_format=torch.channels_last) for _ in range(3))
    norms = [Norm(*torch.randn(2, channels), groups) for _ in range(2)]
    f, _ = eager.norm_tail(y, r, *norms)
    states = []
    for result in (f, tail(y, r, *norms)):
        state = kernels.new_state(z, rows=3, evaluations=4, history_dtype=E5M2)
        state.next_scale.copy_(torch.tensor([0.25, 8]))
        kernels.residual(state, result, z, Step("broyden", 3, 1, last, 0.0))
        states.append(state)
    own, other = states
    torch.testing.assert_close(own.norm_partials.sum(1), other.norm_partials.sum(1), rtol=1e-4, atol=1e-4)
    if not last:
        g = (f - z).permute(0, 2, 3, 1).flatten(1) / own.next_scale.unsqueeze(1)
        assert torch.equal(codes(other.history[:, 1]), codes(rounded(g)))
        # f differs by roundings, which may take a number across the middle between two of 8 bits.
        assert (codes(own.history[:, 1]) != codes(other.history[:, 1])).float().mean() < 0.01


@pytest.mark.parametrize("rule", [Broyden(6), Anderson(6, m=3), Picard(6)], ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("n", [2, 0])
@sized
def test_solves_are_eagers(kernels, rule, n, size):
    rule = type(rule)(**{**vars(rule), "rtol": 0.0, "history_dtype": E5M2}).resolve(torch.float32)
    z0, shift = torch.randn(2, n, size)
    rate = torch.linspace(0.1, 0.4, len(z0)).view(-1, 1)
    own, other = (solve(lambda z, _: rate * z.sin() + shift, z0.clone(), rule, k) for k in (kernels, eager))
    # Roundings of 8 bits soon differ where residuals do in their last digit.
    torch.testing.assert_close(own.trace, other.trace, rtol=0.2, atol=1e-4)
    torch.testing.assert_close(own.value, other.value, rtol=1e-2, atol=1e-2)
    assert (own.residual < 1e-2).all()
