"""COCO's 5,000 test images by all that fits them, for most images fit captions of other images too (--eccv).

COCO's own pairs, Crisscrossed Captions (CxC, Parekh et al. 2021) and ECCV Caption (Chun et al. 2022) come with the
package eccv_caption. Plausible matches (PMRP, Chun et al. 2021) and CxC among images and among captions are read from
cxc_annots/ in the data set's folder or beside it; docs/evaluation.md says which files and what counts.
"""

import csv
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lib.cli import InputError, optional, refusing, with_bar
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, read_ids
from lib.evaluation import report
from lib.evaluation.metrics import FOLDS, RECALLS, WAYS, bootstrap_means, interval
from lib.evaluation.rankings import ABSENT, ONLY_R_PRECISION, Protocol, Query, RankedList, query_metrics
from lib.files import read_lines

ANNOTATIONS = "cxc_annots"
PLAUSIBLE = ("pm_image_to_caption.json", "pm_caption_to_image.json")
INTRA = {"i2i": ("cxc_i2i.json", "sis_test.csv"), "t2t": ("cxc_t2t.json", "sts_test.csv")}
RATED_RIGHT = {"i2i": 2.5, "t2t": 3.0}  # the lowest rating of a right pair, as GPO's published code has it
RECALL_METRICS = (*RECALLS, "avg")
RANKING_METRICS = ("map_at_r", "r_precision", "r1")
QUERIES_AT_ONCE = 256

Numbers = dict[int, int]  # COCO's id -> number in the split


class Coco(NamedTuple):
    """The right answers of all protocols, in a split's own numbers of images and captions."""

    protocols: list[Protocol]
    intra: dict[str, dict[int, np.ndarray]]  # "i2i", "t2t" -> query -> right answers
    image_of_caption: np.ndarray
    note: str  # where ids come from and what is missing

    def results(self, queries: dict[str, list[Query]], pooled: Sequence[tuple[Tensor, Tensor] | None]) -> dict:
        """What --json holds and `tables` takes, by row. pooled: of each model, by `score.pool`; None: saved scores."""
        rows: dict[str, dict] = {row: {} for row in queries}
        for row, protocol in product(queries, self.protocols):
            ways = {}
            for way in WAYS:
                some = [query for query in queries[row] if query.way == way and protocol.name in query.positions]
                ways[way] = [query.number for query in some], [query.positions[protocol.name] for query in some]
            rows[row][protocol.name] = self._summarize(ways, protocol.metrics)
        known, intra, note = [one for one in pooled if one], {}, self.note
        if self.intra and len(known) == len(pooled):
            models = [[one] for one in known] + ([known] if len(known) > 1 else [])
            for row, some in zip(rows, models, strict=True):  # by the mean cosine over models
                ways = {}
                for way, right in self.intra.items():
                    vectors = [images if way == "i2i" else captions for images, captions in some]
                    ways[way] = list(right), list(_intra_positions(vectors, right))
                intra[row] = self._summarize(ways, RECALL_METRICS)
        elif self.intra:
            note += "\nsaved scores do not say how images compare with images, or captions with captions"
        return {"rows": rows, "intra": intra, "note": note}

    def _summarize(self, ways: dict[str, tuple[list[int], list[np.ndarray]]], metrics: tuple[str, ...]) -> dict:
        """{way: {metric: percent}, "interval": ...} from numbers of queries and positions of their right items."""
        percent, ends = {}, {}
        for way, (queries, positions) in ways.items():
            image = np.array(queries) if way.startswith("i") else self.image_of_caption[queries]
            of_queries = [query_metrics(places) for places in positions]
            values = 100 * np.array([[one[name] for name in metrics] for one in of_queries])
            percent[way] = {name: float(column.mean()) for name, column in zip(metrics, values.T, strict=True)}
            draws = bootstrap_means(values, image).T
            ends[way] = {name: interval(column) for name, column in zip(metrics, draws, strict=True)}
        return {**percent, "interval": ends}


