"""What another precision of the features does to a trained model's scores."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np

from lib.data.dataset import Split
from lib.evaluation.embed import Timing, embed_split
from lib.evaluation.evaluate import rank_exactly
from lib.evaluation.matcher import Matcher
from lib.evaluation.metrics import retrieval_metrics
from lib.evaluation.parts import whole

BLOCK_IMAGES = 64  # compared at a time


class ScoreRounding(NamedTuple):
    """Differences between the scores of the same pairs from two files, and the metrics from each."""

    largest: float
    mean: float  # of the absolute differences
    spread: float  # standard deviation of the scores before
    before: dict
    after: dict


def compare_scores(matcher: Matcher, before: Split, after: Split, batch_size: int = 128) -> ScoreRounding:
    """Score all pairs of the same images and captions from two files. The scores wait in a temporary folder."""
    with TemporaryDirectory() as folder:
        paths = [Path(folder) / f"{name}.npy" for name in ("before", "after")]
        metrics = [_score(matcher, split, batch_size, path) for split, path in zip((before, after), paths, strict=True)]
        return ScoreRounding(*_differences(*(np.load(path, mmap_mode="r") for path in paths)), *metrics)


def _score(matcher: Matcher, split: Split, batch_size: int, path: Path) -> dict:
    """The metrics of a split, whose scores go to a file."""
    captions = matcher.tokenizer.tokenize(split.captions)
    embeddings = embed_split(matcher, split, captions, batch_size, 0, Timing())
    every = [whole(len(split.features), len(split.captions))]
    (ranks,) = rank_exactly(matcher.scorer(), embeddings, split, every, Timing(), str(path))
    return retrieval_metrics(ranks)


def _differences(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Largest and mean absolute difference of two arrays of scores (images, captions), and the first one's spread."""
    largest, total, deviations, mean = 0.0, 0.0, 0.0, float(before.mean(dtype=np.float64))
    for first in range(0, len(before), BLOCK_IMAGES):
        scores, others = (array[first : first + BLOCK_IMAGES].astype(np.float64) for array in (before, after))
        difference = np.abs(scores - others)
        largest, total = max(largest, float(difference.max())), total + float(difference.sum())
        deviations += float(((scores - mean) ** 2).sum())
    return largest, total / before.size, (deviations / before.size) ** 0.5
