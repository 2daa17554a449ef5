"""Turn bottom-up attention TSV files into a store of region features by image id, from which `karpathy` and `own` make
data sets. Six columns without a header, as bottom-up attention (Anderson et al. 2018) writes them: image_id, image_w,
image_h, num_boxes, boxes, features; the last two base64 of float32. Images may differ in their number of boxes. An
interrupted run goes on when the same command is given again."""

import argparse
import base64
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from lib.cli import InputError, one_line, reason
from lib.data.features import MOST_REGIONS, FeatureFile
from lib.files import check_space
from lib.prepare.dataset import add_target_flags, describe_counts, target_folder
from lib.prepare.writer import BOX_NUMBERS, SplitWriter, identify

COLUMNS = ("image_id", "image_w", "image_h", "num_boxes", "boxes", "features")
LINE_BYTES = 2**26  # 1.2 MB for 100 boxes of 2048 numbers
PIXELS = 10**6  # an image's width or height at most


class Position(NamedTuple):
    """How far the files are read. file: which; offset: in bytes; line: lines before it; repeated: images left out."""

    file: int = 0
    offset: int = 0
    line: int = 0
    repeated: int = 0


class Row(NamedTuple):
    """A line of a TSV file: size (width, height) in pixels, boxes (r, 4), features (r, img_dim)."""

    image_id: str
    size: tuple[int, int]
    boxes: np.ndarray
    features: np.ndarray


def add_flags(flags: argparse.ArgumentParser) -> None:
    flags.add_argument("files", type=Path, nargs="+", metavar="FILE", help="TSV files, all parts of them at once")
    add_target_flags(flags)
    flags.add_argument("--split", default="all", help="name of the store's files: SPLIT_ims.npy and so on")


def run(args: argparse.Namespace) -> None:
    started = time.perf_counter()
    if not re.fullmatch(r"[\w-]{1,100}", args.split):
        raise InputError(f"--split {one_line(repr(args.split))}: at most 100 letters, digits, '_' and '-'")
    folder = target_folder(args)
    path = folder / f"{args.split}_ims.npy"
    files = [identify(file) for file in args.files]
    writer = SplitWriter(folder, args.split, {"command": "tsv", "files": files}, boxes=True)
    if not writer.finished:
        check_space(folder, sum(file["bytes"] for file in files) * 3 // 4 - writer.bytes_there, "the store")
    with writer:
        if writer.finished:
            print(f"{path} is already there")
            return
        repeated = write_store(args.files, writer)
    features = FeatureFile(path)
    print(f"{path}: {len(features):,} images, {describe_counts(features.counts)} regions, img_dim {features.img_dim}")
    print(f"repeated image ids left out: {repeated:,}")
    print(f"{path.stat().st_size / 1e9:.2f} GB, {time.perf_counter() - started:.0f} seconds")


def write_store(files: Sequence[Path], writer: SplitWriter) -> int:
    """Add the images that the writer has not yet, and finish. Returns how many lines were of an image already there.

    Raises InputError with file and line where one cannot be used.
    """
    start = Position(*(writer.position or ()))
    known, repeated = set(writer.ids), start.repeated
    with tqdm(total=sum(map(os.path.getsize, files)), unit="B", unit_scale=True, leave=False, disable=None) as bar:
        bar.update(sum(map(os.path.getsize, files[: start.file])) + start.offset)
        for line, after in _lines(files, start):
            bar.update(len(line))
            origin = f"{files[after.file]}: line {after.line}"
            row = read_row(line, origin)
            if row.image_id in known:
                repeated += 1
                continue
            known.add(row.image_id)
            position = after._replace(repeated=repeated)
            writer.add(row.features, row.image_id, row.boxes, position, row.size, origin)
    writer.finish()
    return repeated


def read_row(line: bytes, origin: str) -> Row:
    """Raises InputError, starting with the origin, where a line is not one of a bottom-up attention TSV file."""
    try:
        fields = line.rstrip(b"\r\n").split(b"\t")
        if len(fields) != len(COLUMNS):
            raise ValueError(f"{len(fields)} columns instead of {len(COLUMNS)} ({', '.join(COLUMNS)})")
        width, height, regions = map(_number, COLUMNS[1:4], fields[1:4], (PIXELS, PIXELS, MOST_REGIONS))
        boxes, features = (_floats(name, field, regions) for name, field in zip(COLUMNS[4:], fields[4:], strict=True))
        if boxes.shape[1] != BOX_NUMBERS:
            raise ValueError(f"{boxes.size} numbers in the {regions} boxes, expected {BOX_NUMBERS} for each")
        return Row(fields[0].decode(), (width, height), boxes, features)
    except ValueError as error:
        what_to_do = "" if line.endswith(b"\n") else "; the file ends in this line: copy or download it again"
        raise InputError(f"{origin}: {reason(error)}{what_to_do}") from None


def _lines(files: Sequence[Path], start: Position) -> Iterator[tuple[bytes, Position]]:
    """Lines that hold something, each with the position after it."""
    for index in range(start.file, len(files)):
        at = start if index == start.file else Position(index)
        try:
            with open(files[index], "rb") as file:
                file.seek(at.offset)
                while line := file.readline(LINE_BYTES + 1):
                    at = at._replace(offset=at.offset + len(line), line=at.line + 1)
                    if len(line) > LINE_BYTES:
                        raise InputError(f"{files[index]}: line {at.line} is longer than {LINE_BYTES} bytes: no TSV")
                    if line.strip():
                        yield line, at
        except OSError as error:
            raise InputError(f"{files[index]}: cannot be read ({reason(error)})") from None


def _number(name: str, field: bytes, most: int) -> int:
    """A whole number from 1 to `most`."""
    if not (field.isdigit() and len(field) <= len(str(most)) and 1 <= int(field) <= most):
        raise ValueError(f"{name} is {one_line(repr(field[:40]))}, expected a number from 1 to {most}")
    return int(field)


def _floats(name: str, field: bytes, regions: int) -> np.ndarray:
    """The numbers of each region (regions, n)."""
    try:
        content = base64.b64decode(field, validate=True)
    except ValueError as error:
        raise ValueError(f"{name} is not base64 ({reason(error)})") from None
    if not content or len(content) % (4 * regions):
        raise ValueError(f"{name} has {len(content)} bytes, which is not the same number of floats for {regions} boxes")
    return np.frombuffer(content, "<f4").reshape(regions, -1)
