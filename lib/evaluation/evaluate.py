"""One evaluation for every program: a checkpoint and a split in, scores, ranks, metrics, a table out."""

import dataclasses
import json
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset

from lib import processes
from lib.config import EvaluationSettings
from lib.data.batches import ImageBatches, loader
from lib.data.precomp import Split, open_split
from lib.data.token_cache import tokenize_split
from lib.data.tokenizer import TokenizedCaptions
from lib.errors import InputError
from lib.evaluation import report
from lib.evaluation.matcher import (
    Embeddings,
    Matcher,
    Strips,
    gather_scores,
    load_matcher,
    score_pairs,
    score_strips,
    score_true_pairs,
)
from lib.evaluation.metrics import FOLDS, chance_metrics, mean_metrics, retrieval_metrics
from lib.evaluation.parts import Part, Shares, blocks_of, folds, images_at_a_time, overlap, share_out, whole
from lib.evaluation.ranks import Ranks, count_ranks
from lib.evaluation.rerank import Reranker
from lib.files import replacing
from lib.model.similarity import Scorer
from lib.record import quote, read_record


@dataclasses.dataclass
class Timing:
    """Seconds of each part of an evaluation. `compile_s` is 0: nothing is compiled."""

    load_s: float = 0.0
    encode_s: float = 0.0
    compile_s: float = 0.0
    similarity_s: float = 0.0  # all pairs, exactly or coarsely
    rank_s: float = 0.0  # with --rerank the exact scores too


def evaluate(settings: EvaluationSettings) -> dict:
    """Evaluate a checkpoint on a split, print the table, write what --json and --save_sims ask for.

    All processes of a job take part, and find the same. Returns the results as --json holds them. Raises InputError.
    """
    started = time.perf_counter()
    matcher = load_matcher(settings.checkpoint, settings.bert, settings.device, settings.precision)
    with processes.joined(matcher.compute.device):
        split = _open_split(settings, matcher)
        parts = [whole(len(split.features), len(split.captions))]
        if settings.fold5:
            parts += folds(FOLDS, len(split.features), split.image_of_caption)
        with processes.first_goes_first():
            captions = tokenize_split(matcher.tokenizer, split)
        timing = Timing(load_s=time.perf_counter() - started)
        print(_heading(matcher, split))

        embeddings = embed_split(matcher, split, captions, settings.batch_size, settings.workers, timing)
        scorer, coarse, rerank = matcher.scorer(), matcher.scorer(coarse=True), None
        del matcher, captions  # the encoders' memory is free for the scores
        if settings.rerank:
            ranks, rerank = rank_coarse_to_fine(scorer, coarse, embeddings, split, parts, settings.rerank, timing)
        else:
            ranks = rank_exactly(scorer, embeddings, split, parts, timing, settings.save_sims)
        results = {**measure(split, ranks), "rerank": rerank, "timing": dataclasses.asdict(timing)}

        seconds = ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in results["timing"].items())
        print(f"seconds     {seconds}\n\n{_table(results, split)}")
        if settings.json and processes.is_first():
            with replacing(settings.json) as file:
                file.write(json.dumps(results, indent=2).encode() + b"\n")
    return results


