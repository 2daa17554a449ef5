"""Make a data set of your own captions and features. CAPTIONS is a table with a header (.csv, .tsv, .txt), lines
NAME.jpg#0<TAB>caption (.txt, .token), JSON objects, one a line (.jsonl) or in a list (.json), COCO's captions (.json),
or Parquet; with image_id or a file name, a caption or a list of them, and, if you like, split: train, dev or test.
Without it the images are drawn to splits. An image may have any number of captions, and they need not stand together. A
run that was interrupted begins again."""

import argparse
import ast
import csv
import json
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lib.cli import InputError, optional, reason, refusing
from lib.files import read_lines
from lib.prepare import assemble
from lib.prepare.assemble import SPLITS, Features, clean_caption, write_dataset
from lib.prepare.io import read_json

# What columns and keys are called that hold an image's id or name, and its captions.
IMAGES = ("image_id", "image", "file_name", "filename", "image_name")
CAPTIONS = ("caption", "captions", "text", "raw", "sentences", "comment")
WRITTEN_LIST = re.compile(r"""\[\s*["'].*["']\s*]""", re.DOTALL)  # several captions in a field of a table
TOKEN_LINE = re.compile(r"(?P<image>.+)#[0-9]+\t(?P<caption>.*)")

Rows = Iterable[tuple[str, Any]]  # where a caption stands in its file, and its fields: a dict, or JSON that holds one


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("captions", type=Path, metavar="CAPTIONS", help=f"a file of captions: {', '.join(READERS)}")
    assemble.add_flags(flags)
    add_caption_flags(flags)


def add_caption_flags(flags: argparse.ArgumentParser) -> None:
    """The flags that say what is in the file of captions, and how images are drawn to splits."""
    flags.add_argument("--image_column", default="", metavar="NAME", help="column or key of the image's id or name")
    flags.add_argument("--caption_column", default="", metavar="NAME", help="column or key of the caption or captions")
    flags.add_argument("--id_mapping", type=Path, metavar="FILE.json", help="file names by image id, as GPO has them")
    flags.add_argument("--dev", type=float, default=0.1, help="part of the images that is dev, where none is given")
    flags.add_argument("--test", type=float, default=0.1, help="part of the images that is test, where none is given")
    flags.add_argument("--seed", type=int, default=0, help="another seed draws other splits")


def run(args: argparse.Namespace) -> None:
    splits, names = read_splits(args)
    write_dataset(args.data_path / args.data_name, splits, names, Features(args.features))


def read_splits(args: argparse.Namespace) -> tuple[dict[str, dict[str, list[str]]], dict[str, dict[str, str]]]:
    """Captions, by split and image id, and the names that images have, by kind of name and image id."""
    captions, given, file_names = read_captions(args.captions, args.image_column, args.caption_column)
    split_of = given or draw_splits(captions, args.dev, args.test, args.seed)
    there = [split for split in dict.fromkeys(SPLITS.values()) if split in split_of.values()]
    splits = {split: {one: captions[one] for one in captions if split_of[one] == split} for split in there}
    if not {"train", "dev"}.issubset(there):
        print(f"splits: {', '.join(there)}; training needs train and dev, drawn where no column is called split")
    ids = {}
    if args.id_mapping:
        with refusing(f"--id_mapping {args.id_mapping}: not a JSON object of image ids and file names"):
            file_names = {str(image_id): str(name) for image_id, name in read_json(args.id_mapping).items()}
        ids = {name: image_id for image_id, file in file_names.items() for name in (file, Path(file).stem)}
    named = {"image_id": {image_id: image_id for image_id in captions}, "file_name": file_names, "id of file_name": ids}
    return splits, {kind: {one: table[one] for one in captions if one in table} for kind, table in named.items()}


def read_captions(path: Path, image: str = "", caption: str = "") -> tuple[dict, dict[str, str], dict[str, str]]:
    """Captions of each image and, where the file says so, its split and its file's name; in the order of the images.

    image, caption: the columns or keys that hold them; empty: the one of IMAGES and of CAPTIONS that is there, which is
    printed. Raises InputError with the line where one is not what it should be, or an image is in two splits.
    """
    captions: dict[str, list[str]] = {}
    splits: dict[str, str] = {}
    if path.suffix.lower() not in READERS:
        raise InputError(f"{path}: expected a file that ends in {', '.join(READERS)}")
    rows, file_names = READERS[path.suffix.lower()](path)
    for place, row in rows:
        try:
            fields = json.loads(row) if isinstance(row, str) else row
            if not isinstance(fields, dict):
                raise ValueError('expected {"image_id": ..., "caption": ...}, or a line NAME#0<TAB>CAPTION')
            if not captions:
                image, caption = _column(fields, image, IMAGES, "image"), _column(fields, caption, CAPTIONS, "caption")
                print(f"{path}: images by {image}, captions from {caption}")
            image_id, texts, split = _fields(fields, image, caption)
            if bool(split) != bool(next(iter(splits.values()), split)):
                raise ValueError("every caption must have a split, or none")
            if splits.setdefault(image_id, split) != split:
                raise ValueError(f"image {image_id} is in {split}, but in {splits[image_id]} before")
        except ValueError as error:
            hint = "; a list over several lines ends in .json" if isinstance(error, json.JSONDecodeError) else ""
            raise InputError(f"{path}: {place}: {reason(error)}{hint}") from None
        captions.setdefault(image_id, []).extend(texts)
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions, splits if any(splits.values()) else {}, file_names