def open_coco(split: Split) -> Coco:
    """The right answers for COCO's testall. Raises InputError if the package is missing or the split is another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for ujson, which it does not need
        package = optional("eccv_caption", "--eccv").Metrics()
    images, captions, note = _number_ids(split, package)
    fold_of_image = np.empty(len(images), int)  # the package's folds are consecutive fifths of its own order
    for fold, some in enumerate(np.split(package.coco_ids, FOLDS)):
        fold_of_image[[images[package.coco_gts["t2i"][caption][0]] for caption in some]] = fold
    folds = {"i2t": fold_of_image, "t2i": fold_of_image[split.image_of_caption]}
    coco, cxc, eccv = (_in_numbers(getattr(package, f"{one}_gts"), images, captions) for one in ("coco", "cxc", "eccv"))
    protocols = [Protocol("COCO 1K", RECALL_METRICS, coco, folds), Protocol("COCO 5K", RECALL_METRICS, coco)]
    protocols += [Protocol("CxC", RECALL_METRICS, cxc), Protocol("ECCV Caption", RANKING_METRICS, eccv)]
    folders = [split.folder / ANNOTATIONS, split.folder.parent / ANNOTATIONS]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])
    if all((folder / name).is_file() for name in PLAUSIBLE):
        with refusing(f"{folder}: {' or '.join(PLAUSIBLE)} is damaged, or not of COCO's testall"):
            package.set_pm_gts(*(str(folder / name) for name in PLAUSIBLE))
            if not all(pairs and all(pairs.values()) for pairs in package.pm_gts.values()):
                raise ValueError("a query without an answer, or no query")
            protocols.append(Protocol("PMRP", ONLY_R_PRECISION, _in_numbers(package.pm_gts, images, captions)))
    intra = {}
    for way, names in INTRA.items():
        if path := next((folder / name for name in names if (folder / name).is_file()), None):
            intra[way] = _read_intra(path, way, images if way == "i2i" else captions)
    if not intra:
        note += f"\nCxC's images among images and captions among captions need {ANNOTATIONS}/"
    return Coco(protocols, intra, split.image_of_caption, note)


def tables(rows: dict[str, dict], intra: dict[str, dict], note: str) -> str:
    """Tables of recalls, of whole rankings and of images among images, with names of rows if there are several."""
    prefixes = {row: f"{row}: " if len(rows) > 1 else "" for row in rows}
    lines = {RECALL_METRICS: [], RANKING_METRICS: []}
    for row, protocols in rows.items():
        for name, metrics in protocols.items():
            columns = RECALL_METRICS if "avg" in metrics["i2t"] else RANKING_METRICS
            lines[columns] += report.with_interval(prefixes[row] + name, metrics)
    made = [report.table(some, columns) for columns, some in lines.items()]
    if intra:
        name = "CxC" if len(rows) > 1 else "CxC, pooled cosine"
        some = [line for row, one in intra.items() for line in report.with_interval(prefixes[row] + name, one)]
        made.append(report.table(some, RECALL_METRICS, ("i2i", "t2t")))
    return "\n\n".join([*made, note])


def _number_ids(split: Split, package: Any) -> tuple[Numbers, Numbers, str]:
    """Numbers of images and of captions by COCO's ids, and a note on where the ids come from."""
    image_of = package.coco_gts["t2i"]
    known = {image_of[some[0]][0]: some for some in package.coco_ids.reshape(-1, CAPTIONS_PER_IMAGE).tolist()}
    if len(split.features) != len(known) or (np.bincount(split.image_of_caption) != CAPTIONS_PER_IMAGE).any():
        found = f"{split.folder} {split.name} has {len(split.features)} images and {len(split.captions)} captions"
        wanted = f"these protocols are for COCO's {len(known)} test images with five captions each (--split testall)"
        raise InputError(f"--eccv: {found}, but {wanted}")
    path, ids = split.folder / f"{split.name}_ids.txt", read_ids(split)
    note = f"ids: {path.name}" if ids else f"ids: {path.name} is missing, the order of eccv_caption is taken"
    images = [int(one) if one.isdecimal() else -1 for one in ids] if ids else list(known)
    if sorted(images) != sorted(known):
        raise InputError(f"--eccv: {path}: these are not the ids (numbers) of COCO's {len(known)} test images")
    captions, of_captions = [known[image] for image in images], "captions of an image in its order there"
    path = split.folder / f"{split.name}_capids.txt"
    if path.is_file():
        ids = np.array([int(one) if one.isdecimal() else -1 for _, one in read_lines(path)])
        if len(ids) != len(split.captions) or (np.sort(ids.reshape(-1, CAPTIONS_PER_IMAGE)) != np.sort(captions)).any():
            raise InputError(f"--eccv: {path}: its ids are not those of the captions of {split.name}_ids.txt's images")
        captions, of_captions = ids.reshape(-1, CAPTIONS_PER_IMAGE).tolist(), path.name
    numbers = [{one: k for k, one in enumerate(each)} for each in (images, np.concatenate(captions).tolist())]
    return numbers[0], numbers[1], f"{note}; {of_captions}"


