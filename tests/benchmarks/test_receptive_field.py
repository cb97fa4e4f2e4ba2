"""benchmarks/analysis/receptive_field.py: the share of the gradient that four convolutions cannot see."""

import json

import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from benchmarks.analysis import receptive_field
from benchmarks.analysis.receptive_field import HeldStatistics, specified
from benchmarks.quality.coco import DataError
from benchmarks.quality.strategies import STRATEGIES
from benchmarks.report import results_page
from ifr_fast import Broyden, Unroll


def test_share_outside_of_a_known_field():
    field = torch.zeros(14, 14)
    field[7, 7], field[11, 3], field[12, 7], field[7, 2] = 5, 3, 1.5, 0.5
    assert receptive_field.outside(field) == pytest.approx(0.2)


@pytest.mark.parametrize("norm", [torch.group_norm, F.group_norm])
def test_held_statistics_are_constants_of_the_gradient_alone(norm):
    y, weight, bias, grad = torch.randn(2, 8, 5, 5), torch.randn(8), torch.randn(8), torch.randn(2, 8, 5, 5)
    y.requires_grad_()
    expected = norm(y, 4, weight, bias, 1e-5)
    with HeldStatistics():
        found = norm(y, 4, weight, bias, 1e-5)
    torch.testing.assert_close(found, expected)
    rstd = (y.unflatten(1, (4, 2)).var((2, 3, 4), correction=0) + 1e-5).rsqrt().repeat_interleave(2, 1)
    slope = (rstd * weight)[:, :, None, None]
    torch.testing.assert_close(torch.autograd.grad(found, y, grad)[0], slope * grad)


@pytest.mark.parametrize("row", ["4 convolutions, GroupNorm", "unroll", "unroll, unshared", "IFR"])
def test_made_of_torchs_operators_it_is_the_same_refinement(row):
    refinement, x = STRATEGIES[row].build(32).eval(), torch.randn(2, 32, 7, 7)
    torch.testing.assert_close(specified(refinement)(x), refinement(x), rtol=1e-3, atol=1e-3)


def test_an_equilibriums_field_with_held_statistics_is_a_long_unrolls(make_head, seed):
    head = make_head(16, post_gain=0.3, solver=Broyden(60, rtol=1e-13)).double()
    x = torch.randn(2, 16, 14, 14, dtype=torch.float64)
    held = receptive_field.fields(head, x, seed)["statistics held"]
    head.solver = Unroll(150)
    unrolled = receptive_field.fields(head, x, seed)
    torch.testing.assert_close(held, unrolled["statistics held"], rtol=1e-3, atol=1e-6)
    assert (held - unrolled["gradient"]).abs().max() > 1e-4


def test_convolutions_see_9_by_9_group_norm_and_an_equilibrium_all(shapes, sweep, tmp_path):
    report = receptive_field.main([str(shapes), "--sweep", str(sweep), "--rois", "3", "--output", str(tmp_path)])
    assert report == json.loads((tmp_path / "receptive_field.json").read_text())
    shares = {row: [fields[name]["outside"][0] for name in fields] for row, fields in report["rows"].items()}
    assert shares["4 convolutions"] == pytest.approx([0, 0], abs=1e-6)
    assert shares["4 convolutions, GroupNorm"][0] > 0.01
    assert shares["4 convolutions, GroupNorm"][1] == pytest.approx(0, abs=1e-6)
    assert all(0 < share < 1 for share in shares["unroll"])
    assert torch.tensor(report["rows"]["IFR"]["gradient"]["field"]).min() > 0
    assert "| 4 convolutions, GroupNorm |" in results_page.receptive_field(report)
    with Image.open(tmp_path / "receptive_field.png") as picture:
        assert picture.size[0] > 1000


def test_other_data_than_the_sweeps_is_refused(sweep, tmp_path):
    with pytest.raises(DataError, match=r"which the sweep in .* was trained on, got"):
        receptive_field.main([str(tmp_path), "--sweep", str(sweep)])
