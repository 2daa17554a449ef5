"""Retrieval metrics from ranks: recall at K, median and mean rank, rSum. How ranks are counted: ranks.py.

Metrics are {"i2t": {"r1": ..., ...}, "t2i": {...}, "rsum": ...}; a figure is a number, or an array of one number for
each draw of a bootstrap.
"""

from collections.abc import Callable
from math import comb

import numpy as np

from lib.evaluation.ranks import Ranks

RECALL_AT = (1, 5, 10)
RECALLS = tuple(f"r{k}" for k in RECALL_AT)
WAYS = ("i2t", "t2i")
FOLDS = 5


def summarize(ranks: np.ndarray) -> dict[str, float]:
    """r1, r5, r10 in percent, medr and meanr (both from 1) of ranks counted from 0."""
    recalls = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in RECALL_AT}
    return {**recalls, "medr": float(np.floor(np.median(ranks)) + 1), "meanr": float(ranks.mean() + 1)}


def retrieval_metrics(ranks: Ranks) -> dict:
    """The metrics of the ranks of both directions."""
    return complete(summarize(ranks.i2t), summarize(ranks.t2i))


def mean_metrics(folds: list[dict]) -> dict:
    """Each figure averaged over the folds."""
    return map_figures(lambda *figures: np.mean(figures, axis=0), *folds)


def chance_metrics(image_of_caption: np.ndarray) -> dict:
    """The recalls expected of random scores: the part of all orders that bring a true item among the first K."""
    captions_of_image = np.bincount(image_of_caption)
    images, captions = len(captions_of_image), len(image_of_caption)
    i2t = {}
    for k in RECALL_AT:
        seen = min(k, captions)
        missed = [comb(captions - int(true), seen) / comb(captions, seen) for true in captions_of_image]
        i2t[f"r{k}"] = 100 * (1 - float(np.mean(missed)))
    return complete(i2t, {f"r{k}": 100 * min(1.0, k / images) for k in RECALL_AT})


def complete(i2t: dict, t2i: dict) -> dict:
    """Metrics of both directions with what follows from the recalls: their mean (avg) in each, the sum of all six."""
    sums = [sum(way[name] for name in RECALLS) for way in (i2t, t2i)]
    ways = ({**way, "avg": total / len(RECALLS)} for way, total in zip((i2t, t2i), sums, strict=True))
    return {**dict(zip(WAYS, ways, strict=True)), "rsum": sum(sums)}


def map_figures(function: Callable, *metrics: dict) -> dict:
    """Metrics of what a function makes of each figure of some metrics, which all have the same figures."""
    ways = {way: {name: function(*(one[way][name] for one in metrics)) for name in metrics[0][way]} for way in WAYS}
    return {**ways, "rsum": function(*(one["rsum"] for one in metrics))}
