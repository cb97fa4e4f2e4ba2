"""How far a difference between trained models can be trusted: the bootstrap over seeds and over images.

Seeds alone would tell how training scatters on one set of images, and nothing of another set.
"""

from functools import cache
from typing import Any

import numpy as np

RESAMPLES = 2000
Evaluation = dict[str, Any]  # of one training: "images", an image's id for every object, and "ious"


def paired_gain(own: list[Evaluation], others: list[Evaluation]) -> dict[str, float]:
    """Mean difference of the objects' IoUs, and the bounds "low" and "high" of its 95 % interval.

    own[i] and others[i] are of equal seeds, and of the same objects. Objects of an image are drawn together, as are the
    two trainings of a seed.
    """
    images = np.unique(own[0]["images"], return_inverse=True)[1]
    counts = np.bincount(images)
    gains = np.array([sums(a, images) - sums(b, images) for a, b in zip(own, others, strict=True)])
    of_seeds, of_images = draws(*gains.shape)
    means = (of_seeds @ gains * of_images).sum(1) / (len(gains) * of_images @ counts)
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": gains.sum() / (len(gains) * counts.sum()), "low": low, "high": high}


@cache
def draws(seeds: int, images: int) -> tuple[np.ndarray, np.ndarray]:
    """How often each resample has each seed (RESAMPLES, seeds) and each image (RESAMPLES, images)."""
    generator = np.random.default_rng(0)
    drawn = [[generator.integers(n, size=n) for n in (seeds, images)] for _ in range(RESAMPLES)]
    return tuple(
        np.stack([np.bincount(draw, minlength=n) for draw in of]).astype(float)
        for of, n in zip(zip(*drawn, strict=True), (seeds, images), strict=True)
    )


def sums(evaluation: Evaluation, images: np.ndarray) -> np.ndarray:
    """Of each image's IoUs."""
    return np.bincount(images, evaluation["ious"])


def together(first: Evaluation, second: Evaluation) -> Evaluation:
    """Evaluations of different images as one."""
    return {key: first[key] + second[key] for key in ("images", "ious")}
