"""Two models on the same queries: the difference of every figure with its interval, and where they differ most."""

from typing import NamedTuple

import numpy as np

from lib import distributed
from lib.cli import one_line
from lib.config import CompareSettings
from lib.data.dataset import Split
from lib.evaluation import report
from lib.evaluation.bootstrap import interval, p_value
from lib.evaluation.embed import Timing
from lib.evaluation.evaluate import describe, draw_metrics, measure, rank_scores, scores_of, write_json
from lib.evaluation.metrics import WAYS, map_figures, mean_metrics
from lib.evaluation.ranks import Ranks
from lib.evaluation.sources import opened
from lib.files import check_writable

SURE = 0.05  # largest p-value of the difference in rSum that makes a winner
CHANGED = 5  # queries of each direction that are shown


class Change(NamedTuple):
    """A query that the two rank differently."""

    way: str
    query: int
    ranks: tuple[int, int]  # A's and B's, from 1
    captions: list[str]  # the query itself, or the captions of the image that it is


def compare(settings: CompareSettings) -> dict:
    """Score a split with A and with B, print what differs, write --json. Returns the results. Raises InputError."""
    timing = Timing()
    check_writable(settings.json if distributed.is_first() else "")
    with opened([settings.a, settings.b], settings, timing) as (sources, split, parts, compute, caveats):
        print(describe(sources, split, compute, ("A", "B")))
        for source in sources:
            source.embed(split, settings, timing)
        ranks, _ = rank_scores(scores_of(sources, split, compute, timing), split, parts, timing)
        with timing.clock("protocols_s"):
            drawn = [draw_metrics(one, parts, split.image_of_caption) for one in ranks]
        figures = [measure(one) for one in ranks]
        results = {
            **{"data": str(split.folder), "split": split.name},
            **{"images": len(split.features), "captions": len(split.captions)},
            **{"a": figures[0], "b": figures[1], "difference": _differences(figures, drawn)},
            "wins": {way: count_wins(*(getattr(one[0], way) for one in ranks)) for way in WAYS},
            "changed": [change._asdict() for change in find_changes(ranks[0][0], ranks[1][0], split)],
            "timing": vars(timing),
        }
        print(f"{'seconds':<12}{timing}\n")
        for name, of_one in zip("AB", caveats, strict=True):
            print("".join(f"{name}, {caveat.label}: {caveat.text}\n" for caveat in of_one), end="")
        print(_report(results))
        if settings.json and distributed.is_first():
            write_json(settings.json, results)
    return results


def count_wins(a: np.ndarray, b: np.ndarray) -> dict[str, int]:
    """How many queries each ranks better, by the ranks (queries,) of the best true item."""
    return {"a": int((a < b).sum()), "b": int((b < a).sum()), "alike": int((a == b).sum())}


def find_changes(a: Ranks, b: Ranks, split: Split) -> list[Change]:
    """The CHANGED queries of each direction whose ranks differ by the largest factor, the largest first."""
    changes = []
    for way in WAYS:
        pairs = np.stack([getattr(a, way), getattr(b, way)]) + 1
        factors = np.abs(np.log(pairs[0] / pairs[1]))
        for query in np.argsort(-factors, kind="stable")[:CHANGED].tolist():
            if factors[query] > 0:
                changes.append(Change(way, query, tuple(pairs[:, query].tolist()), _captions(way, query, split)))
    return changes


def _captions(way: str, query: int, split: Split) -> list[str]:
    if way == "t2i":
        return [split.captions[query]]
    first, end = np.searchsorted(split.image_of_caption, [query, query + 1])
    return split.captions[first:end]


def _differences(figures: list[dict], drawn: list[list[dict]]) -> dict:
    """B's figures less A's: of all, or of the folds' mean and, as `full`, of all; each with interval and p-value."""
    (a, b), (drawn_a, drawn_b) = figures, drawn
    every = (drawn_a[0], drawn_b[0])
    if not a["folds"]:
        return _difference(a, b, *every)
    of_mean = _difference(a, b, *(mean_metrics(one[1:]) for one in drawn))
    return {**of_mean, "full": _difference(a["full"], b["full"], *every)}


def _difference(a: dict, b: dict, drawn_a: dict, drawn_b: dict) -> dict:
    draws = map_figures(np.subtract, drawn_b, drawn_a)
    return {
        **map_figures(lambda of_a, of_b: float(of_b - of_a), a, b),
        "interval": map_figures(interval, draws),
        "p": map_figures(p_value, draws),
    }


# What is printed


def _report(results: dict) -> str:
    return "\n".join([_table(results), "", report.INTERVALS, "", *_wins(results), "", *_changes(results["changed"])])


def _table(results: dict) -> str:
    images, number = results["images"], len(results["a"]["folds"])
    of = {"": results}
    if number:
        of = {
            f", mean of {number} folds of {images // number}": results,
            f", all {images} images": {name: results[name]["full"] for name in ("a", "b", "difference")},
        }
    rows = []
    for which, one in of.items():
        rows += [report.Row(f"A{which}", one["a"]), report.Row(f"B{which}", one["b"])]
        rows += report.with_interval(f"B - A{which}", one["difference"], "+.1f")
        rows.append(report.Row("  p", one["difference"]["p"], ".3f"))
    return report.table(rows)


def _wins(results: dict) -> list[str]:
    """How many queries each wins, and who is better on the whole."""
    difference = results["difference"]
    rsum, p, (low, high) = (part["rsum"] for part in (difference, difference["p"], difference["interval"]))
    winner = "no winner" if p >= SURE else f"{'B' if rsum > 0 else 'A'} is better"
    lines = [f"{'queries that rank better in':<28}{'A':>7}{'B':>7}{'alike':>7}"]
    lines += [
        f"  {report.TITLES[way]:<26}{wins['a']:>7}{wins['b']:>7}{wins['alike']:>7}"
        for way, wins in results["wins"].items()
    ]
    return [*lines, "", f"{winner}: rSum {rsum:+.1f} from A to B (95 % {low:+.1f} to {high:+.1f}), p = {p:.3f}"]


def _changes(changes: list[dict]) -> list[str]:
    if not changes:
        return ["no query changes its rank"]
    lines = [f"{'queries that change most':<28}{'A':>7}{'B':>7}"]
    for change in changes:
        name = f"{'image' if change['way'] == 'i2t' else 'caption'} {change['query']}"
        lines.append(f"  {name:<26}{change['ranks'][0]:>7}{change['ranks'][1]:>7}  {one_line(change['captions'][0])}")
        lines += [f"{'':<44}{one_line(caption)}" for caption in change["captions"][1:]]
    return lines
