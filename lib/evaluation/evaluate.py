"""One evaluation for every program: checkpoints and a split in, scores, ranks, metrics, tables out."""

import json
import time
from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from lib import distributed
from lib.config import EvaluationSettings
from lib.data.dataset import Split
from lib.evaluation import coco, report
from lib.evaluation.bootstrap import bootstrap, interval
from lib.evaluation.embed import Timing
from lib.evaluation.matcher import Embeddings, gather_scores, pool, score_pairs, score_strips
from lib.evaluation.metrics import map_figures, mean_metrics, retrieval_metrics
from lib.evaluation.parts import Part, share_out
from lib.evaluation.provenance import Caveat
from lib.evaluation.rankings import Judged, judge
from lib.evaluation.ranks import Ranks, count_ranks
from lib.evaluation.ranks_file import pair_protocols, write_ranks
from lib.evaluation.rerank import Reranker
from lib.evaluation.scores import Scores, kept, scores_of_model, side_by_side, with_mean, written
from lib.evaluation.sources import CheckpointSource, Source, opened
from lib.files import check_writable, replacing
from lib.model.engine.autograd import Scorer
from lib.runtime import Compute


def evaluate(settings: EvaluationSettings) -> dict:
    """Evaluate checkpoints on a split, print the tables, write the files that are asked for.

    All processes of a job take part, and find the same; the first one alone has what --eccv and --ranks tell. Returns
    the results as --json holds them. Raises InputError.
    """
    timing = Timing()
    for path in (settings.save_sims, settings.ranks, settings.json) if distributed.is_first() else ():
        check_writable(path)
    with opened(settings.checkpoint, settings, timing) as (sources, split, parts, compute, caveats):
        with timing.clock("load_s"):
            fits = coco.open_coco(split) if settings.eccv else None
        print(describe(sources, split, compute))
        for source in sources:
            source.embed(split, settings, timing)
        names, ranks, rerank, matrices = _rank(settings, sources, split, parts, compute, timing)
        with timing.clock("protocols_s"):
            rows = {
                name: add_intervals(measure(one), one, parts, split.image_of_caption)
                for name, one in zip(_label(names, caveats), ranks, strict=True)
            }
            protocols = pair_protocols(split, parts) + (fits.protocols if fits else []) if len(matrices) else []
            judged = [list(judge(matrix, protocols)) for matrix in matrices]
            beyond = _beyond_pairs(fits, judged, list(rows), sources) if fits else None
        results = {**_results(rows, split, caveats), "coco": beyond, "rerank": rerank, "timing": vars(timing)}
        print(f"{'seconds':<12}{timing}\n\n{_tables(rows, results, split, caveats)}")
        if beyond:
            print(f"\n{coco.tables(**beyond)}")
        if settings.json and distributed.is_first():
            write_json(settings.json, results)
        if settings.ranks and distributed.is_first():
            write_ranks(settings.ranks, judged[-1], split, protocols, results["row"])
    return results


def describe(sources: Sequence[Source], split: Split, compute: Compute, labels: Sequence[str] = ()) -> str:
    """The heading: what is evaluated, on what, with what. labels: of several sources."""
    labels = labels or (["checkpoint"] if len(sources) == 1 else _singles(sources))
    lines = [source.describe(label) for source, label in zip(sources, labels, strict=True)]
    size = f"{len(split.features)} images, {len(split.captions)} captions"
    data = f"{'data':<12}{split.folder} {split.name}: {size}"
    return "\n".join([*lines, data, f"{'device':<12}{compute}"])


