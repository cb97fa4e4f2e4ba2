"""How far a difference between trained models can be trusted, over seeds and over images.

Seeds alone would tell how training scatters on one set of images, and nothing of another set. The images' share of the
variance is a bootstrap's; the seeds, which are few, give theirs themselves, and Student's t makes the interval of both.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from pycocotools.cocoeval import COCOeval
from scipy import stats

RESAMPLES = 2000
Evaluation = dict[str, Any]  # of one training: "images", ids, with each one's "objects" and "iou_sums" over them


def paired_gain(own: list[Evaluation], others: list[Evaluation]) -> dict[str, float]:
    """Mean difference of the objects' IoUs, and the bounds "low" and "high" of its 95 % interval.

    own[i] and others[i] are a pair: of equal seeds, and of the same objects. Objects of an image are drawn together.
    """
    counts = np.array(own[0]["objects"])
    gains = np.subtract(*([evaluation["iou_sums"] for evaluation in of] for of in (own, others)))
    drawn = draws(len(counts))
    return student_interval(gains.sum(1) / counts.sum(), (drawn @ gains.T) / (drawn @ counts)[:, None], len(counts))


def student_interval(of_seeds: np.ndarray, resamples: np.ndarray, images: int) -> dict[str, float]:
    """The mean over seeds of what was found with each (seeds,), and the bounds "low" and "high" of its 95 % interval.

    resamples: the same on images drawn anew (resamples, seeds). The variance by the seeds has seeds − 1 degrees of
    freedom, that by the images has images − 1, and their sum has those of Welch and Satterthwaite.
    """
    mean, seeds = of_seeds.mean(), len(of_seeds)
    by_seeds, by_images = 0.0, np.nanvar(resamples.mean(1))  # NaN: a resample of images without objects alone
    if seeds > 1:
        by_seeds = of_seeds.var(ddof=1) / seeds
        # What an image gives with one seed and not with another is in both.
        apart = np.nanvar(resamples - resamples.mean(1, keepdims=True), 0).sum() / (seeds - 1)
        by_images = max(0.0, by_images - apart / seeds)
    variance = by_seeds + by_images
    if not variance:
        return {"mean": mean, "low": mean, "high": mean}
    shares = np.array([by_seeds, by_images]) / variance
    freedom = 1 / (shares**2 / np.maximum([seeds - 1, images - 1], 1)).sum()
    margin = stats.t.ppf(0.975, freedom) * variance**0.5
    return {"mean": mean, "low": mean - margin, "high": mean + margin}


def gains(
    rows: dict[str, list[dict[str, Any]]], reference: str, parts: dict[str, Callable[..., Any]]
) -> dict[str, dict[str, Any]]:
    """Each row's IoU less the reference's of equal seeds, on several parts of the data.

    parts: a part's name → a function that takes a training's evaluation on it from its report.
    """
    found = {}
    references = {report["seed"]: report for report in rows.get(reference, []) if "failed" not in report}
    for row, reports in rows.items():
        own = [report for report in reports if "failed" not in report and report["seed"] in references]
        if row == reference or len(own) < 2:
            continue
        others = [references[report["seed"]] for report in own]
        found[row] = {"seeds": len(own)}
        for name, of in parts.items():
            found[row][name] = paired_gain([of(report) for report in own], [of(report) for report in others])
    return found


def paired_precision_gain(own: list[COCOeval], others: list[COCOeval]) -> dict[str, float]:
    """As paired_gain, of COCO's AP in place of the mean IoU; own[i] and others[i] evaluate detectors of equal seeds."""
    images = len(own[0].params.imgIds)
    weights = np.vstack([np.ones(images), draws(images)])  # first all images, each once
    values = [[average_precision(evaluation, weights) for evaluation in of] for of in (own, others)]
    gains = np.subtract(*values)
    return student_interval(gains[:, 0], gains.T[1:], images)


def average_precision(evaluation: COCOeval, weights: np.ndarray) -> np.ndarray:
    """COCO's AP (resamples,) with images counted as often as `weights` (resamples, images) say; NaN without objects.

    The images are in the order of evaluation.params.imgIds. Equals COCOeval's AP on that many copies of each, for which
    every resample would be accumulated anew.
    """
    params = evaluation.params
    total, categories = np.zeros((2, len(weights)))
    results = np.array(evaluation.evalImgs, dtype=object).reshape(len(params.catIds), len(params.areaRng), -1)
    for of_category in results[:, 0]:  # 0: objects of all sizes
        present = [image for image, result in enumerate(of_category) if result is not None]
        if not present:
            continue
        weight = weights[:, present]
        ranked = Ranked.of([of_category[image] for image in present])
        objects = weight @ ranked.objects
        shown = objects > 0
        precisions = [
            interpolated(weight @ hits.T, weight @ misses.T, np.maximum(objects, 1), params.recThrs)
            for hits, misses in ranked.counts()
        ]
        total += shown * np.mean(precisions, 0)
        categories += shown
    with np.errstate(invalid="ignore"):
        return total / categories


@dataclass
class Ranked:
    """A category's detections by falling score."""

    images: np.ndarray  # (detections, images), one-hot
    hits: np.ndarray  # (IoU thresholds, detections)
    misses: np.ndarray  # likewise; what lies in crowds is neither
    objects: np.ndarray  # (images,)

    @classmethod
    def of(cls, results: list[dict[str, Any]]) -> "Ranked":
        """From COCOeval's results for some images."""
        order = np.argsort(-np.concatenate([r["dtScores"] for r in results]), kind="mergesort")
        found, ignored = (
            np.concatenate([r[key] for r in results], 1)[:, order] > 0 for key in ("dtMatches", "dtIgnore")
        )
        images = np.eye(len(results)).repeat([len(r["dtScores"]) for r in results], 0)[order]
        objects = np.array([np.count_nonzero(np.equal(r["gtIgnore"], 0)) for r in results])
        return cls(images, found & ~ignored, ~found & ~ignored, objects)

    def counts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Of each IoU threshold: hits and misses up to each hit, by image (hits, images). Precision peaks at hits."""
        for hits, misses in zip(self.hits, self.misses, strict=True):
            yield tuple(np.cumsum(self.images * which[:, None], 0)[hits] for which in (hits, misses))


def interpolated(hits: np.ndarray, misses: np.ndarray, objects: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Mean precision at levels of recall, of counts (resamples, hits): at each the best of that recall or more."""
    precision = hits / np.maximum(hits + misses, 1)
    best = np.maximum.accumulate(precision[:, ::-1], 1)[:, ::-1]
    reached = np.searchsorted(levels, hits / objects[:, None], side="right")
    return (best * np.diff(reached, axis=1, prepend=0)).sum(1) / len(levels)


@cache
def draws(images: int) -> np.ndarray:
    """How often each resample has each image (RESAMPLES, images)."""
    generator = np.random.default_rng(0)
    drawn = [np.bincount(generator.integers(images, size=images), minlength=images) for _ in range(RESAMPLES)]
    return np.stack(drawn).astype(float)


def together(first: Evaluation, second: Evaluation) -> Evaluation:
    """Evaluations of different images as one."""
    return {key: first[key] + second[key] for key in ("images", "objects", "iou_sums")}


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """An evaluation without what it says of every image."""
    return {key: value for key, value in evaluation.items() if key not in ("images", "objects", "iou_sums")}
