"""Which convolutions a solve takes. The thresholds are measured: the tests take them from the module."""

import copy
import logging

import pytest
import torch

from ifr_fast import Anderson, Broyden, Implicit, _native
from ifr_fast.kernels import choose, convolutions
from ifr_fast.kernels.convolutions import LEAST_EVALUATIONS, LEAST_TILES, MULTIPLE, Size, check, chosen
from ifr_fast.kernels.winograd import Winograd

ENOUGH = 4 * LEAST_TILES  # pixels a side, of LEAST_TILES² tiles


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Each choice is remembered, and logged once. It is that of a processor with AVX2."""
    monkeypatch.setattr(_native, "isa", lambda: "avx2")
    convolutions._pays.cache_clear()
    yield
    convolutions._pays.cache_clear()


def choice(
    name="auto", *, n=2, channels=256, mid_channels=256, height=ENOUGH, width=ENOUGH, evaluations=16,
    dtype=torch.float32, backend="auto",
):  # fmt: skip
    """ "winograd" or "direct"; the tensors are on meta, as none is read."""
    kernels = choose.kernels(backend, "cpu", dtype)
    x = torch.empty(n, channels, height, width, device="meta")
    weight = torch.empty(mid_channels, channels, 3, 3, device="meta")
    found = chosen(kernels, name, x, weight, dtype, evaluations)
    assert isinstance(found, Winograd) or found is kernels
    return "winograd" if isinstance(found, Winograd) else "direct"


def test_a_mask_head_takes_winograd():
    assert choice(height=14, width=14) == "winograd"


DIRECT = [
    dict(dtype=torch.float64),
    dict(dtype=torch.bfloat16),
    dict(backend="eager"),
    dict(channels=256 + MULTIPLE // 2),
    dict(mid_channels=256 - MULTIPLE // 2),
    dict(channels=MULTIPLE // 4, mid_channels=MULTIPLE // 4),
    dict(evaluations=LEAST_EVALUATIONS - 1),
    dict(height=1, width=4 * (LEAST_TILES - 1)),
    dict(height=4 * (LEAST_TILES - 1), width=1),
    dict(height=1, width=4 * LEAST_TILES),
    dict(height=4 * LEAST_TILES, width=1),
]


def test_without_avx2_all_are_direct(monkeypatch):
    monkeypatch.setattr(_native, "isa", lambda: "generic")
    assert choice() == "direct"


@pytest.mark.parametrize("options", DIRECT, ids=str)
def test_where_direct_convolutions_serve_or_are_faster(options):
    assert choice(**options) == "direct"


def test_the_least_that_takes_winograd():
    least = dict(height=2, width=4 * LEAST_TILES - 3, evaluations=LEAST_EVALUATIONS)
    assert choice(**least) == "winograd"
    assert choice(**least | dict(width=4 * LEAST_TILES - 4)) == "direct"
    assert choice(**least | dict(evaluations=LEAST_EVALUATIONS - 1)) == "direct"


@pytest.mark.parametrize("options", [{}, *DIRECT], ids=str)
def test_the_number_of_samples_never_matters(options):
    assert len({choice(n=n, **options) for n in (0, 1, 2, 17, 100_000)}) == 1
    assert "n" not in Size._fields


@pytest.mark.parametrize("options", [{}, *DIRECT], ids=str)
def test_direct_always_serves(options):
    assert choice("direct", **options) == "direct"


@pytest.mark.parametrize(
    "options",
    [{}, dict(evaluations=1), dict(height=1, width=1), dict(channels=MULTIPLE, mid_channels=MULTIPLE)],
    ids=str,
)  # fmt: skip
def test_winograd_is_taken_where_it_is_asked_for(options):
    assert choice("winograd", **options) == "winograd"


REFUSED = [
    (dict(dtype=torch.float64), "torch.float64"),
    (dict(dtype=torch.bfloat16), "torch.bfloat16"),
    (dict(backend="eager"), "eager"),
    (dict(channels=48), "48 channels"),
    (dict(mid_channels=40), "40 between"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=str)
def test_winograd_where_it_cannot_serve(options, words):
    with pytest.raises(ValueError, match=rf"^convolution='winograd' .*{words}"):
        choice("winograd", **options)


@pytest.mark.parametrize("name", ["fast", "", None, 1, True, ["auto"], "Winograd"])
def test_wrong_names(name):
    with pytest.raises(ValueError, match=r"^convolution=.*expected one of auto, direct, winograd"):
        check(name)


def test_each_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, "ifr_fast"):
        for n in (1, 2, 17):
            for options in ({}, dict(evaluations=LEAST_EVALUATIONS - 1), dict(height=2, width=2), dict(channels=48)):
                choice(n=n, **options)
    lines = [r.getMessage() for r in caplog.records if "convolutions by" in r.getMessage()]
    assert len(lines) == 4
    assert "Winograd" in lines[0]
    for line, words in zip(lines[1:], ("evaluations", "tiles", "48 channels"), strict=True):
        assert "directly" in line
        assert words in line


def test_names_that_are_forced_are_not_explained(caplog):
    with caplog.at_level(logging.INFO, "ifr_fast"):
        choice("direct")
        choice("winograd")
    assert not [r for r in caplog.records if "convolutions by" in r.getMessage()]


@pytest.fixture
def taken(monkeypatch):
    """The names of the convolutions that solves take, in order."""
    names = []

    def recorded(kernels, name, *rest):
        found = chosen(kernels, name, *rest)
        names.append("winograd" if isinstance(found, Winograd) else "direct")
        return found

    monkeypatch.setattr(convolutions, "chosen", recorded)
    return names


def test_a_head_chooses_for_each_solve(taken, make_head):
    """The forward solve by its steps, the backward one by the adjoint's."""
    head = make_head(32, solver=Broyden(LEAST_EVALUATIONS, rtol=0.0), adjoint=Implicit(1))
    x = torch.randn(2, 32, ENOUGH, ENOUGH, requires_grad=True)
    head(x).sum().backward()
    assert taken == ["winograd", "direct"] or LEAST_EVALUATIONS <= 2
    head.solver = Anderson(1)
    head(x[:, :, :4, :4])
    assert taken[2:] == ["direct"]


def test_a_head_gives_one_sample_what_it_gives_a_batch(make_head):
    """At the least number of tiles that takes Winograd's algorithm, and one pixel below."""
    head = make_head(32, groups=4, solver=Broyden(3, rtol=0.0))
    for width in (4 * LEAST_TILES - 4, 4 * LEAST_TILES - 3):
        x = torch.randn(3, 32, 1, width)
        assert torch.equal(head(x)[1:2], head(x[1:2]))


def test_a_name_may_be_assigned(taken, make_head):
    head, x = make_head(32, solver=Broyden(3)), torch.randn(1, 32, ENOUGH, ENOUGH)
    for name in ("winograd", "direct"):
        head.convolution = name
        head(x)
        copy.deepcopy(head)(x)
    assert taken == ["winograd"] * 2 + ["direct"] * 2
    head.convolution = "fast"
    with pytest.raises(ValueError, match=r"convolution='fast': expected one of auto, direct, winograd"):
        head(x)
    head.convolution = "direct"
    head(x)


def test_heads_refuse_at_construction(make_head):
    with pytest.raises(ValueError, match=r"^convolution='fast'"):
        make_head(32, convolution="fast")
