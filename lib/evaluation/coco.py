"""COCO's test images by what else fits them: most images fit captions of other images, too.

COCO 1K, COCO 5K   the data set's own pairs, in the five folds of the package eccv_caption and among all
CxC                Crisscrossed Captions (Parekh et al. 2021): pairs that people rated 3 of 5 or better count as well
ECCV Caption       1,261 images and 1,332 captions with all that fits them (Chun et al. 2022)
PMRP               plausible matches (Chun et al. 2021), where pm_image_to_caption.json and pm_caption_to_image.json are
                   in cxc_annots/
CxC i2i, t2t       images among images, captions among captions, where cxc_annots/ has GPO's cxc_i2i.json and
                   cxc_t2t.json or the official sis_test.csv and sts_test.csv

cxc_annots/ is looked for in the data set's folder and beside it. What fits what comes from the package's own files.
"""

import csv
import json
import re
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from lib.cli import InputError, reason, with_bar
from lib.data.dataset import CAPTIONS_PER_IMAGE, Split, read_ids
from lib.evaluation import report
from lib.evaluation.bootstrap import bootstrap_means, interval
from lib.evaluation.metrics import FOLDS, RECALLS
from lib.evaluation.rankings import ABSENT, Judged, Protocol, RankedList, query_figures

ANNOTATIONS = "cxc_annots"
PLAUSIBLE = ("pm_image_to_caption.json", "pm_caption_to_image.json")
INTRA = {"i2i": ("cxc_i2i.json", "sis_test.csv"), "t2t": ("cxc_t2t.json", "sts_test.csv")}
RATED_RIGHT = 3.0  # from which rating on the package's own CxC pairs count
RECALL_FIGURES = (*RECALLS, "avg")
RANKING_FIGURES = ("map_at_r", "r_precision", "r1")
AT_ONCE = 256  # queries whose cosines to all others are computed at a time

NOT_EMBEDDED = "saved scores do not say how images compare with images, or captions with captions"

# What reading a damaged file may raise
DAMAGED = (
    *(OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError),
    csv.Error,
)

Right = dict[int, np.ndarray]  # right answers to each query


class Coco:
    """Right answers in a split's own numbers of images and captions."""

    def __init__(self, protocols: list[Protocol], intra: dict[str, Right], image_of_caption: np.ndarray, note: str):
        self.protocols, self.intra, self.image_of_caption, self.note = protocols, intra, image_of_caption, note

    def figures(self, judged: Sequence[Judged]) -> dict[str, dict]:
        """{protocol: {"i2t": {figure: percent}, "t2i": ..., "interval": the same with both ends}} of all queries."""
        return {protocol.name: self._of_protocol(protocol, judged) for protocol in self.protocols}

    def intra_figures(self, pooled: Sequence[tuple[Tensor, Tensor]]) -> dict:
        """{"i2i": ..., "t2t": ..., "interval": ...} by the mean of each model's cosines of pooled embeddings."""
        ways = {"i2i": (0, np.arange(len(pooled[0][0]))), "t2t": (1, self.image_of_caption)}
        found = {}
        for way, right in self.intra.items():
            kind, image = ways[way]
            places = _places([vectors[kind] for vectors in pooled], right)
            found[way] = _summarize([query_figures(one) for one in places], RECALL_FIGURES, image[list(right)])
        return _with_intervals(found)

    def _of_protocol(self, protocol: Protocol, judged: Sequence[Judged]) -> dict:
        found = {}
        for way in ("i2t", "t2i"):
            those = [one for one in judged if one.way == way and protocol.name in one.positions]
            queries = np.array([one.query for one in those])
            image = queries if way == "i2t" else self.image_of_caption[queries]
            values = [query_figures(one.positions[protocol.name]) for one in those]
            found[way] = _summarize(values, protocol.figures, image)
        return _with_intervals(found)


