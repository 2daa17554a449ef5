"""Caption files: {split}_caps.txt, UTF-8, one caption a line, and {split}_caps_counts.txt, how many of each image."""

import os
from codecs import BOM_UTF8
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lib.errors import InputError, reason

CAPTIONS_PER_IMAGE = 5  # where no file of counts says otherwise

# What is read at most of files that may hold anything
CAPTION_BYTES = 8_192  # of a caption; those of COCO and Flickr30K stay below 500
MOST_CAPTIONS = 10_000  # of an image


def count_captions(folder: Path, split: str, images: int) -> np.ndarray:
    """Captions of each image (images,): five, or what {split}_caps_counts.txt says, one number a line.

    Raises InputError where a line is no number from 1 to MOST_CAPTIONS, or their number is not that of the images.
    """
    path = folder / f"{split}_caps_counts.txt"
    if not os.path.isfile(path):
        return np.full(images, CAPTIONS_PER_IMAGE)
    counts = [_count(path, *line) for line in islice(_numbered_lines(path), images + 1)]
    if len(counts) != images:
        raise InputError(f"{path}: {count_lines(path)} lines for {images} images; every line counts one's captions")
    return np.array(counts)


def read_captions(path: Path, most: int | None = None) -> list[str]:
    """The captions of a file, one a line, no more than the first `most`; lines end at \\n or \\r\\n only.

    A byte-order mark before the first caption is dropped, and so is a \\r at the file's very end, where it was cut.
    Raises InputError on bad UTF-8, NUL, a line that is empty or longer than CAPTION_BYTES, or no line at all.
    """
    captions = [_caption(path, *line) for line in islice(_numbered_lines(path), most)]
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    try:
        with open(path, "rb") as file:
            yield from enumerate(_lines(file), start=1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long only as much as shows it."""
    if file.read(len(BOM_UTF8)) != BOM_UTF8:
        file.seek(0)
    while line := file.readline(CAPTION_BYTES + len(b"\r\n")):
        yield line


def _caption(path: Path, number: int, line: bytes) -> str:
    line = line.removesuffix(b"\n").removesuffix(b"\r")
    if len(line) > CAPTION_BYTES:
        raise InputError(f"{path}: line {number} is longer than {CAPTION_BYTES} bytes; every line holds one caption")
    if b"\0" in line:
        raise InputError(f"{path}: line {number} holds a NUL byte; convert the file to UTF-8, or copy it again")
    try:
        caption = line.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{path}: line {number} is not UTF-8; convert the file to UTF-8") from None
    if not caption.strip():
        raise InputError(f"{path}: line {number} is an empty caption; every line must hold one")
    return caption


def _count(path: Path, number: int, line: bytes) -> int:
    text = line.strip()
    if not (text.isdigit() and len(text) <= len(str(MOST_CAPTIONS)) and 1 <= int(text) <= MOST_CAPTIONS):
        raise InputError(f"{path}: line {number} is no number of captions from 1 to {MOST_CAPTIONS}")
    return int(text)


def count_lines(path: Path) -> int:
    """Lines of a file of any size, with lines of any length."""
    count, end = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            count, end = count + block.count(b"\n"), block[-1:]
    return count + (end != b"\n")
