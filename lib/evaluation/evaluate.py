"""One evaluation, from top to bottom: load, embed, score, rank, measure, print, write."""

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lib import collectives, distributed
from lib.checkpoints.native import trained_encoder
from lib.checkpoints.record import RECORD
from lib.cli import InputError, reason, refusing
from lib.config import SAVED_SCORES, EvaluationSettings, SplitSettings
from lib.data.dataset import Split, describe_encoder, find_folder, is_same_encoder, open_split, read_encoder
from lib.data.images import open_pictures
from lib.data.tokenizer import TokenizedCaptions
from lib.evaluation import coco, metrics, rankings, report, score
from lib.evaluation.metrics import Part, Ranks
from lib.files import check_writable, refuse_inputs, replacing
from lib.model.registry import PAPERS_GATE, is_from_pixels
from lib.runtime import ROOT, Compute, choose_compute

GLOBAL_ALONE = ", global vectors alone"  # ends the name of a row by a global head's cosines
FOLDS_ALONE = "folds alone"  # label of scores that rank nothing among all images


def evaluate(settings: EvaluationSettings) -> dict:
    """Evaluate checkpoints or saved scores on a split, print the tables, write the files. Returns what --json holds.

    Several have a row each, and their ensemble, by the mean of their scores, has the last one. All processes of a job
    must call this; only the first returns results. Raises InputError.
    """
    first = distributed.is_first()
    for path in (settings.save_sims, settings.ranks, settings.json) if first else ():
        check_writable(path)
    with opened(settings.checkpoint, settings) as job:
        sources, split, clock = job.sources, job.split, job.clock
        with clock("load"):
            fits = coco.open_coco(split) if settings.eccv else None
        protocols = rankings.pair_protocols(split.image_of_caption, job.parts) + (fits.protocols if fits else [])
        print(describe(job, [source.name for source in sources] if len(sources) > 1 else ["checkpoint"]))

        ranks: dict[str, list[Ranks]] = {}  # by row: the ranks within the split and its folds
        queries: dict[str, list[rankings.Query]] = {}
        rerank = None
        if settings.rerank:
            ranks, rerank = rank_coarse_to_fine(job, settings.rerank)
        for row, scores, is_last in [] if settings.rerank else rows_of_scores(job):
            with clock("rank"):
                ranks[row] = metrics.rank_parts(scores, split.image_of_caption, job.parts)
            with clock("protocols"):
                if first and ((fits and not row.endswith(GLOBAL_ALONE)) or (settings.ranks and is_last)):
                    queries[row] = list(rankings.judge(scores, protocols))
                if first and settings.save_sims and is_last:
                    with replacing(settings.save_sims) as file:
                        np.save(file, scores)
        if not first:
            return {}

        with clock("protocols"):
            rows = {}
            for row, of_parts in ranks.items():
                draws = metrics.bootstrap_parts(of_parts, job.parts, split.image_of_caption)
                rows[row] = metrics.metrics_of_parts(of_parts, draws)
                if FOLDS_ALONE in dict(job.caveats):
                    del rows[row]["full"]
            beyond = fits.results(queries, [source.pooled for source in sources]) if fits else None
        *singles, last = rows
        results = {
            **job.about,
            "row": last,
            "caveats": list(dict.fromkeys(text for _, text in job.caveats)),
            **rows[last],
            **{"singles": {row: rows[row] for row in singles}, "coco": beyond, "rerank": rerank, "timing": clock},
        }
        print(f"{'seconds':<12}{clock}\n\n{tables(rows, results, job)}")
        if beyond:
            print(f"\n{coco.tables(**beyond)}")
        if settings.json:
            write_json(settings.json, results)
        if settings.ranks:
            about = {**job.about, "row": last, "folds": len(job.parts) - 1}
            rankings.write_ranks(settings.ranks, queries[last], split, protocols, about)
    return results


def measure_split(
    matcher: score.Matcher, split: Split, captions: TokenizedCaptions, batch_size: int, workers: int
) -> dict:
    """The retrieval metrics of a model on a split, for the training loop. All processes of a job must call this."""
    embeddings = score.embed_split(matcher, split, captions, batch_size, workers)
    scores = score.score_all(matcher.scorer(), embeddings).numpy()
    return metrics.retrieval_metrics(metrics.rank_matrix(scores, split.image_of_caption))