def open_coco(split: Split) -> Coco:
    """What fits what in COCO's testall. Raises InputError where the package is missing or the split is another one."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it asks for ujson, which is no faster where it matters here
            from eccv_caption import Metrics
    except ImportError:
        raise InputError("--eccv: needs the package eccv_caption: pip install eccv_caption") from None
    package, folder = Metrics(), _annotations(split)
    images, captions, note = _number_ids(split, package)
    protocols = [
        _protocol("COCO 1K", RECALL_FIGURES, package.coco_gts, images, captions, _folds(package, images, captions)),
        _protocol("COCO 5K", RECALL_FIGURES, package.coco_gts, images, captions),
        _protocol("CxC", RECALL_FIGURES, package.cxc_gts, images, captions),
        _protocol("ECCV Caption", RANKING_FIGURES, package.eccv_gts, images, captions),
    ]
    if folder and all((folder / name).is_file() for name in PLAUSIBLE):
        protocols.append(_plausible(folder, package, images, captions))
    intra = {way: _read_intra(folder, way, images, captions, split) for way in INTRA if _intra_file(folder, way)}
    missing = [] if intra else [f"CxC's images among images and captions among captions need {ANNOTATIONS}/"]
    return Coco(protocols, intra, split.image_of_caption, "\n".join([note, *missing]))


def tables(rows: dict[str, dict], intra: dict[str, dict], note: str) -> str:
    """Tables of each row's figures by protocol, of recalls and of whole rankings; notes below."""
    several = len(rows) > 1
    made = []
    for columns in (RECALL_FIGURES, RANKING_FIGURES):
        lines = [
            line
            for row, protocols in rows.items()
            for name, figures in protocols.items()
            if ("avg" in figures["i2t"]) == (columns is RECALL_FIGURES)
            for line in report.with_interval(f"{row}: {name}" if several else name, figures)
        ]
        made.append(report.table(lines, columns))
    if intra:
        lines = [
            line
            for row, figures in intra.items()
            for line in report.with_interval(f"{row}: CxC" if several else "CxC, pooled cosine", figures)
        ]
        made.append(report.table(lines, RECALL_FIGURES, ("i2i", "t2t")))
    return "\n\n".join([*made, note])


# Which number in the split an id of COCO has


def _number_ids(split: Split, package) -> tuple[dict[int, int], dict[int, int], str]:
    """Numbers of images and of captions by COCO's ids, and where the ids come from."""
    own = [int(caption) for caption in package.coco_ids]
    image_of = {caption: image for caption, (image,) in package.coco_gts["t2i"].items()}
    own_images = [image_of[caption] for caption in own[::CAPTIONS_PER_IMAGE]]
    if len(split.features) != len(own_images) or (np.bincount(split.image_of_caption) != CAPTIONS_PER_IMAGE).any():
        found = f"{split.folder} {split.name} has {len(split.features)} images and {len(split.captions)} captions"
        raise InputError(
            f"--eccv: {found}, but these protocols are for COCO's {len(own_images)} test images with five captions "
            "each (--split testall)"
        )
    ids, ids_path = read_ids(split), split.folder / f"{split.name}_ids.txt"
    if ids is None:
        images, note = own_images, f"ids: {ids_path.name} is missing, the order of eccv_caption is taken"
    else:
        images, note = _numbers(ids, ids_path), f"ids: {ids_path.name}"
    if strange := sorted(set(own_images) ^ set(images)):
        raise InputError(
            f"--eccv: {ids_path}: these are not COCO's {len(own_images)} test images ({strange[0]} is on one side only)"
        )
    captions, of_captions = _caption_ids(split, images, own, image_of)
    numbers = ({one: number for number, one in enumerate(each)} for each in (images, captions))
    return *numbers, f"{note}; {of_captions}"


def _caption_ids(split: Split, images: list[int], own: list[int], image_of: dict) -> tuple[list[int], str]:
    """The captions' ids: from a file, else those of each image in the package's order."""
    path = split.folder / f"{split.name}_capids.txt"
    if not path.is_file():
        of_image = defaultdict(list)
        for caption in own:
            of_image[image_of[caption]].append(caption)
        return [caption for image in images for caption in of_image[image]], "captions of an image in its order there"
    try:
        captions = _numbers(path.read_text(encoding="utf-8-sig", errors="replace").split(), path)
    except OSError as error:
        raise InputError(f"--eccv: {path}: cannot be read ({reason(error)})") from None
    expected = [images[image] for image in split.image_of_caption]
    if [image_of.get(caption) for caption in captions] != expected or len(set(captions)) != len(captions):
        raise InputError(f"--eccv: {path}: its ids are not those of the captions of {split.name}_ids.txt's images")
    return captions, path.name


def _numbers(ids: Iterable[str], where) -> list[int]:
    try:
        return [int(one) for one in ids]
    except ValueError as error:
        raise InputError(f"--eccv: {where}: {reason(error)}; expected COCO's numbers") from None


# What fits what


def _protocol(
    name: str, figures: tuple[str, ...], pairs: dict, images: dict, captions: dict, folds: Sequence = ()
) -> Protocol:
    """A protocol in the split's numbers, from the package's {"i2t": {image id: caption ids}, "t2i": ...}."""
    of_images = {images[image]: _all_numbers(right, captions) for image, right in pairs["i2t"].items()}
    of_captions = {captions[caption]: _all_numbers(right, images) for caption, right in pairs["t2i"].items()}
    return Protocol(name, figures, of_images, of_captions, folds)


