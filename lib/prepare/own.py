"""Make a data set of your own captions and features. CAPTIONS is a .jsonl file (a JSON object a line) or a .csv file (a
header, then a caption a line) with image_id, caption and, if you like, split: train, dev or test. Without it the images
are drawn to splits. An image may have any number of captions, and they need not stand together. An interrupted run goes
on when the same command is given again."""

import argparse
import csv
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lib.cli import InputError, one_line, reason
from lib.data.dataset import MOST_CAPTIONS
from lib.files import replacing
from lib.prepare import dataset
from lib.prepare.dataset import Image, check_found, clean_caption, name_some, target_folder, write_dataset
from lib.prepare.sources import Features
from lib.prepare.writer import ID_CHARACTERS

LINE_BYTES = 2**16  # of a captions file
COLUMNS = ("image_id", "caption", "split")
SPLITS = ("train", "dev", "test")
UNCAPTIONED = "without_captions.txt"


class Line(NamedTuple):
    """What a line says. split: one of SPLITS, or nothing."""

    image_id: str
    caption: str
    split: str


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("captions", type=Path, metavar="CAPTIONS", help="a .jsonl or .csv file")
    dataset.add_flags(flags)
    flags.add_argument("--dev", type=float, default=0.1, help="part of the images that is dev, where none is given")
    flags.add_argument("--test", type=float, default=0.1, help="part of the images that is test, where none is given")
    flags.add_argument("--seed", type=int, default=0, help="another seed draws other splits")


def run(args: argparse.Namespace) -> None:
    folder = target_folder(args)
    captions, given = read_captions(args.captions)
    splits = given or draw_splits(captions, args.dev, args.test, args.seed)
    features = Features(args.features)
    images = {split: [] for split in SPLITS}
    for image_id, of_image in captions.items():
        images[splits[image_id]].append(Image(image_id, features.find(image_id), of_image))
    for split, of_split in images.items():
        if of_split:
            check_found(f"image of {split}", of_split, features)
    write_dataset(folder, images, features, {"command": "own"})
    _list_uncaptioned(folder, features, {image.found for split in images.values() for image in split})


def read_captions(path: Path) -> tuple[dict[str, list[str]], dict[str, str]]:
    """Captions of each image and, where the file says so, its split; in the order in which the images appear.

    Raises InputError with the line where one is not what it should be, or an image is in two splits.
    """
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    for number, line in _read_lines(path):
        captions.setdefault(line.image_id, []).append(line.caption)
        split = splits.setdefault(line.image_id, line.split)
        if bool(line.split) != bool(next(iter(splits.values()))):
            raise InputError(f"{path}: line {number}: every line must have a split, or none")
        if split != line.split:
            raise InputError(f"{path}: line {number}: image {line.image_id} is in {line.split}, but in {split} before")
        if len(captions[line.image_id]) > MOST_CAPTIONS:
            raise InputError(f"{path}: line {number}: more than {MOST_CAPTIONS} captions of image {line.image_id}")
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions, splits if any(splits.values()) else {}


def draw_splits(image_ids: Iterable[str], dev: float, test: float, seed: int) -> dict[str, str]:
    """The split of each image. Depends on the ids, the parts and the seed, not on the order of the ids.

    Raises InputError where no image would be left for train.
    """
    ids = sorted(image_ids)
    for name, part in (("--dev", dev), ("--test", test)):
        if not 0 < part < 1:
            raise InputError(f"{name} {part}: a part of the images, above 0 and below 1")
    if seed < 0:
        raise InputError(f"--seed {seed} is negative: give 0 or more")
    sizes = {"dev": max(1, round(dev * len(ids))), "test": max(1, round(test * len(ids)))}
    if sum(sizes.values()) >= len(ids):
        raise InputError(
            f"{len(ids)} images are too few: --dev {dev} and --test {test} take {sizes['dev']} and {sizes['test']} of "
            "them and leave none for train"
        )
    names = ["dev"] * sizes["dev"] + ["test"] * sizes["test"]
    drawn = np.random.default_rng(seed).permutation(len(ids))
    return {**dict.fromkeys(ids, "train"), **{ids[place]: name for place, name in zip(drawn, names, strict=False)}}


def _read_lines(path: Path) -> Iterator[tuple[int, Line]]:
    """What the lines of a captions file say, with their numbers."""
    readers = {".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix not in readers:
        raise InputError(f"{path}: expected a file that ends in {' or '.join(readers)}")
    for number, fields in readers[path.suffix](path):
        try:
            yield number, _line(fields)
        except ValueError as error:
            raise InputError(f"{path}: line {number}: {reason(error)}") from None


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict]]:
    for number, text in _decoded_lines(path):
        try:
            fields = json.loads(text) if text.strip() else None
        except (ValueError, RecursionError) as error:
            raise InputError(f"{path}: line {number}: no JSON ({reason(error)})") from None
        if isinstance(fields, dict):
            yield number, fields
        elif text.strip():
            raise InputError(f'{path}: line {number}: expected {{"image_id": ..., "caption": ...}}')


def _read_csv(path: Path) -> Iterator[tuple[int, dict]]:
    """Rows by the names in the header; one in quotes may have several lines, its number is that of the first."""
    reader = csv.reader((text for _, text in _decoded_lines(path)), strict=True)
    columns: list[str] = []
    while True:
        number = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(f"{path}: line {number}: {reason(error)}") from None
        if row is None:
            return
        if row and not columns:
            columns = _header(path, row)
        elif row and len(row) != len(columns):
            raise InputError(f"{path}: line {number}: {len(row)} columns instead of {len(columns)}; quote commas")
        elif row:
            yield number, dict(zip(columns, row, strict=True))


def _header(path: Path, row: list[str]) -> list[str]:
    columns = [name.strip() for name in row]
    if not {"image_id", "caption"} <= set(columns) or any(columns.count(name) > 1 for name in COLUMNS):
        raise InputError(f"{path}: the first line must name the columns, image_id and caption, separated by commas")
    return columns


def _decoded_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their ends and numbers, without a byte-order mark."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(LINE_BYTES + 1), b""), start=1):
                if len(line) > LINE_BYTES:
                    raise InputError(f"{path}: line {number} is longer than {LINE_BYTES} bytes")
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: line {number} is not UTF-8; convert the file to UTF-8") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def _line(fields: dict) -> Line:
    """Raises ValueError where a field is missing, or not what it should be."""
    image_id, caption, split = fields.get("image_id"), fields.get("caption"), fields.get("split") or ""
    image_id = str(image_id) if type(image_id) is int else image_id
    if not isinstance(image_id, str) or not 0 < len(image_id := image_id.strip()) <= ID_CHARACTERS:
        raise ValueError(f"image_id must be a number or a text of 1 to {ID_CHARACTERS} characters")
    if not image_id.isprintable():
        raise ValueError("image_id holds what cannot be printed")
    if not isinstance(caption, str):
        raise ValueError("caption must be a text")
    if split and split not in SPLITS:
        raise ValueError(f"split {one_line(repr(split))} is none of {', '.join(SPLITS)}")
    return Line(image_id, clean_caption(caption), split)


def _list_uncaptioned(folder: Path, features: Features, captioned: set[str | None]) -> None:
    """Say which images have features, but no captions."""
    uncaptioned = sorted(set(features.ids) - captioned)
    if uncaptioned:
        path = folder / UNCAPTIONED
        with replacing(path) as file:
            file.write("".join(f"{image_id}\n" for image_id in uncaptioned).encode())
        print(f"no captions for {len(uncaptioned):,} with features: {name_some(uncaptioned)}; all are in {path}")
