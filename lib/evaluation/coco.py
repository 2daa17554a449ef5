"""COCO's 5,000 test images by all that fits them, for most images fit captions of other images too (--eccv).

COCO 1K, COCO 5K   the data set's own pairs, in the folds of the package eccv_caption and among all
CxC                Crisscrossed Captions (Parekh et al. 2021): pairs that people rated 3 of 5 or better count as well
ECCV Caption       1,261 images and 1,332 captions with all that fits them (Chun et al. 2022)
PMRP               plausible matches (Chun et al. 2021), if cxc_annots/ holds pm_image_to_caption.json and
                   pm_caption_to_image.json
CxC i2i, t2t       images among images and captions among captions, if cxc_annots/ holds GPO's cxc_i2i.json and
                   cxc_t2t.json or the official sis_test.csv and sts_test.csv

cxc_annots/ lies in the data set's folder or beside it. All other right answers come with the package.
"""

import csv
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lib.cli import InputError, reason, with_bar
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, read_ids
from lib.evaluation import report
from lib.evaluation.metrics import FOLDS, RECALLS, WAYS, bootstrap_means, interval
from lib.evaluation.rankings import ABSENT, ONLY_R_PRECISION, Protocol, Query, RankedList, query_metrics

ANNOTATIONS = "cxc_annots"
PLAUSIBLE = ("pm_image_to_caption.json", "pm_caption_to_image.json")
INTRA = {"i2i": ("cxc_i2i.json", "sis_test.csv"), "t2t": ("cxc_t2t.json", "sts_test.csv")}
RATED_RIGHT = 3.0  # the lowest rating that the package counts among CxC's image-caption pairs
RECALL_METRICS = (*RECALLS, "avg")
RANKING_METRICS = ("map_at_r", "r_precision", "r1")
QUERIES_AT_ONCE = 256
NOT_EMBEDDED = "saved scores do not say how images compare with images, or captions with captions"
DAMAGED = (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError, csv.Error)

Numbers = dict[int, int]  # COCO's id -> number in the split


class Coco(NamedTuple):
    """The right answers of all protocols, in a split's own numbers of images and captions."""

    protocols: list[Protocol]
    intra: dict[str, dict[int, np.ndarray]]  # "i2i", "t2t" -> query -> right answers
    image_of_caption: np.ndarray
    note: str  # where ids come from and what is missing

    def metrics(self, queries: Sequence[Query]) -> dict[str, dict]:
        """{protocol: {"i2t": {metric: percent}, "t2i": ..., "interval": {the same: both ends}}}."""
        return {protocol.name: self._of_protocol(protocol, queries) for protocol in self.protocols}

    def intra_metrics(self, pooled: Sequence[tuple[Tensor, Tensor]]) -> dict:
        """{"i2i": ..., "t2t": ..., "interval": ...} by the mean over models of the cosines of pooled embeddings."""
        ways = {}
        for way, right in self.intra.items():
            kind, image = (0, np.arange(len(pooled[0][0]))) if way == "i2i" else (1, self.image_of_caption)
            positions = _intra_positions([vectors[kind] for vectors in pooled], right)
            ways[way] = _summarize(positions, RECALL_METRICS, image[list(right)])
        return _with_intervals(ways)

    def _of_protocol(self, protocol: Protocol, queries: Sequence[Query]) -> dict:
        ways = {}
        for way in WAYS:
            some = [query for query in queries if query.way == way and protocol.name in query.positions]
            numbers = np.array([query.number for query in some])
            image = numbers if way == "i2t" else self.image_of_caption[numbers]
            ways[way] = _summarize((query.positions[protocol.name] for query in some), protocol.metrics, image)
        return _with_intervals(ways)


