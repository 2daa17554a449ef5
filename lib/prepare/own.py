"""Make a data set of your own captions and features. CAPTIONS is a .csv or .tsv file (a header, then a caption a line),
a .jsonl file (a JSON object a line) or a .json file (a list of such objects) with image_id, caption and, if you like,
split: train, dev or test. Without it the images are drawn to splits. An image may have any number of captions, and they
need not stand together. A run that was interrupted begins again."""

import argparse
import csv
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lib.cli import InputError, reason
from lib.files import read_lines
from lib.prepare import assemble
from lib.prepare.assemble import Features, clean_caption, write_dataset
from lib.prepare.io import read_json

SPLITS = ("train", "dev", "test")

Rows = Iterable[tuple[str, Any]]  # where a caption stands in its file, and its fields: a dict, or JSON that holds one


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("captions", type=Path, metavar="CAPTIONS", help=f"a file of captions: {', '.join(READERS)}")
    assemble.add_flags(flags)
    flags.add_argument("--dev", type=float, default=0.1, help="part of the images that is dev, where none is given")
    flags.add_argument("--test", type=float, default=0.1, help="part of the images that is test, where none is given")
    flags.add_argument("--seed", type=int, default=0, help="another seed draws other splits")


def run(args: argparse.Namespace) -> None:
    captions, given = read_captions(args.captions)
    split_of = given or draw_splits(captions, args.dev, args.test, args.seed)
    splits: dict[str, dict[str, list[str]]] = {split: {} for split in SPLITS if split in split_of.values()}
    for image_id, of_image in captions.items():
        splits[split_of[image_id]][image_id] = of_image
    names = {"image_id": {image_id: image_id for image_id in captions}}
    write_dataset(args.data_path / args.data_name, splits, names, Features(args.features))


def read_captions(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions of each image and, where the file says so, its split; in the order in which the images appear.

    Raises InputError with the line where one is not what it should be, or an image is in two splits.
    """
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    if path.suffix not in READERS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    for place, row in READERS[path.suffix](path):
        try:
            image_id, caption, split = _fields(row)
            if bool(split) != bool(next(iter(splits.values()), split)):
                raise ValueError("every caption must have a split, or none")
            if splits.setdefault(image_id, split) != split:
                raise ValueError(f"image {image_id} is in {split}, but in {splits[image_id]} before")
        except ValueError as error:
            raise InputError(f"{path}: {place}: {reason(error)}") from None
        captions.setdefault(image_id, []).append(caption)
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions, splits if any(splits.values()) else {}


def draw_splits(image_ids: Iterable[str], dev: float, test: float, seed: int) -> dict[str, str]:
    """The split of each image. Depends on the ids, the parts and the seed, not on the order of the ids.

    Raises InputError where no image would be left for train.
    """
    if not (0 < dev < 1 and 0 < test < 1 and seed >= 0):
        raise InputError(f"--dev {dev} --test {test} --seed {seed}: expected parts from 0 to 1, a seed from 0 on")
    ids = sorted(image_ids)
    names = ["dev"] * max(1, round(dev * len(ids))) + ["test"] * max(1, round(test * len(ids)))
    if len(names) >= len(ids):
        raise InputError(f"{len(ids)} images are too few: --dev {dev} and --test {test} leave none for train")
    drawn = np.random.default_rng(seed).permutation(len(ids))
    return {**dict.fromkeys(ids, "train"), **{ids[place]: name for place, name in zip(drawn, names, strict=False)}}


def _read_table(path: Path, delimiter: str) -> Rows:
    """Rows by the names in the header; a field in quotes may have several lines."""
    lines = (f"{line}\n" for _, line in read_lines(path))
    reader = csv.DictReader(lines, delimiter=delimiter, skipinitialspace=True, strict=True)
    try:
        if not {"image_id", "caption"} <= set(reader.fieldnames or ()):
            raise InputError(f"{path}: the first line must name the columns, image_id and caption among them")
        for row in reader:
            yield f"line {reader.reader.line_num}", row
    except csv.Error as error:
        raise InputError(f"{path}: line {reader.reader.line_num}: {reason(error)}") from None


READERS: dict[str, Callable[[Path], Rows]] = {
    ".csv": partial(_read_table, delimiter=","),
    ".tsv": partial(_read_table, delimiter="\t"),
    ".jsonl": lambda path: ((f"line {number}", line) for number, line in read_lines(path) if line.strip()),
    ".json": lambda path: ((f"entry {number} (counted from 0)", row) for number, row in enumerate(read_json(path))),
}


def _fields(row: Any) -> tuple[str, str, str]:
    """image_id, caption and split (empty where none is given). Raises ValueError where one is not what it should be."""
    fields = json.loads(row) if isinstance(row, str) else row
    if not isinstance(fields, dict):
        raise ValueError('expected {"image_id": ..., "caption": ...}')
    if None in fields:
        raise ValueError("more columns than the header; put captions into quotes")
    image_id, caption, split = fields.get("image_id"), fields.get("caption"), fields.get("split") or ""
    if type(image_id) not in (int, str) or not str(image_id).strip() or not str(image_id).strip().isprintable():
        raise ValueError("image_id must be a number or printable text")
    if not isinstance(caption, str) or not clean_caption(caption):
        raise ValueError("caption must be text")
    if split and split not in SPLITS:
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return str(image_id).strip(), clean_caption(caption), split
