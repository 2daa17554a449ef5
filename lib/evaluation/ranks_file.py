"""--ranks FILE: what became of every query, one JSON object a line, enough to redo every table without the model.

The first line says what was evaluated: format, data, split, images, captions, row (of the table), folds. Then, images
first, for each query:

way      i2t: the query is an image; t2i: a caption
query    its number in the split, from 0; id: the image's id where the data set has ids; caption: the caption's text
right    numbers of the captions of the image, or of the caption's image
ranks    from 1, a wrong item with the same score before a right one. all: of the right items, among all; fold: among
         the query's own fold (--fold5); with --eccv one entry more for each protocol that the query counts for
top      number and score of the first ten items
"""

import json
from collections.abc import Iterable, Sequence

import numpy as np

from lib.data.dataset import Split, read_ids
from lib.evaluation.metrics import RECALLS
from lib.evaluation.parts import Part
from lib.evaluation.rankings import Judged, Protocol, query_figures
from lib.files import replacing

FORMAT = "x-dim ranks 1"
ALL, FOLD = "all", "fold"
ONLY_R_PRECISION = ("r_precision",)


def pair_protocols(split: Split, parts: Sequence[Part]) -> list[Protocol]:
    """The data set's own pairs: among all images and captions, and in folds where the parts hold some."""
    numbers = np.arange(len(split.captions))
    ends = np.searchsorted(split.image_of_caption, np.arange(len(split.features) + 1))
    captions = {image: numbers[ends[image] : ends[image + 1]] for image in range(len(split.features))}
    images = {caption: image[None] for caption, image in enumerate(split.image_of_caption)}
    folds = [tuple(np.arange(each.start, each.stop) for each in part) for part in parts[1:]]
    protocols = [Protocol(ALL, RECALLS, captions, images)]
    return protocols + ([Protocol(FOLD, RECALLS, captions, images, folds)] if folds else [])


def write_ranks(path: str, judged: Iterable[Judged], split: Split, protocols: Sequence[Protocol], row: str) -> None:
    """Write all queries of a split. Raises InputError where the file cannot be written."""
    ids, by_name = read_ids(split), {protocol.name: protocol for protocol in protocols}
    folds = next((len(protocol.folds) for protocol in protocols if protocol.name == FOLD), 0)
    sizes = {"images": len(split.features), "captions": len(split.captions)}
    about = {"format": FORMAT, "data": str(split.folder), "split": split.name, **sizes, "row": row, "folds": folds}
    with replacing(path) as file:
        for record in [about, *(_record(one, split, ids, by_name) for one in judged)]:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")


def _record(one: Judged, split: Split, ids: list[str] | None, protocols: dict[str, Protocol]) -> dict:
    about = {"caption": split.captions[one.query]} if one.way == "t2i" else {"id": ids[one.query]} if ids else {}
    return {
        **{"way": one.way, "query": one.query, **about, "right": one.right.tolist()},
        "ranks": {name: _ranks(protocols[name], positions) for name, positions in one.positions.items()},
        "top": one.top,
    }


def _ranks(protocol: Protocol, positions: np.ndarray) -> list[int] | float:
    """Ranks from 1; of thousands of right items only the R-precision that they are reported by."""
    if protocol.figures == ONLY_R_PRECISION:
        return query_figures(positions)["r_precision"]
    return (positions + 1).tolist()