def open_coco(split: Split) -> Coco:
    """The right answers for COCO's testall. Raises InputError if the package is missing or the split is another one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for ujson, which it does not need
            from eccv_caption import Metrics
    except ImportError:
        raise InputError("--eccv: needs the package eccv_caption: pip install eccv_caption") from None
    package = Metrics()
    images, captions, note = _number_ids(split, package)
    protocols = [
        _protocol("COCO 1K", RECALL_METRICS, package.coco_gts, images, captions, _folds(package, images, split)),
        _protocol("COCO 5K", RECALL_METRICS, package.coco_gts, images, captions),
        _protocol("CxC", RECALL_METRICS, package.cxc_gts, images, captions),
        _protocol("ECCV Caption", RANKING_METRICS, package.eccv_gts, images, captions),
    ]
    folders = [split.folder / ANNOTATIONS, split.folder.parent / ANNOTATIONS]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    if all((folder / name).is_file() for name in PLAUSIBLE):
        protocols.append(_plausible(folder, package, images, captions))
    intra = {}
    for way, names in INTRA.items():
        if path := next((folder / name for name in names if (folder / name).is_file()), None):
            intra[way] = _read_intra(path, images if way == "i2i" else captions, split)
    if not intra:
        note += f"\nCxC's images among images and captions among captions need {ANNOTATIONS}/"
    return Coco(protocols, intra, split.image_of_caption, note)


def tables(rows: dict[str, dict], intra: dict[str, dict], note: str) -> str:
    """Tables of recalls, of whole rankings and of images among images, for each row of an evaluation; the note."""
    prefix = (lambda row: f"{row}: ") if len(rows) > 1 else (lambda row: "")
    made = []
    for columns in (RECALL_METRICS, RANKING_METRICS):
        lines = [
            line
            for row, protocols in rows.items()
            for name, metrics in protocols.items()
            if ("avg" in metrics["i2t"]) == (columns is RECALL_METRICS)
            for line in report.with_interval(f"{prefix(row)}{name}", metrics)
        ]
        made.append(report.table(lines, columns))
    if intra:
        names = {row: f"{row}: CxC" if len(rows) > 1 else "CxC, pooled cosine" for row in intra}
        lines = [line for row, metrics in intra.items() for line in report.with_interval(names[row], metrics)]
        made.append(report.table(lines, RECALL_METRICS, ("i2i", "t2t")))
    return "\n\n".join([*made, note])


# COCO's ids and the split's numbers


def _number_ids(split: Split, package: Any) -> tuple[Numbers, Numbers, str]:
    """Numbers of images and of captions by COCO's ids, and a note on where the ids come from."""
    known = [int(caption) for caption in package.coco_ids]
    image_of = {caption: image for caption, (image,) in package.coco_gts["t2i"].items()}
    known_images = [image_of[caption] for caption in known[::CAPTIONS_PER_IMAGE]]
    if len(split.features) != len(known_images) or (np.bincount(split.image_of_caption) != CAPTIONS_PER_IMAGE).any():
        raise InputError(
            f"--eccv: {split.folder} {split.name} has {len(split.features)} images and {len(split.captions)} captions, "
            f"but these protocols are for COCO's {len(known_images)} test images with five captions each "
            "(--split testall)"
        )
    path, ids = split.folder / f"{split.name}_ids.txt", read_ids(split)
    images = known_images if ids is None else _to_numbers(ids, path)
    note = f"ids: {path.name}" + (" is missing, the order of eccv_caption is taken" if ids is None else "")
    if strange := sorted(set(known_images) ^ set(images)):
        raise InputError(
            f"--eccv: {path}: these are not COCO's {len(known_images)} test images ({strange[0]} is on one side only)"
        )
    captions, of_captions = _caption_ids(split, images, known, image_of)
    numbers = ({one: number for number, one in enumerate(each)} for each in (images, captions))
    return *numbers, f"{note}; {of_captions}"


def _caption_ids(split: Split, images: list[int], known: list[int], image_of: Numbers) -> tuple[list[int], str]:
    """The captions' ids, from {split}_capids.txt or else each image's in the package's order."""
    path = split.folder / f"{split.name}_capids.txt"
    if not path.is_file():
        of_image = defaultdict(list)
        for caption in known:
            of_image[image_of[caption]].append(caption)
        return [caption for image in images for caption in of_image[image]], "captions of an image in its order there"
    try:
        captions = _to_numbers(path.read_text(encoding="utf-8-sig", errors="replace").split(), path)
    except OSError as error:
        raise InputError(f"--eccv: {path}: cannot be read ({reason(error)})") from None
    expected = [images[image] for image in split.image_of_caption]
    if [image_of.get(caption) for caption in captions] != expected or len(set(captions)) != len(captions):
        raise InputError(f"--eccv: {path}: its ids are not those of the captions of {split.name}_ids.txt's images")
    return captions, path.name


def _to_numbers(ids: Iterable[str], path: Path) -> list[int]:
    try:
        return [int(one) for one in ids]
    except ValueError as error:
        raise InputError(f"--eccv: {path}: {reason(error)}; expected COCO's numbers") from None


# Right answers


