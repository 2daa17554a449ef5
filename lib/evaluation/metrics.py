"""Retrieval metrics from ranks: recall at K, median and mean rank, rSum. How ranks are counted: ranks.py."""

from math import comb

import numpy as np

from lib.evaluation.ranks import Ranks

RECALL_AT = (1, 5, 10)
FOLDS = 5


def summarize(ranks: np.ndarray) -> dict[str, float]:
    """r1, r5, r10 in percent, medr and meanr (both from 1) of ranks counted from 0."""
    recalls = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in RECALL_AT}
    return {**recalls, "medr": float(np.floor(np.median(ranks)) + 1), "meanr": float(ranks.mean() + 1)}


def retrieval_metrics(ranks: Ranks) -> dict:
    """{"i2t": ..., "t2i": ..., "rsum": ...} of the ranks of both directions."""
    return _with_rsum(summarize(ranks.i2t), summarize(ranks.t2i))


def mean_metrics(folds: list[dict]) -> dict:
    """Each figure averaged over the folds."""
    i2t, t2i = (
        {name: float(np.mean([fold[way][name] for fold in folds])) for name in folds[0][way]} for way in ("i2t", "t2i")
    )
    return _with_rsum(i2t, t2i)


def chance_metrics(image_of_caption: np.ndarray) -> dict:
    """The recalls expected of random scores: the part of all orders that bring a true item among the first K."""
    captions_of_image = np.bincount(image_of_caption)
    images, captions = len(captions_of_image), len(image_of_caption)
    i2t = {}
    for k in RECALL_AT:
        seen = min(k, captions)
        missed = [comb(captions - int(true), seen) / comb(captions, seen) for true in captions_of_image]
        i2t[f"r{k}"] = 100 * (1 - float(np.mean(missed)))
    return _with_rsum(i2t, {f"r{k}": 100 * min(1.0, k / images) for k in RECALL_AT})


def _with_rsum(i2t: dict, t2i: dict) -> dict:
    return {"i2t": i2t, "t2i": t2i, "rsum": sum(way[f"r{k}"] for way in (i2t, t2i) for k in RECALL_AT)}
