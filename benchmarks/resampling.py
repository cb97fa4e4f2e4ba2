"""How far a difference between trained models can be trusted: the bootstrap over seeds and over images.

Seeds alone would tell how training scatters on one set of images, and nothing of another set.
"""

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
    generator = np.random.default_rng(0)
    means = np.empty(RESAMPLES)
    for index in range(RESAMPLES):
        seeds = generator.integers(len(gains), size=len(gains))
        drawn = generator.integers(len(counts), size=len(counts))
        means[index] = gains[np.ix_(seeds, drawn)].sum() / (len(seeds) * counts[drawn].sum())
    low, high = np.quantile(means, [0.025, 0.975])
    return {"mean": gains.sum() / (len(gains) * counts.sum()), "low": low, "high": high}


def sums(evaluation: Evaluation, images: np.ndarray) -> np.ndarray:
    """Of each image's IoUs."""
    return np.bincount(images, evaluation["ious"])


def together(first: Evaluation, second: Evaluation) -> Evaluation:
    """Evaluations of different images as one."""
    return {key: first[key] + second[key] for key in ("images", "ious")}