def _protocol(
    name: str,
    metrics: tuple[str, ...],
    pairs: dict,
    images: Numbers,
    captions: Numbers,
    fold_of: dict[str, np.ndarray] | None = None,
) -> Protocol:
    """A protocol in the split's numbers, from the package's {"i2t": {image id: caption ids}, "t2i": ...}."""
    numbers = {"i2t": (images, captions), "t2i": (captions, images)}
    right = {}
    for way, (queries, items) in numbers.items():
        right[way] = {
            queries[query]: np.sort([items.get(one, ABSENT) for one in set(answers)])
            for query, answers in pairs[way].items()
        }
    return Protocol(name, metrics, right, fold_of)


def _folds(package: Any, images: Numbers, split: Split) -> dict[str, np.ndarray]:
    """The fold of each image and caption in the package's five: consecutive fifths of its own order."""
    fold_of_image = np.empty(len(images), int)
    for fold, captions in enumerate(np.split(package.coco_ids, FOLDS)):
        fold_of_image[[images[package.coco_gts["t2i"][caption][0]] for caption in captions]] = fold
    return {"i2t": fold_of_image, "t2i": fold_of_image[split.image_of_caption]}


def _plausible(folder: Path, package: Any, images: Numbers, captions: Numbers) -> Protocol:
    try:
        package.set_pm_gts(*(str(folder / name) for name in PLAUSIBLE))
        if not all(pairs and all(pairs.values()) for pairs in package.pm_gts.values()):
            raise ValueError("a query without an answer, or no query")
        return _protocol("PMRP", ONLY_R_PRECISION, package.pm_gts, images, captions)
    except DAMAGED as error:
        what = f"{' or '.join(PLAUSIBLE)} is damaged, or not of COCO's testall ({reason(error)})"
        raise InputError(f"{folder}: {what}") from None


def _read_intra(path: Path, numbers: Numbers, split: Split) -> dict[int, np.ndarray]:
    """Right answers among images, or among captions, of either form of CxC's files. Raises InputError if damaged."""
    right = defaultdict(set)
    try:
        for query, answer in _rated_right(path):
            if query in numbers and answer in numbers and query != answer:
                right[numbers[query]].add(numbers[answer])
    except DAMAGED as error:
        raise InputError(f"{path}: damaged, or not CxC's ({reason(error)})") from None
    if not right:
        raise InputError(f"{path}: none of its pairs is of this split")
    if path.name == INTRA["t2t"][1]:  # the captions of one image fit each other, however people rated them
        for caption in range(len(split.captions)):
            first = caption - caption % CAPTIONS_PER_IMAGE
            right[caption].update({*range(first, first + CAPTIONS_PER_IMAGE)} - {caption})
    return {query: np.array(sorted(right[query])) for query in sorted(right)}


def _rated_right(path: Path) -> Iterator[tuple[int, int]]:
    """Pairs (query id, id of a right answer): all of GPO's {query id: [[id, rating], ...]}, the well rated of a CSV."""
    if path.suffix == ".json":
        for query, answers in json.loads(path.read_text(encoding="utf-8")).items():
            yield from ((int(query), int(answer)) for answer, _ in answers)
        return
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        if next(rows, None) is None:
            raise ValueError("it is empty")
        for one, other, rating, _ in rows:
            if float(rating) >= RATED_RIGHT:
                a, b = (int(re.findall(r"\d+", name)[-1]) for name in (one, other))
                yield from ((a, b), (b, a))


# Metrics


def _intra_positions(vectors: Sequence[Tensor], right: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Where the right answers to each query stand among all others, by the mean cosine over models."""
    queries = np.array(list(right))
    for first in with_bar(range(0, len(queries), QUERIES_AT_ONCE), "pooled"):
        some = queries[first : first + QUERIES_AT_ONCE]
        cosines = sum((each[some] @ each.T).float() for each in vectors).numpy()
        cosines[np.arange(len(some)), some] = -np.inf  # a query is no answer to itself
        yield from (RankedList(row).positions(right[query]) for query, row in zip(some, cosines, strict=True))


def _summarize(positions: Iterable[np.ndarray], metrics: tuple[str, ...], image: np.ndarray) -> dict[str, tuple]:
    """(percent, both ends of its interval) of each metric. image: (queries,) image that each query belongs to."""
    values = [query_metrics(places) for places in positions]
    table = 100 * np.array([[one[name] for name in metrics] for one in values])
    draws = bootstrap_means(table, image)
    return {name: (float(table[:, k].mean()), interval(draws[:, k])) for k, name in enumerate(metrics)}


def _with_intervals(ways: dict[str, dict[str, tuple]]) -> dict:
    percent, ends = (
        {way: {name: both[k] for name, both in metrics.items()} for way, metrics in ways.items()} for k in (0, 1)
    )
    return {**percent, "interval": ends}
