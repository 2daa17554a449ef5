"""Retrieval metrics of a matrix of scores (images, captions): ranks, recalls, folds, chance, 95 % intervals.

The rank of a query is the number of wrong items before its best right one, counted from 0; a wrong item with the same
score counts as before it. Metrics are {"i2t": {"r1", "r5", "r10", "avg", "medr", "meanr"}, "t2i": {the same}, "rsum"};
each value is a number, or an array (DRAWS,) of its values in all draws of a bootstrap.

The bootstrap draws images with replacement, each with all its captions, because these are easy or hard together. The
gallery stays as it is, so a query keeps its rank. The same number of images and the same seed give the same draws: two
models are compared on the same queries, draw by draw.
"""

from collections.abc import Callable, Iterator, Sequence
from math import comb
from typing import NamedTuple

import numpy as np

from lib.cli import InputError

WAYS = ("i2t", "t2i")
RECALL_AT = (1, 5, 10)
RECALLS = tuple(f"r{k}" for k in RECALL_AT)
FOLDS = 5
DRAWS = 2000
DRAWS_AT_ONCE = 100
LEVEL = 95  # percent of the draws that an interval holds


class Ranks(NamedTuple):
    """Rank of every query, from 0."""

    i2t: np.ndarray  # (images,) the best of the image's captions among all captions
    t2i: np.ndarray  # (captions,) the caption's image among all images


class Part(NamedTuple):
    """Consecutive images and their captions, ranked among themselves: a whole split or one fold of it."""

    images: slice
    captions: slice


def parts_of_split(image_of_caption: np.ndarray, folds: int = 0) -> list[Part]:
    """The whole split and then that many consecutive folds. Raises InputError if its images cannot be divided so."""
    images = int(image_of_caption[-1]) + 1
    if folds and images % folds:
        raise InputError(f"--fold5: {images} images do not divide into {folds} equal folds")
    edges = [(0, images), *((images * k // folds, images * (k + 1) // folds) for k in range(folds))]
    return [Part(slice(*edge), slice(*np.searchsorted(image_of_caption, edge).tolist())) for edge in edges]


def rank_parts(scores: np.ndarray, image_of_caption: np.ndarray, parts: Sequence[Part]) -> list[Ranks]:
    """The ranks within each part of scores (images, captions). Raises InputError on NaN."""
    if np.isnan(scores).any():
        raise InputError("the scores hold NaN: damaged checkpoint, features or saved scores; or use --precision fp32")
    ranks = []
    for part in parts:
        own, image = scores[part], image_of_caption[part.captions] - part.images.start
        true = own[image, np.arange(len(image))]
        best = np.maximum.reduceat(true, np.searchsorted(image, np.arange(len(own))))  # (images,), each has a caption
        right = np.bincount(image[true >= best[image]], minlength=len(own))  # captions as good as the best one
        ranks.append(Ranks((own >= best[:, None]).sum(axis=1) - right, (own >= true).sum(axis=0) - 1))
    return ranks


def rank_matrix(scores: np.ndarray, image_of_caption: np.ndarray) -> Ranks:
    """The ranks within all of scores (images, captions). Raises InputError on NaN."""
    return rank_parts(scores, image_of_caption, parts_of_split(image_of_caption))[0]


def retrieval_metrics(ranks: Ranks) -> dict:
    """The metrics of both directions."""
    return _complete(*map(_summarize, ranks))


def metrics_of_parts(ranks: Sequence[Ranks], draws: Sequence[dict]) -> dict:
    """A split's metrics and their "interval"; or those of its "folds", their means, and "full", of the whole split."""
    full, *folds = [_with_interval(retrieval_metrics(one), drawn) for one, drawn in zip(ranks, draws, strict=True)]
    if not folds:
        return {**full, "folds": []}
    return {**_with_interval(mean_metrics(folds), mean_metrics(draws[1:])), "folds": folds, "full": full}


def _with_interval(metrics: dict, draws: dict) -> dict:
    return {**metrics, "interval": map_metrics(interval, draws)}


def mean_metrics(folds: Sequence[dict]) -> dict:
    """Each metric averaged over the folds."""
    return map_metrics(lambda *values: np.mean(values, axis=0), *folds)


def chance_metrics(image_of_caption: np.ndarray) -> dict:
    """The recalls expected of random scores: the share of all orders that have a right item among the first K."""
    captions_of_image, captions = np.bincount(image_of_caption).tolist(), len(image_of_caption)
    i2t, t2i = {}, {f"r{k}": 100 * min(1.0, k / len(captions_of_image)) for k in RECALL_AT}
    for k in RECALL_AT:
        seen = min(k, captions)
        missed = [comb(captions - right, seen) / comb(captions, seen) for right in captions_of_image]
        i2t[f"r{k}"] = 100 * (1 - float(np.mean(missed)))
    return _complete(i2t, t2i)


def map_metrics(function: Callable, *metrics: dict) -> dict:
    """The metrics whose values are function(values of the same metric in each of `metrics`)."""
    ways = {way: {name: function(*(one[way][name] for one in metrics)) for name in metrics[0][way]} for way in WAYS}
    return {**ways, "rsum": function(*(one["rsum"] for one in metrics))}


def _summarize(ranks: np.ndarray) -> dict[str, float]:
    """Recalls in percent, median (rounded down) and mean of the ranks, both counted from 1."""
    recalls = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in RECALL_AT}
    return {**recalls, "medr": float(np.floor(np.median(ranks)) + 1), "meanr": float(ranks.mean() + 1)}


def _complete(i2t: dict, t2i: dict) -> dict:
    """Both directions with what follows from the recalls: their mean (avg) in each, the sum of all six (rsum)."""
    sums = [sum(way[name] for name in RECALLS) for way in (i2t, t2i)]
    ways = ({**way, "avg": total / len(RECALLS)} for way, total in zip((i2t, t2i), sums, strict=True))
    return {**dict(zip(WAYS, ways, strict=True)), "rsum": sum(sums)}


def bootstrap(ranks: Ranks, image_of_caption: np.ndarray, seed: int = 0) -> dict:
    """The metrics in each draw, every value an array (DRAWS,). image_of_caption: (captions,), images from 0."""
    images = np.arange(len(ranks.i2t))
    drawn = [
        _complete(_summarize_draws(ranks.i2t, images, times), _summarize_draws(ranks.t2i, image_of_caption, times))
        for times in _draws(len(images), seed)
    ]
    return map_metrics(lambda *chunks: np.concatenate(chunks), *drawn)


def bootstrap_parts(ranks: Sequence[Ranks], parts: Sequence[Part], image_of_caption: np.ndarray) -> list[dict]:
    """`bootstrap` of each part; images are drawn within the part."""
    images = [image_of_caption[part.captions] - part.images.start for part in parts]
    return [bootstrap(one, image, seed) for seed, (one, image) in enumerate(zip(ranks, images, strict=True))]


def bootstrap_means(values: np.ndarray, image_of_query: np.ndarray) -> np.ndarray:
    """The means in each draw (DRAWS, columns) of values (queries, columns), of queries that belong to images."""
    _, image = np.unique(image_of_query, return_inverse=True)
    return np.concatenate([_means(values, image, times) for times in _draws(image.max() + 1, seed=0)])


def interval(draws: np.ndarray) -> list[float]:
    """Both ends of the interval that holds LEVEL percent of the draws (DRAWS,), with half of the rest on each side."""
    outside = (100 - LEVEL) / 2
    return np.percentile(draws, [outside, 100 - outside]).tolist()


def p_value(differences: np.ndarray) -> float:
    """Two-sided p-value of a difference between two models, from its values in all draws (DRAWS,)."""
    differences = differences.round(9)  # a sum of gains and losses that cancel is zero but for rounding
    on_one_side = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (1 + float(on_one_side)) / (1 + len(differences)))


def t_test(differences: np.ndarray) -> dict | None:
    """Student's t-test of whether paired differences (n,) are zero on average: {"interval", "p"}; None where n < 2.

    With t = sqrt(n - 1) tan(a), Student's density is that of an angle a: proportional to cos(a)^(n - 2).
    """
    if (n := len(differences)) < 2:
        return None
    angles = np.linspace(0, np.pi / 2, 100_001)
    density = np.cos(angles) ** (n - 2)
    within = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])  # probability of -a to a, not yet normalised
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(n)
    reach = error * np.sqrt(n - 1) * np.tan(np.interp(LEVEL / 100 * within[-1], within, angles))
    angle = np.arctan2(abs(mean), error * np.sqrt(n - 1))
    p = 1 - np.interp(angle, angles, within) / within[-1] if mean else 1.0
    return {"interval": [float(mean - reach), float(mean + reach)], "p": float(p)}


