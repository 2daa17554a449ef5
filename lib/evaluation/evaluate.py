"""One evaluation for every program: a checkpoint and a split in, scores, ranks, metrics, a table out."""

import dataclasses
import json
import time
from pathlib import Path

import numpy as np

from lib.config import EvaluationSettings
from lib.data.batches import ImageBatches, loader
from lib.data.precomp import Split, open_split
from lib.data.tokenizer import TokenizedCaptions
from lib.errors import InputError
from lib.evaluation import report
from lib.evaluation.matcher import Matcher, load_matcher
from lib.evaluation.metrics import chance_metrics, fold_metrics, mean_metrics, retrieval_metrics
from lib.files import replacing
from lib.record import quote, read_record


@dataclasses.dataclass
class Timing:
    """Seconds of each part of an evaluation. `compile_s` is 0: nothing is compiled."""

    load_s: float = 0.0
    encode_s: float = 0.0
    compile_s: float = 0.0
    similarity_s: float = 0.0
    rank_s: float = 0.0


def evaluate(settings: EvaluationSettings) -> dict:
    """Evaluate a checkpoint on a split, print the table, write what --json and --save_sims ask for.

    Returns the results as --json holds them. Raises InputError.
    """
    started = time.perf_counter()
    matcher = load_matcher(settings.checkpoint, settings.bert, settings.device, settings.precision)
    split = _open_split(settings, matcher)
    captions = matcher.tokenizer.tokenize(split.captions)
    timing = Timing(load_s=time.perf_counter() - started)
    print(_heading(matcher, split))

    scores = score_split(matcher, split, captions, settings.batch_size, settings.workers, timing)
    started = time.perf_counter()
    results = measure(scores, split, settings.fold5)
    timing.rank_s = time.perf_counter() - started
    results["timing"] = dataclasses.asdict(timing)

    seconds = ", ".join(f"{name.removesuffix('_s')} {value:.1f}" for name, value in results["timing"].items())
    print(f"seconds     {seconds}\n\n{_table(results, split)}")
    if settings.save_sims:
        with replacing(settings.save_sims) as file:
            np.save(file, scores)
    if settings.json:
        with replacing(settings.json) as file:
            file.write(json.dumps(results, indent=2).encode() + b"\n")
    return results


def score_split(
    matcher: Matcher, split: Split, captions: TokenizedCaptions, batch_size: int, workers: int, timing: Timing
) -> np.ndarray:
    """Scores (images, captions), float32, of a whole split; every image and caption is encoded once."""
    started = time.perf_counter()
    batches = loader(ImageBatches(split.features, batch_size), workers, matcher.compute.device)
    images = matcher.embed_images(batches, total=len(batches))
    words, lengths = matcher.embed_captions(captions, batch_size)
    matcher.compute.synchronize()
    timing.encode_s, started = time.perf_counter() - started, time.perf_counter()
    scores = matcher.score_embeddings(images, words, lengths)
    timing.similarity_s = time.perf_counter() - started
    return scores.numpy()


def measure(scores: np.ndarray, split: Split, fold5: bool = False) -> dict:
    """All metrics of a split's scores; with fold5 those at the top are the folds' means, `full` the whole split's."""
    full = retrieval_metrics(scores, split.image_of_caption)
    sizes = {"split": split.name, "images": scores.shape[0], "captions": scores.shape[1]}
    if not fold5:
        return {**sizes, **full, "folds": []}
    folds = fold_metrics(scores, split.image_of_caption)
    return {**sizes, **mean_metrics(folds), "folds": folds, "full": full}


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
    if not results["folds"]:
        return report.table({"X-Dim": results, "chance": chance_metrics(split.image_of_caption)})
    size = len(split.features) // len(results["folds"])
    rows = {f"fold {k}": fold for k, fold in enumerate(results["folds"], start=1)}
    rows[f"mean of {len(rows)} folds of {size}"] = results
    rows[f"chance, {size} images"] = chance_metrics(split.image_of_caption[split.image_of_caption < size])
    rows[f"all {len(split.features)} images"] = results["full"]
    rows[f"chance, {len(split.features)} images"] = chance_metrics(split.image_of_caption)
    return report.table(rows)