class Clock(dict):
    """Seconds spent on each part of an evaluation, by the names of --json. A part ends when the device has done it."""

    def __init__(self, compute: Compute):
        self.compute = compute
        super().__init__({f"{part}_s": 0.0 for part in ("load", "encode", "similarity", "rank", "protocols")})

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.compute.synchronize()
        self[f"{part}_s"] += time.perf_counter() - started

    def __str__(self) -> str:
        return ", ".join(f"{name.removesuffix('_s')} {seconds:.1f}" for name, seconds in self.items())


class Source:
    """A checkpoint, or a .npy file of scores: all, as --save_sims writes them, or of each fold. Raises InputError."""

    def __init__(self, given: str, settings: SplitSettings):
        self.path, self.name = given, "saved scores"  # name: in tables
        self.content: dict = {}  # the checkpoint's, without weights
        self.caveats: list[tuple[str, str]] = []  # label, text
        self.pooled: tuple[Tensor, Tensor] | None = None  # of score.pool, with --eccv or a global head
        self.has_head = False
        if not given.endswith(SAVED_SCORES):
            self.matcher = score.load(given, settings.bert, settings.device, settings.precision, settings.engine)
            self.content, self.has_head = self.matcher.content, self.matcher.model.global_head is not None
            similarity = self.content["architecture"]["similarity"]
            gate = similarity["options"].get("gate", {"name": PAPERS_GATE})["name"]
            self.name = "X-Dim" if similarity["name"] == "xdim" else similarity["name"]
            self.name += "" if gate == PAPERS_GATE else f", {gate} gate"
            self.name += " and global head" if self.has_head else ""
            return
        self.saved = _read_scores(given)

    @property
    def row(self) -> str:
        """The name of its row in tables."""
        return ", ".join([self.name, *(label for label, _ in self.caveats)])

    def embed(self, job: "Job") -> score.Embeddings:
        """The split, encoded by a checkpoint's model."""
        with job.clock("encode"):
            captions = self.matcher.tokenizer.tokenize_split(job.split.name, job.split.captions)
            return score.embed_split(self.matcher, job.split, captions, job.settings.batch_size, job.settings.workers)

    def scores(self, job: "Job") -> np.ndarray:
        """All scores (images, captions)."""
        if not self.content:
            with job.clock("load"):
                scores = np.full((len(job.split.features), len(job.split.captions)), -np.inf, np.float32)
                for part, saved in zip(self.saved_parts, self.saved, strict=True):
                    with refusing(f"{self.path}: scores beyond float32; divide them all by a number"):
                        scores[part] = np.errstate(over="raise")(np.asarray)(saved, np.float32)
                return scores
        embeddings, scorer, pooling = self.embed(job), self.matcher.scorer(), self.matcher.model.pooling
        del self.matcher  # the encoders' memory is free for the scores
        with job.clock("similarity"):
            scores = score.score_all(scorer, embeddings).numpy()
            if self.has_head or getattr(job.settings, "eccv", False):
                self.pooled = score.pool(pooling, embeddings)
        return scores

    def fit_saved(self, split: Split, parts: Sequence[Part], settings: SplitSettings) -> None:
        """Turn saved scores that have captions first. Raises InputError where they do not fit split or flags."""
        folds, *size = self.saved.shape
        self.saved_parts = parts[1:] if folds > 1 else parts[:1]
        found = f"{self.path}: {' x '.join(map(str, size if folds == 1 else self.saved.shape))} scores"
        if folds > 1:
            needing = [f"--{name}" for name in ("eccv", "ranks", "save_sims") if getattr(settings, name, "")]
            needing += ["compare"] * (not isinstance(settings, EvaluationSettings))
            if needing or not settings.fold5:
                what = f"{', '.join(needing)} cannot be had" if needing else "give --fold5, or use testall.py"
                raise InputError(f"{found}, of {folds} folds without the pairs between these: {what}")
            self.caveats = [(FOLDS_ALONE, "between folds there are no scores, so nothing is ranked among all images")]
        fitting = [[one.stop - one.start for one in part] for part in self.saved_parts]
        if fitting == [size[::-1]] * folds and fitting != [size] * folds:
            self.saved, self.name = self.saved.swapaxes(1, 2), f"{self.name}, read captions first"
        elif fitting != [size] * folds:
            sizes = f"{len(split.features)} images and {len(split.captions)} captions"
            sizes += f", {len(fitting)} folds" * (folds > 1)
            raise InputError(f"{found}, but {split.folder} {split.name} has {sizes}")


