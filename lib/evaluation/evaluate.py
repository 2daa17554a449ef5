"""One evaluation, from top to bottom: load, embed, score, rank, measure, print, write."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from lib import distributed
from lib.cli import InputError, reason
from lib.config import SAVED_SCORES, EvaluationSettings, ScoringSettings
from lib.data.dataset import Split, open_split
from lib.data.tokenizer import TokenizedCaptions, Tokenizer
from lib.evaluation import coco, metrics, rankings, report, score
from lib.evaluation.metrics import Part, Ranks
from lib.evaluation.report import Caveat
from lib.files import check_writable, replacing
from lib.model.registry import PAPERS_GATE
from lib.model.xdim import XDim
from lib.runtime import Compute, choose_compute


def evaluate(settings: EvaluationSettings) -> dict:
    """Evaluate checkpoints or saved scores on a split: print the tables, write the files that are asked for.

    Several have a row each, and their ensemble, by the mean of their scores, has the last one. All processes of a job
    must call this; the first one alone prints, writes, and has the results of --eccv. Returns what --json holds. Raises
    InputError.
    """
    first = distributed.is_first()
    for path in (settings.save_sims, settings.ranks, settings.json) if first else ():
        check_writable(path)
    with opened(settings.checkpoint, settings) as job:
        split, clock = job.split, job.clock
        with clock("load"):
            fits = coco.open_coco(split) if settings.eccv else None
        protocols = rankings.pair_protocols(split.image_of_caption, job.parts) + (fits.protocols if fits else [])
        print(describe(job, job.names if len(job.sources) > 1 else ["checkpoint"]))

        ranks: dict[str, list[Ranks]] = {}  # by row: the ranks within the split and its folds
        queries: dict[str, list[rankings.Query]] = {}
        rerank = None
        if settings.rerank:
            of_parts, rerank = rank_coarse_to_fine(job)
            ranks[with_labels(f"{job.names[0]}, best {rerank['k']} exact", job.caveats)] = of_parts
        for name, scores in [] if settings.rerank else rows_of_scores(job):
            is_last = len(ranks) == len(job.sources) - (len(job.sources) == 1)
            with clock("rank"):
                ranks[name] = metrics.rank_parts(scores, split.image_of_caption, job.parts)
            with clock("protocols"):
                if first and (fits or (settings.ranks and is_last)):
                    queries[name] = list(rankings.judge(scores, protocols))
                if first and settings.save_sims and is_last:
                    save_scores(settings.save_sims, scores)

        with clock("protocols"):
            rows = {}
            for name, of_parts in ranks.items():
                draws = metrics.bootstrap_parts(of_parts, job.parts, split.image_of_caption)
                rows[name] = metrics.with_intervals(metrics.metrics_of_parts(of_parts), draws)
            beyond = beyond_pairs(fits, queries, job.sources) if fits and first else None
        *singles, last = rows
        results = {
            **describe_split(split),
            **{"row": last, "caveats": list(dict.fromkeys(one.text for some in job.caveats for one in some))},
            **rows[last],
            **{"singles": {name: rows[name] for name in singles}, "coco": beyond, "rerank": rerank},
            "timing": clock.results(),
        }
        print(f"{'seconds':<12}{clock}\n\n{tables(rows, results, job)}")
        if beyond:
            print(f"\n{coco.tables(**beyond)}")
        if settings.json and first:
            write_json(settings.json, results)
        if settings.ranks and first:
            about = {"row": last, "folds": len(job.parts) - 1}
            rankings.write_ranks(settings.ranks, queries[last], split, protocols, {**describe_split(split), **about})
    return results


def measure_split(
    model: XDim,
    tokenizer: Tokenizer,
    compute: Compute,
    split: Split,
    captions: TokenizedCaptions,
    batch_size: int,
    workers: int,
) -> dict:
    """The retrieval metrics of a model on a split, for the training loop. All processes of a job must call this.

    The model is put into evaluation mode.
    """
    matcher = score.Matcher(model, tokenizer, compute)
    embeddings = score.embed_split(matcher, split, captions, batch_size, workers)
    scores = score.score_all(matcher.scorer(), embeddings).numpy()
    return metrics.retrieval_metrics(metrics.rank_matrix(scores, split.image_of_caption))


class Clock:
    """Adds up the seconds of each part of an evaluation."""

    def __init__(self):
        self.seconds = dict.fromkeys(("load", "encode", "similarity", "rank", "protocols"), 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Within this context time counts as that of a part."""
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started

    def results(self) -> dict[str, float]:
        """For --json."""
        return {f"{part}_s": seconds for part, seconds in self.seconds.items()}

    def __str__(self) -> str:
        return ", ".join(f"{part} {seconds:.1f}" for part, seconds in self.seconds.items())


