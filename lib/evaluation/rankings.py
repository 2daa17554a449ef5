"""Lists of whole queries: where each item that fits a query stands, and what stands at the top.

A wrong item stands before one that fits and has the same score, as everywhere. What fits is for a protocol to say.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lib.cli import with_bar
from lib.evaluation.metrics import RECALL_AT

TOP = 10
ABSENT = -1
AT_ONCE = 256  # captions whose scores are turned into rows at a time


class Protocol(NamedTuple):
    """Which items count as right answers to which queries; a query that is not in it does not count.

    A right answer that is not among the items at all (ECCV Caption knows two such captions) is one of number ABSENT.
    """

    name: str
    figures: tuple[str, ...]  # of query_figures, by which it is reported
    captions: dict[int, np.ndarray]  # right answers to an image
    images: dict[int, np.ndarray]  # right answers to a caption
    folds: Sequence[tuple[np.ndarray, np.ndarray]] = ()  # images and captions, ascending, that are ranked among
    # themselves; (): all are


class RankedList:
    """The items of one query in order of their scores (items,)."""

    def __init__(self, scores: np.ndarray):
        self.scores, self.ascending = scores, np.sort(scores)

    def positions(self, right: np.ndarray) -> np.ndarray:
        """Where each of the right items (n,) stands, from 0: no two in the same place. ABSENT ones are behind all."""
        known, positions = right != ABSENT, len(self.scores) + np.arange(len(right))
        scores = self.scores[right[known]]
        order = np.argsort(-scores, kind="stable")
        ordinal = np.empty_like(order)
        ordinal[order] = np.arange(len(order))
        as_good = _count_as_good(self.ascending, scores)  # items, itself included
        right_as_good = _count_as_good(np.sort(scores), scores)
        positions[known] = as_good - right_as_good + ordinal
        return positions

    def top(self, right: np.ndarray, k: int = TOP) -> np.ndarray:
        """The first k items, or all where there are fewer."""
        least = self.ascending[max(0, len(self.ascending) - k)]
        items = np.flatnonzero(self.scores >= least)
        return items[np.lexsort((items, np.isin(items, right), -self.scores[items]))[:k]]


class Judged(NamedTuple):
    """What became of one query."""

    way: str  # i2t, t2i
    query: int
    top: list[tuple[int, float]]  # the first TOP items and their scores
    right: np.ndarray  # items that fit, by the first protocol
    positions: dict[str, np.ndarray]  # by protocol: where the items that fit stand, from 0, in the protocol's order


def judge(scores: np.ndarray, protocols: Sequence[Protocol]) -> Iterator[Judged]:
    """All queries of a matrix of scores (images, captions), images first. The first protocol must have every query."""
    lists = _ranked_lists(scores)
    for way, query, ranked in with_bar(lists, "lists", sum(scores.shape)):
        answers = [(p.captions if way == "i2t" else p.images).get(query) for p in protocols]
        positions = {
            protocol.name: _positions(ranked, right, protocol.folds, way, query)
            for protocol, right in zip(protocols, answers, strict=True)
            if right is not None
        }
        top = [(int(item), float(ranked.scores[item])) for item in ranked.top(answers[0])]
        yield Judged(way, query, top, answers[0], positions)


def query_figures(positions: np.ndarray) -> dict[str, float]:
    """The figures of one query, each between 0 and 1, from the places (n,) of all n items that fit it.

    r1, r5, r10: is one of them among the first 1, 5, 10; avg: the mean of the three. r_precision: the part of the first
    n that fit. map_at_r: the mean over the first n places of the precision up to there, where the item there fits, else
    of 0 (Musgrave et al. 2020, "A Metric Learning Reality Check").
    """
    places, right = np.sort(positions), len(positions)
    precision = np.arange(1, right + 1) / (places + 1)
    inside = places < right
    recalls = {f"r{k}": float(places[0] < k) for k in RECALL_AT}
    average = sum(recalls.values()) / len(recalls)
    precisions = {"r_precision": float(inside.mean()), "map_at_r": float(precision[inside].sum() / right)}
    return {**recalls, "avg": average, **precisions}


def _ranked_lists(scores: np.ndarray) -> Iterator[tuple[str, int, RankedList]]:
    for image, row in enumerate(scores):
        yield "i2t", image, RankedList(row)
    for first in range(0, scores.shape[1], AT_ONCE):
        for number, column in enumerate(np.ascontiguousarray(scores[:, first : first + AT_ONCE].T)):
            yield "t2i", first + number, RankedList(column)


def _positions(ranked: RankedList, right: np.ndarray, folds: Sequence, way: str, query: int) -> np.ndarray:
    """Where the right items stand, in the query's fold where there are folds."""
    queries_of, items_of = (0, 1) if way == "i2t" else (1, 0)
    for fold in folds:
        place = np.searchsorted(fold[queries_of], query)
        if place < len(fold[queries_of]) and fold[queries_of][place] == query:
            items = fold[items_of]
            return RankedList(ranked.scores[items]).positions(np.searchsorted(items, right))
    return ranked.positions(right)


def _count_as_good(ascending: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """How many of some scores in ascending order are at least each of some others."""
    return len(ascending) - np.searchsorted(ascending, scores, side="left")
