"""Ranks of true pairs, counted while blocks of scores pass by: no matrix of all scores is kept, nothing is sorted.

A query's rank is the number of wrong items before its best true one, counted from 0; a wrong item with the same score
counts as before it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.errors import InputError


class Ranks(NamedTuple):
    """Ranks of all queries of both directions, from 0."""

    i2t: np.ndarray  # (images,)
    t2i: np.ndarray  # (captions,)


class Part(NamedTuple):
    """Consecutive images and their captions, ranked among themselves: a whole split, or a fold of it."""

    images: slice
    captions: slice


class RankCounter:
    """Counts the ranks of one part of a split."""

    def __init__(self, part: Part, true_scores: Tensor, image_of_caption: Tensor):
        """true_scores: (C,) of each caption and its own image, all captions of the split; image_of_caption: (C,)."""
        self.part, self.true = part, true_scores[part.captions]
        image = image_of_caption[part.captions] - part.images.start
        self.best = self.true.new_full((part.images.stop - part.images.start,), float("-inf"))
        self.best.scatter_reduce_(0, image, self.true, "amax")
        self.own = torch.bincount(image[self.true >= self.best[image]], minlength=len(self.best))
        self.i2t = torch.zeros_like(self.own)
        self.t2i = torch.full_like(image, -1)  # each caption's own image is no wrong one

    def add(self, first: int, scores: Tensor) -> None:
        """Count a block of the split's scores (images, C), whose first image is `first`. Each image once."""
        begin, end = max(first, self.part.images.start), min(first + len(scores), self.part.images.stop)
        if begin >= end:
            return
        scores = scores[begin - first : end - first, self.part.captions]
        rows = slice(begin - self.part.images.start, end - self.part.images.start)
        self.i2t[rows] = (scores >= self.best[rows, None]).sum(dim=1) - self.own[rows]
        self.t2i += (scores >= self.true).sum(dim=0)

    def ranks(self) -> Ranks:
        """The ranks, once all images have been added."""
        return Ranks(self.i2t.cpu().numpy(), self.t2i.cpu().numpy())


def count_ranks(
    blocks: Iterable[tuple[int, Tensor]], true_scores: Tensor, image_of_caption: Tensor, parts: Iterable[Part]
) -> list[Ranks]:
    """The ranks of each part. blocks: first image and scores (images, C), all on one device.

    true_scores: (C,) of each caption and its own image, the very numbers that stand in the blocks. image_of_caption:
    (C,), ascending. Raises InputError on NaN.
    """
    counters = [RankCounter(part, true_scores, image_of_caption) for part in parts]
    for first, scores in blocks:
        if scores.isnan().any():
            raise InputError(
                "the scores hold NaN: the checkpoint or the features are damaged, or --precision is too low"
            )
        for counter in counters:
            counter.add(first, scores)
    return [counter.ranks() for counter in counters]


def rank_matrix(scores: np.ndarray | Tensor, image_of_caption: np.ndarray, parts: Iterable[Part] = ()) -> list[Ranks]:
    """The ranks of a whole matrix of scores (I, C), or of parts of it. Raises InputError on NaN."""
    scores, image = torch.as_tensor(scores), torch.as_tensor(image_of_caption, device=getattr(scores, "device", None))
    true_scores = scores[image, torch.arange(len(image), device=scores.device)]
    return count_ranks(_cut(scores), true_scores, image, parts or [whole(*scores.shape)])


def whole(images: int, captions: int) -> Part:
    """All of a split."""
    return Part(slice(0, images), slice(0, captions))


def folds(count: int, images: int, image_of_caption: np.ndarray) -> list[Part]:
    """Equal consecutive parts of a split, each with its own captions. Raises InputError where they cannot be equal."""
    if images % count:
        raise InputError(f"--fold5: {images} images do not divide into {count} equal folds")
    edges = np.arange(count + 1) * (images // count)
    captions = np.searchsorted(image_of_caption, edges)
    return [Part(slice(*map(int, edges[k : k + 2])), slice(*map(int, captions[k : k + 2]))) for k in range(count)]


def _cut(scores: Tensor, images: int = 64) -> Iterator[tuple[int, Tensor]]:
    for first in range(0, len(scores), images):
        yield first, scores[first : first + images]