def _read_scores(path: str) -> np.ndarray:
    """A .npy file of scores (1, images, captions), or of folds (folds, ...), mapped. InputError where it is none."""
    try:
        saved = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        if "Python objects" not in str(error):
            raise InputError(f"{path}: no readable matrix of scores ({reason(error)})") from None
        code = f"import numpy as np; np.save('scores.npy', np.load('{path}', allow_pickle=True).item()['sims'])"
        what = "a pickled dict, which could run code when it is loaded; if you trust it, write its scores alone"
        raise InputError(f'{path}: {what}: python -c "{code}"') from None
    if saved.ndim not in (2, 3) or saved.dtype.kind != "f":
        found = f"{saved.dtype} of {' x '.join(map(str, saved.shape))}"
        raise InputError(f"{path}: expected floating-point numbers, images x captions, found {found}")
    return saved if saved.ndim == 3 else saved[None]


class Job(NamedTuple):
    """What an evaluation works on, and the clock that measures it."""

    settings: SplitSettings
    clock: Clock
    sources: list[Source]
    split: Split
    parts: list[Part]  # the whole split, then its folds (--fold5)

    about: dict  # the split, for --json and --ranks
    caveats: list[tuple[str, str]]  # label, text: those of all sources, each once


@contextmanager
def opened(given: Sequence[str], settings: SplitSettings) -> Iterator[Job]:
    """Sources and the split, by the flags or else of the first's training; within it processes can communicate."""
    compute = choose_compute(settings.device, settings.precision)
    clock = Clock(compute)
    with clock("load"):
        sources = [Source(one, settings) for one in given]
    with compute.in_force(), distributed.joined(compute.device):
        with clock("load"):
            contents = [source.content for source in sources if source.content]
            split, data_name = open_split_of(contents, settings)
            outputs = [getattr(settings, name, "") for name in ("json", "ranks", "save_sims")]
            read = [source.content.get("path", source.path) for source in sources]
            records = [Path(one).with_name(RECORD) for one in read]
            refuse_inputs(outputs, [*read, *records, *split.folder.iterdir()])
            if distributed.world_size() > 1:  # a fingerprint reads 64 images
                weights = [one.get("sha256") for one in contents]
                collectives.refuse_disagreement({"the data": split.fingerprint(), "the weights": weights})
            parts = metrics.parts_of_split(split.image_of_caption, metrics.FOLDS if settings.fold5 else 0)
            size = {"images": len(split.features), "captions": len(split.captions)}
            about = {"data": str(split.folder), "split": split.name, **size}
            for number, source in enumerate(sources, start=1):
                if source.content:
                    source.caveats = report.find_caveats(source.content, split, data_name)
                else:
                    source.fit_saved(split, parts, settings)
                source.name = f"single {number}" if len(sources) > 1 else source.name
            caveats = list(dict.fromkeys(caveat for source in sources for caveat in source.caveats))
        yield Job(settings, clock, sources, split, parts, about, caveats)


def open_split_of(contents: Sequence[dict], settings: Any) -> tuple[Split, str]:
    """The split of the flags or else of the first model's training, of pictures where the models start from pixels; and
    its data set's name. Raises InputError where it is not known, or not for all of them."""
    trained = contents[0]["settings"] if contents else {}
    data_path, data_name = settings.data_path, settings.data_name or trained.get("data_name")
    if not data_path and (data_path := trained.get("data_path")):  # perhaps relative to the checkout
        data_path = next((str(at) for at in (Path(data_path), ROOT / data_path) if at.is_dir()), data_path)
    if not data_path or not data_name:
        what = f"{contents[0]['path']}: a published checkpoint" if contents else "saved scores alone"
        missing = "--data_path" if data_name else "--data_path and --data_name"
        raise InputError(f"{what}; say with {missing} where the data is")
    theirs = "" if settings.data_path or settings.data_name else trained.get("image_path", "")
    image_path = settings.image_path or theirs
    return _open_split(contents, data_path, data_name, settings.split, image_path), data_name