def _draws(images: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn, (DRAWS_AT_ONCE, images) at a time, DRAWS in all."""
    rng = np.random.default_rng(seed)
    offsets = images * np.arange(DRAWS_AT_ONCE)[:, None]
    for _ in range(DRAWS // DRAWS_AT_ONCE):
        drawn = rng.integers(images, size=(DRAWS_AT_ONCE, images)) + offsets
        yield np.bincount(drawn.ravel(), minlength=DRAWS_AT_ONCE * images).reshape(DRAWS_AT_ONCE, images)


def _summarize_draws(ranks: np.ndarray, image: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """`_summarize` in each draw. ranks, image: (queries,); times: (draws, images) how often an image is drawn."""
    hits = 100.0 * (ranks[:, None] < np.array(RECALL_AT))
    *recalls, mean = _means(np.column_stack([hits, ranks]), image, times).T
    order = np.argsort(ranks, kind="stable")
    counted = times[:, image[order]].cumsum(axis=1)
    middle = np.stack([(counted[:, -1] - 1) // 2, counted[:, -1] // 2])  # two places where the number is even
    medians = ranks[order][(counted <= middle[..., None]).sum(axis=-1)].mean(axis=0)
    return {**dict(zip(RECALLS, recalls, strict=True)), "medr": np.floor(medians) + 1, "meanr": mean + 1}


def _means(values: np.ndarray, image: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Means (draws, columns) of values (queries, columns), each counted as often as its image is drawn."""
    sums = np.column_stack([np.bincount(image, column, minlength=times.shape[1]) for column in values.T])
    queries = np.bincount(image, minlength=times.shape[1])
    return (times @ sums) / (times @ queries)[:, None]