def _in_numbers(pairs: dict, images: Numbers, captions: Numbers) -> dict[str, dict[int, np.ndarray]]:
    """The package's {"i2t": {image id: caption ids}, "t2i": ...} in the split's numbers."""
    right = {}
    for way, queries, items in (("i2t", images, captions), ("t2i", captions, images)):
        numbers = {queries[query]: [items.get(one, ABSENT) for one in {*some}] for query, some in pairs[way].items()}
        right[way] = {query: np.sort(some) for query, some in numbers.items()}
    return right


def _read_intra(path: Path, way: str, numbers: Numbers) -> dict[int, np.ndarray]:
    """Right answers among images, or among captions: pairs that are rated well, and captions of the same image.

    path: GPO's {query id: [[id, rating], ...]}, or CxC's CSV. numbers: by COCO's ids. Raises InputError.
    """
    rated, right = [], defaultdict(set)
    with refusing(f"{path}: damaged, or not CxC's"):
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            rated = [(query, *one) for query, answers in json.loads(text).items() for one in answers]
        else:  # below the column names
            rows = list(csv.reader(text.splitlines()))[1:]
            rated = [(*(re.findall(r"\d+", name)[-1] for name in names), rating) for *names, rating, _ in rows]
        pairs = [(int(a), int(b)) for a, b, rating in rated if float(rating) >= RATED_RIGHT[way]]
    for query, answer in [*pairs, *((b, a) for a, b in pairs)]:
        if query in numbers and answer in numbers and query != answer:
            right[numbers[query]].add(numbers[answer])
    if not right:
        raise InputError(f"{path}: none of its pairs is of this split")
    for caption in numbers.values() if way == "t2t" else ():
        first = caption - caption % CAPTIONS_PER_IMAGE
        right[caption] |= {*range(first, first + CAPTIONS_PER_IMAGE)} - {caption}
    return {query: np.array(sorted(right[query])) for query in sorted(right)}


def _intra_positions(vectors: Sequence[Tensor], right: dict[int, np.ndarray]) -> Iterator[np.ndarray]:
    """Where the right answers to each query stand among all others, by the mean cosine over models."""
    queries = np.array(list(right))
    for first in with_bar(range(0, len(queries), QUERIES_AT_ONCE), "pooled"):
        some = queries[first : first + QUERIES_AT_ONCE]
        cosines = sum(((each[some] @ each.T).float() for each in vectors), torch.zeros(1)).numpy()
        cosines[np.arange(len(some)), some] = -np.inf  # a query is no answer to itself
        yield from (RankedList(row).positions(right[query]) for query, row in zip(some, cosines, strict=True))