def _open_split(contents: Sequence[dict], data_path: str, data_name: str, name: str, image_path: str) -> Split:
    images = [one["architecture"]["image_encoder"] for one in contents]
    if any(map(is_from_pixels, images)):
        if not all(map(is_from_pixels, images)):
            raise InputError("--checkpoint: some of the models start from pixels, others from region features")
        return open_pictures(data_path, data_name, name, image_path)
    folder = find_folder(data_path, data_name)
    of_data = read_encoder(folder)
    for content in contents:
        of_model = trained_encoder(content)
        if of_model and of_data and not is_same_encoder(of_model, of_data):
            trained, found = (describe_encoder(one) for one in (of_model, of_data))
            raise InputError(f"{content['path']}: trained on regions by {trained}; those of {folder} are by {found}")
        if of_model and not of_data:
            content["notes"].append(f"{folder} does not say that its regions are by {describe_encoder(of_model)}")
    for dim in {one["options"].get("img_dim") for one in images} or {None}:  # raises for all but one
        split = open_split(data_path, data_name, name, dim)
    return split


def rows_of_scores(job: Job) -> Iterator[tuple[str, np.ndarray, bool]]:
    """A row's name, its scores (images, captions) and whether it is the last: each source's, then the ensemble's."""
    total, number = np.zeros(1, np.float32), len(job.sources)
    for source in job.sources:
        scores = source.scores(job)
        if source.has_head and source.pooled:
            images, captions = source.pooled
            yield source.row + GLOBAL_ALONE, (images @ captions.T).numpy(), False
        yield source.row, scores, number == 1
        total = total + scores
    if number > 1:
        labels = dict.fromkeys(label for label, _ in job.caveats)
        yield ", ".join([f"ensemble of {number}", *labels]), total / number, True


def rank_coarse_to_fine(job: Job, wanted: str) -> tuple[dict[str, list[Ranks]], dict]:
    """By row the ranks of each part, by cheap scores of all pairs and exact ones of the best K; K, number of pairs.

    The cheap ones are a global head's, which has a row too, where the model has one; else X-Dim's coarse ones.
    """
    source, rows = job.sources[0], {}
    embeddings, scorers = source.embed(job), (source.matcher.scorer(), source.matcher.scorer(coarse=True))
    with job.clock("similarity"):
        coarse, exact = score.coarse_and_exact(*scorers, embeddings)
    with job.clock("rank"):
        reranker = score.Reranker(coarse, exact, job.split.image_of_caption, job.parts)
        ranks, k = reranker.ranks_until_stable() if wanted == "auto" else (reranker.ranks(int(wanted)), int(wanted))
    if source.has_head:
        rows[source.row + GLOBAL_ALONE] = reranker.coarse_ranks
    source.name += f", best {k} exact"
    return rows | {source.row: ranks}, {"k": k, "exact_pairs": reranker.exact_pairs, "pairs": coarse.numel()}


def describe(job: Job, labels: Sequence[str]) -> str:
    """The heading: what is evaluated, on what data, on which device."""
    lines = [report.describe_source(one.path, one.content, name) for one, name in zip(job.sources, labels, strict=True)]
    data = "{data} {split}: {images} images, {captions} captions".format(**job.about)
    return "\n".join([*lines, f"{'data':<12}{data}", f"{'device':<12}{job.clock.compute}"])


def tables(rows: dict[str, dict], results: dict, job: Job) -> str:
    """The table of all rows and of chance, and below it what a reader has to know."""
    lines, notes = [], [report.INTERVALS]
    images, folds, image_of_caption = results["images"], len(results["folds"]), job.split.image_of_caption
    for name, values in rows.items():
        if name == results["row"]:
            lines += [report.Row(f"{name}, fold {k}", fold) for k, fold in enumerate(values["folds"], start=1)]
        for part, of_part in report.named_parts(values, images, folds).items():
            lines += report.with_interval(name + part, of_part)
    sizes = [images // folds, images] if folds else [images]
    for size in sizes[:1] if FOLDS_ALONE in dict(job.caveats) else sizes:
        chance = metrics.chance_metrics(image_of_caption[image_of_caption < size])
        lines.append(report.Row(f"chance, {size} images" if folds else "chance", chance))
    if rerank := results["rerank"]:
        k, exact, pairs = rerank.values()
        notes.append(f"best {k} of each query by exact score: {exact} of {pairs} pairs ({100 * exact / pairs:.1f} %)")
    notes += [f"{label}: {text}" for label, text in job.caveats]
    return "\n".join([report.table(lines), "", *notes])


def write_json(path: str | Path, results: dict) -> None:
    with replacing(path) as file:
        file.write(json.dumps(results, indent=2).encode() + b"\n")
