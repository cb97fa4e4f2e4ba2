"""benchmarks/receptive_field.py: the share of the gradient that four convolutions cannot see."""

import json

import pytest
import receptive_field
import torch
from coco import DataError
from PIL import Image


def test_share_outside_of_a_known_field():
    field = torch.zeros(14, 14)
    field[7, 7], field[11, 3], field[12, 7], field[7, 2] = 5, 3, 1.5, 0.5
    assert receptive_field.outside(field) == pytest.approx(0.2)


def test_a_stack_sees_9_by_9_and_an_equilibrium_all(shapes, sweep, tmp_path):
    report = receptive_field.main([str(shapes), "--sweep", str(sweep), "--rois", "3", "--output", str(tmp_path)])
    assert report == json.loads((tmp_path / "receptive_field.json").read_text())
    shares = {row: entry["outside"][0] for row, entry in report["rows"].items()}
    assert shares["4 convolutions"] == pytest.approx(0, abs=1e-6)
    assert 0 < shares["unroll"] < 1
    assert torch.tensor(report["rows"]["IFR"]["field"]).min() > 0
    with Image.open(tmp_path / "receptive_field.png") as picture:
        assert picture.size[0] > 1000


def test_other_data_than_the_sweeps_is_refused(sweep, tmp_path):
    with pytest.raises(DataError, match=r"which the sweep in .* was trained on, got"):
        receptive_field.main([str(tmp_path), "--sweep", str(sweep)])