def embed_split(
    matcher: Matcher, split: Split, captions: TokenizedCaptions, batch_size: int, workers: int, timing: Timing
) -> Embeddings:
    """Encode every image and caption of a split once: each process those of its share."""
    started = time.perf_counter()
    shares = share_out(len(split.features), split.image_of_caption)
    own, size = shares.mine.images, images_at_a_time(batch_size)
    counts = torch.from_numpy(split.features.counts[own])
    batches = ImageBatches(split.features, size, matcher.compute.half_features)
    images = Subset(batches, range(own.start // size, -(-own.stop // size)))
    regions = matcher.embed_images(loader(images, workers, matcher.compute.device), counts)
    groups = [block.captions for block in blocks_of(shares.mine, split.image_of_caption)]
    embeddings = Embeddings(regions, counts, *matcher.embed_captions(captions, groups, batch_size), shares)
    matcher.compute.synchronize()
    timing.encode_s = time.perf_counter() - started
    return embeddings


def rank_exactly(
    scorer: Scorer, embeddings: Embeddings, split: Split, parts: list[Part], timing: Timing, save_sims: str = ""
) -> list[Ranks]:
    """The ranks of each part from exact scores of all pairs, which go to a file where one is named."""
    started, shares = time.perf_counter(), embeddings.shares
    true_scores = score_true_pairs(scorer, embeddings, split.image_of_caption)
    image_of_caption = torch.from_numpy(split.image_of_caption).to(true_scores.device)
    strips = _clock(score_strips(scorer, embeddings), timing)
    strips = _put_true_scores(strips, true_scores, image_of_caption, shares.mine)
    if save_sims:
        strips = _write_scores(strips, save_sims, (len(split.features), len(split.captions)), shares)
    ranks = count_ranks(strips, true_scores, image_of_caption, parts, shares)
    timing.rank_s = time.perf_counter() - started - timing.similarity_s
    return ranks


def rank_coarse_to_fine(
    exact: Scorer, coarse: Scorer, embeddings: Embeddings, split: Split, parts: list[Part], rerank: str, timing: Timing
) -> tuple[list[Ranks], dict]:
    """The ranks of each part from coarse scores of all pairs and exact ones of the best; K, and how many were exact."""
    started = time.perf_counter()
    scores = gather_scores(score_strips(coarse, embeddings), embeddings)
    timing.similarity_s, started = time.perf_counter() - started, time.perf_counter()
    reranker = Reranker(scores, partial(score_pairs, exact, embeddings), split.image_of_caption, parts)
    ranks, k = reranker.ranks_until_they_stay() if rerank == "auto" else (reranker.ranks(int(rerank)), int(rerank))
    timing.rank_s = time.perf_counter() - started
    return ranks, {"k": k, "exact_pairs": len(reranker.known), "pairs": scores.numel()}


def measure(split: Split, ranks: list[Ranks]) -> dict:
    """All metrics; with ranks of folds after those of the whole split, those at the top are the folds' means."""
    full, *of_folds = [retrieval_metrics(one) for one in ranks]
    sizes = {"split": split.name, "images": len(split.features), "captions": len(split.captions)}
    if not of_folds:
        return {**sizes, **full, "folds": []}
    return {**sizes, **mean_metrics(of_folds), "folds": of_folds, "full": full}


def _clock(strips: Strips, timing: Timing) -> Strips:
    """Strips on their way; the time it takes to make them is added up."""
    started = time.perf_counter()
    for strip in strips:
        timing.similarity_s += time.perf_counter() - started
        yield strip
        started = time.perf_counter()


def _put_true_scores(strips: Strips, true_scores: Tensor, image_of_caption: Tensor, share: Part) -> Strips:
    """Strips with the true pairs' scores as they were computed before, so that each pair has one score to the bit."""
    for first, scores in strips:
        own = overlap(slice(first, first + scores.shape[1]), share.captions)
        captions = torch.arange(own.start, own.stop, device=scores.device)
        scores[image_of_caption[captions] - share.images.start, captions - first] = true_scores[captions]
        yield first, scores


def _write_scores(strips: Strips, path: str, shape: tuple[int, int], shares: Shares) -> Strips:
    """Strips on their way; the first process writes those of all to a .npy file."""
    with replacing(path) if shares.own == 0 else nullcontext() as file:
        if file:
            np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
            begin = file.tell()
        for first, scores in strips:
            every = shares.gather_images(scores)
            if file:
                for image, row in enumerate(every.cpu().numpy().astype("<f4", copy=False)):
                    file.seek(begin + 4 * (image * shape[1] + first))
                    file.write(row)
            del every
            yield first, scores


def _open_split(settings: EvaluationSettings, matcher: Matcher) -> Split:
    trained = matcher.checkpoint["settings"]
    data_path, data_name = (
        settings.data_path or trained.get("data_path"),
        settings.data_name or trained.get("data_name"),
    )
    if not data_path or not data_name:
        raise InputError(
            f"{matcher.checkpoint['path']}: a published checkpoint; say with --data_path where the data is"
        )
    return open_split(data_path, data_name, settings.split, matcher.checkpoint["architecture"]["img_dim"])


def _heading(matcher: Matcher, split: Split) -> str:
    progress = matcher.checkpoint["progress"]
    dev = progress["history"][-1]["dev"]["rsum"] if progress["history"] else progress["best_rsum"]
    measured = f", dev rSum {dev:.1f}" if dev >= 0 else ""  # a checkpoint from before the first evaluation has none
    trained = f"{matcher.checkpoint['path']}, {progress['epoch']} epochs{measured}"
    size = f"{len(split.features)} images, {len(split.captions)} captions"
    run = _quote_run(matcher.checkpoint["path"])
    return f"checkpoint  {trained}\n{run}data        {split.folder} {split.name}: {size}\ndevice      {matcher.compute}"


def _quote_run(checkpoint: Path) -> str:
    """What the run's record says of how the checkpoint was chosen, where there is a record beside it."""
    try:
        record = read_record(checkpoint.parent)
        return f"run         {quote(record)}\n" if record else ""
    except InputError as error:
        return f"run         {error}\n"


def _table(results: dict, split: Split) -> str:
    name, note = "X-Dim", ""
    if results["rerank"]:
        k, exact, pairs = results["rerank"].values()
        name = f"X-Dim, best {k} exact"
        note = f"\n\nbest {k} of each query by exact score: {exact} of {pairs} pairs ({100 * exact / pairs:.1f} %)"
    if not results["folds"]:
        return report.table({name: results, "chance": chance_metrics(split.image_of_caption)}) + note
    size = len(split.features) // len(results["folds"])
    rows = {f"fold {k}": fold for k, fold in enumerate(results["folds"], start=1)}
    rows[f"mean of {len(rows)} folds of {size}"] = results
    rows[f"chance, {size} images"] = chance_metrics(split.image_of_caption[split.image_of_caption < size])
    rows[f"all {len(split.features)} images"] = results["full"]
    rows[f"chance, {len(split.features)} images"] = chance_metrics(split.image_of_caption)
    return report.table(rows) + note
