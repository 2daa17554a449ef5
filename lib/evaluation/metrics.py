"""Retrieval metrics from a matrix of scores: recall at K, median and mean rank, rSum.

A query's rank is the number of wrong items before its best true one, counted from 0; a wrong item with the same score
counts as before it. `image_of_caption` says which image each caption belongs to, any number of captions an image.
"""

from math import comb

import numpy as np

from lib.errors import InputError

RECALL_AT = (1, 5, 10)
FOLDS = 5


def image_to_text_ranks(scores: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """For each image the rank (from 0) of its best-ranked true caption. scores: (I, C). Raises InputError on NaN."""
    _refuse_nan(scores)
    true = scores[image_of_caption, np.arange(scores.shape[1])]  # (C,)
    best = np.full(len(scores), -np.inf, dtype=scores.dtype)
    np.maximum.at(best, image_of_caption, true)
    true_not_behind = np.bincount(image_of_caption[true >= best[image_of_caption]], minlength=len(scores))
    return (scores >= best[:, None]).sum(axis=1) - true_not_behind


def text_to_image_ranks(scores: np.ndarray, image_of_caption: np.ndarray) -> np.ndarray:
    """For each caption the rank (from 0) of its image. scores: (I, C). Raises InputError on NaN."""
    _refuse_nan(scores)
    true = scores[image_of_caption, np.arange(scores.shape[1])]
    return (scores >= true).sum(axis=0) - 1


def summarize(ranks: np.ndarray) -> dict[str, float]:
    """r1, r5, r10 in percent, medr and meanr (both from 1) of ranks counted from 0."""
    recalls = {f"r{k}": 100.0 * float((ranks < k).mean()) for k in RECALL_AT}
    return {**recalls, "medr": float(np.floor(np.median(ranks)) + 1), "meanr": float(ranks.mean() + 1)}


def retrieval_metrics(scores: np.ndarray, image_of_caption: np.ndarray) -> dict:
    """{"i2t": ..., "t2i": ..., "rsum": ...} of a score matrix (I, C). Raises InputError on NaN."""
    return _with_rsum(
        summarize(image_to_text_ranks(scores, image_of_caption)),
        summarize(text_to_image_ranks(scores, image_of_caption)),
    )


def fold_metrics(scores: np.ndarray, image_of_caption: np.ndarray) -> list[dict]:
    """The metrics of five equal consecutive parts of the images, each with its own captions.

    Raises InputError where the images do not divide by five.
    """
    if len(scores) % FOLDS:
        raise InputError(f"--fold5: {len(scores)} images do not divide into {FOLDS} equal folds")
    size, folds = len(scores) // FOLDS, []
    for first in range(0, len(scores), size):
        captions = np.flatnonzero((image_of_caption >= first) & (image_of_caption < first + size))
        folds.append(retrieval_metrics(scores[first : first + size, captions], image_of_caption[captions] - first))
    return folds


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


def _refuse_nan(scores: np.ndarray) -> None:
    if np.isnan(scores).any():
        raise InputError("the scores hold NaN: the checkpoint or the features are damaged, or --precision is too low")
