"""Two models on the same queries: the difference of every metric with its interval, and where they differ most."""

import numpy as np

from lib import distributed
from lib.cli import one_line
from lib.config import CompareSettings
from lib.data.dataset import Split
from lib.evaluation import metrics, report
from lib.evaluation.evaluate import describe, opened, write_json
from lib.evaluation.metrics import WAYS, Ranks, map_metrics
from lib.files import check_writable

SIGNIFICANT = 0.05  # a difference in rSum with a p-value below this has a winner
CHANGED = 5  # queries of each direction that are shown


def compare(settings: CompareSettings) -> dict:
    """Print how A and B differ, write --json and return what it holds. All processes of a job must call this."""
    check_writable(settings.json if distributed.is_first() else "")
    with opened([settings.a, settings.b], settings) as job:
        print(describe(job, ("A", "B")))
        ranks, split, clock = [], job.split, job.clock
        for source in job.sources:
            scores = source.scores(job)
            with clock("rank"):
                ranks.append(metrics.rank_parts(scores, split.image_of_caption, job.parts))
        with clock("protocols"):
            draws = [metrics.bootstrap_parts(one, job.parts, split.image_of_caption) for one in ranks]
            a, b = map(metrics.metrics_of_parts, ranks, draws)
            wins = {}
            for way, x, y in zip(WAYS, ranks[0][0], ranks[1][0], strict=True):
                wins[way] = {name: int(one.sum()) for name, one in (("a", x < y), ("b", y < x), ("alike", x == y))}
            results = {**job.about, "a": a, "b": b, "difference": _differences(a, b, *draws), "wins": wins}
            results["changed"] = find_changes(ranks[0][0], ranks[1][0], split)
        results["timing"] = clock
        print(f"{'seconds':<12}{clock}\n")
        for name, source in zip("AB", job.sources, strict=True):
            print("".join(f"{name}, {label}: {text}\n" for label, text in source.caveats), end="")
        lines = [_table(results), "", report.INTERVALS, "", *_wins(results), "", *_changes(results["changed"])]
        print("\n".join(lines))
        if settings.json and distributed.is_first():
            write_json(settings.json, results)
    return results


def find_changes(a: Ranks, b: Ranks, split: Split) -> list[dict]:
    """The CHANGED queries of each direction whose ranks (from 1) differ by the largest factor, and their captions."""
    changes = []
    for way, *ranks in zip(WAYS, a, b, strict=True):
        pairs = np.stack(ranks) + 1
        factors = np.abs(np.log(pairs[0] / pairs[1]))
        for query in np.argsort(-factors, kind="stable")[:CHANGED].tolist():
            if factors[query] > 0:
                captions = np.flatnonzero(split.image_of_caption == query) if way == "i2t" else [query]
                about = {"ranks": pairs[:, query].tolist(), "captions": [split.captions[c] for c in captions]}
                changes.append({"way": way, "query": query, **about})
    return changes


def _differences(a: dict, b: dict, draws_a: list[dict], draws_b: list[dict]) -> dict:
    """B's metrics less A's, with intervals and p-values; of the folds' means, if any, and then "full" of all images."""
    full = {}
    if a["folds"]:
        whole_a, whole_b = ({**one["full"], "folds": []} for one in (a, b))
        full = {"full": _differences(whole_a, whole_b, draws_a[:1], draws_b[:1])}
    draws = map_metrics(np.subtract, *(metrics.mean_metrics(some[1:] or some) for some in (draws_b, draws_a)))
    return {
        **map_metrics(lambda of_a, of_b: float(of_b - of_a), a, b),
        "interval": map_metrics(metrics.interval, draws),
        "p": map_metrics(metrics.p_value, draws),
        **full,
    }


def _table(results: dict) -> str:
    size, rows = (results["images"], len(results["a"]["folds"])), []
    a, b, difference = (report.named_parts(results[name], *size) for name in ("a", "b", "difference"))
    for part in a:
        rows += [report.Row(f"A{part}", a[part]), report.Row(f"B{part}", b[part])]
        rows += report.with_interval(f"B - A{part}", difference[part], "+.1f")
        rows.append(report.Row("  p", difference[part]["p"], ".3f"))
    return report.table(rows)


def _wins(results: dict) -> list[str]:
    """How many queries each wins, and who is better on the whole."""
    difference = results["difference"]
    rsum, ends, p = (one["rsum"] for one in (difference, difference["interval"], difference["p"]))
    winner = "no winner" if p >= SIGNIFICANT else f"{'B' if rsum > 0 else 'A'} is better"
    lines = [f"{'queries that rank better in':<28}{'A':>7}{'B':>7}{'alike':>7}"]
    for way, wins in results["wins"].items():
        lines.append(f"  {report.TITLES[way]:<26}" + "".join(f"{count:>7}" for count in wins.values()))
    summary = f"rSum {rsum:+.1f} from A to B (95 % {ends[0]:+.1f} to {ends[1]:+.1f}), p = {p:.3f}"
    return [*lines, "", f"{winner}: {summary}"]


def _changes(changes: list[dict]) -> list[str]:
    if not changes:
        return ["no query changes its rank"]
    lines = [f"{'queries that change most':<28}{'A':>7}{'B':>7}"]
    for change in changes:
        name, (a, b) = f"{'image' if change['way'] == 'i2t' else 'caption'} {change['query']}", change["ranks"]
        first, *others = map(one_line, change["captions"])
        lines += [f"  {name:<26}{a:>7}{b:>7}  {first}", *(f"{'':<44}{caption}" for caption in others)]
    return lines
