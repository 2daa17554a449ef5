"""Data sets of region features and captions on disk, in the layout of SCAN ("precomp", Lee et al. 2018).

    DATA_PATH/DATA_NAME/{split}_ims.npy    float32 or float16, images x regions x img_dim
    DATA_PATH/DATA_NAME/{split}_caps.txt   UTF-8, one caption a line, five consecutive lines for each image

GPO keeps the same files in DATA_PATH/precomp/. The files that people download hold dev, test and testall images five
times in a row, one row a caption: both are recognised, and an image is one row here.
"""

import hashlib
import io
import math
import os
import warnings
from codecs import BOM_UTF8
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.lib import format as npy

from lib.errors import InputError, one_line, reason

CAPTIONS_PER_IMAGE = 5

# What is read at most of files that may hold anything
HEADER_BYTES = 16_384  # of a .npy file; NumPy writes 128 and parses no more than 10,000
MOST_REGIONS = 4_096  # of an image
CAPTION_BYTES = 8_192  # of a caption; those of COCO and Flickr30K stay below 500
NAME_BYTES = 200  # of a data set's or split's name

FINGERPRINT_ROWS = 64

HOW_TO_GET_DATA = (
    "usually obtained from the Kaggle data set kuanghueilee/scan-features (see docs/data.md); "
    "`sh train_demo.sh` needs no download: it makes its own data"
)


class FeatureFile:
    """Region features of a split, memory-mapped: only rows that are asked for are read.

    An instance travels to loader workers as a path; each opens the file for itself.
    """

    def __init__(self, path: Path, repeats: int = 1):
        """Open {split}_ims.npy; each image stands `repeats` times in a row. Raises InputError where it is not sound."""
        self.path = path
        self.repeats = repeats
        self._rows = _map_features(path)
        self.images, self.regions, self.img_dim = len(self._rows) // repeats, *self._rows.shape[1:]
        self.dtype = self._rows.dtype

    def __len__(self) -> int:
        return self.images

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None}  # pickling a memory map would copy the whole file

    def read(self, images: np.ndarray) -> np.ndarray:
        """Features (images, regions, img_dim) of some images, in the file's precision. Raises InputError on NaN."""
        if self._rows is None:
            self._rows = _map_features(self.path)
        features = self._rows[np.asarray(images) * self.repeats]
        finite = np.isfinite(features).all(axis=(1, 2))
        if not finite.all():
            row = int(np.asarray(images)[~finite][0]) * self.repeats
            raise InputError(
                f"{self.path}: row {row} holds NaN or infinite features; extract or download the file again"
            )
        return features


@dataclass
class Split:
    """One split of a data set: features of each image, captions, and which image a caption belongs to."""

    name: str
    folder: Path
    features: FeatureFile
    captions: list[str]
    image_of_caption: np.ndarray  # (captions,), ascending

    def fingerprint(self) -> str:
        """16 hex digits that differ where the data does; found without reading all the features.

        SHA-256 of the number of images, regions, img_dim and type, all captions, and 64 evenly spaced images (all
        where there are fewer). Neither the folder, nor the split's name, nor how often the file holds an image
        matters. Raises InputError on NaN.
        """
        features = self.features
        digest = hashlib.sha256(f"{len(features)} {features.regions} {features.img_dim} {features.dtype}\n".encode())
        for caption in self.captions:
            digest.update(f"{caption}\n".encode())
        for image in np.linspace(0, len(features) - 1, min(len(features), FINGERPRINT_ROWS)).astype(int):
            digest.update(features.read(image[None]).tobytes())
        return digest.hexdigest()[:16]


def open_split(data_path: str, data_name: str, split: str, img_dim: int) -> Split:
    """Open a split for reading, checking all that can be checked without reading the features.

    Raises InputError naming the flag or file: a name that leads out of its folder, a file that is missing, truncated
    or not features, wrong feature size, captions that are no captions, or whose number does not fit the images.
    """
    _check_name("--split", split)
    folder = find_folder(data_path, data_name)
    features_path, captions_path = folder / f"{split}_ims.npy", folder / f"{split}_caps.txt"
    for path in (features_path, captions_path):
        if not os.path.isfile(path):
            raise InputError(
                f"{path} is missing: {data_name} needs {features_path.name} and {captions_path.name} there, "
                f"{HOW_TO_GET_DATA}"
            )
    features = FeatureFile(features_path)
    if features.img_dim != img_dim:
        raise InputError(
            f"{features_path}: features of {features.img_dim} numbers, but the model takes --img_dim {img_dim}"
        )
    captions = read_captions(captions_path, most=len(features) * CAPTIONS_PER_IMAGE + 1)  # one more tells of many more
    if len(features) == len(captions) and _holds_each_image_five_times(features):
        features = FeatureFile(features_path, repeats=CAPTIONS_PER_IMAGE)
    if len(features) * CAPTIONS_PER_IMAGE != len(captions):
        raise InputError(
            f"{captions_path}: {_count_lines(captions_path)} captions do not fit the {len(features)} rows of "
            f"{features_path.name}; expected {CAPTIONS_PER_IMAGE} captions for each image"
        )
    return Split(split, folder, features, captions, np.repeat(np.arange(len(features)), CAPTIONS_PER_IMAGE))


