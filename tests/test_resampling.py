"""benchmarks/resampling.py: the bootstrap's interval against what is known of it."""

import numpy as np
import pytest
from resampling import paired_gain, together


@pytest.fixture
def generator(seed):
    return np.random.default_rng(seed)


def evaluation(images, ious):
    return {"images": list(images), "ious": list(ious)}


def test_the_mean_is_over_objects_and_an_equal_gain_is_certain(generator):
    images, ious = [7, 7, 3, 9], generator.random(4)
    found = paired_gain([evaluation(images, ious + 0.25)] * 2, [evaluation(images, ious)] * 2)
    assert [found[key] for key in ("mean", "low", "high")] == pytest.approx([0.25] * 3)
    found = paired_gain([evaluation(images, [1, 1, 0, 1])], [evaluation(images, [0, 1, 0, 0])])
    assert found["mean"] == pytest.approx(0.5)


def test_objects_of_one_image_count_as_one(generator):
    """The interval is that of the images' mean, however many objects show the same thing."""
    gains = generator.normal(size=400)
    for copies in (1, 5):
        images, ious = np.arange(400).repeat(copies), gains.repeat(copies)
        found = paired_gain([evaluation(images, ious)], [evaluation(images, 0 * ious)])
        assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * gains.std() / 400**0.5, rel=0.15)


def test_seeds_that_differ_widen_the_interval(generator):
    images, ious = np.arange(50), generator.random(50)
    shifts = (-0.2, 0.0, 0.2)
    own = [evaluation(images, ious + shift) for shift in shifts]
    found = paired_gain(own, [evaluation(images, ious)] * 3)
    assert found["mean"] == pytest.approx(0, abs=1e-12)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 * np.std(shifts) / 3**0.5, rel=0.25)


def test_evaluations_of_different_images_are_joined():
    assert together(evaluation([1], [0.5]), evaluation([2, 2], [0.1, 0.2])) == evaluation([1, 2, 2], [0.5, 0.1, 0.2])
