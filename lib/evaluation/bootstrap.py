"""Error bars: how far figures would move with other queries of the same kind.

Images are drawn with replacement, each with all its captions, for captions of one image are easy or hard together. The
gallery stays as it is, so a query that is drawn has the rank it has. The same number of images and the same seed give
the same draws, whatever is measured: so two models are compared on the same queries, draw by draw.
"""

from collections.abc import Iterator

import numpy as np

from lib.evaluation.metrics import RECALL_AT, complete, map_figures
from lib.evaluation.ranks import Ranks

DRAWS = 2000
AT_ONCE = 100  # draws
LEVEL = 95  # percent


def bootstrap(ranks: Ranks, image_of_caption: np.ndarray, seed: int = 0) -> dict:
    """The metrics of each draw: every figure an array (DRAWS,). image_of_caption: (captions,), images from 0."""
    images = np.arange(len(ranks.i2t))
    ways = [(ranks.i2t, images), (ranks.t2i, image_of_caption)]
    drawn = [complete(*(_summarize(*way, times) for way in ways)) for times in _draws(len(images), seed)]
    return map_figures(lambda *chunks: np.concatenate(chunks), *drawn)


def bootstrap_means(values: np.ndarray, image_of_query: np.ndarray, seed: int = 0) -> np.ndarray:
    """The mean of each draw (DRAWS, figures) of values (queries, figures); the images drawn are those of a query."""
    _, image = np.unique(image_of_query, return_inverse=True)
    return np.concatenate([_means(values, image, times) for times in _draws(image.max() + 1, seed)])


def interval(draws: np.ndarray) -> list[float]:
    """The ends of the interval that holds LEVEL percent of the draws (DRAWS,), half of the rest on either side."""
    outside = (100 - LEVEL) / 2
    return np.percentile(draws, [outside, 100 - outside]).tolist()


def p_value(differences: np.ndarray) -> float:
    """Two-sided: how probable so large a difference is where there is none, from differences (DRAWS,) of pairs."""
    differences = differences.round(9)  # a sum of what one gains and the other loses is zero but for rounding
    on_one_side = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (1 + float(on_one_side)) / (1 + len(differences)))


def _draws(images: int, seed: int) -> Iterator[np.ndarray]:
    """How often each image is drawn: (AT_ONCE, images), until there are DRAWS."""
    rng = np.random.default_rng(seed)
    offsets = images * np.arange(AT_ONCE)[:, None]
    for _ in range(DRAWS // AT_ONCE):
        drawn = rng.integers(images, size=(AT_ONCE, images)) + offsets
        yield np.bincount(drawn.ravel(), minlength=AT_ONCE * images).reshape(AT_ONCE, images)


def _summarize(ranks: np.ndarray, image: np.ndarray, times: np.ndarray) -> dict[str, np.ndarray]:
    """What metrics.summarize gives, of each draw. ranks, image: (queries,); times: (draws, images)."""
    hits = 100.0 * (ranks[:, None] < np.array(RECALL_AT))
    *recalls, mean = _means(np.column_stack([hits, ranks]), image, times).T
    named = {f"r{k}": recall for k, recall in zip(RECALL_AT, recalls, strict=True)}
    return {**named, "medr": np.floor(_medians(ranks, image, times)) + 1, "meanr": mean + 1}


def _means(values: np.ndarray, image: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Means (draws, figures) of values (queries, figures), each counted as often as its image is drawn."""
    sums = np.column_stack([np.bincount(image, figure, minlength=times.shape[1]) for figure in values.T])
    queries = np.bincount(image, minlength=times.shape[1])
    return (times @ sums) / (times @ queries)[:, None]


def _medians(ranks: np.ndarray, image: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Medians (draws,) of ranks (queries,), each counted as often as its image is drawn."""
    order = np.argsort(ranks, kind="stable")
    counted = times[:, image[order]].cumsum(axis=1)
    middle = np.stack([(counted[:, -1] - 1) // 2, counted[:, -1] // 2])  # one place, or two where the number is even
    return ranks[order][(counted <= middle[..., None]).sum(axis=-1)].mean(axis=0)
