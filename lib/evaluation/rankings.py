"""The ranked list of every query: where its right items stand and what stands first; and the file of --ranks.

A wrong item with the same score stands before a right one. docs/evaluation.md describes the file.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lib.cli import with_bar
from lib.data.dataset import Split, read_ids
from lib.evaluation.metrics import RECALL_AT, RECALLS, Part
from lib.files import replacing

FORMAT = "x-dim ranks 1"
TOP = 10
ABSENT = -1  # a right answer that is not among the items: ECCV Caption knows two such captions
ONLY_R_PRECISION = ("r_precision",)


class Protocol(NamedTuple):
    """Which items are right answers to which queries. Queries that it does not have do not count."""

    name: str
    metrics: tuple[str, ...]  # those of `query_metrics` that it reports
    right: dict[str, dict[int, np.ndarray]]  # way -> query -> right items
    fold_of: dict[str, np.ndarray] | None = None  # way -> fold of each query, if queries are ranked within folds


class Query(NamedTuple):
    """The ranked list of one query."""

    way: str
    number: int
    top: list[tuple[int, float]]  # the first TOP items and their scores
    right: np.ndarray  # right items by the first protocol
    positions: dict[str, np.ndarray]  # protocol -> where its right items stand, from 0


class RankedList:
    """The items of one query, ordered by their scores (items,)."""

    def __init__(self, scores: np.ndarray):
        self.scores, self.ascending = scores, np.sort(scores)

    def positions(self, right: np.ndarray) -> np.ndarray:
        """Where each right item (n,) stands, from 0, no two at the same place; ABSENT ones stand behind all."""
        present, positions = right != ABSENT, len(self.scores) + np.arange(len(right))
        scores = self.scores[right[present]]
        order = np.argsort(-scores, kind="stable")
        before = np.empty_like(order)  # right items before each
        before[order] = np.arange(len(order))
        as_good = len(self.ascending) - np.searchsorted(self.ascending, scores)
        wrong = as_good - (len(scores) - np.searchsorted(np.sort(scores), scores))
        positions[present] = wrong + before
        return positions

    def top(self, right: np.ndarray) -> np.ndarray:
        """The first TOP items, or all if there are fewer."""
        least = self.ascending[max(0, len(self.ascending) - TOP)]
        items = np.flatnonzero(self.scores >= least)
        return items[np.lexsort((items, np.isin(items, right), -self.scores[items]))[:TOP]]


def judge(scores: np.ndarray, protocols: Sequence[Protocol]) -> Iterator[Query]:
    """All queries of scores (images, captions), images first. The first protocol must have every query."""
    for way, matrix in (("i2t", scores), ("t2i", np.ascontiguousarray(scores.T))):
        for query, row in enumerate(with_bar(matrix, f"lists {way}")):
            ranked, positions = RankedList(row), {}
            for name, _, right_of, fold_of in protocols:
                right = right_of[way].get(query)
                if right is not None and fold_of is None:
                    positions[name] = ranked.positions(right)
                elif right is not None and fold_of is not None:
                    items = np.flatnonzero(fold_of["t2i" if way == "i2t" else "i2t"] == fold_of[way][query])
                    positions[name] = RankedList(row[items]).positions(np.searchsorted(items, right))
            right = protocols[0].right[way][query]
            yield Query(way, query, [(int(item), float(row[item])) for item in ranked.top(right)], right, positions)


def query_metrics(positions: np.ndarray) -> dict[str, float]:
    """Metrics of one query, each between 0 and 1, from the positions (n,) of all its n right items.

    r1, r5, r10: whether a right item is among the first 1, 5, 10; avg: their mean. r_precision: share of right items
    among the first n. map_at_r: mean over the first n places of the precision up to there if the item there is right,
    else of 0 (Musgrave et al. 2020, "A Metric Learning Reality Check").
    """
    places, right = np.sort(positions), len(positions)
    precision = np.arange(1, right + 1) / (places + 1)
    inside = places < right
    recalls = {f"r{k}": float(places[0] < k) for k in RECALL_AT}
    precisions = {"r_precision": float(inside.mean()), "map_at_r": float(precision[inside].sum() / right)}
    return {**recalls, "avg": sum(recalls.values()) / len(recalls), **precisions}


def pair_protocols(image_of_caption: np.ndarray, parts: Sequence[Part]) -> list[Protocol]:
    """The data set's own pairs: "all", and "fold" if the parts hold folds after the whole split."""
    captions = np.split(np.arange(len(image_of_caption)), np.flatnonzero(np.diff(image_of_caption)) + 1)
    right = {"i2t": dict(enumerate(captions)), "t2i": dict(enumerate(image_of_caption[:, None]))}
    protocols = [Protocol("all", RECALLS, right)]
    if len(parts) > 1:
        fold_of_image = np.repeat(np.arange(len(parts) - 1), len(captions) // (len(parts) - 1))
        folds = {"i2t": fold_of_image, "t2i": fold_of_image[image_of_caption]}
        protocols.append(Protocol("fold", RECALLS, right, folds))
    return protocols


def write_ranks(path: str, queries: Iterable[Query], split: Split, protocols: Sequence[Protocol], about: dict) -> None:
    """Write the file of --ranks. about: entries of its first line."""
    ids, only_precision = read_ids(split), {one.name for one in protocols if one.metrics == ONLY_R_PRECISION}
    named = {"i2t": [{"id": one} for one in ids or ()], "t2i": [{"caption": one} for one in split.captions]}
    with replacing(path) as file:
        file.write(json.dumps({"format": FORMAT, **about}, ensure_ascii=False).encode() + b"\n")
        for way, number, top, right, positions in queries:
            ranks = {
                name: query_metrics(places)["r_precision"] if name in only_precision else (places + 1).tolist()
                for name, places in positions.items()
            }
            record = {"way": way, "query": number, **(named[way][number] if named[way] else {})}
            record |= {"right": right.tolist(), "ranks": ranks, "top": top}
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
