"""Ranks of true pairs, counted while strips of scores pass by: no matrix of all scores is kept, nothing is sorted.

A query's rank is the number of wrong items before its best true one, counted from 0; a wrong item with the same score
counts as before it.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.cli import InputError
from lib.evaluation.parts import Part, Shares, chunks, count, overlap, unshared, whole, within


class Ranks(NamedTuple):
    """Ranks of all queries of both directions, from 0."""

    i2t: np.ndarray  # (images,)
    t2i: np.ndarray  # (captions,)


class RankCounter:
    """Counts the ranks of one part of a split, of whose images this process may have some."""

    def __init__(self, part: Part, true_scores: Tensor, image_of_caption: Tensor, shares: Shares):
        """true_scores: (C,) of each caption and its own image, all captions of the split; image_of_caption: (C,)."""
        self.part, self.shares, self.true = part, shares, true_scores[part.captions]
        image = image_of_caption[part.captions] - part.images.start
        self.best = self.true.new_full((count(part.images),), float("-inf"))
        self.best.scatter_reduce_(0, image, self.true, "amax")
        self.own = torch.bincount(image[self.true >= self.best[image]], minlength=len(self.best))
        self.i2t, self.t2i = torch.zeros_like(self.own), torch.zeros_like(image)  # items as good as the best true one

    def add(self, first: int, scores: Tensor) -> None:
        """Count scores (own images, captions) of consecutive captions of the split from `first`. Each caption once."""
        images = overlap(self.shares.mine.images, self.part.images)
        captions = overlap(slice(first, first + scores.shape[1]), self.part.captions)
        if not count(images) or not count(captions):
            return
        scores = scores[within(images, self.shares.mine.images), captions.start - first : captions.stop - first]
        rows, columns = within(images, self.part.images), within(captions, self.part.captions)
        self.i2t[rows] += (scores >= self.best[rows, None]).sum(dim=1)
        self.t2i[columns] += (scores >= self.true[columns]).sum(dim=0)

    def ranks(self) -> Ranks:
        """The ranks, once all captions have been added on all processes: true items are no wrong ones."""
        i2t, t2i = self.shares.add_up(self.i2t) - self.own, self.shares.add_up(self.t2i) - 1
        return Ranks(i2t.cpu().numpy(), t2i.cpu().numpy())


def count_ranks(
    strips: Iterable[tuple[int, list[Tensor]]],
    true_scores: list[Tensor],
    image_of_caption: Tensor,
    parts: Iterable[Part],
    shares: Shares,
) -> list[list[Ranks]]:
    """The ranks of each part, of each row of scores, on all processes.

    strips: first caption and of each row the scores (own images, captions) of consecutive captions, all on one device;
    every process has as many. true_scores: of each row (C,) of each caption and its own image, the very numbers that
    stand in the strips. image_of_caption: (C,), ascending. Raises InputError on NaN, on all processes.
    """
    parts = list(parts)
    counters = [[RankCounter(part, true, image_of_caption, shares) for part in parts] for true in true_scores]
    for first, rows in strips:
        for scores, of_row in zip(rows, counters, strict=True):
            if shares.add_up(scores.isnan().any().long()):
                raise InputError(
                    "the scores hold NaN: the checkpoint, the features or the saved matrix is damaged, or --precision "
                    "is too low"
                )
            for counter in of_row:
                counter.add(first, scores)
    return [[counter.ranks() for counter in of_row] for of_row in counters]


def rank_matrix(scores: np.ndarray | Tensor, image_of_caption: np.ndarray, parts: Iterable[Part] = ()) -> list[Ranks]:
    """The ranks of a whole matrix of scores (I, C), or of parts of it. Raises InputError on NaN."""
    scores, image = torch.as_tensor(scores), torch.as_tensor(image_of_caption, device=getattr(scores, "device", None))
    true_scores = scores[image, torch.arange(len(image), device=scores.device)]
    strips = ((chunk.start, [scores[:, chunk]]) for chunk in chunks(scores.shape[1]))
    (ranks,) = count_ranks(strips, [true_scores], image, parts or [whole(*scores.shape)], unshared(*scores.shape))
    return ranks