# What gives scores


class Source:
    """A checkpoint, or a .npy file of scores (images, captions) as --save_sims writes it. Raises InputError."""

    def __init__(self, given: str, settings: ScoringSettings):
        self.path, self.matcher, self.content = given, None, {}
        self.name = "saved scores"
        self.pooled: tuple[Tensor, Tensor] | None = None  # see score.pool; kept for --eccv
        if not given.endswith(SAVED_SCORES):
            self.matcher = score.load(given, settings.bert, settings.device, settings.precision, settings.engine)
            self.content = self.matcher.content
            self.name = _name_model(self.content["architecture"])
            return
        try:
            self.saved = np.load(given, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise InputError(f"{given}: no readable matrix of scores ({reason(error)})") from None
        if not isinstance(self.saved, np.ndarray) or self.saved.ndim != 2 or self.saved.dtype.kind != "f":
            raise InputError(f"{given}: expected a matrix of floating-point scores, images x captions")

    def check(self, split: Split) -> None:
        """Raises InputError if saved scores are not of this split's size."""
        found, expected = None if self.matcher else self.saved.shape, (len(split.features), len(split.captions))
        if found and found != expected:
            raise InputError(
                f"{self.path}: {found[0]} x {found[1]} scores, but {split.folder} {split.name} has {expected[0]} "
                f"images and {expected[1]} captions"
            )

    def embed(self, job: "Job") -> score.Embeddings:
        """Encode the split, after which the encoders' memory is free."""
        with job.clock("load"):
            captions = self.matcher.tokenizer.tokenize(job.split.captions)
        with job.clock("encode"):
            settings = job.settings
            return score.embed_split(self.matcher, job.split, captions, settings.batch_size, settings.workers)

    def scores(self, job: "Job") -> np.ndarray:
        """All scores (images, captions)."""
        if not self.matcher:
            with job.clock("load"):
                return self.saved.astype(np.float32)
        embeddings, scorer = self.embed(job), self.matcher.scorer()
        self.matcher = None  # the encoders' memory is free for the scores
        with job.clock("similarity"):
            scores = score.score_all(scorer, embeddings).numpy()
        if getattr(job.settings, "eccv", False):
            self.pooled = score.pool(embeddings)
        return scores


class Job(NamedTuple):
    """What an evaluation works on, and the clock that it is measured by."""

    settings: ScoringSettings
    clock: Clock
    compute: Compute
    sources: list[Source]
    split: Split
    parts: list[Part]  # the whole split, then its folds (--fold5)
    caveats: list[list[Caveat]]  # of each source

    @property
    def names(self) -> list[str]:
        """Names of the sources in tables."""
        return [f"single {k}" for k in range(1, len(self.sources) + 1)] if self.sources[1:] else [self.sources[0].name]


@contextmanager
def opened(given: Sequence[str], settings: ScoringSettings) -> Iterator[Job]:
    """Open checkpoints or files of scores and the split; within this context the job's processes can talk.

    Raises InputError.
    """
    clock = Clock()
    with clock("load"):
        sources = [Source(one, settings) for one in given]
        compute = choose_compute(settings.device, settings.precision)
    with distributed.joined(compute.device):
        with clock("load"):
            split, data_name = _open_split([source.content for source in sources if source.content], settings)
            for source in sources:
                source.check(split)
            parts = metrics.parts_of_split(split.image_of_caption, metrics.FOLDS if settings.fold5 else 0)
            caveats = [report.find_caveats(source.content, split, data_name) for source in sources]
        yield Job(settings, clock, compute, sources, split, parts, caveats)


def _open_split(contents: Sequence[dict], settings: ScoringSettings) -> tuple[Split, str]:
    """A split and its data set's name, as the flags say or else as the first checkpoint's training had it."""
    trained = contents[0]["settings"] if contents else {}
    data_path = settings.data_path or trained.get("data_path")
    data_name = settings.data_name or trained.get("data_name")
    if not data_path or not data_name:
        what = f"{contents[0]['path']}: a published checkpoint" if contents else "saved scores alone"
        missing = "--data_path" if data_name else "--data_path and --data_name"
        raise InputError(f"{what}; say with {missing} where the data is")
    dims = {content["architecture"]["image_encoder"]["options"]["img_dim"] for content in contents}
    if len(dims) > 1:
        sizes = " and of ".join(map(str, sorted(dims)))
        raise InputError(f"the checkpoints take features of {sizes} numbers, which no data set has at once")
    return open_split(data_path, data_name, settings.split, *dims), data_name


def _name_model(architecture: dict) -> str:
    """What a table calls a model."""
    similarity = architecture["similarity"]
    name = "X-Dim" if similarity["name"] == "xdim" else similarity["name"]
    gate = similarity["options"].get("gate", {"name": PAPERS_GATE})["name"]
    return name if gate == PAPERS_GATE else f"{name}, {gate} gate"


# Scores and ranks


def rows_of_scores(job: Job) -> Iterator[tuple[str, np.ndarray]]:
    """A row's name and scores (images, captions) for each source, and if there are several for their ensemble."""
    total = np.float32(0)
    for source, name, caveats in zip(job.sources, job.names, job.caveats, strict=True):
        scores = source.scores(job)
        yield with_labels(name, [caveats]), scores
        total = total + scores
    if len(job.sources) > 1:
        yield with_labels(f"ensemble of {len(job.sources)}", job.caveats), total / len(job.sources)


def rank_coarse_to_fine(job: Job) -> tuple[list[Ranks], dict]:
    """The ranks of each part by coarse scores of all pairs and exact ones of the best K; K and the number of pairs."""
    (source,), wanted = job.sources, job.settings.rerank
    embeddings = source.embed(job)
    with job.clock("similarity"):
        coarse = score.score_all(source.matcher.scorer(coarse=True), embeddings)
    with job.clock("rank"):
        exact = partial(score.score_pairs, source.matcher.scorer(), embeddings)
        reranker = score.Reranker(coarse, exact, job.split.image_of_caption, job.parts)
        ranks, k = reranker.ranks_until_stable() if wanted == "auto" else (reranker.ranks(int(wanted)), int(wanted))
    return ranks, {"k": k, "exact_pairs": reranker.exact_pairs, "pairs": coarse.numel()}


def beyond_pairs(fits: coco.Coco, queries: dict[str, list[rankings.Query]], sources: Sequence[Source]) -> dict:
    """The results of --eccv: metrics of every row, notes."""
    rows, pooled = {name: fits.metrics(of_row) for name, of_row in queries.items()}, [one.pooled for one in sources]
    if not fits.intra or None in pooled:
        return {"rows": rows, "intra": {}, "note": "\n".join([fits.note, *([coco.NOT_EMBEDDED] if fits.intra else [])])}
    models = [[one] for one in pooled] + ([pooled] if len(pooled) > 1 else [])
    intra = {name: fits.intra_metrics(some) for name, some in zip(rows, models, strict=True)}
    return {"rows": rows, "intra": intra, "note": fits.note}


# What is printed and written


def with_labels(name: str, caveats: Sequence[Sequence[Caveat]]) -> str:
    """A row's name with the labels of its caveats; an ensemble has those of all its models."""
    return ", ".join([name, *dict.fromkeys(caveat.label for of_one in caveats for caveat in of_one)])


def describe(job: Job, labels: Sequence[str]) -> str:
    """The heading: what is evaluated, on what data, on which device."""
    lines = [report.describe_source(one.path, one.content, name) for one, name in zip(job.sources, labels, strict=True)]
    about = describe_split(job.split)
    data = f"{about['data']} {about['split']}: {about['images']} images, {about['captions']} captions"
    return "\n".join([*lines, f"{'data':<12}{data}", f"{'device':<12}{job.compute}"])


def describe_split(split: Split) -> dict:
    """For --json and --ranks."""
    size = {"images": len(split.features), "captions": len(split.captions)}
    return {"data": str(split.folder), "split": split.name, **size}


def tables(rows: dict[str, dict], results: dict, job: Job) -> str:
    """The table of all rows, and below it what a reader has to know."""
    lines, notes = [], [report.INTERVALS]
    for name, values in rows.items():
        lines += report.metric_rows(name, values, results["images"], with_folds=name == results["row"])
    if rerank := results["rerank"]:
        k, exact, pairs = rerank.values()
        notes.append(f"best {k} of each query by exact score: {exact} of {pairs} pairs ({100 * exact / pairs:.1f} %)")
    notes += dict.fromkeys(f"{caveat.label}: {caveat.text}" for of_one in job.caveats for caveat in of_one)
    lines += report.chance_rows(job.split.image_of_caption, len(results["folds"]))
    return "\n".join([report.table(lines), "", *notes])


def save_scores(path: str | Path, scores: np.ndarray) -> None:
    """Write scores (images, captions) as float32. Raises InputError if the file cannot be written."""
    with replacing(path) as file:
        np.save(file, scores.astype(np.float32, copy=False))


def write_json(path: str | Path, results: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