def _all_numbers(ids: Iterable[int], numbers: dict[int, int]) -> np.ndarray:
    return np.sort([numbers.get(one, ABSENT) for one in set(ids)])


def _folds(package, images: dict, captions: dict) -> list[tuple[np.ndarray, np.ndarray]]:
    """The package's five folds: consecutive fifths of its own order."""
    return [
        (_all_numbers((package.coco_gts["t2i"][c][0] for c in fold), images), _all_numbers(fold, captions))
        for fold in np.split(package.coco_ids, FOLDS)
    ]


def _plausible(folder: Path, package, images: dict, captions: dict) -> Protocol:
    try:
        package.set_pm_gts(*(str(folder / name) for name in PLAUSIBLE))
        if not all(pairs and all(pairs.values()) for pairs in package.pm_gts.values()):
            raise ValueError("a query without an answer, or no query")
        return _protocol("PMRP", ("r_precision",), package.pm_gts, images, captions)
    except DAMAGED as error:
        what = f"{' or '.join(PLAUSIBLE)} is damaged, or not of COCO's testall ({reason(error)})"
        raise InputError(f"{folder}: {what}") from None


def _annotations(split: Split) -> Path | None:
    """The folder of annotation files, where there is one."""
    folders = [split.folder / ANNOTATIONS, split.folder.parent / ANNOTATIONS]
    return next((folder for folder in folders if folder.is_dir()), None)


def _intra_file(folder: Path | None, way: str) -> Path | None:
    return next((folder / name for name in INTRA[way] if (folder / name).is_file()), None) if folder else None


def _read_intra(folder: Path, way: str, images: dict, captions: dict, split: Split) -> Right:
    """Right answers among images (i2i) or among captions (t2t). Raises InputError where the file is damaged."""
    path, numbers = _intra_file(folder, way), images if way == "i2i" else captions
    right = defaultdict(set)
    try:
        for one, other in _rated_right(path):
            if one in numbers and other in numbers and one != other:
                right[numbers[one]].add(numbers[other])
    except DAMAGED as error:
        raise InputError(f"{path}: damaged, or not CxC's ({reason(error)})") from None
    if not right:
        raise InputError(f"{path}: none of its pairs is of this split")
    if way == "t2t" and path.suffix == ".csv":  # captions of one image fit each other, however they were rated
        first = np.searchsorted(split.image_of_caption, split.image_of_caption)
        for caption, begin in enumerate(first.tolist()):
            right[caption].update(set(range(begin, begin + CAPTIONS_PER_IMAGE)) - {caption})
    return {query: np.array(sorted(right[query])) for query in sorted(right)}


def _rated_right(path: Path) -> Iterable[tuple[int, int]]:
    """Pairs of ids that fit, both ways round. GPO's files hold those alone: {query id: [[id, rating], ...]}."""
    if path.suffix == ".json":
        for query, answers in json.loads(path.read_text(encoding="utf-8")).items():
            for answer in answers:
                yield int(query), int(answer[0] if isinstance(answer, list) else answer)
        return
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.reader(file)
        if next(rows, None) is None:
            raise ValueError("it is empty")
        for one, other, rating, _ in rows:
            if float(rating) >= RATED_RIGHT:
                a, b = (int(re.findall(r"\d+", name)[-1]) for name in (one, other))
                yield from ((a, b), (b, a))


# Figures


def _places(vectors: Sequence[Tensor], right: Right) -> Iterable[np.ndarray]:
    """Where the right answers to each query stand, by the mean cosine to all others."""
    queries = np.array(list(right))
    for first in with_bar(range(0, len(queries), AT_ONCE), "pooled"):
        some = queries[first : first + AT_ONCE]
        cosines = sum((each[some] @ each.T).float().cpu() for each in vectors).numpy()
        cosines[np.arange(len(some)), some] = -np.inf  # itself is no answer
        yield from (RankedList(row).positions(right[query]) for query, row in zip(some, cosines, strict=True))


def _summarize(values: Sequence[dict], figures: tuple[str, ...], image: np.ndarray) -> dict[str, tuple]:
    """(percent, its interval) of each figure. values: of each query; image: (queries,) whose they are."""
    table = 100 * np.array([[one[name] for name in figures] for one in values])
    draws = bootstrap_means(table, image)
    return {name: (float(table[:, k].mean()), interval(draws[:, k])) for k, name in enumerate(figures)}


def _with_intervals(ways: dict[str, dict[str, tuple]]) -> dict:
    percent, ends = (
        {way: {name: both[k] for name, both in figures.items()} for way, figures in ways.items()} for k in (0, 1)
    )
    return {**percent, "interval": ends}
