"""Everything that stands in a data set's folder, as `verify` and `pack` take it: all splits, with ids and boxes."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from lib.cli import InputError, one_line, reason
from lib.data.dataset import Split, find_folder, open_split
from lib.data.features import HEADER_BYTES, FeatureFile
from lib.prepare.writer import BOX_NUMBERS, ID_CHARACTERS

TRAINED_ON = ("train", "dev", "test", "testall")  # what training and evaluation open; these need captions
SIZE = re.compile(r"([1-9][0-9]{0,8}) ([1-9][0-9]{0,8})")
ENDING = "_ims.npy"


def find_splits(data_path: str | Path, data_name: str) -> tuple[Path, list[str]]:
    """The data set's folder and the names of all splits in it, `train` first. Raises InputError where there are none.

    The names are as they stand in the folder, so they may be no names of splits at all.
    """
    folder = find_folder(str(data_path), data_name)
    names = {path.name.removesuffix(ENDING) for path in folder.glob(f"*{ENDING}")}
    if not names:
        open_split(str(data_path), data_name, "train")  # says what is missing
    known = [name for name in TRAINED_ON if name in names]
    return folder, known + sorted(names.difference(known))


def open_any(data_path: str | Path, data_name: str, name: str) -> Split:
    """A split; or a store of features without captions, where the name is none of TRAINED_ON. Raises InputError."""
    folder = find_folder(str(data_path), data_name)
    if not (name and name.isprintable()):
        raise InputError(f"{folder}: '{one_line(name)}{ENDING}' names no split; rename it")
    if name in TRAINED_ON or (folder / f"{name}_caps.txt").exists():
        return open_split(str(data_path), data_name, name)
    features = FeatureFile(folder / f"{name}{ENDING}")
    return Split(name, folder, features, [], np.zeros(0, np.int64))


def captions_of_images(split: Split) -> list[list[str]]:
    """The captions of each image."""
    ends = np.cumsum(np.bincount(split.image_of_caption, minlength=len(split.features)))
    return [split.captions[begin:end] for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def read_sizes(split: Split) -> list[tuple[int, int]] | None:
    """Width and height in pixels of each image, from {split}_sizes.txt; None where there is no such file.

    Raises InputError where the file has not one line of two numbers for each image.
    """
    path, images = split.folder / f"{split.name}_sizes.txt", len(split.features)
    if not path.exists():
        return None
    sizes = [SIZE.fullmatch(line) for line in islice(_read_lines(path), images + 1)]
    if len(sizes) != images or None in sizes:
        raise InputError(f"{path}: expected a line of two numbers, width and height, for each of {images} images")
    return [(int(size[1]), int(size[2])) for size in sizes]


def read_boxes(split: Split) -> np.ndarray | None:
    """The boxes (regions of all images, 4) float32, from {split}_boxes.npy; None where there is no such file.

    Raises InputError where they are not one box for each region, or no numbers.
    """
    path, features = split.folder / f"{split.name}_boxes.npy", split.features
    if not path.exists():
        return None
    shapes = {(int(features.starts[-1]), BOX_NUMBERS): 1}
    if not features.varies:
        for repeats in {1, features.repeats}:
            shapes[len(features) * repeats, features.regions, BOX_NUMBERS] = repeats
    boxes = _load(path, list(shapes))
    if (repeats := shapes[boxes.shape]) > 1:
        boxes = boxes.reshape(len(features), repeats, -1)
        unequal = np.flatnonzero((boxes != boxes[:, :1]).any(axis=(1, 2)))
        if len(unequal):
            raise InputError(f"{path}: rows {repeats * unequal[0]} to {repeats * unequal[0] + 4} differ, one image's")
        boxes = boxes[:, 0]
    return boxes.reshape(-1, BOX_NUMBERS)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of columns, names to the left and figures to the right."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    lines = []
    for name, *figures in (header, *rows):
        aligned = [figure.rjust(width) for figure, width in zip(figures, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *aligned]))
    return "\n".join(lines)


def _load(path: Path, shapes: list[tuple[int, ...]]) -> np.ndarray:
    """An array of finite numbers as float32, of one of some shapes. Nothing longer than fits them is read."""
    largest = max(np.prod(shape) for shape in shapes) * np.dtype(np.float64).itemsize + HEADER_BYTES
    try:
        if os.path.getsize(path) > largest:
            raise ValueError(f"{os.path.getsize(path)} bytes, no more than {largest} are expected")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on odd text in the header; what matters is said in the error
            array = np.load(path, allow_pickle=False)
        if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiu" or array.shape not in shapes:
            found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else "an archive"
            raise ValueError(f"expected float32 {' or '.join(map(str, shapes))}, found {found}")
        array = array.astype(np.float32)
        if not np.isfinite(array).all():
            raise ValueError("NaN or infinite")
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise InputError(f"{path}: no boxes of these features ({reason(error)}); delete it, or make it again") from None
    return array


def _read_lines(path: Path) -> Iterator[str]:
    """Lines of 1 to ID_CHARACTERS printable characters. Raises InputError on others."""
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(iter(lambda: file.readline(4 * ID_CHARACTERS + 2), b""), start=1):
                yield _read_line(path, number, line)
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None


def _read_line(path: Path, number: int, line: bytes) -> str:
    text = line.decode("utf-8-sig" if number == 1 else "utf-8", errors="replace").strip()
    if not 1 <= len(text) <= ID_CHARACTERS or not text.isprintable() or "\ufffd" in text:
        raise InputError(
            f"{path}: line {number} is empty, not UTF-8, or no line of up to {ID_CHARACTERS} printable characters"
        )
    return text