def find_folder(data_path: str, data_name: str) -> Path:
    """The data set's folder: DATA_PATH/DATA_NAME (SCAN) or DATA_PATH/precomp (GPO).

    Raises InputError where there is neither, or where the name leads out of DATA_PATH.
    """
    _check_name("--data_name", data_name, nested=True)
    folders = [Path(data_path) / data_name, Path(data_path) / "precomp"]
    for folder in folders:
        if os.path.isdir(folder):
            return folder
    raise InputError(
        f"no data set at {folders[0]} or {folders[1]}: expected there train_ims.npy, train_caps.txt and the same "
        f"for dev and test (COCO: testall), {HOW_TO_GET_DATA}"
    )


def read_captions(path: Path, most: int | None = None) -> list[str]:
    """The captions of a file, one a line, no more than the first `most`; lines end at \\n or \\r\\n only.

    A byte-order mark before the first caption is dropped, and so is a \\r at the file's very end, where it was cut.
    Raises InputError on bad UTF-8, NUL, a line that is empty or longer than CAPTION_BYTES, or no line at all.
    """
    try:
        with open(path, "rb") as file:
            captions = [_caption(path, *line) for line in islice(enumerate(_lines(file), start=1), most)]
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({reason(error)})") from None
    if not captions:
        raise InputError(f"{path}: no captions in it")
    return captions


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


def _count_lines(path: Path) -> int:
    """Lines of a file of any size, with lines of any length."""
    count, end = 0, b"\n"
    with open(path, "rb") as file:
        while block := file.read(2**20):
            count, end = count + block.count(b"\n"), block[-1:]
    return count + (end != b"\n")


def _check_name(flag: str, name: str, nested: bool = False) -> None:
    """Refuse what is no plain name below a folder, such as "../other" or "/etc"; nested: "coco/precomp" is one too."""
    parts = Path(name).parts if isinstance(name, str) and name.isprintable() else ()
    stays = bool(parts) and ".." not in parts and not Path(name).anchor and (nested or name == parts[0])
    if not stays or len(os.fsencode(name)) > NAME_BYTES:
        below = " below --data_path" if nested else ""
        raise InputError(
            f"{flag} {one_line(str(name))!r}: must be a plain name{below}, without '..', no absolute path, "
            f"at most {NAME_BYTES} bytes"
        )


def _map_features(path: Path) -> np.memmap:
    """Map a file into memory once its header has been found to say what the file holds."""
    try:
        shape, fortran_order, dtype, offset, size = _read_header(path)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise InputError(f"{path}: truncated or not a .npy file ({reason(error)}); copy or download it again") from None
    if len(shape) != 3 or dtype not in (np.float32, np.float16) or min(shape) < 1 or shape[1] > MOST_REGIONS:
        raise InputError(
            f"{path}: expected float32 or float16 of shape (images, regions, img_dim), at most {MOST_REGIONS} regions, "
            f"found {one_line(f'{dtype} {shape}')}"
        )
    expected = offset + math.prod(shape) * dtype.itemsize
    if size != expected:
        raise InputError(
            f"{path}: {'truncated' if size < expected else 'more in it than its header says'}, {size} bytes instead of "
            f"{expected}; copy or download it again"
        )
    return np.memmap(path, dtype, "r", offset, shape, "F" if fortran_order else "C")


def _read_header(path: Path) -> tuple[tuple[int, ...], bool, np.dtype, int, int]:
    """Shape, whether in Fortran order, type, where the data starts, and the file's size; raises whatever NumPy does.

    NumPy's own `np.load` would read a header of any length, up to 4 GB, before it refuses it.
    """
    with open(path, "rb") as file:
        head, size = io.BytesIO(file.read(HEADER_BYTES)), os.fstat(file.fileno()).st_size
    version = npy.read_magic(head)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} of the format, expected 1.0 or 2.0")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on odd text in it; what matters is said in the error
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        return *read(head), head.tell(), size


def _holds_each_image_five_times(features: FeatureFile) -> bool:
    """Whether rows come in equal groups of five; looks at the first, middle and last group."""
    groups, rest = divmod(len(features), CAPTIONS_PER_IMAGE)
    if rest:
        return False
    for group in (0, groups // 2, groups - 1):
        rows = features.read(group * CAPTIONS_PER_IMAGE + np.arange(CAPTIONS_PER_IMAGE))
        if not (rows == rows[:1]).all():
            return False
    return True