def write_json(path: str, results: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")


# From scores to ranks


def _rank(
    settings: EvaluationSettings,
    sources: Sequence[Source],
    split: Split,
    parts: Sequence[Part],
    compute: Compute,
    timing: Timing,
) -> tuple[list[str], list[list[Ranks]], dict | None, np.ndarray]:
    """Names of rows, their ranks of each part, what --rerank has done, and the rows' scores that are needed further."""
    if settings.rerank:
        ranks, rerank = rank_coarse_to_fine(*sources, split, parts, settings.rerank, timing)
        return [f"{sources[0].name}, best {rerank['k']} exact"], ranks, rerank, np.empty((0, 0, 0))
    names, scores = [sources[0].name], scores_of(sources, split, compute, timing)
    if len(sources) > 1:
        names, scores = [*_singles(sources), f"ensemble of {len(sources)}"], with_mean(scores)
    keep = len(names) if settings.eccv else int(bool(settings.ranks))
    ranks, matrices = rank_scores(scores, split, parts, timing, settings.save_sims, keep)
    return names, ranks, None, matrices


def scores_of(sources: Sequence[Source], split: Split, compute: Compute, timing: Timing) -> Scores:
    """The exact scores of all sources, a row each; those of true pairs are computed here, the others on their way."""
    shares = share_out(len(split.features), split.image_of_caption)
    with timing.clock("similarity_s"):
        return side_by_side([source.scores(split, shares, compute.device) for source in sources])


def rank_scores(
    scores: Scores, split: Split, parts: Sequence[Part], timing: Timing, save_sims: str = "", keep: int = 0
) -> tuple[list[list[Ranks]], np.ndarray]:
    """The ranks of each part, of each row of scores, and all scores (rows, images, captions) of the last `keep` rows.

    save_sims: a file that the last row is written to. Other processes than the first keep no scores: (0, ...).
    """
    started, before = time.perf_counter(), timing.similarity_s
    shape = (len(split.features), len(split.captions))
    shares = share_out(shape[0], split.image_of_caption)
    image_of_caption = torch.from_numpy(split.image_of_caption).to(scores.of_true_pairs[0].device)
    strips = _clock(scores.strips, timing)
    matrices = np.empty((keep, *shape) if distributed.is_first() else (0, *shape), np.float32)
    if keep:
        strips = kept(strips, keep, matrices, shares)
    if save_sims:
        strips = written(strips, save_sims, shape, shares)
    ranks = count_ranks(strips, scores.of_true_pairs, image_of_caption, parts, shares)
    timing.rank_s += time.perf_counter() - started - (timing.similarity_s - before)
    return ranks, matrices


def rank_exactly(
    scorer: Scorer, embeddings: Embeddings, split: Split, parts: Sequence[Part], timing: Timing, save_sims: str = ""
) -> list[Ranks]:
    """The ranks of each part from one model's exact scores of all pairs, which go to a file where one is named."""
    scores = scores_of_model(scorer, embeddings, split.image_of_caption)
    ((ranks,), _) = rank_scores(scores, split, parts, timing, save_sims)
    return ranks


def rank_coarse_to_fine(
    source: CheckpointSource, split: Split, parts: Sequence[Part], rerank: str, timing: Timing
) -> tuple[list[list[Ranks]], dict]:
    """The ranks of each part, in one row, from coarse scores of all pairs and exact ones of the best.

    Returns K too, and how many scores were exact.
    """
    started, embeddings = time.perf_counter(), source.embeddings
    scores = gather_scores(score_strips(source.scorer(coarse=True), embeddings), embeddings)
    timing.similarity_s, started = time.perf_counter() - started, time.perf_counter()
    exact = partial(score_pairs, source.scorer(), embeddings)
    reranker = Reranker(scores, exact, split.image_of_caption, parts)
    ranks, k = reranker.ranks_until_they_stay() if rerank == "auto" else (reranker.ranks(int(rerank)), int(rerank))
    timing.rank_s = time.perf_counter() - started
    return [ranks], {"k": k, "exact_pairs": len(reranker.known), "pairs": scores.numel()}


def _clock(strips, timing: Timing):
    """Strips on their way; the time it takes to make them is added up."""
    started = time.perf_counter()
    for strip in strips:
        timing.similarity_s += time.perf_counter() - started
        yield strip
        started = time.perf_counter()


# From ranks to figures


def measure(ranks: Sequence[Ranks]) -> dict:
    """All metrics; with ranks of folds after those of the whole split, those at the top are the folds' means."""
    full, *of_folds = [retrieval_metrics(one) for one in ranks]
    return {**mean_metrics(of_folds), "folds": of_folds, "full": full} if of_folds else {**full, "folds": []}


def add_intervals(metrics: dict, ranks: Sequence[Ranks], parts: Sequence[Part], image_of_caption: np.ndarray) -> dict:
    """Metrics as `measure` makes them, with the interval of every figure: of all, of each fold and of their mean."""
    full, *of_folds = draw_metrics(ranks, parts, image_of_caption)
    if not of_folds:
        return {**metrics, "interval": map_figures(interval, full)}
    folds = [
        {**fold, "interval": map_figures(interval, drawn)}
        for fold, drawn in zip(metrics["folds"], of_folds, strict=True)
    ]
    return {
        **metrics,
        "interval": map_figures(interval, mean_metrics(of_folds)),
        "folds": folds,
        "full": {**metrics["full"], "interval": map_figures(interval, full)},
    }


def draw_metrics(ranks: Sequence[Ranks], parts: Sequence[Part], image_of_caption: np.ndarray) -> list[dict]:
    """The metrics of each draw of a bootstrap, of each part; images are drawn within it."""
    return [
        bootstrap(one, image_of_caption[part.captions] - part.images.start, seed=number)
        for number, (one, part) in enumerate(zip(ranks, parts, strict=True))
    ]


def _beyond_pairs(
    fits: coco.Coco, judged: Sequence[Sequence[Judged]], names: Sequence[str], sources: Sequence[Source]
) -> dict | None:
    """COCO's further protocols by row; None on other processes than the first."""
    embedded = all(source.embeddings for source in sources)
    pooled = [pool(source.embeddings) for source in sources] if fits.intra and embedded else []
    if not distributed.is_first():
        return None
    several = [*([one] for one in pooled), pooled] if len(pooled) > 1 else [pooled] * len(pooled)
    intra = {name: fits.intra_figures(some) for name, some in zip(names, several, strict=bool(pooled))}
    return {
        "rows": {name: fits.figures(one) for name, one in zip(names, judged, strict=True)},
        "intra": intra,
        "note": fits.note if embedded or not fits.intra else f"{fits.note}\n{coco.NOT_EMBEDDED}",
    }


# What is printed and written


def _singles(sources: Sequence[Source]) -> list[str]:
    return [f"single {number}" for number in range(1, len(sources) + 1)]


def _label(names: Sequence[str], caveats: Sequence[Sequence[Caveat]]) -> list[str]:
    """Names of rows with what has to be known of each; an ensemble's, below its models, is what is true of any."""
    labels = [[caveat.label for caveat in of_one] for of_one in caveats]
    if len(names) > len(labels):
        labels.append(list(dict.fromkeys(label for of_one in labels for label in of_one)))
    return [", ".join([name, *of_one]) for name, of_one in zip(names, labels, strict=True)]


def _results(rows: dict[str, dict], split: Split, caveats: Sequence[Sequence[Caveat]]) -> dict:
    """What was found; at the top the figures of the last row, the ensemble's where there is one."""
    *singles, last = rows
    return {
        **{"data": str(split.folder), "split": split.name},
        **{"images": len(split.features), "captions": len(split.captions)},
        **{"row": last, "caveats": list(dict.fromkeys(caveat.text for of_one in caveats for caveat in of_one))},
        **rows[last],
        "singles": {name: rows[name] for name in singles},
    }


def _tables(rows: dict[str, dict], results: dict, split: Split, caveats: Sequence[Sequence[Caveat]]) -> str:
    """The table of all rows, and below it what has to be known."""
    lines, notes = [], [report.INTERVALS]
    for name, figures in rows.items():
        lines += report.figure_rows(name, figures, len(split.features), with_folds=name == results["row"])
    if rerank := results["rerank"]:
        k, exact, pairs = rerank.values()
        notes.append(f"best {k} of each query by exact score: {exact} of {pairs} pairs ({100 * exact / pairs:.1f} %)")
    notes += dict.fromkeys(f"{caveat.label}: {caveat.text}" for of_one in caveats for caveat in of_one)
    lines += report.chance_rows(split.image_of_caption, len(results["folds"]))
    return "\n".join([report.table(lines), "", *notes])