def draw_splits(image_ids: Iterable[str], dev: float, test: float, seed: int) -> dict[str, str]:
    """The split of each image, whatever the order of the ids. Raises InputError where no image is left for train."""
    if not (0 < dev < 1 and 0 < test < 1 and seed >= 0):
        raise InputError(
            f"--dev {dev} --test {test} --seed {seed}: expected parts above 0 and below 1, a seed from 0 on"
        )
    ids = sorted(image_ids)
    names = ["dev"] * max(1, round(dev * len(ids))) + ["test"] * max(1, round(test * len(ids)))
    if len(names) >= len(ids):
        raise InputError(f"{len(ids)} images are too few: --dev {dev} and --test {test} leave none for train")
    drawn = np.random.default_rng(seed).permutation(len(ids))
    return {**dict.fromkeys(ids, "train"), **{ids[place]: name for place, name in zip(drawn, names, strict=False)}}


def _read_text(path: Path) -> tuple[Rows, dict[str, str]]:
    """Lines `name.jpg#0<TAB>caption`, or a table with a header; a field in quotes may have several lines."""
    lines = ((number, line) for number, line in read_lines(path) if line.strip())
    _, first = next(lines, (0, ""))
    if TOKEN_LINE.fullmatch(first):
        found = ((number, TOKEN_LINE.fullmatch(line)) for number, line in read_lines(path) if line.strip())
        return ((f"line {number}", one and one.groupdict()) for number, one in found), {}
    return _read_table(path, next((one for one in "\t|;," if one in first), ",")), {}


def _read_table(path: Path, delimiter: str) -> Rows:
    quoting: Literal[0, 3] = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    lines = (f"{line}\n" for _, line in read_lines(path))
    table = csv.reader(lines, delimiter=delimiter, skipinitialspace=True, strict=True, quoting=quoting)
    try:
        header = [name.strip() for name in next(filter(any, table), [])]
        if twice := [name for name in header if name and header.count(name) > 1]:
            raise csv.Error(f"several columns are called {twice[0]}; rename or delete all but one")
        for cells in filter(None, table):
            if len(cells) > len(header):
                raise csv.Error("more columns than the header; put captions into quotes")
            yield f"line {table.line_num}", dict(zip_longest(header, cells))
    except csv.Error as error:
        raise InputError(f"{path}: line {table.line_num}: {reason(error)}") from None


def _read_json(path: Path) -> tuple[Rows, dict[str, str]]:
    """A list of objects, captions by the image's name, or COCO's `annotations`, perhaps with `images`."""
    content, names = read_json(path), {}
    if isinstance(content, dict) and "annotations" in content:
        with refusing(f"{path}: not COCO's captions"):
            names = {str(image["id"]): image["file_name"] for image in content.get("images", ())}
            content = [{name: one[name] for name in ("image_id", "caption")} for one in content["annotations"]]
    elif isinstance(content, dict) and "images" not in content:
        content = [{"image": name, "captions": captions} for name, captions in content.items()]
    if not isinstance(content, list):
        raise InputError(f"{path}: neither a list of captions nor COCO's captions; Karpathy's splits go to `karpathy`")
    return ((f"entry {number} (counted from 0)", row) for number, row in enumerate(content)), names


def _read_parquet(path: Path) -> tuple[Rows, dict[str, str]]:
    """Rows without their binary columns, which hold pictures."""
    parquet = optional("pyarrow.parquet", f"{path}: Parquet")
    with refusing(f"{path}: not a Parquet file; copy or download it again"):
        file = parquet.ParquetFile(path)
        columns = [file.schema.column(place) for place in range(len(file.schema))]
        texts = [one.path for one in columns if one.physical_type != "BYTE_ARRAY" or one.logical_type.type == "STRING"]
    rows = (row for batch in file.iter_batches(columns=texts) for row in batch.to_pylist())
    return ((f"row {number} (counted from 0)", row) for number, row in enumerate(rows)), {}


READERS: dict[str, Callable[[Path], tuple[Rows, dict[str, str]]]] = {
    **dict.fromkeys((".csv", ".tsv", ".txt", ".token"), _read_text),
    ".jsonl": lambda path: (((f"line {number}", line) for number, line in read_lines(path) if line.strip()), {}),
    ".json": _read_json,
    ".parquet": _read_parquet,
}


def _column(fields: dict, given: str, known: Sequence[str], what: str) -> str:
    """The field that holds the image's name or its captions. Raises ValueError where it is not plain which."""
    found = [name for name in fields if (name == given if given else name.lower() in known)]
    if len(found) != 1:
        seen = f"several may be it: {', '.join(found)}" if found else f"there are {', '.join(fields)}"
        raise ValueError(f"choose the {what} with --{what}_column (a table's first line names the columns); {seen}")
    return found[0]


def _fields(fields: dict, image: str, caption: str) -> tuple[str, list[str], str]:
    """Image id, captions and split (empty where none is given). Raises ValueError where one is not as it should be."""
    image_id, texts = fields.get(image), fields.get(caption)
    split = next((value for name, value in fields.items() if name.lower() == "split"), "") or ""
    image_id = image_id.get("path") if isinstance(image_id, dict) else image_id  # Hugging Face's pictures
    if isinstance(texts, str) and WRITTEN_LIST.fullmatch(texts.strip()):
        with suppress(SyntaxError):
            texts = ast.literal_eval(texts.strip())
    texts = texts if isinstance(texts, list) else [texts]
    if type(image_id) not in (int, str) or not str(image_id).strip() or not str(image_id).strip().isprintable():
        raise ValueError(f"{image} must be a number or printable text")
    if not texts or not all(isinstance(text, str) and clean_caption(text) for text in texts):
        raise ValueError(f"{caption} must be text, or a list of texts, and not empty; mend or delete it")
    if split and not (isinstance(split, str) and split in SPLITS):
        raise ValueError(f"split {split!r} is none of {', '.join(SPLITS)}")
    return str(image_id).strip(), list(map(clean_caption, texts)), SPLITS.get(split, "")
